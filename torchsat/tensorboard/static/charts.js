// Small pictures: numbers, scales, line charts, and the histogram over time. Names are only ever set as text.

const SVG = "http://www.w3.org/2000/svg";

// Okabe and Ito (2008): eight colours that colour-blind eyes tell apart, in an order that suits light and dark pages.
export const LINES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#b8a800"];

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function drawn(tag, attributes = {}, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

export function percent(share) {
  const points = 100 * share;
  if (points < 0) return `−${percent(-share)}`.replace("−< ", "> −");
  if (points > 0 && points < 0.1) return "< 0.1 %";
  if (points < 100 && points > 99.9) return "> 99.9 %";
  return `${points < 10 || points > 90 ? points.toFixed(1) : points.toFixed(0)} %`;
}

export function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(3)));
}

export function printed(metric, value) {
  if (Number.isNaN(value) || value === undefined || value === null) return "not measured";
  return metric.form === "share" ? percent(value) : number(value);
}

// A number as a share of the way from `low` to `high`, which may lie outside [0, 1].
export function along(scale, value, low, high) {
  if (scale === "log") {
    [value, low, high] = [value, low, high].map((each) => Math.log10(Math.max(each, 1e-300)));
  }
  return high > low ? (value - low) / (high - low) : 0;
}

export function ticks(scale, low, high, most = 5) {
  if (scale === "log") {
    const first = Math.ceil(Math.log10(low) - 1e-9);
    const last = Math.floor(Math.log10(high) + 1e-9);
    const stride = Math.max(1, Math.ceil((last - first + 1) / most));
    const found = [];
    for (let power = first; power <= last; power += stride) found.push(Number(`1e${power}`));
    if (found.length > 1) return found;
    return [low, high];
  }
  const rough = (high - low) / most;
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const stride = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
  const found = [];
  for (let at = Math.ceil(low / stride - 1e-9) * stride; at <= high + stride * 1e-9; at += stride) found.push(Number(at.toPrecision(12)));
  return found;
}

export function short(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return value.toExponential(0).replace("e+", "e");
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
  if (size !== 0 && size < 1e-3) return value.toExponential(0).replace("e-", "e−");
  return String(Number(value.toPrecision(4)));
}

// The ends of a scale: those of the metric, or those between which all but the last half per cent of the numbers lie on either side, so that one
// outlier does not make the rest one colour.
export function range(metric, values) {
  if (metric.low !== null && metric.high !== null) return [metric.low, metric.high];
  const known = Float64Array.from(values).filter((value) => Number.isFinite(value) && (metric.scale !== "log" || value > 0)).sort();
  if (!known.length) return metric.scale === "log" ? [1e-6, 1] : [0, 1];
  const spared = Math.floor(known.length / 200);
  const [low, high] = [known[spared], known[known.length - 1 - spared]];
  if (metric.scale === "log") {
    const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high) + 1e-9)];
    return [10 ** first, 10 ** Math.max(first + 1, last)];
  }
  return low === high ? [low - 0.5, high + 0.5] : [low, high];
}

// A line chart: each series is {name, colour, dash, points: [[x, y], ...]}; a point without a finite y is a gap. The values under the pointer
// are written beside the names.
export function lines({ title, series, scale, low, high, xLow, xHigh, at, form, xName = "step", xLabel, width = 340, height = 120, limit }) {
  const [left, right, top, bottom] = [44, 8, 6, 20];
  const x = (value) => left + (width - left - right) * (xHigh > xLow ? (value - xLow) / (xHigh - xLow) : 0.5);
  const y = (value) => top + (height - top - bottom) * (1 - Math.min(1, Math.max(0, along(scale, value, low, high))));
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, class: "lines", role: "img", "aria-label": title });
  for (const tick of ticks(scale, low, high, 4)) {
    svg.append(drawn("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), class: "rule" }));
    svg.append(drawn("text", { x: left - 4, y: y(tick) + 3, class: "tick", "text-anchor": "end" }, short(tick)));
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
  const values = new Map();
  const legend = element("div", { className: "legend" });
  for (const each of series) {
    let path = "";
    let pen = "M";
    let alone = true;
    for (const [px, py] of each.points) {
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
      value.textContent = nearest === null ? "" : ` ${printed({ form }, nearest[1])} (${xName} ${xLabel ? xLabel(nearest[0]) : nearest[0]})`;
    }
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    read(xLow + (((event.clientX - box.left) / box.width) * width - left) / (width - left - right) * (xHigh - xLow));
  });
  svg.addEventListener("pointerleave", () => values.forEach((value) => (value.textContent = "")));
  return element("figure", { className: "chart" }, element("figcaption", { textContent: title }), svg, legend);
}

// Shares over time as a picture: rows are bins from the bottom, the x axis is that of the curves. Colours are those of the scale from `low` to 1.
export function bands({ title, grid, colours, label, ends, scale, low, xLow, xHigh, at, ink }) {
  const [count, bins, width] = [grid.steps.length, grid.names.length, 600];
  const end = count > 1 ? 2 * grid.steps[count - 1] - grid.steps[count - 2] : grid.steps[0] + 1;
  const last = Math.max(xHigh, end);
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
      pen.fillStyle = colours[Math.round(255 * Math.min(1, Math.max(0, along(scale, value, low, 1))))];
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
    const step = xLow + ((event.clientX - box.left) / box.width) * (last - xLow);
    const bin = Math.min(bins - 1, Math.max(0, bins - 1 - Math.floor(((event.clientY - box.top) / box.height) * bins)));
    const row = grid.row(step);
    readout.textContent = step >= grid.steps[0] && step < end ? label(grid.steps[row], bin, grid.at(row, bin)) : "";
  });
  canvas.addEventListener("pointerleave", () => (readout.textContent = ""));
  const axis = element("div", { className: "ends" }, ...ends.map((text) => element("span", { textContent: text })));
  const steps = [xLow, last].map((step) => element("span", { textContent: `step ${step}` }));
  return element(
    "figure",
    { className: "chart" },
    element("figcaption", { textContent: title }),
    element("div", { className: "framed" }, axis, canvas),
    element("div", { className: "span" }, ...steps),
    readout,
  );
}
