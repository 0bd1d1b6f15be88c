// What each metric, rule and cause means: a dialog with all definitions, which opens at one of them. Where there is a server, each definition has a link
// to its place in the documentation, which opens in a tab of its own so that the view is kept.

import { element } from "./charts.js";

export class Help {
  constructor() {
    this.list = element("div", { className: "definitions" });
    const close = element("button", { type: "button", className: "close", textContent: "×", ariaLabel: "close the definitions" });
    close.addEventListener("click", () => this.element.close());
    this.element = element("dialog", { className: "help" }, close, element("h2", { textContent: "What the words mean" }), this.list);
    this.element.setAttribute("aria-label", "Definitions of metrics, rules and causes");
    this.element.addEventListener("click", (event) => {
      if (event.target === this.element) this.element.close();
    });
  }

  // `links`: where each word is explained, by `<kind> <name>`; empty where there is no server.
  fill({ metrics, rules, causes, links }) {
    if (this.list.children.length) return;
    const entry = (kind, name, title, says) => {
      const word = `${kind} ${name}`;
      const more = links[word] ? element("a", { textContent: "more", target: "_blank", rel: "noopener", ariaLabel: `more on ${title}` }) : null;
      if (more) more.dataset.page = links[word];
      const made = element("div", { className: "definition" }, element("dt", { textContent: title }), element("dd", {}, says, more ? " " : null, more));
      made.dataset.name = word;
      return made;
    };
    const titles = new Map(metrics.map((metric) => [metric.name, metric.title]));
    const groups = Map.groupBy(metrics, (metric) => metric.group);
    for (const [group, members] of groups) {
      this.list.append(element("h3", { textContent: `Metrics: ${group}` }), element("dl", {}, ...members.map((metric) => entry("metric", metric.name, metric.title, metric.says))));
    }
    this.list.append(
      element("h3", { textContent: "Rules" }),
      element("dl", {}, ...rules.map((rule) => entry("rule", rule.rule, rule.rule, `${rule.says} Shown by: ${titles.get(rule.metric)}.`))),
      element("h3", { textContent: "Causes" }),
      element("dl", {}, ...causes.map((cause) => entry("cause", cause.cause, `${cause.cause}: ${cause.title}`, cause.says))),
    );
    if (!Object.keys(links).length) this.list.append(element("p", { className: "aside", textContent: "More: docs/metrics.md on metrics and docs/alerts.md on rules and causes, in the repository." }));
  }

  // A button with a question mark that opens the dialog at one definition.
  button(kind, name) {
    const made = element("button", { type: "button", className: "ask", textContent: "?", ariaLabel: `what ${name} means` });
    made.addEventListener("click", (event) => {
      event.preventDefault();
      this.open(kind, name);
    });
    return made;
  }

  open(kind, name) {
    // The page has the theme that the view has now.
    const theme = this.element.closest(".dark") ? "dark" : "light";
    this.list.querySelectorAll("a[data-page]").forEach((each) => (each.href = `./${each.dataset.page.replace("#", `?theme=${theme}#`)}`));
    this.element.showModal();
    const wanted = [...this.list.querySelectorAll(".definition")];
    wanted.forEach((each) => each.classList.toggle("asked", each.dataset.name === `${kind} ${name}`));
    wanted.find((each) => each.classList.contains("asked"))?.scrollIntoView({ block: "center" });
  }
}
