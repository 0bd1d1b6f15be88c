// The mixtures of experts: which part of the tokens the router of each sends to which expert, over time.

import { bands, element } from "./charts.js";
import { number } from "./numbers.js";
import { Grid } from "./source.js";

const ROUTING = ["dead", "busiest", "entropy", "margin"]; // the numbers of a mixture that are told
const MOST_DRAWN = 6; // so many mixtures of a run are drawn, the least balanced ones; the others are in the table

// What the source has of the mixtures of a run, as `mixturesOf` takes it.
export async function loadMixtures(source, run) {
  const mixtures = await source.json("experts", { run });
  if (!mixtures.length) return { mixtures };
  const [loads, ...found] = await Promise.all([source.grid("loads", { run }), ...ROUTING.map((metric) => source.grid("routing", { run, metric }))]);
  return { mixtures, loads, routing: Object.fromEntries(ROUTING.map((metric, index) => [metric, found[index]])) };
}

// The section with the mixtures of some runs, each as `mixturesOf` takes it.
export function expertsSection(runs) {
  const made = runs.flatMap((given) => mixturesOf(given));
  const says = "A row is one expert, and its colour the part of the tokens that it gets, on a logarithmic scale. An expert that gets less than a twentieth of an even part has nearly the colour of the page.";
  return made.length ? [element("h2", { textContent: "Mixtures of experts" }), element("p", { className: "aside", textContent: says }), ...made] : [];
}

// The mixtures of one run. given:
//   line, mixtures     the name and the colour of the run, and [{site, k, experts}] of its mixtures
//   loads, routing     the part of the tokens of each expert of each mixture, one after another, and the grids of ROUTING by name
//   step, latest       the step that is shown, and whether it is the last one
//   from, to           the steps that are zoomed in on; null: all
//   colours, ink       the ramp of the shares, and the colour of the mark at the step
//   print, hover       the printer, and what is called with the step under the pointer
function mixturesOf(given) {
  const { line, mixtures, loads, routing, step } = given;
  if (!mixtures.length || !loads.steps.length) return [];
  const dot = element("i", { className: "dot" });
  dot.style.background = line.colour;
  const row = loads.row(step);
  let first = 0;
  const told = mixtures.map((mixture) => {
    const at = (name) => routing[name].at(routing[name].row(step), routing[name].column.get(mixture.site));
    const found = { ...mixture, first, ...Object.fromEntries(ROUTING.map((name) => [name, at(name)])) };
    first += mixture.experts;
    return found;
  });
  const worst = [...told].sort((one, other) => concentration(other) - concentration(one) || one.first - other.first).slice(0, MOST_DRAWN);
  const figures = element("div", { className: "charts" }, ...worst.map((mixture) => overTime(given, mixture)));
  return [element("h3", {}, dot, ` ${line.name}, step ${loads.steps[row]}${given.latest ? " (latest)" : ""}`), figures, mixtureRows(told)];
}

// The parts of the experts of one mixture over time.
function overTime({ loads, from, to, step, latest, colours, ink, print, hover }, mixture) {
  const { site, k, experts, first } = mixture;
  const values = new Float32Array(loads.steps.length * experts);
  for (let row = 0; row < loads.steps.length; row++) for (let expert = 0; expert < experts; expert++) values[row * experts + expert] = loads.at(row, first + expert);
  const grid = new Grid(Array.from({ length: experts }, (_, expert) => String(expert)), loads.steps, values);
  const [xLow, xHigh] = [from ?? loads.steps[0], to ?? loads.steps[loads.steps.length - 1]];
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
  const names = ["mixture", "experts", "for each token", "dead", "busiest / even", "entropy", "margin"];
  const head = element("tr", {}, ...names.map((text) => element("th", { textContent: text, scope: "col" })));
  return element("details", { className: "rows-of-card" }, element("summary", { textContent: "As a table" }), element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)));
}
