// The mixtures of experts: which part of the tokens the router of each sends to which expert, over time.

import { foldedTable, cardOf, runHeading } from "./card.js";
import { bands, element } from "./charts.js";
import { number } from "./numbers.js";
import { Grid } from "./source.js";

const ROUTING = ["dead", "busiest", "entropy", "margin"]; // the numbers of a mixture that are told
const MOST_DRAWN = 6; // so many mixtures of a run are drawn, the least balanced ones; the others are in the table

// What the source has of the mixtures of a run, as `mixturesOf` takes it.
export async function loadMixtures(source, run) {
  const mixtures = await source.json("experts", { run });
  return mixtures.length ? { mixtures, routing: await source.grid("routing", { run }) } : { mixtures };
}

// The section with the mixtures of some runs, each as `mixturesOf` takes it.
export function expertsSection(runs) {
  const says = "A row is one expert, and its colour the part of the tokens that it gets, on a logarithmic scale. An expert that gets less than a twentieth of an even part has nearly the colour of the page.";
  return cardOf("Mixtures of experts", says, runs.flatMap((given) => mixturesOf(given)));
}

// The mixtures of one run. given:
//   line, mixtures     the name and the colour of the run, and [{site, k, experts}] of its mixtures
//   routing            what is known of each of them over time (view.routing)
//   step, latest       the step that is shown, and whether it is the last one
//   from, to           the steps that are zoomed in on; null: all
//   colours, ink       the ramp of the shares, and the colour of the mark at the step
//   print, hover       the printer, and what is called with the step under the pointer
function mixturesOf(given) {
  const { line, mixtures, routing, step } = given;
  if (!mixtures.length || !routing.steps.length) return [];
  const row = routing.row(step);
  const told = mixtures.map((mixture) => ({ ...mixture, ...Object.fromEntries(ROUTING.map((name) => [name, routing.at(row, routing.column.get(`${mixture.site}/${name}`))])) }));
  const worst = [...told].sort((one, other) => concentration(other) - concentration(one)).slice(0, MOST_DRAWN);
  const figures = element("div", { className: "charts" }, ...worst.map((mixture) => overTime(given, mixture)));
  return [runHeading(line, routing.steps[row], given.latest), figures, mixtureRows(told)];
}

// The parts of the experts of one mixture over time.
function overTime({ routing, from, to, step, latest, colours, ink, print, hover }, mixture) {
  const { site, k, experts } = mixture;
  const names = Array.from({ length: experts }, (_, expert) => String(expert));
  const columns = names.map((expert) => routing.column.get(`${site}/${expert}`));
  const values = Float32Array.from(Array.from(routing.steps, (_, row) => columns.map((column) => routing.at(row, column))).flat());
  const grid = new Grid(names, routing.steps, values);
  const [xLow, xHigh] = [from ?? routing.steps[0], to ?? routing.steps[routing.steps.length - 1]];
  const label = (at, expert, value) => `step ${at}, expert ${expert}: ${Number.isNaN(value) ? "not measured" : `${print.percent(value)} of the tokens, ${number((value * experts) / k)} times an even part`}`;
  const title = `${site}: ${balanceOf(mixture)}`;
  return bands({ title, grid, colours, label, ends: [`expert ${experts - 1}`, "expert 0"], scale: "log", low: (0.05 * k) / experts, xLow, xHigh, at: latest ? undefined : step, ink, hover });
}

// How far the busiest expert is on its way from an even part, 0, to every token, 1 (Experts.concentration in experts.py).
function concentration({ busiest, experts, k }) {
  return experts > k ? (busiest - 1) / (experts / k - 1) || 0 : 0;
}

// What is known of one mixture at the step that is shown.
function balanceOf({ experts, k, dead, busiest }) {
  const asleep = Number.isNaN(dead) ? "too few tokens to tell which are dead" : `${dead} dead`;
  return `${experts} experts, ${k} for each token; ${asleep}; the busiest gets ${number(busiest)} times an even part`;
}

// The same numbers as a table, of all mixtures.
function mixtureRows(told) {
  const shown = (value) => (Number.isNaN(value) ? "not known" : number(value));
  const rows = told.map(({ site, experts, k, ...numbers }) => element("tr", {}, ...[site, experts, k, ...ROUTING.map((name) => shown(numbers[name]))].map((text) => element("td", { textContent: text }))));
  return foldedTable(["mixture", "experts", "for each token", "dead", "busiest / even", "entropy", "margin"], rows);
}
