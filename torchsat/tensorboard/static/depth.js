// The depth profile: one metric of every site at one step, from the first site to the last.

import { element, lines } from "./charts.js";

// The section with the profile. `runs` are {name, colour, grid, sites}, `open` is the site that is marked; `choose(step)` is called when the slider
// moves.
export function depthProfile({ runs, metric, low, high, step, open, print, choose }) {
  const steps = [...new Set(runs.flatMap(({ grid }) => Array.from(grid.steps)))].sort((one, other) => one - other);
  const names = merged(runs.map(({ sites }) => sites));
  const place = new Map(names.map((name, index) => [name, index]));
  const series = runs.filter(({ grid }) => grid.steps.length && grid.steps[0] <= step).map(({ name, colour, grid, sites }) => {
    const row = grid.row(step);
    const points = sites.map((site) => [place.get(site), grid.at(row, grid.column.get(site))]);
    points.sort((one, other) => one[0] - other[0]);
    const then = grid.steps[row] === step ? "" : `, step ${grid.steps[row]}`;
    return { name: name + then, colour, points };
  });
  const slider = element("input", { type: "range", min: 0, max: Math.max(0, steps.length - 1), step: 1 });
  slider.value = String(Math.max(0, steps.findLastIndex((each) => each <= step)));
  slider.dataset.control = "step";
  slider.setAttribute("aria-label", "step of the depth profile");
  const said = element("output", { textContent: `step ${step}` });
  slider.addEventListener("input", () => {
    said.textContent = `step ${steps[slider.value]}`;
  });
  slider.addEventListener("change", () => choose(steps[slider.value]));
  const chart = names.length
    ? lines({
        title: `${metric.title} by depth: from the first site to the last`,
        series,
        scale: metric.scale,
        low,
        high,
        xLow: 0,
        xHigh: Math.max(1, names.length - 1),
        form: metric.form,
        print,
        xName: "site",
        xLabel: (index) => names[index] ?? "",
        at: place.get(open),
        width: 680,
        height: 170,
      })
    : element("p", { textContent: "No site is shown." });
  return { nodes: [element("h2", { textContent: "Depth profile" }), element("label", { className: "slider" }, slider, said), chart], slider };
}

// Merges lists of names into one, in the order of the longest list. A name that only a shorter list has stands behind the name before it there.
function merged(lists) {
  const [first = [], ...others] = [...lists].sort((one, other) => other.length - one.length);
  const names = [...first];
  const known = new Set(names);
  for (const list of others) {
    let after = 0;
    for (const name of list) {
      if (known.has(name)) after = names.indexOf(name) + 1;
      else {
        names.splice(after++, 0, name);
        known.add(name);
      }
    }
  }
  return names;
}
