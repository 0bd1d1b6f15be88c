// Alerts as text: a table of all alerts, and those of one site with their causes and remedies.

import { element } from "./charts.js";
import { copyButton } from "./export.js";
import { titled } from "./frame.js";
import { shownName } from "./source.js";

const CODE = "    "; // what stands before each line of code in a remedy (record.py)

const MOST_OPEN = 3; // so many alerts are listed at once; more are folded at first, as are those that the verdict has told

// The list of the alerts of all runs shown, the worst first, which can be folded. `rows` are [run, alert]; `choose(run, alert)` is called with the alert that
// was clicked, `help` is the dialog of definitions, `isTold` is whether the verdict above says all of them, and `open` is whether the user has unfolded the
// list; null: not touched yet.
export function alertTable({ rows, several, choose, help, causes, about, isTold, open }) {
  const urgency = ([, alert]) => (alert.cleared === null ? 0 : 4) + (alert.rule === "nonfinite" ? 0 : alert.severity === "critical" ? 1 : 2);
  const ordered = [...rows].sort((one, other) => urgency(one) - urgency(other) || one[1].since - other[1].since);
  const made = ordered.map(([run, alert]) => {
    const link = element("button", { type: "button", className: "link", textContent: titledIn(about.get(run), alert.site), disabled: !alert.places.length });
    link.addEventListener("click", () => choose(run, alert));
    const more = alert.also.length ? ` and ${alert.also.length} more` : "";
    const [first] = alert.causes;
    return element(
      "tr",
      {},
      element("td", { className: alert.severity, textContent: alert.severity }),
      several ? element("td", { textContent: shownName(run) }) : null,
      element("td", {}, link, more),
      element("td", {}, alert.rule, help.button("rule", alert.rule)),
      element("td", { textContent: `since step ${alert.since}, ${ended(alert)}` }),
      element("td", {}, first ? (causes[first.name] ?? first.name) : "", first && first.name in causes ? help.button("cause", first.name) : null),
    );
  });
  if (!made.length) return [];
  const heads = ["severity", ...(several ? ["run"] : []), "site", "rule", "when", "first cause"].map((text) => element("th", { scope: "col", textContent: text }));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...made));
  const summary = element("summary", {}, element("h2", { textContent: `Alerts (${rows.length})` }), ` ${counted(rows.map(([, alert]) => alert))}`);
  return [element("details", { open: open ?? (!isTold && rows.length <= MOST_OPEN) }, summary, table)];
}

// How many alerts there are of each kind, in words.
function counted(alerts) {
  const fire = (severity) => alerts.filter((alert) => alert.cleared === null && alert.severity === severity).length;
  const parts = [[fire("critical"), "critical"], [fire("warning"), fire("warning") === 1 ? "warning" : "warnings"], [alerts.filter((alert) => alert.cleared !== null).length, "over"]];
  return parts.filter(([count]) => count).map(([count, word]) => `${count} ${word}`).join(", ");
}

// The alerts of one site: what is wrong, since when, why and with which shares of the blame, what to try. `choose(site)` is called when another place is
// clicked.
export function alertArticles({ alerts, site, print, help, choose, causes: titles }) {
  const found = alerts.filter((alert) => alert.places.includes(site) || alert.also.includes(site));
  const asked = (cause) => (cause in titles ? help.button("cause", cause) : null);
  return found.map((alert) => {
    const title = element("b", { className: alert.severity, textContent: `${alert.severity}: ${alert.rule}` });
    const head = element("p", {}, title, help.button("rule", alert.rule), ` since step ${alert.since}, raised at step ${alert.fired}, ${ended(alert)}`);
    const causes = alert.causes.map((cause) => {
      const several = alert.causes.length > 1;
      const bar = element("div", { className: "share-of-blame", hidden: !several });
      bar.style.width = `${Math.round(100 * cause.share)}%`;
      return element(
        "li",
        {},
        element("div", {}, element("b", { textContent: titles[cause.name] ?? cause.name }), ` ${cause.name}`, asked(cause.name), several ? ` ${print.percent(cause.share)} of the cause` : ""),
        bar,
        element("div", { textContent: cause.evidence }),
        remedy(cause.remedy),
      );
    });
    const origin = alert.places.includes(site) ? null : element("p", { textContent: `It began at ${alert.site}; this site suffers from the same.` });
    return element("article", { className: `alert ${alert.severity}` }, head, origin, element("p", { textContent: alert.message }), causes.length ? element("ol", {}, ...causes) : null, others(alert.also, choose));
  });
}

// The name of a site of a run for people.
function titledIn(about, site) {
  const fact = about?.sites.find((each) => each.site === site);
  return fact ? titled(fact) : site;
}

// The lines of code of a remedy, without what they are indented by; empty where there are none.
function codeOf(text) {
  return text.split("\n").filter((line) => line.startsWith(CODE)).map((line) => line.slice(CODE.length)).join("\n");
}

// A remedy: its sentence, and its code with a button that copies it.
function remedy(text) {
  const code = codeOf(text);
  const sentence = text.split("\n").filter((line) => !line.startsWith(CODE)).join(" ");
  const lines = code ? element("pre", { textContent: code, tabIndex: 0 }) : null;
  return element("div", { className: "remedy" }, element("b", { textContent: "Try: " }), `${sentence} `, copyButton(code || sentence), lines);
}

// The other places that suffer, folded. A click on one opens it.
function others(names, choose) {
  if (!names.length) return null;
  const summary = element("summary", { textContent: `Also ${names.length} more place${names.length > 1 ? "s" : ""}` });
  const links = names.map((name) => {
    const made = element("button", { type: "button", className: "link", textContent: name });
    made.addEventListener("click", () => choose(name));
    return element("li", {}, made);
  });
  return element("details", {}, summary, element("ul", {}, ...links));
}

// How an alert ended.
function ended(alert) {
  if (alert.cleared === null) return "still firing";
  return alert.gone ? `its place is gone after step ${alert.cleared}` : `cleared at step ${alert.cleared}`;
}
