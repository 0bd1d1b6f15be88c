// What each metric and each rule means: a dialog with all definitions, which opens at one of them.

import { element } from "./charts.js";

export class Help {
  constructor() {
    this.list = element("div", { className: "definitions" });
    const close = element("button", { type: "button", className: "close", textContent: "×", ariaLabel: "close the definitions" });
    close.addEventListener("click", () => this.element.close());
    this.element = element("dialog", { className: "help" }, close, element("h2", { textContent: "What the words mean" }), this.list);
    this.element.setAttribute("aria-label", "Definitions of metrics and rules");
    this.element.addEventListener("click", (event) => {
      if (event.target === this.element) this.element.close();
    });
  }

  fill({ metrics, rules }) {
    if (this.list.children.length) return;
    const entry = (kind, name, title, says) => {
      const made = element("div", { className: "definition" }, element("dt", { textContent: title }), element("dd", { textContent: says }));
      made.dataset.name = `${kind} ${name}`;
      return made;
    };
    const titles = new Map(metrics.map((metric) => [metric.name, metric.title]));
    this.list.append(
      element("h3", { textContent: "Metrics" }),
      element("dl", {}, ...metrics.map((metric) => entry("metric", metric.name, metric.title, metric.says))),
      element("h3", { textContent: "Rules" }),
      element("dl", {}, ...rules.map((rule) => entry("rule", rule.rule, rule.rule, `${rule.says} Shown by: ${titles.get(rule.metric)}.`))),
      element("p", { className: "aside", textContent: "More: docs/saturation.md on metrics and docs/alerts.md on rules, in the repository." }),
    );
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
    this.element.showModal();
    const wanted = [...this.list.querySelectorAll(".definition")];
    wanted.forEach((each) => each.classList.toggle("asked", each.dataset.name === `${kind} ${name}`));
    wanted.find((each) => each.classList.contains("asked"))?.scrollIntoView({ block: "center" });
  }
}
