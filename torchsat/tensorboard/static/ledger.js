// The ledger of the gradient: how each part of a model changes the norm of the gradient on its way from the output to the input, as a waterfall. A bar
// reaches from the norm at the output of a part to the norm at its input. A click on a residual join or a gated product shows its branches below; a
// click on a part that is a site opens the site.

import { foldedTable, cardOf, runHeading } from "./card.js";
import { LINES, drawn, element, lines } from "./charts.js";
import { along, number, range, short, ticks } from "./numbers.js";
import { readable } from "./palette.js";

const ENTRY_NAMES = { layer: "layers", activation: "activations", norm: "norms", join: "residual joins", gate: "gated products", attention: "attention", step: "steps in time", other: "other parts" };
const ENTRY_TINTS = { layer: LINES[0], activation: LINES[1], norm: LINES[2], join: LINES[3], gate: LINES[4], attention: LINES[5], step: LINES[3], other: "#8a8a8a" };
const DEEP = 190;
const [WIDEST, LABELLED] = [120, 70]; // pixels: the most that a bar takes, and what it needs to be named below
const [EDGE, END, ABOVE_BARS, BELOW_BARS] = [52, 8, 8, 22]; // pixels around the bars

// The section with the ledgers of some runs, each as `ledgerOf` takes it.
export function ledgerSection(runs) {
  const made = runs.flatMap((given) => ledgerOf(given));
  const says = "The norm of the gradient on its way from the output of the model (left) to its input (right). A bar is one part. Click a residual join to see its branches, or a site to open it.";
  return cardOf("Where the gradient goes", says, made);
}

// The ledger of one run. given:
//   line, entries, grids  the name and the colour of the run, the facts of its entries, and the grids of their numbers by name
//   step, latest          the step that is shown, and whether it is the last one
//   open                  the places of the joins and gates that are unfolded
//   sites                 the names of the sites of the run
//   unfold, choose        are called with the place of a join or gate, and with that of a site
//   width, theme, print   the width of the charts in pixels, the colours of the page, and the printer
function ledgerOf(given) {
  const { line, entries, grids, step, open } = given;
  if (!entries.length || !grids.norm.steps.length) return [];
  const row = grids.norm.row(step);
  const at = (metric, place) => grids[metric].at(row, grids[metric].column.get(place));
  const parts = entries.map((entry) => ({ ...entry, before: at("norm", entry.place), factor: at("factor", entry.place), branch: at("branch", entry.place) }));
  const known = parts.filter(({ before }) => before > 0);
  const shown = grids.norm.steps[row];
  const title = runHeading(line, shown, given.latest);
  if (!known.length) return [title, element("p", { textContent: `No gradient was heard at step ${shown}.` })];
  const spine = known.filter(({ level }) => level === 0);
  const made = [title, waterfall(given, spine, wholeWay(spine), spine[0].before)];
  for (const place of open) {
    const inside = known.filter(({ parent }) => parent === place);
    const join = known.find((entry) => entry.place === place);
    if (inside.length && join) made.push(waterfall(given, inside, `Branches of ${place}: the gradient arrives from the left, at 1${said(join)}`, join.before));
  }
  return [...made, ...sizes(given, parts, at), asRows(given, known)];
}

// The factors of the spine in words.
function wholeWay(spine) {
  const whole = spine.reduce((product, { factor }) => product * factor, 1);
  return `From the output to the input the norm changes by a factor of ${Number.isNaN(whole) ? "unknown size" : number(whole)}`;
}

// What is known of a join beside its factor.
function said({ branch, kind }) {
  return kind === "join" && !Number.isNaN(branch) ? `; by its branches comes ${number(branch)} of what comes by the skip connection` : "";
}

function describe(part, start) {
  const after = part.before * part.factor;
  const factor = Number.isNaN(part.factor) ? "no gradient was heard behind it" : `× ${number(part.factor)}, which leaves ${number(after / start)}`;
  return `${part.place} (${part.kind}): ${factor}${said(part)}`;
}

// One waterfall: bars between the norm before and behind each part, in units of the norm with which it starts.
function waterfall({ width, theme, sites, unfold, choose, open }, parts, title, start) {
  const ends = parts.flatMap(({ before, factor }) => [before / start, (before * factor) / start]).filter((value) => value > 0 && Number.isFinite(value));
  const [low, high] = [Math.min(0.5, ...ends) / 1.2, Math.max(2, ...ends) * 1.2];
  const room = Math.min(WIDEST, (width - EDGE - END) / parts.length);
  const y = (value) => ABOVE_BARS + (DEEP - ABOVE_BARS - BELOW_BARS) * (1 - Math.min(1, Math.max(0, along("log", value, low, high))));
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${DEEP}`, class: "lines waterfall", role: "img", "aria-label": title });
  for (const tick of roundNumbers(low, high)) {
    svg.append(drawn("line", { x1: EDGE, x2: width - END, y1: y(tick), y2: y(tick), class: "rule" }));
    svg.append(drawn("text", { x: EDGE - 4, y: y(tick) + 3, class: "tick", "text-anchor": "end" }, short(tick)));
  }
  svg.append(drawn("line", { x1: EDGE, x2: width - END, y1: y(1), y2: y(1), class: "limit" }));
  if (room < LABELLED) {
    svg.append(drawn("text", { x: EDGE, y: DEEP - 6, class: "tick" }, "output"));
    svg.append(drawn("text", { x: width - END, y: DEEP - 6, class: "tick", "text-anchor": "end" }, "input"));
  }
  const readout = element("output", { className: "readout" });
  parts.forEach((part, index) => {
    const [from, to] = [y(part.before / start), y(Number.isNaN(part.factor) ? part.before / start : Math.max((part.before * part.factor) / start, low / 2))];
    const x = EDGE + index * room;
    const acts = isOpenable(part) || sites.has(part.place);
    const bar = drawn("g", { class: `bar-of-part${acts ? " acts" : ""}${open.has(part.place) ? " open" : ""}` });
    bar.append(drawn("rect", { x, y: ABOVE_BARS, width: room, height: DEEP - ABOVE_BARS - BELOW_BARS, class: "catch" }));
    bar.append(drawn("rect", { x: x + Math.min(1, room / 6), y: Math.min(from, to), width: Math.max(1, room - Math.min(2, room / 3)), height: Math.max(1.5, Math.abs(to - from)), fill: readable(ENTRY_TINTS[part.kind], theme.page) }));
    if (index + 1 < parts.length) bar.append(drawn("line", { x1: x, x2: x + 2 * room, y1: to, y2: to, class: "step-line" }));
    bar.append(drawn("title", {}, describe(part, start)));
    if (room >= LABELLED) bar.append(drawn("text", { x: x + room / 2, y: DEEP - 6, class: "tick", "text-anchor": "middle" }, endOf(part.place, room / 6)));
    bar.addEventListener("pointerenter", () => (readout.textContent = describe(part, start)));
    if (acts) bar.addEventListener("click", () => (isOpenable(part) ? unfold(part.place) : choose(part.place)));
    svg.append(bar);
  });
  svg.addEventListener("pointerleave", () => (readout.textContent = ""));
  return element("figure", { className: "chart" }, element("figcaption", {}, title), svg, totals(parts, theme), readout);
}

// Round numbers for a logarithmic axis. Where it spans little, they are 1, 2 and 5 times the powers of ten.
function roundNumbers(low, high) {
  if (high > 50 * low) return ticks("log", low, high, 5);
  const powers = ticks("log", 10 ** Math.floor(Math.log10(low)), 10 ** Math.ceil(Math.log10(high)), 20);
  return powers.flatMap((power) => [power, 2 * power, 5 * power]).filter((value) => value >= low && value <= high);
}

// The end of a name, as much as there is room for.
function endOf(name, most) {
  return name.length <= most ? name : `…${name.slice(1 - most)}`;
}

function isOpenable({ kind }) {
  return kind === "join" || kind === "gate";
}

// The product of the factors of each kind, with its colour.
function totals(parts, theme) {
  const legend = element("div", { className: "legend" });
  for (const [kind, each] of Map.groupBy(parts, (part) => part.kind)) {
    const key = element("i", { className: "key" });
    key.style.borderTopColor = readable(ENTRY_TINTS[kind], theme.page);
    const product = each.reduce((whole, { factor }) => whole * factor, 1);
    legend.append(element("span", {}, key, `${ENTRY_NAMES[kind]} (${each.length}) × ${Number.isNaN(product) ? "?" : number(product)}`));
  }
  return legend;
}

// The inputs of the norms by depth, from the first to the last: their root mean square, and their largest value.
function sizes({ width, theme, print }, parts, at) {
  const norms = parts.filter(({ place, kind }) => kind === "norm" && at("input_rms", place) > 0).reverse();
  if (norms.length < 2) return [];
  const series = [["root mean square", "input_rms", LINES[0], ""], ["largest |x|", "input_top", LINES[1], "4 3"]].map(([name, metric, tint, dash]) => ({
    name,
    colour: readable(tint, theme.page),
    dash,
    points: norms.map(({ place }, index) => [index, at(metric, place)]),
  }));
  const [low, high] = range({ scale: "log", low: null, high: null }, series.flatMap(({ points }) => points.map(([, value]) => value)));
  const axis = { xLow: 0, xHigh: norms.length - 1, xName: "norm", xLabel: (index) => norms[Math.round(index)]?.place ?? "" };
  const title = "Size of the inputs of the norms by depth, from the first to the last. In a transformer that is the residual stream";
  return [lines({ title, series, scale: "log", low, high, ...axis, form: "number", print, width, height: 120 })];
}

// The same numbers as a table.
function asRows({ sites, unfold, choose, open }, parts) {
  const rows = parts.map((part) => {
    const acts = isOpenable(part) || sites.has(part.place);
    const name = acts ? element("button", { type: "button", className: "link", textContent: part.place }) : part.place;
    if (acts) name.addEventListener("click", () => (isOpenable(part) ? unfold(part.place) : choose(part.place)));
    if (acts && isOpenable(part)) name.setAttribute("aria-expanded", String(open.has(part.place)));
    const cell = element("td", {}, name);
    cell.style.paddingLeft = `${part.level}em`;
    const values = [part.kind, Number.isNaN(part.factor) ? "not known" : number(part.factor), part.kind !== "join" || Number.isNaN(part.branch) ? "" : number(part.branch)];
    return element("tr", {}, cell, ...values.map((text) => element("td", { textContent: text })));
  });
  return foldedTable(["part", "is", "factor", "branch / skip"], rows);
}
