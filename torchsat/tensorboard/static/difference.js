// The difference of two runs, as a grid of its own and the metric that draws it.

import { Grid } from "./source.js";

// One grid less another, over the sites that both have. At each step of the first one the last value of the other one counts. On a logarithmic scale
// it is the logarithm of the ratio, in powers of ten.
export function difference(one, other, metric) {
  const names = one.names.filter((name) => other.column.has(name));
  const values = new Float32Array(one.steps.length * names.length);
  const scaled = metric.scale === "log" ? (value) => Math.log10(value) : (value) => value;
  let most = 0;
  one.steps.forEach((step, row) => {
    const there = other.steps.length && other.steps[0] <= step ? other.row(step) : -1;
    names.forEach((name, place) => {
      const found = there < 0 ? NaN : scaled(one.at(row, one.column.get(name))) - scaled(other.at(there, other.column.get(name)));
      values[row * names.length + place] = found;
      if (Number.isFinite(found)) most = Math.max(most, Math.abs(found));
    });
  });
  const span = metric.scale === "log" ? Math.max(0.1, most) : metric.form === "number" ? most || 1 : Math.max(0.05, most);
  const says = metric.scale === "log" ? "The power of ten of the ratio of the two." : "The first less the second.";
  const drawn = { ...metric, form: metric.form === "share" ? "share" : "number", scale: "linear", low: -span, high: span, worst: null, ramp: "balance", reversed: false, says };
  return { grid: new Grid(names, one.steps, values), metric: { ...drawn, title: `${metric.title}, difference` } };
}
