// What surrounds the cells of a heatmap: the names of the sites, the x axis, and the marks of alerts. `map` is the Heatmap, `pen` that of its canvas.

import { short, ticks } from "./numbers.js";

export const FONT = "11px system-ui, sans-serif";
export const TOP = 8; // CSS pixels above the first row
export const RIGHT = 18; // the room behind the cells, for the dots of alerts that still fire

const logarithm = (step) => Math.log1p(Math.max(0, step));

// The x axes. `edges` gives for n observations n + 1 positions: observation i lies between the positions i and i + 1. `at` gives the position of a step
// of a grid, and `step` is its inverse.
export const AXES = {
  step: { title: "step", edges: (steps) => edges(Array.from(steps)), at: (step) => step, step: (at) => at },
  log: { title: "step, log", edges: (steps) => edges(Array.from(steps)).map(logarithm), at: (step) => logarithm(step), step: (at) => Math.expm1(at) },
  observation: {
    title: "observation",
    edges: (steps) => Array.from({ length: steps.length + 1 }, (_, index) => index),
    at: (step, grid) => (step > grid.steps[grid.steps.length - 1] ? grid.steps.length : grid.row(step)),
    step: (at, grid) => grid.steps[Math.min(grid.steps.length - 1, Math.max(0, Math.floor(at)))],
  },
};

// The steps, and one more: the last observation is as long as the one before it.
function edges(steps) {
  const count = steps.length;
  const last = count > 1 ? steps[count - 1] - steps[count - 2] : 1;
  return [...steps, steps[count - 1] + last];
}

// The names of the sites, as many as there is room for. The chosen site is always named.
export function drawNames(pen, map) {
  const { sites, facts, chosen, theme } = map.given;
  const [every, own] = [Math.ceil(13 / map.row), sites.indexOf(chosen)];
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  sites.forEach((site, place) => {
    if (place % every && site !== chosen) return;
    if (site !== chosen && own >= 0 && Math.abs(place - own) < every) return;
    const after = aside(facts.get(site));
    pen.fillStyle = site === chosen ? theme.accent : after ? theme.faint : theme.ink;
    pen.font = site === chosen ? `bold ${FONT}` : FONT;
    pen.fillText(shortened(pen, titled(facts.get(site) ?? { site }) + after, map.left - 10), map.left - 6, TOP + (place + 0.5) * map.row);
  });
  pen.font = FONT;
}

// The x axis.
export function drawAxis(pen, map) {
  const { theme, axis, sites } = map.given;
  const [start, end] = map.domain;
  const y = TOP + map.row * sites.length;
  pen.fillStyle = theme.faint;
  pen.strokeStyle = theme.faint;
  pen.textBaseline = "top";
  const places = axis === "log" ? powers(start, end) : ticks("linear", start, end, 6).filter(Number.isInteger).map((at) => [at, at]);
  let written = -Infinity; // the right end of the last label, so that none overlaps another
  for (const [at, value] of places) {
    const x = map.left + (map.plot * (at - start)) / (end - start);
    pen.fillRect(Math.round(x), y, 1, 4);
    const right = x > map.left + map.plot - 30;
    const width = pen.measureText(short(value)).width;
    const from = right ? x - width : x - width / 2;
    if (from < written + 6) continue;
    pen.textAlign = right ? "right" : "center";
    pen.fillText(short(value), x, y + 6);
    written = from + width;
  }
  pen.textAlign = "right";
  pen.fillText(AXES[axis].title, map.left - 18, y + 6); // the label of the first tick begins left of the picture
}

// The marks of alerts: a triangle where one was raised, a line while it fires, a square where it cleared, a dot at the end of the row if it still fires.
export function drawAlerts(pen, map) {
  const { alerts, sites, theme, grid, row } = map.given;
  if (!grid.steps.length) return;
  const within = (x) => Math.min(map.left + map.plot, Math.max(map.left, x));
  const end = within(map.left + (map.plot * (map.edges[map.edges.length - 1] - map.domain[0])) / (map.domain[1] - map.domain[0]));
  for (const alert of alerts) {
    const colour = alert.severity === "critical" ? theme.critical : theme.warning;
    for (const name of new Set(alert.places.map((site) => row.get(site)))) {
      const place = sites.indexOf(name);
      if (place < 0) continue;
      const y = TOP + (place + 0.5) * map.row;
      const raised = map.place(alert.fired) ?? map.left;
      const from = within(raised);
      const over = alert.cleared === null ? end : (map.place(alert.cleared) ?? end);
      const to = within(over);
      if (to <= map.left || from >= map.left + map.plot) continue;
      const bottom = Math.round(TOP + (place + 1) * map.row) - 1;
      if (map.row >= 8) {
        pen.fillStyle = theme.page;
        pen.fillRect(from, bottom - 2, to - from, 3);
        pen.fillStyle = colour;
        pen.fillRect(from, bottom - 1, to - from, 2);
      }
      // The fill has the colour of the page and the outline that of the alert, so that the mark is visible on every colour of the ramp.
      const size = Math.min(5.5, Math.max(3, map.row / 2 + 1));
      pen.lineWidth = 2;
      pen.strokeStyle = colour;
      pen.fillStyle = theme.page;
      if (raised === from) {
        pen.beginPath();
        pen.moveTo(from, y - size);
        pen.lineTo(from + 1.6 * size, y);
        pen.lineTo(from, y + size);
        pen.closePath();
        pen.stroke();
        pen.fill();
      }
      pen.beginPath();
      if (alert.cleared === null) {
        pen.fillStyle = colour;
        pen.arc(map.left + map.plot + 9, y, 4, 0, 7);
        pen.fill();
      } else if (over === to) {
        pen.rect(to - 3.5, y - 3.5, 7, 7);
        pen.fillStyle = theme.page;
        pen.fill();
        pen.strokeStyle = colour;
        pen.lineWidth = 2;
        pen.stroke();
      }
    }
  }
  // Places that suffer from a fault that began elsewhere have a hollow dot.
  for (const alert of alerts.filter((each) => each.cleared === null)) {
    pen.strokeStyle = alert.severity === "critical" ? theme.critical : theme.warning;
    for (const name of new Set(alert.also.map((site) => row.get(site)))) {
      const place = sites.indexOf(name);
      if (place < 0 || alert.places.some((site) => row.get(site) === name)) continue;
      pen.lineWidth = 1.5;
      pen.beginPath();
      pen.arc(map.left + map.plot + 9, TOP + (place + 0.5) * map.row, Math.min(3.5, map.row / 2), 0, 7);
      pen.stroke();
    }
  }
  pen.lineWidth = 1;
}

// The name of a site for people. In an nn.Sequential a name such as `1` says nothing by itself.
export function titled(fact) {
  return /^\d+$/.test(fact.site.split(".").pop()) && fact.activation && !fact.members ? `${fact.site} · ${fact.activation}` : fact.site;
}

// What stands behind the name of a site.
export function aside(fact) {
  return fact?.members ? ` (${fact.activation})` : fact?.output ? " (output)" : fact?.gate ? " (gate)" : "";
}

// A name cut to a width in pixels. It is cut at its beginning, since its end says more.
function shortened(pen, text, width) {
  if (pen.measureText(text).width <= width) return text;
  let [low, high] = [0, text.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (pen.measureText(`…${text.slice(middle)}`).width <= width) high = middle;
    else low = middle + 1;
  }
  return `…${text.slice(low)}`;
}

// The powers of ten on a logarithmic axis, as [position, step]; step 0 too.
function powers(start, end) {
  const found = start <= 0 ? [[0, 0]] : [];
  for (let value = 1; Math.log1p(value) <= end; value *= 10) if (Math.log1p(value) >= start) found.push([Math.log1p(value), value]);
  return found;
}
