// One site in detail: its facts, alerts, figures at one step, and its numbers over time, compared with the same site of other runs.

import { alertArticles } from "./alerts.js";
import { LINES, bands, element, lines } from "./charts.js";
import { titled } from "./frame.js";
import { number, range } from "./numbers.js";
import { readable } from "./palette.js";
import { shownName } from "./source.js";

// The metrics that get a chart of their own, if they were measured.
const CURVES = ["relative_derivative", "attenuation", "grad_z_rms", "update_ratio", "z_std", "entropy_min", "logit_std"];

// The section. given:
//   run, about, fact   the run's name and description (Series.describe in view.py), and the facts of the site
//   own, spread        the site's metrics over time, and its histogram; of a softmax, the entropies of its heads
//   compared           [{name, colour, dash, grid}]: the same metrics in each run shown that has the site, this run among them
//   from, to           the steps that are zoomed in on; null: all
//   step, at           the step of the figures, and the chosen step; undefined if none is chosen
//   scales, shade      the scales, and "light" or "dark"
//   causes             the names of causes in words
//   theme, print       the colours of the page, and the printer
//   help, hover        the dialog of definitions, and what is called with the step under the pointer
//   choose             is called with the name of another site that is clicked
//   close              is called when the user closes the section
export function siteDetail(given) {
  const { about, fact, spread, compared, at, print, help, hover, from, to } = given;
  const steps = compared.flatMap(({ grid }) => [grid.steps[0], grid.steps[grid.steps.length - 1]]).filter((step) => step !== undefined);
  const axis = { xLow: from ?? Math.min(...steps), xHigh: to ?? Math.max(...steps), at, print, hover };
  const charts = element("div", { className: "charts" });
  if (spread.steps.length) charts.append(fact.kind === "softmax" ? headsOverTime(given, axis) : histogramOverTime(given, axis));
  charts.append(...curves(given, axis));
  return [factsOf(given), ...alertArticles({ alerts: about.alerts, site: fact.site, print, help, causes: given.causes, choose: given.choose }), figures(given), charts];
}

function factsOf({ run, about, fact, close }) {
  const role = fact.output ? ", makes an output of the model" : fact.gate ? ", a gate of another signal" : "";
  const fed = about.layers.filter((layer) => layer.feeds.includes(fact.site)).map((layer) => layer.titled);
  const button = element("button", { type: "button", className: "close", textContent: "×", title: "close", ariaLabel: "close the section of this site" });
  button.addEventListener("click", close);
  const text = `${fact.activation}${role}${fact.units ? `, ${fact.units} units` : ""}${fed.length ? `, fed by ${fed.join(", ")}` : ""}, in ${shownName(run)}`;
  return element("div", { className: "facts" }, button, element("h2", { textContent: titled(fact) }), element("p", { textContent: text }));
}

// Every metric of the site at one step.
function figures({ own, fact, step, scales, print, help }) {
  const row = own.row(step);
  const cells = scales.metrics
    .map((metric) => [metric, own.at(row, own.column.get(metric.name))])
    .filter(([metric, value]) => !Number.isNaN(value) && (value !== 0 || !metric.name.endsWith("nonfinite")))
    .map(([metric, value]) => element("div", { title: metric.says }, element("span", {}, metric.title, help.button("metric", metric.name)), element("b", { textContent: print.value(metric, value) })));
  const normal = fact.normal_derivative === null ? "" : ` On N(0, 1) inputs ${fact.activation} has E|f'| / peak ${number(fact.normal_derivative)} and ${print.percent(fact.normal_saturated)} saturated.`;
  return element("div", { className: "figures" }, element("p", { textContent: `At step ${own.steps[row]}.${normal}` }), element("div", { className: "cells" }, ...cells));
}

function histogramOverTime({ spread, scales, shade, theme: { accent }, print }, axis) {
  const edge = (bin) => number(scales.histogram_edges[bin]);
  const label = (step, bin, value) => `step ${step}, |f'| / peak from ${edge(bin)} to ${edge(bin + 1)}: ${Number.isNaN(value) ? "not measured" : print.percent(value)}`;
  return bands({ title: "|f'| / peak over time: share of elements, log scales", grid: spread, colours: scales.ramps.amount[shade], label, ends: ["1", "0"], scale: "log", low: 1e-4, ink: accent, ...axis });
}

function headsOverTime({ spread, scales, shade, theme: { accent } }, axis) {
  const label = (step, head, value) => `step ${step}, head ${head}: ${Number.isNaN(value) ? "not measured" : number(value)}`;
  const colours = [...scales.ramps.heat[shade]].reverse();
  return bands({ title: "Entropy of each head over time: 1 even, 0 one key", grid: spread, colours, label, ends: [`head ${spread.names.length - 1}`, "head 0"], scale: "linear", low: 0, ink: accent, ...axis });
}

// The saturated share, then the metrics of CURVES. Several runs are compared by one line each; of one run the parts of the saturated share are shown.
function curves({ own, fact, compared, scales, theme, help }, axis) {
  const made = [];
  if (own.points("saturated").some(([, value]) => !Number.isNaN(value))) {
    const series = compared.length > 1
      ? compared.map(({ name, colour, dash, grid }) => ({ name, colour, dash, points: grid.points("saturated") }))
      : [["saturated", LINES[0]], ["low", LINES[5]], ["high", LINES[1]], ["stuck", LINES[3]]].map(([name, tint], index) => ({ name: name === "stuck" ? "stuck units" : name, colour: readable(tint, theme.page), dash: index ? "4 3" : "", points: own.points(name) }));
    made.push(lines({ ...axis, title: "Saturated share", ask: help.button("metric", "saturated"), series, scale: "linear", low: 0, high: 1, form: "share" }));
  }
  for (const name of CURVES) {
    const metric = scales.metrics.find((each) => each.name === name);
    const series = compared.map((each) => ({ name: each.name, colour: each.colour, dash: each.dash, points: each.grid.points(name) }));
    const values = series.flatMap((each) => each.points.map(([, value]) => value)).filter((value) => Number.isFinite(value) && (metric.scale !== "log" || value > 0));
    if (!values.length) continue;
    let [low, high] = metric.ramp === "heat" && metric.scale === "linear" ? [metric.low, metric.high] : range({ ...metric, low: null, high: null }, values);
    if (name === "attenuation") high = Math.max(1, high);
    const limit = name === "relative_derivative" ? fact.normal_derivative : undefined;
    const title = metric.title + (limit ? " (dashed: on N(0, 1) inputs)" : "");
    made.push(lines({ ...axis, title, ask: help.button("metric", name), series, scale: metric.scale, low, high, form: metric.form, limit }));
  }
  return made;
}
