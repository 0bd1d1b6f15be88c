// The Saturation view as a whole: it loads what the view asks for, and fills the controls, the heatmaps, the alerts, the depth profile and the
// section of one site. `window.torchsat` is the App, for tests and for the curious.

import { decode, encode } from "./address.js";
import { alertTable } from "./alerts.js";
import { LINES, element } from "./charts.js";
import { Controls } from "./controls.js";
import { depthProfile } from "./depth.js";
import { siteDetail } from "./detail.js";
import { AXES } from "./frame.js";
import { Heatmap } from "./heatmap.js";
import { printer, range } from "./numbers.js";
import { shownName } from "./source.js";

const FIRST_RUNS = 2; // how many runs are shown before the user chooses: the newest
const EMPTY = 3000; // milliseconds until a server without data is asked again

const THEMES = {
  light: { page: "#ffffff", ink: "#202124", faint: "#5f6368", rule: "#9aa0a6", missing: "#c6cacf", accent: "#0b57d0", critical: "#c5221f", warning: "#a85b00" },
  dark: { page: "#202124", ink: "#e8eaed", faint: "#a9aeb4", rule: "#6b7075", missing: "#54585d", accent: "#8ab4f8", critical: "#ff8a80", warning: "#fdd663" },
};

// Show the view in the element `root`. `source`: see source.js. `host` is what surrounds the view, TensorBoard or a page of its own: it keeps the
// address (read, write, onView), and tells whether the page is dark (dark, onTheme) and when there may be new data (onReload).
export async function start(root, source, host) {
  const app = new App(root, source, host);
  window.torchsat = app;
  host.onTheme(() => app.draw());
  host.onReload(() => app.reload());
  host.onView(() => {
    app.view = decode(host.read());
    app.draw();
  });
  new ResizeObserver(() => app.resized()).observe(root);
  await app.reload();
  return app;
}

class App {
  constructor(root, source, host) {
    Object.assign(this, { root, source, host, view: decode(host.read()), panels: new Map(), drawing: 0, width: 0, states: new Map() });
    this.controls = new Controls(this.view.filter, (values) => this.change(values));
    this.maps = element("main", { className: "maps" });
    this.message = element("p", { className: "message", role: "status" });
    this.alerts = element("section", { className: "card alerts" });
    this.depth = element("section", { className: "card depth" });
    this.detail = element("section", { className: "card detail" });
    this.alerts.setAttribute("aria-label", "Alerts");
    this.depth.setAttribute("aria-label", "Depth profile");
    this.detail.setAttribute("aria-label", "Site");
    const left = element("div", { className: "left" }, this.maps, this.alerts, this.depth);
    this.frame = element("div", { className: "torchsat" }, this.controls.element, this.message, element("div", { className: "columns" }, left, this.detail));
    root.append(this.frame);
  }

  async reload() {
    this.source.forget();
    await this.draw();
  }

  resized() {
    if (Math.abs(this.maps.clientWidth - this.width) > 1 && this.runs) this.draw();
  }

  change(values) {
    Object.assign(this.view, values);
    return this.draw();
  }

  // Load what the view asks for and draw everything anew. If `draw` is called again meanwhile, the older call ends at its next pause.
  async draw() {
    const turn = ++this.drawing;
    const failed = (error) => {
      if (turn === this.drawing) this.message.textContent = `This view could not be loaded: ${error.message}`;
    };
    try {
      const [scales, runs] = await Promise.all([this.source.json("scales"), this.source.json("runs")]);
      if (turn !== this.drawing) return;
      this.scales = scales;
      this.print = printer(scales.percent);
      this.runs = runs;
      clearTimeout(this.waiting);
      if (!runs.length) this.waiting = setTimeout(() => this.reload(), EMPTY);
      this.host.write(encode(this.view));
      const chosen = this.chosen();
      const loaded = await Promise.all(chosen.map((run) => this.source.json("run", { run })));
      if (turn !== this.drawing) return;
      this.about = new Map(chosen.map((run, index) => [run, loaded[index]]));
      this.metric = this.scales.metrics.find((metric) => metric.name === this.view.metric) ?? this.scales.metrics[0];
      const grids = await Promise.all(chosen.map((run) => this.source.grid("values", { run, metric: this.metric.name })));
      if (turn !== this.drawing) return;
      this.grids = new Map(chosen.map((run, index) => [run, grids[index]]));
      this.ends = range(this.metric, everything(grids));
      this.theme = THEMES[this.host.dark() ? "dark" : "light"];
      this.root.classList.toggle("dark", this.host.dark());
      this.colours = this.scales.ramps[this.metric.ramp][this.host.dark() ? "dark" : "light"];
      const missing = (this.view.runs ?? []).filter((run) => !runs.some((each) => each.name === run)).map((run) => `There is no run ${run}.`);
      if (this.metric.name !== this.view.metric) missing.push(`There is no metric ${this.view.metric}.`);
      if (!chosen.length) missing.push(runs.length ? "Choose a run." : "No run here holds torchsat data.");
      this.message.textContent = missing.join(" ");
      this.open = this.opened();
      this.sites = new Map(chosen.map((run) => [run, this.selected(run)]));
      if (this.view.site && this.open === null && chosen.length) this.message.textContent += ` The runs shown have no site ${this.view.site}.`;
      this.detail.hidden = this.open === null;
      this.fill();
      await this.fillDetail(turn);
    } catch (error) {
      failed(error);
    }
  }

  // The names of the runs that are shown.
  chosen() {
    const known = this.runs.map((run) => run.name);
    if (this.view.runs !== null) return known.filter((run) => this.view.runs.includes(run));
    const newest = [...this.runs].sort((one, other) => other.time - one.time).slice(0, FIRST_RUNS);
    return known.filter((run) => newest.some((each) => each.name === run));
  }

  // The run and site that are shown in detail: those of the view; if it says nothing, the place of the first alert, of those that still fire if there
  // are any. null: none.
  opened() {
    const has = (run, site) => this.about.get(run)?.sites.some((each) => each.site === site);
    if (this.view.site === "") return null;
    if (this.view.site !== null) {
      const run = [this.view.run, ...this.about.keys()].find((each) => has(each, this.view.site));
      return run === undefined ? null : { run, site: this.view.site };
    }
    const alerts = [...this.about].flatMap(([run, about]) => about.alerts.filter((alert) => alert.places.length).map((alert) => ({ run, alert })));
    const first = alerts.find(({ alert }) => alert.cleared === null) ?? alerts[0];
    return first === undefined ? null : { run: first.run, site: first.alert.places[0] };
  }

  fill() {
    performance.mark("torchsat.fill.start");
    const [low, high] = this.ends;
    this.controls.fill({ view: this.view, runs: this.runs, about: this.about, metrics: this.scales.metrics, metric: this.metric, colours: this.colours, low, high });
    this.fillMaps();
    this.fillAlerts();
    this.fillDepth();
    performance.measure("torchsat.fill", "torchsat.fill.start");
  }

  colour(run) {
    return LINES[[...this.about.keys()].indexOf(run) % LINES.length];
  }

  // The names of the sites of a run that have the metric and pass the filters, in the order wanted. The array's `measured` says how many have the metric.
  selected(run) {
    const grid = this.grids.get(run);
    const terms = this.view.filter.toLowerCase().split(/\s+/).filter(Boolean);
    const has = new Set(grid.names.filter((_, column) => grid.steps.some((_, row) => !Number.isNaN(grid.at(row, column)))));
    const found = this.about.get(run).sites.filter(({ site, activation, kind }) => {
      const text = `${site} ${activation}`.toLowerCase();
      return has.has(site) && !this.view.hidden.has(kind) && terms.every((term) => text.includes(term));
    });
    const names = found.map(({ site }) => site);
    names.measured = has.size;
    if (this.view.order !== "worst") return names;
    const row = this.view.step === null ? grid.steps.length - 1 : grid.row(this.view.step);
    const sign = this.metric.worst === "low" ? 1 : -1;
    const badness = (site) => {
      const value = grid.at(row, grid.column.get(site));
      return Number.isNaN(value) ? Infinity : sign * value;
    };
    return names.sort((one, other) => badness(one) - badness(other) || 0);
  }

  fillMaps() {
    this.width = this.maps.clientWidth;
    const axis = AXES[this.view.axis];
    const ends = [...this.grids.values()].filter((grid) => grid.steps.length).map((grid) => axis.edges(grid.steps));
    const domain = [Math.min(...ends.map((each) => each[0])), Math.max(...ends.map((each) => each[each.length - 1]))];
    const [low, high] = this.ends;
    const kept = new Map();
    for (const [run, about] of this.about) {
      const panel = this.panels.get(run) ?? this.panel(run);
      kept.set(run, panel);
      const sites = this.sites.get(run);
      const firing = about.alerts.filter((alert) => alert.cleared === null).length;
      const [without, hidden] = [about.sites.length - sites.measured, sites.measured - sites.length];
      const aside = [without ? `${without} have no such number` : "", hidden ? `${hidden} filtered out` : ""].filter(Boolean).join(", ");
      panel.title.textContent = shownName(run);
      panel.key.style.borderTopColor = this.colour(run);
      panel.key.hidden = this.about.size < 2;
      panel.aside.textContent =
        ` ${about.observations} observation${about.observations === 1 ? "" : "s"}, steps ${about.first} to ${about.last}, ` +
        `${sites.length} of ${about.sites.length} sites${aside ? ` (${aside})` : ""}, ${about.alerts.length} alert${about.alerts.length === 1 ? "" : "s"}` +
        (firing ? `, ${firing} firing` : "");
    }
    this.panels = kept;
    const order = [...kept.values()].map((panel) => panel.element);
    if (order.length !== this.maps.children.length || order.some((each, index) => each !== this.maps.children[index])) this.maps.replaceChildren(...order);
    for (const [run, panel] of kept) {
      const about = this.about.get(run);
      panel.heatmap.show({
        grid: this.grids.get(run),
        sites: this.sites.get(run),
        facts: new Map(about.sites.map((site) => [site.site, site])),
        metric: this.metric,
        colours: this.colours,
        theme: this.theme,
        axis: this.view.axis,
        domain,
        low,
        high,
        alerts: about.alerts,
        chosen: this.open?.site ?? null,
        step: this.view.step,
        label: shownName(run),
        print: this.print,
      });
    }
  }

  // The heatmap of one run with its heading.
  panel(run) {
    const title = element("h2");
    const key = element("i", { className: "key" });
    const aside = element("span", { className: "aside" });
    const heatmap = new Heatmap((site, step) => this.change({ run, site, step: step ?? this.view.step }));
    const made = element("section", { className: "panel" }, element("div", { className: "heading" }, key, title, aside), heatmap.element);
    made.dataset.run = run;
    return { element: made, title, key, aside, heatmap };
  }

  // Whether what a part shows has changed since it was last filled. A part that has not is left alone, since replacing it would take the focus away.
  changed(part, ...given) {
    const state = JSON.stringify(given);
    if (this.states.get(part) === state) return false;
    this.states.set(part, state);
    return true;
  }

  fillAlerts() {
    if (!this.changed("alerts", [...this.about].map(([run, about]) => [run, about.alerts]))) return;
    const rows = [...this.about].flatMap(([run, about]) => about.alerts.map((alert) => [run, alert]));
    const choose = (run, site, step) => this.change({ run, site, step });
    this.alerts.replaceChildren(...alertTable({ rows, several: this.about.size > 1, print: this.print, choose }));
  }

  // The step that the depth profile and the figures show: the chosen one, or else the last.
  step() {
    const last = Math.max(...[...this.grids.values()].map((grid) => grid.steps[grid.steps.length - 1] ?? 0), 0);
    return this.view.step === null ? last : Math.min(this.view.step, last);
  }

  fillDepth() {
    const runs = [...this.about.keys()].map((run) => ({ name: shownName(run), colour: this.colour(run), grid: this.grids.get(run), sites: this.sites.get(run) }));
    const [low, high] = this.ends;
    const refocus = document.activeElement?.dataset?.control === "step";
    const choose = (step) => this.change({ step });
    const { nodes, slider } = depthProfile({ runs, metric: this.metric, low, high, step: this.step(), open: this.open?.site, print: this.print, choose });
    this.depth.replaceChildren(...nodes);
    if (refocus) slider.focus();
  }

  async fillDetail(turn) {
    const about = [...this.about].map(([key, each]) => [key, each.time, each.observations, each.alerts]);
    if (!this.changed("detail", this.open, this.view.step, this.host.dark(), about)) return;
    this.states.delete("detail"); // a call that is ended before it has filled the section leaves it to the next one
    if (this.open === null) return this.detail.replaceChildren();
    const { run, site } = this.open;
    const fact = this.about.get(run).sites.find((one) => one.site === site);
    const having = [...this.about.keys()].filter((each) => this.about.get(each).sites.some((one) => one.site === site));
    const softmax = fact.kind === "softmax";
    const [grids, spread] = await Promise.all([
      Promise.all(having.map((each) => this.source.grid("site", { run: each, site }))),
      this.source.grid(softmax ? "heads" : "histogram", { run, site }),
    ]);
    if (turn !== this.drawing) return;
    this.detail.replaceChildren(
      ...siteDetail({
        run,
        about: this.about.get(run),
        fact,
        own: grids[having.indexOf(run)],
        spread,
        compared: having.map((each, index) => ({ name: shownName(each), colour: this.colour(each), grid: grids[index] })),
        step: this.step(),
        at: this.view.step ?? undefined,
        scales: this.scales,
        shade: this.host.dark() ? "dark" : "light",
        accent: this.theme.accent,
        print: this.print,
        close: () => this.change({ site: "", run: null }),
      }),
    );
    this.changed("detail", this.open, this.view.step, this.host.dark(), about);
  }
}

function* everything(grids) {
  for (const grid of grids) yield* grid.values;
}
