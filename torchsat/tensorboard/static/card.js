// What the cards about whole runs have in common: the ledger of the gradient, and the mixtures of experts.

import { element } from "./charts.js";

// The content of a card: its title and what it says, and below them what is there of the runs; nothing where there is nothing.
export function cardOf(title, says, made) {
  return made.length ? [element("h2", { textContent: title }), element("p", { className: "aside", textContent: says }), ...made] : [];
}

// The name of a run in its colour, and the step that is shown of it.
export function runHeading(line, step, latest) {
  const dot = element("i", { className: "dot" });
  dot.style.background = line.colour;
  return element("h3", {}, dot, ` ${line.name}, step ${step}${latest ? " (latest)" : ""}`);
}

// The numbers of a picture as a table, which a keyboard and a screen reader reach too.
export function foldedTable(titles, rows) {
  const head = element("tr", {}, ...titles.map((text) => element("th", { textContent: text, scope: "col" })));
  return element("details", { className: "rows-of-card" }, element("summary", { textContent: "As a table" }), element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)));
}
