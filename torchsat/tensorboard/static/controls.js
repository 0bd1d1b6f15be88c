// The controls above the heatmaps: metric, runs, order, x axis, filter, kinds of sites, and the key of the colours.

import { KINDS, ORDERS } from "./address.js";
import { element } from "./charts.js";
import { AXES } from "./frame.js";
import { along, short, ticks } from "./numbers.js";
import { shownName } from "./source.js";

export class Controls {
  // `change(values)` is called with what the user has chosen, as a part of the view.
  constructor(filter, change) {
    this.change = change;
    this.choices = element("div", { className: "group" });
    this.aside = element("div", { className: "group" });
    // The field for the filter is never replaced, so that somebody who types in it is not interrupted.
    this.filter = element("input", { type: "search", value: filter, placeholder: "part of a name", size: 16 });
    this.filter.dataset.control = "filter";
    this.filter.addEventListener("input", () => this.change({ filter: this.filter.value }));
    const field = element("label", {}, element("span", { textContent: "Sites" }), this.filter);
    this.element = element("header", { className: "controls" }, this.choices, field, this.aside);
  }

  // Show what is chosen. given: {view, runs (all), about (the chosen ones, by name), metrics, metric, colours, low, high}. The control that has the
  // focus keeps it, though most are replaced.
  fill(given) {
    const focused = document.activeElement?.dataset?.control;
    const { view, about, metrics, metric } = given;
    const present = new Set([...about.values()].flatMap((each) => each.metrics));
    const offered = metrics.filter((each) => present.has(each.name) || each === metric);
    this.choices.replaceChildren(
      this.select("metric", "Metric", offered.map((each) => [each.name, each.title]), metric.name),
      this.runs(given),
      this.select("order", "Order", Object.entries(ORDERS), view.order),
      this.select("axis", "x axis", Object.entries(AXES).map(([key, axis]) => [key, axis.title]), view.axis),
    );
    if (this.filter.value !== view.filter) this.filter.value = view.filter;
    this.aside.replaceChildren(...[this.kinds(given), legend(given)].filter(Boolean));
    if (focused) this.element.querySelector(`[data-control="${focused}"]`)?.focus();
  }

  select(name, title, options, value) {
    const made = element("select", { title }, ...options.map(([key, text]) => element("option", { value: key, textContent: text, selected: key === value })));
    made.dataset.control = name;
    made.addEventListener("change", () => this.change({ [name]: made.value }));
    return element("label", {}, element("span", { textContent: title }), made);
  }

  // A check box for each run.
  runs({ runs, about }) {
    const open = this.element.querySelector("details")?.open ?? false;
    const boxes = runs.map((run) => {
      const box = element("input", { type: "checkbox", checked: about.has(run.name) });
      box.dataset.control = `run ${run.name.replace(/["\\]/g, "\\$&")}`;
      box.addEventListener("change", () => {
        const chosen = new Set(about.keys());
        if (box.checked) chosen.add(run.name);
        else chosen.delete(run.name);
        this.change({ runs: [...chosen] });
      });
      const aside = element("small", { textContent: ` ${run.sites} sites` });
      return element("label", {}, box, element("span", { textContent: shownName(run.name) }), aside);
    });
    const made = element("details", { className: "runs", open }, element("summary", { textContent: `Runs: ${about.size} of ${runs.length}` }), element("div", {}, ...boxes));
    made.querySelector("summary").dataset.control = "runs";
    return made;
  }

  // A check box for each kind of site; null if all sites are of the same kind.
  kinds({ view, about }) {
    const there = new Set([...about.values()].flatMap((each) => each.sites.map((site) => site.kind)));
    const made = Object.entries(KINDS).filter(([kind]) => there.has(kind)).map(([kind, text]) => {
      const box = element("input", { type: "checkbox", checked: !view.hidden.has(kind) });
      box.dataset.control = `kind ${kind}`;
      box.addEventListener("change", () => {
        const hidden = new Set(view.hidden);
        if (box.checked) hidden.delete(kind);
        else hidden.add(kind);
        this.change({ hidden });
      });
      return element("label", { className: "kind" }, box, text);
    });
    return made.length > 1 ? element("fieldset", { className: "kinds" }, ...made) : null;
  }
}

// The key of the colours, with the sentence that explains the metric.
function legend({ metric, colours, low, high }) {
  const bar = element("canvas", { width: colours.length, height: 1, className: "ramp" });
  const pen = bar.getContext("2d");
  colours.forEach((colour, index) => {
    pen.fillStyle = colour;
    pen.fillRect(metric.reversed ? colours.length - 1 - index : index, 0, 1, 1);
  });
  const text = (value) => (metric.form === "share" ? `${Number((100 * value).toPrecision(3))} %` : short(value));
  const marks = ticks(metric.scale, low, high, 4).map((value) => {
    const mark = element("span", { textContent: text(value) });
    mark.style.left = `${100 * along(metric.scale, value, low, high)}%`;
    return mark;
  });
  const explained = element("p", { className: "says", textContent: metric.says });
  return element("div", { className: "key-of-colours" }, element("div", { className: "bar" }, bar, ...marks), explained);
}
