// Small charts: lines, and shares over time as a picture. Names are set as text, never as HTML.

import { along, level, short, ticks } from "./numbers.js";

const SVG = "http://www.w3.org/2000/svg";

// Colours of Okabe and Ito (2008), which colour-blind eyes tell apart, for the parts of one number.
export const LINES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];

// A new HTML element with properties or attributes and children. Children that are null are left out.
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// A new SVG element.
export function drawn(tag, attributes = {}, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// A line chart. Each series is {name, colour, dash, points: [[x, y], ...]}; a point without a finite y is a gap. `at` is an x that is marked, `limit`
// a y that is marked, `form` that of a metric. The values under the pointer are written beside the names, by `print`. Where x is a step, `hover(step)` is
// called when the pointer moves, and the figure has a function `cross(step)` that marks one, so that all charts can mark the same step.
export function lines({ title, ask, series, scale, low, high, xLow, xHigh, at, form, print, hover, xName = "step", xLabel, width = 340, height = 120, limit }) {
  const [left, right, top, bottom] = [form === "level" ? 52 : 44, 8, 6, 20];
  const x = (value) => left + (width - left - right) * (xHigh > xLow ? (value - xLow) / (xHigh - xLow) : 0.5);
  const y = (value) => top + (height - top - bottom) * (1 - Math.min(1, Math.max(0, along(scale, value, low, high))));
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, class: "lines", role: "img", "aria-label": title });
  for (const tick of form === "level" ? [0, 0.5, 1] : ticks(scale, low, high, 4)) {
    svg.append(drawn("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), class: "rule" }));
    svg.append(drawn("text", { x: left - 4, y: y(tick) + 3, class: "tick", "text-anchor": "end" }, form === "level" ? level(tick) : short(tick)));
  }
  for (const tick of ticks("linear", xLow, xHigh, 4).filter((each) => Number.isInteger(each))) {
    const anchor = x(tick) > width - 24 ? "end" : "middle";
    svg.append(drawn("text", { x: x(tick), y: height - 6, class: "tick", "text-anchor": anchor }, xLabel ? xLabel(tick) : short(tick)));
  }
  if (limit !== undefined && limit !== null) {
    svg.append(drawn("line", { x1: left, x2: width - right, y1: y(limit), y2: y(limit), class: "limit" }));
  }
  if (at !== undefined && at >= xLow && at <= xHigh) {
    svg.append(drawn("line", { x1: x(at), x2: x(at), y1: top, y2: height - bottom, class: "cursor" }));
  }
  const cross = drawn("line", { x1: 0, x2: 0, y1: top, y2: height - bottom, class: "cross", visibility: "hidden" });
  svg.append(cross);
  const values = new Map();
  const legend = element("div", { className: "legend" });
  for (const each of series) {
    let path = "";
    let pen = "M";
    let alone = true;
    for (const [px, py] of each.points) {
      if (px < xLow || px > xHigh) continue;
      if (!Number.isFinite(py) || (scale === "log" && py <= 0)) {
        pen = "M";
        continue;
      }
      alone = alone && path === "";
      path += `${pen}${x(px).toFixed(1)} ${y(py).toFixed(1)}`;
      pen = "L";
      if (alone) svg.append(drawn("circle", { cx: x(px), cy: y(py), r: 1.6, fill: each.colour }));
    }
    svg.append(drawn("path", { d: path, stroke: each.colour, class: "series", "stroke-dasharray": each.dash ?? "" }));
    const value = element("output");
    values.set(each, value);
    const key = element("i", { className: "key" });
    key.style.borderTopColor = each.colour;
    key.style.borderTopStyle = each.dash ? "dashed" : "solid";
    legend.append(element("span", {}, key, element("span", { textContent: each.name }), value));
  }
  const read = (px) => {
    for (const [each, value] of values) {
      let nearest = null;
      for (const point of each.points) if (nearest === null || Math.abs(point[0] - px) < Math.abs(nearest[0] - px)) nearest = point;
      value.textContent = nearest === null ? "" : ` ${print.value({ form }, nearest[1])} (${xName} ${xLabel ? xLabel(nearest[0]) : nearest[0]})`;
    }
  };
  const under = (event) => {
    const box = svg.getBoundingClientRect();
    return xLow + ((((event.clientX - box.left) / box.width) * width - left) / (width - left - right)) * (xHigh - xLow);
  };
  svg.addEventListener("pointermove", (event) => {
    if (hover) hover(under(event));
    else figure.cross(under(event));
  });
  svg.addEventListener("pointerleave", () => (hover ? hover(null) : figure.cross(null)));
  const figure = element("figure", { className: "chart" }, element("figcaption", {}, title, ask ?? null), svg, legend);
  if (hover) figure.classList.add("crossed");
  // Show the values at a position, and a line there; null: hide them.
  figure.cross = (px) => {
    const inside = px !== null && px >= xLow && px <= xHigh;
    cross.setAttribute("visibility", inside ? "visible" : "hidden");
    if (inside) {
      cross.setAttribute("x1", x(px));
      cross.setAttribute("x2", x(px));
      read(px);
    } else values.forEach((value) => (value.textContent = ""));
  };
  return figure;
}

// Shares over time as a picture. The rows are the columns of the grid, the first one at the bottom. The x axis is that of the line charts. The
// colours span the scale from `low` to 1. `label(step, row, value)` is the text for what is under the pointer, `ends` are the texts at the top and
// the bottom.
export function bands({ title, ask, grid, colours, label, ends, scale, low, xLow, xHigh, at, ink, hover }) {
  const [count, bins, width] = [grid.steps.length, grid.names.length, 600];
  const end = count > 1 ? 2 * grid.steps[count - 1] - grid.steps[count - 2] : grid.steps[0] + 1;
  const last = xHigh >= grid.steps[count - 1] ? Math.max(xHigh, end) : xHigh;
  const x = (step) => Math.round((width * (step - xLow)) / Math.max(1e-9, last - xLow));
  const canvas = element("canvas", { width, height: Math.max(1, 2 * bins), className: "bands" });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", title);
  const pen = canvas.getContext("2d");
  for (let row = 0; row < count; row++) {
    const [from, to] = [x(grid.steps[row]), x(row + 1 < count ? grid.steps[row + 1] : end)];
    for (let bin = 0; bin < bins; bin++) {
      const value = grid.at(row, bin);
      if (Number.isNaN(value)) continue;
      pen.fillStyle = colours[Math.round((colours.length - 1) * Math.min(1, Math.max(0, along(scale, value, low, 1))))];
      pen.fillRect(from, 2 * (bins - 1 - bin), Math.max(1, to - from), 2);
    }
  }
  if (at !== undefined) {
    pen.fillStyle = ink;
    for (let y = 0; y < 2 * bins; y += 8) pen.fillRect(x(at), y, 2, 4);
  }
  const readout = element("output", { className: "readout" });
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    if (hover) hover(xLow + ((event.clientX - box.left) / box.width) * (last - xLow));
    const step = xLow + ((event.clientX - box.left) / box.width) * (last - xLow);
    const bin = Math.min(bins - 1, Math.max(0, bins - 1 - Math.floor(((event.clientY - box.top) / box.height) * bins)));
    const row = grid.row(step);
    readout.textContent = step >= grid.steps[0] && step < end ? label(grid.steps[row], bin, grid.at(row, bin)) : "";
  });
  canvas.addEventListener("pointerleave", () => {
    readout.textContent = "";
    if (hover) hover(null);
  });
  const axis = element("div", { className: "ends" }, ...ends.map((text) => element("span", { textContent: text })));
  const steps = [xLow, last].map((step) => element("span", { textContent: `step ${Math.round(step)}` }));
  const line = element("i", { className: "crossing", hidden: true });
  const figure = element(
    "figure",
    { className: "chart crossed" },
    element("figcaption", {}, title, ask ?? null),
    element("div", { className: "framed" }, axis, element("div", { className: "under" }, canvas, line)),
    element("div", { className: "span" }, ...steps),
    readout,
  );
  figure.cross = (step) => {
    line.hidden = step === null || step < xLow || step > last;
    if (!line.hidden) line.style.left = `${(100 * (step - xLow)) / (last - xLow)}%`;
  };
  return figure;
}
