// Alerts as text: a table of all alerts, and those of one site with their causes and remedies.

import { element } from "./charts.js";
import { shownName } from "./source.js";

// The section with the alerts of all runs shown. `rows` are [run, alert]; `choose(run, site, step)` is called with the alert that was clicked.
export function alertTable({ rows, several, print, choose }) {
  const made = rows.map(([run, alert]) => {
    const site = alert.places[0] ?? null;
    const open = element("button", { type: "button", className: "link", textContent: alert.site, disabled: site === null });
    open.addEventListener("click", () => choose(run, site, alert.fired));
    return element(
      "tr",
      {},
      element("td", { className: alert.severity, textContent: alert.severity }),
      several ? element("td", { textContent: shownName(run) }) : null,
      element("td", {}, open),
      element("td", { textContent: alert.rule }),
      element("td", { textContent: `since ${alert.since}, ${ended(alert, "")}` }),
      element("td", { textContent: alert.causes.length ? `${alert.causes[0].name} ${print.percent(alert.causes[0].share)}` : "" }),
    );
  });
  const heads = ["", ...(several ? ["run"] : []), "site", "rule", "steps", "first cause"].map((text) => element("th", { textContent: text }));
  return [
    element("h2", { textContent: `Alerts (${rows.length})` }),
    rows.length
      ? element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...made))
      : element("p", { textContent: "No alert was raised in the runs shown." }),
    element("p", { className: "aside", textContent: "A click on a row of a heatmap, or Enter on it, opens a site: its derivatives over time, its curves, its alerts with causes and remedies." }),
  ];
}

// The alerts of one site: what is wrong, since when, why and with which shares of the blame, what to try.
export function alertArticles({ alerts, site, print }) {
  const found = alerts.filter((alert) => alert.places.includes(site) || alert.also.includes(site));
  return found.map((alert) => {
    const head = element("p", {}, element("b", { className: alert.severity, textContent: `${alert.severity}: ${alert.rule}` }), ` since step ${alert.since}, raised at step ${alert.fired}, ${ended(alert, "step ")}`);
    const causes = alert.causes.map((cause) => {
      const bar = element("span", { className: "share-of-blame" });
      bar.style.width = `${Math.round(100 * cause.share)}%`;
      return element(
        "li",
        {},
        element("div", { className: "blame" }, bar, element("b", { textContent: `${cause.name} ${print.percent(cause.share)}` })),
        element("div", { textContent: cause.evidence }),
        element("div", { className: "remedy" }, element("b", { textContent: "Try: " }), cause.remedy),
      );
    });
    const origin = alert.places.includes(site) ? null : element("p", { textContent: `It began at ${alert.site}; this site suffers from the same.` });
    const also = alert.also.length ? element("p", { textContent: `Also: ${listed(alert.also)}` }) : null;
    return element("article", { className: `alert ${alert.severity}` }, head, origin, element("p", { textContent: alert.message }), causes.length ? element("ol", {}, ...causes) : null, also);
  });
}

// The first names of a list, and how many more there are.
function listed(names) {
  const most = 12;
  return names.slice(0, most).join(", ") + (names.length > most ? ` and ${names.length - most} more` : "");
}

// How an alert ended. `word` stands before the number of the step.
function ended(alert, word) {
  if (alert.cleared === null) return "still firing";
  return alert.gone ? `its place is gone after ${word}${alert.cleared}` : `cleared at ${word}${alert.cleared}`;
}
