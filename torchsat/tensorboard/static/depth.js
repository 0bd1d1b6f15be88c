// The depth profile: one metric of every site at one step, from the first site to the last. Runs of other sites have a chart of their own.

import { element, lines } from "./charts.js";
import { titled } from "./frame.js";

// The section with the profile. `runs` are {name, colour, dash, grid, sites}, `open` is the site that is marked; `choose(step)` is called when the
// slider moves, with null at its right end, which means the latest step. `width`: of the charts, in pixels.
export function depthProfile({ runs, metric, low, high, step, latest, open, print, choose, width }) {
  const steps = [...new Set(runs.flatMap(({ grid }) => Array.from(grid.steps)))].sort((one, other) => one - other);
  const slider = element("input", { type: "range", min: 0, max: Math.max(0, steps.length - 1), step: 1 });
  slider.value = String(Math.max(0, steps.findLastIndex((each) => each <= step)));
  slider.dataset.control = "step";
  slider.setAttribute("aria-label", "step of the depth profile");
  const said = element("output");
  const charts = element("div", { className: "profiles" });
  const show = (at, isLatest) => {
    said.textContent = `step ${at}${isLatest ? " (latest)" : ""}`;
    slider.setAttribute("aria-valuetext", said.textContent);
    charts.replaceChildren(...profiles({ runs, metric, low, high, step: at, open, print, width }));
  };
  const isEnd = () => Number(slider.value) === steps.length - 1;
  slider.addEventListener("input", () => show(steps[slider.value], isEnd()));
  slider.addEventListener("change", () => choose(isEnd() ? null : steps[slider.value]));
  const back = element("button", { type: "button", textContent: "latest", hidden: latest, title: "show the latest step again" });
  back.addEventListener("click", () => choose(null));
  show(step, latest);
  return [element("h2", { textContent: "Depth profile" }), element("label", { className: "slider" }, slider, said, back), charts];
}

function profiles({ runs, metric, low, high, step, open, print, width }) {
  const alike = new Map(); // runs by their sites
  for (const run of runs.filter(({ sites }) => sites.length)) {
    const key = run.sites.join("\n");
    alike.set(key, [...(alike.get(key) ?? []), run]);
  }
  if (!alike.size) return [element("p", { textContent: "No site is shown." })];
  return [...alike.values()].flatMap((group) => {
    const { sites: names } = group[0];
    const place = new Map(names.map((name, index) => [name, index]));
    const series = group.filter(({ grid }) => grid.steps.length && grid.steps[0] <= step).flatMap(({ name, colour, dash, grid, facts }) => {
      const row = grid.row(step);
      const then = grid.steps[row] === step ? "" : `, step ${grid.steps[row]}`;
      // Softmaxes have a line of their own: joined with the activations between them they would make a saw.
      const kinds = Map.groupBy(names.entries(), ([, site]) => facts.get(site)?.kind === "softmax");
      return [...kinds].map(([softmax, entries]) => {
        const points = entries.map(([index, site]) => {
          const value = grid.at(row, grid.column.get(site));
          return [index, Math.abs(value) === Infinity ? (metric.worst === "low" ? low : high) : value];
        });
        const kind = kinds.size > 1 ? (softmax ? ", softmaxes" : ", activations") : "";
        return { name: name + kind + then, colour, dash: softmax && kinds.size > 1 ? "2 3" : dash, points };
      });
    });
    if (!series.length) return [];
    const title = `${metric.title} by depth${alike.size > 1 ? ` of ${group.map(({ name }) => name).join(", ")}` : ""}: from the first site to the last`;
    const words = names.map((site) => new Set(group.map(({ facts }) => titled(facts.get(site)))));
    const shown = names.map((site, index) => (words[index].size === 1 ? [...words[index]][0] : site)); // runs may differ in the activation of a site
    const axis = { xLow: 0, xHigh: Math.max(1, names.length - 1), xName: "site", xLabel: (index) => shown[Math.round(index)] ?? "" };
    return [lines({ title, series, scale: metric.scale, low, high, ...axis, form: metric.form, print, at: place.get(open), width, height: 170 })];
  });
}
