// The controls above the heatmaps: metric, runs, order, x axis, filter, kinds of sites, and the key of the colours.

import { FOLDS, KINDS, ORDERS } from "./address.js";
import { element } from "./charts.js";
import { AXES } from "./frame.js";
import { along, short, ticks } from "./numbers.js";
import { matcher } from "./rows.js";
import { shownName } from "./source.js";
import { badge, isSick, worstFirstRuns } from "./verdict.js";

export class Controls {
  // `change(values)` is called with what the user has chosen, as a part of the view. `help` is the dialog of definitions; `follow(on)` is called when the
  // user wants to see new data as they come, or no longer.
  constructor(filter, change, help, follow) {
    Object.assign(this, { change, help, follow });
    this.choices = element("div", { className: "group" });
    this.aside = element("div", { className: "group" });
    // The field for the filter is never replaced, so that somebody who types in it is not interrupted.
    this.filter = element("input", { type: "search", value: filter, placeholder: "name or /regex/", size: 16 });
    this.filter.dataset.control = "filter";
    this.filter.addEventListener("input", () => this.change({ filter: this.filter.value }));
    const field = element("label", {}, element("span", { textContent: "Sites" }), this.filter);
    this.element = element("section", { className: "controls" }, this.choices, field, this.aside);
    this.element.setAttribute("aria-label", "What is shown");
    document.addEventListener("pointerdown", (event) => this.closeRuns((list) => !list.contains(event.target)));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.closeRuns(() => true, true);
    });
  }

  // Close the list of runs if it is open and `when` says so.
  closeRuns(when, focus = false) {
    const list = this.element.querySelector("details.runs[open]");
    if (list === null || !when(list)) return;
    list.open = false;
    if (focus) list.querySelector("summary").focus();
  }

  // Show what is chosen. given: {view, runs (all), about (the chosen ones, by name), metrics, metric, colours, low, high}. The control that has the
  // focus keeps it, though most are replaced.
  fill(given) {
    const focused = document.activeElement?.dataset?.control;
    const { view, about, metrics, metric } = given;
    const present = new Set([...about.values()].flatMap((each) => each.metrics));
    const offered = metrics.filter((each) => present.has(each.name) || each === metric);
    this.choices.replaceChildren(
      this.select("metric", "Metric", offered.map((each) => [each.name, each.title, each.group]), metric.name, this.help.button("metric", metric.name)),
      this.runs(given),
      this.select("order", "Order", Object.entries(ORDERS), view.order),
      this.select("fold", "Rows", Object.entries(FOLDS), view.fold),
      this.select("axis", "x axis", Object.entries(AXES).map(([key, axis]) => [key, axis.title]), view.axis),
    );
    if (this.filter.value !== view.filter) this.filter.value = view.filter;
    const { wrong } = matcher(view.filter);
    this.filter.setCustomValidity(wrong ?? "");
    this.filter.title = wrong ? `The regular expression cannot be used: ${wrong}` : "";
    this.aside.replaceChildren(...[this.kinds(given), legend(given, this.switches(given))].filter(Boolean));
    if (focused) this.element.querySelector(`[data-control="${focused}"]`)?.focus();
  }

  select(name, title, options, value, ask = null) {
    const option = ([key, text]) => element("option", { value: key, textContent: text, selected: key === value });
    const groups = Map.groupBy(options, ([, , group]) => group);
    const made = element("select", { title }, ...[...groups].flatMap(([group, members]) => (group ? [element("optgroup", { label: group }, ...members.map(option))] : members.map(option))));
    made.dataset.control = name;
    made.addEventListener("change", () => this.change({ [name]: made.value }));
    const field = element("label", {}, element("span", { textContent: title }), made);
    return ask === null ? field : element("div", { className: "asked-of" }, field, ask);
  }

  // Follow, the difference of two runs, and the way back from a zoom.
  switches({ view, about, following, canFollow, asleep }) {
    const box = (control, text, checked, change, title) => {
      const made = element("input", { type: "checkbox", checked });
      made.dataset.control = control;
      made.addEventListener("change", () => change(made.checked));
      return element("label", { className: "kind", title }, made, text);
    };
    const zoomed = view.from !== null || view.to !== null || view.top !== null;
    const reset = element("button", { type: "button", textContent: "show all", title: "leave the zoom (double click, or 0)" });
    reset.dataset.control = "reset";
    reset.addEventListener("click", () => this.change({ from: null, to: null, top: null, bottom: null }));
    const found = [
      canFollow ? box("follow", "follow latest", following, (on) => this.follow(on), "ask for new data every few seconds, and show the latest step") : null,
      canFollow && asleep && !following ? element("span", { className: "aside", textContent: "TensorBoard's reload is off", title: "TensorBoard does not load new data by itself, unless its settings say so" }) : null,
      about.size === 2 ? box("difference", "difference", view.difference, (on) => this.change({ difference: on }), "a picture of the first run less the second") : null,
      zoomed ? reset : null,
    ].filter(Boolean);
    return found.length ? element("div", { className: "switches" }, ...found) : null;
  }

  // A check box for each run, the worst first, with a search and buttons for all and none.
  runs({ runs, about }) {
    const open = this.element.querySelector("details.runs")?.open ?? false;
    const boxes = worstFirstRuns(runs).map((run) => {
      const box = element("input", { type: "checkbox", checked: about.has(run.name) });
      box.dataset.control = `run ${run.name.replace(/["\\]/g, "\\$&")}`;
      box.addEventListener("change", () => {
        const chosen = new Set(about.keys());
        if (box.checked) chosen.add(run.name);
        else chosen.delete(run.name);
        this.change({ runs: [...chosen] });
      });
      const aside = element("small", { textContent: ` ${run.sites} sites` });
      return element("label", {}, box, element("span", { textContent: shownName(run.name) }), " ", badge(run.verdict), aside);
    });
    const search = element("input", { type: "search", placeholder: "search runs", value: this.searched ?? "", ariaLabel: "search runs" });
    search.dataset.control = "search runs";
    const sift = () => {
      this.searched = search.value;
      boxes.forEach((box) => (box.hidden = !box.textContent.toLowerCase().includes(search.value.toLowerCase())));
    };
    search.addEventListener("input", sift);
    sift();
    const button = (text, names) => {
      const one = element("button", { type: "button", textContent: text });
      one.addEventListener("click", () => this.change({ runs: names() }));
      return one;
    };
    const all = button("all", () => runs.map((run) => run.name));
    const sick = button("sick ones", () => runs.filter((run) => isSick(run.verdict)).map((run) => run.name));
    const none = button("none", () => []);
    const head = element("div", { className: "run-buttons" }, search, all, sick, none);
    const made = element("details", { className: "runs", open }, element("summary", { textContent: `Runs: ${about.size} of ${runs.length}` }), element("div", {}, head, ...boxes));
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

// The marks on the scale of alert levels.
const LEVELS = new Map([[0, "healthy"], [0.5, "warning"], [1, "critical"]]);

// The key of the colours, with the sentence that explains the metric, and the switches behind it.
function legend({ metric, colours, low, high }, switches) {
  const bar = element("canvas", { width: colours.length, height: 1, className: "ramp" });
  const pen = bar.getContext("2d");
  colours.forEach((colour, index) => {
    pen.fillStyle = colour;
    pen.fillRect(metric.reversed ? colours.length - 1 - index : index, 0, 1, 1);
  });
  const text = (value) => (metric.form === "level" ? LEVELS.get(value) : metric.form === "share" ? `${Number((100 * value).toPrecision(3))} %` : short(value));
  const marks = (metric.form === "level" ? [...LEVELS.keys()] : ticks(metric.scale, low, high, 4)).map((value) => {
    const mark = element("span", { textContent: text(value) });
    mark.style.left = `${100 * along(metric.scale, value, low, high)}%`;
    return mark;
  });
  const explained = element("p", { className: "says", textContent: `${metric.says} Hatched: not finite. Grey stripes: not measured.` });
  return element("div", { className: "key-of-colours" }, element("div", { className: "bar" }, bar, ...marks), explained, switches);
}
