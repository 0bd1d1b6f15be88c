// The Saturation view as a whole: it loads what the view asks for, and fills the verdict, the controls, the pictures, the alerts, the depth profile and
// the section of one site. `window.torchsat` is the App, for tests and for the curious.

import { decode, encode } from "./address.js";
import { alertTable } from "./alerts.js";
import { element } from "./charts.js";
import { Controls } from "./controls.js";
import { depthProfile } from "./depth.js";
import { siteDetail } from "./detail.js";
import { difference } from "./difference.js";
import { expertsSection, loadMixtures } from "./experts.js";
import { AXES } from "./frame.js";
import { Heatmap } from "./heatmap.js";
import { Help } from "./help.js";
import { ledgerSection } from "./ledger.js";
import { printer, range } from "./numbers.js";
import { alike, runColour, runDash } from "./palette.js";
import { Panel } from "./panel.js";
import { refill } from "./refill.js";
import { rowsOf } from "./rows.js";
import { shownName } from "./source.js";
import { toldRuns, verdictSection, worstFirstRuns } from "./verdict.js";

const FIRST_RUNS = 2; // how many runs are shown before the user chooses: the worst
const EMPTY = 3000; // milliseconds until a server without data is asked again
const FOLLOW = 5000; // milliseconds between two questions for new data
const SETTLED = 250; // milliseconds after the last change of a zoom until all parts are drawn anew
const [LEAST_PANEL, GAP] = [440, 14]; // pixels: the least width of a panel, and the gap between two (style.css)
const MOST_CARDS = 3; // of so many runs the ledger of the gradient and the mixtures of experts are shown
const MOST_HOLE = 120; // pixels by which panels side by side may differ in height
const NOTHING = "No run here holds torchsat data yet. A training that is watched, as by torchsat.watch(model, \"runs/exp1\"), appears by itself where this folder contains its own.";
const ALL = { from: null, to: null, top: null, bottom: null };

const THEMES = {
  light: { name: "light", page: "#ffffff", ink: "#202124", faint: "#5f6368", rule: "#9aa0a6", missing: "#c6cacf", accent: "#0b57d0", critical: "#c5221f", warning: "#a85b00" },
  dark: { name: "dark", page: "#202124", ink: "#e8eaed", faint: "#a9aeb4", rule: "#6b7075", missing: "#54585d", accent: "#8ab4f8", critical: "#ff8a80", warning: "#fdd663" },
};

// Show the view in the element `root`. `source`: see source.js. `host` is what surrounds the view, TensorBoard or a page of its own: it keeps the
// address (read, write, onView), and tells whether the page is dark (dark, onTheme), when there may be new data (onReload), whether it can be asked for
// new data (canFollow), and whether it does not load new data by itself (asleep).
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
    Object.assign(this, { root, source, host, view: decode(host.read()), panels: new Map(), drawing: 0, width: 0, states: new Map(), following: null });
    this.help = new Help();
    this.controls = new Controls(this.view.filter, (values) => this.change(values), this.help, (on) => this.follow(on));
    this.verdict = element("header", { className: "card verdict" });
    this.maps = element("div", { className: "maps" });
    this.message = element("p", { className: "message", role: "status" });
    this.alerts = element("section", { className: "card alerts" });
    this.unfolded = null; // whether the user has unfolded the list of alerts; null: not touched yet
    this.depth = element("section", { className: "card depth" });
    this.ledger = element("section", { className: "card ledger", hidden: true });
    this.experts = element("section", { className: "card experts", hidden: true });
    this.inside = new Map(); // for each run, the joins and gates of its ledger that are unfolded
    this.detail = element("section", { className: "card detail" });
    this.alerts.setAttribute("aria-label", "Alerts");
    this.depth.setAttribute("aria-label", "Depth profile");
    this.ledger.setAttribute("aria-label", "Ledger of the gradient");
    this.experts.setAttribute("aria-label", "Mixtures of experts");
    this.detail.setAttribute("aria-label", "Site");
    const hint = "▷ alert raised, line: it fires, □ it cleared; behind a row: ● it fires still, ○ the site suffers from it. Click: open a site. Drag: zoom in. Double click: show all. Ctrl and wheel: zoom.";
    this.hint = element("p", { className: "aside", textContent: hint });
    this.left = element("main", { className: "left" }, this.message, this.maps, this.hint, this.depth, this.ledger, this.experts);
    this.frame = element("div", { className: "torchsat" }, this.verdict, this.alerts, this.controls.element, element("div", { className: "columns" }, this.left, this.detail), this.help.element);
    root.append(this.frame);
  }

  async reload() {
    this.source.forget();
    await this.draw();
  }

  // Ask for new data every few seconds, or no longer, and show the latest step meanwhile.
  follow(on) {
    clearInterval(this.following);
    this.following = on ? setInterval(() => this.reload(), FOLLOW) : null;
    return on ? this.change({ step: null, to: null }) : this.draw();
  }

  resized() {
    if (Math.abs(this.maps.clientWidth - this.width) > 1 && this.runs) this.draw();
  }

  change(values) {
    Object.assign(this.view, values);
    return this.draw();
  }

  // The user has chosen a site: if its section is below the window, as on a narrow page, it is brought into sight.
  async open(values) {
    await this.change(values);
    const box = this.detail.getBoundingClientRect();
    if (!this.detail.hidden && box.top > window.innerHeight - 120) this.detail.scrollIntoView({ block: "start" });
  }

  // Show what an alert is about: its run, its site, its metric and the step at which it was raised.
  openAlert(run, alert) {
    const rule = this.scales.rules.find((each) => each.rule === alert.rule);
    const measured = this.about.get(run)?.metrics.includes(rule?.metric);
    return this.open({ run, site: alert.places[0], step: alert.fired, metric: measured ? rule.metric : null, ...ALL });
  }

  // Zoom in on steps and rows; null: show all. The pictures follow at once, the rest when the zoom has come to rest.
  zoom(values) {
    const grids = [...this.grids.values()].filter((grid) => grid.steps.length);
    const [first, last] = [Math.min(...grids.map((grid) => grid.steps[0])), Math.max(...grids.map((grid) => grid.steps[grid.steps.length - 1]))];
    const wanted = values === null ? ALL : { ...values };
    if (wanted.from !== undefined && wanted.from <= first) wanted.from = null;
    if (wanted.to !== undefined && wanted.to > last) wanted.to = null;
    if (wanted.from != null && wanted.to != null && wanted.to <= wanted.from) wanted.to = wanted.from + 1;
    Object.assign(this.view, wanted);
    clearTimeout(this.resting);
    this.resting = setTimeout(() => this.draw(), SETTLED);
    this.waitingFrame ??= requestAnimationFrame(() => {
      this.waitingFrame = null;
      if (this.view.top === null || wanted.top === undefined) this.fillMaps();
    });
  }

  // Mark a step in all pictures and charts; null: none.
  hover(step) {
    if (step === this.hovered) return;
    this.hovered = step;
    this.frame.querySelectorAll(".crossed").forEach((each) => each.cross(step));
  }

  // Load what the view asks for and draw everything anew. If `draw` is called again meanwhile, the older call ends at its next pause.
  async draw() {
    const turn = ++this.drawing;
    try {
      const [scales, runs] = await Promise.all([this.source.json("scales"), this.source.json("runs")]);
      if (turn !== this.drawing) return;
      this.scales = scales;
      this.causes = Object.fromEntries(scales.causes.map(({ cause, title }) => [cause, title]));
      this.print = printer(scales.percent);
      this.runs = runs;
      this.help.fill(scales);
      clearTimeout(this.waiting);
      if (!runs.length) this.waiting = setTimeout(() => this.reload(), EMPTY);
      this.host.write(encode(this.view));
      const chosen = this.chosen();
      const loaded = await Promise.all(chosen.map((run) => this.source.json("run", { run })));
      if (turn !== this.drawing) return;
      this.about = new Map(chosen.map((run, index) => [run, loaded[index]]));
      this.metric = this.wantedMetric();
      const grids = await Promise.all(chosen.map((run) => this.source.grid("values", { run, metric: this.metric.name })));
      const curves = await Promise.all(chosen.map((run) => this.curves(run)));
      if (turn !== this.drawing) return;
      this.grids = new Map(chosen.map((run, index) => [run, grids[index]]));
      this.strips = new Map(chosen.map((run, index) => [run, curves[index]]));
      this.ends = range(this.metric, everything(grids));
      this.theme = THEMES[this.host.dark() ? "dark" : "light"];
      this.root.classList.toggle("dark", this.host.dark());
      document.documentElement.classList.toggle("dark", this.host.dark());
      this.say();
      this.opened = this.site();
      this.rows = new Map(chosen.map((run) => [run, rowsOf({ about: this.about.get(run), grid: this.grids.get(run), metric: this.metric, view: this.view, step: this.view.step })]));
      this.detail.hidden = this.opened === null;
      this.fill();
      await Promise.all([this.fillLedger(turn), this.fillExperts(turn), this.fillDetail(turn)]);
    } catch (error) {
      this.states.clear(); // what was being filled is filled anew by the next call
      if (turn === this.drawing) this.message.textContent = `This view could not be loaded: ${error.message}`;
    }
  }

  // The names of the runs that are shown, the worst first.
  chosen() {
    const known = worstFirstRuns(this.runs).map((run) => run.name);
    if (this.view.runs !== null) return known.filter((run) => this.view.runs.includes(run));
    return known.slice(0, FIRST_RUNS);
  }

  // The metric of the view, or else the first one that the runs have.
  wantedMetric() {
    const present = new Set([...this.about.values()].flatMap((about) => about.metrics));
    const { metrics } = this.scales;
    return metrics.find((metric) => metric.name === this.view.metric) ?? metrics.find((metric) => present.has(metric.name)) ?? metrics[0];
  }

  // The curves above the picture of a run: the user's loss and learning rate. Where the user has written no rate, it is the one that was measured.
  async curves(run) {
    const { loss, rate } = await this.source.json("scalars", { run });
    const found = [];
    for (const [tag, dash] of [[loss, ""], [rate, "4 3"]]) {
      if (tag === null) continue;
      const grid = await this.source.grid("scalar", { run, tag });
      // A scalar that is written has a value: where it is NaN, it is so because the user's number is.
      found.push({ name: tag, dash, points: grid.points(tag).map(([step, value]) => [step, Number.isNaN(value) ? Infinity : value]) });
    }
    if (rate === null && this.about.get(run).metrics.includes("learning_rate")) {
      const grid = await this.source.grid("values", { run, metric: "learning_rate" });
      const points = Array.from(grid.steps, (step, row) => [step, grid.names.map((_, column) => grid.at(row, column)).find((value) => !Number.isNaN(value)) ?? NaN]);
      found.push({ name: "learning rate", dash: "4 3", points });
    }
    const lacks = loss === null ? "no scalar of this run is named like a loss" : "";
    return { curves: found.map((curve) => ({ ...curve, scale: spans(curve.points) ? "log" : "linear" })), lacks };
  }

  // Say what of the view is not there.
  say() {
    const missing = (this.view.runs ?? []).filter((run) => !this.runs.some((each) => each.name === run)).map((run) => `There is no run ${run}.`);
    if (this.view.metric !== null && this.metric.name !== this.view.metric) missing.push(`There is no metric ${this.view.metric}.`);
    if (!this.about.size) missing.push(this.runs.length ? "Choose a run." : NOTHING);
    if (this.view.site && this.site() === null && this.about.size) missing.push(`The runs shown have no site ${this.view.site}.`);
    this.message.textContent = missing.join(" ");
  }

  // The run and site that are shown in detail: those of the view; if it says nothing, the place of the worst alert. null: none.
  site() {
    const has = (run, site) => this.about.get(run)?.sites.some((each) => each.site === site);
    if (this.view.site === "") return null;
    if (this.view.site !== null) {
      const run = [this.view.run, ...this.about.keys()].find((each) => has(each, this.view.site));
      return run === undefined ? null : { run, site: this.view.site };
    }
    for (const [run, about] of this.about) {
      const alert = about.alerts.find((each) => each.site === about.verdict.site && each.rule === about.verdict.rule) ?? about.alerts[0];
      if (alert?.places.length) return { run, site: alert.places[0] };
    }
    return null;
  }

  fill() {
    performance.mark("torchsat.fill.start");
    const [low, high] = this.ends;
    const colours = this.colours(this.metric);
    const follow = { following: this.following !== null, canFollow: this.host.canFollow, asleep: this.host.asleep() };
    this.fillVerdict();
    this.controls.fill({ view: this.view, runs: this.runs, about: this.about, metrics: this.scales.metrics, metric: this.metric, colours, low, high, ...follow });
    this.fillMaps();
    this.alerts.hidden = ![...this.about.values()].some((about) => about.alerts.length);
    this.depth.hidden = this.hint.hidden = !this.about.size;
    this.controls.element.hidden = !this.runs.length;
    this.fillAlerts();
    this.fillDepth();
    performance.measure("torchsat.fill", "torchsat.fill.start");
  }

  colours(metric) {
    return this.scales.ramps[metric.ramp][this.theme.name];
  }

  place(run) {
    return this.runs.find((each) => each.name === run)?.place ?? 0;
  }

  // How the line of a run is drawn.
  line(run) {
    const colour = runColour(this.place(run), this.theme);
    const before = [...this.about.keys()].slice(0, [...this.about.keys()].indexOf(run));
    return { name: shownName(run), colour, dash: runDash(before.filter((each) => alike(runColour(this.place(each), this.theme), colour)).length) };
  }

  fillVerdict() {
    const runs = this.runs.map((run) => ({ ...run, verdict: this.about.get(run.name)?.verdict ?? run.verdict }));
    const shown = new Map([...this.about.keys()].map((run) => [run, this.line(run).colour]));
    if (!this.changed("verdict", worstFirstRuns(runs).map(({ name, verdict }) => [name, verdict]), [...shown])) return;
    const show = (chosen) => this.change({ runs: chosen, run: null, site: null, step: null, ...ALL });
    const toggle = (run) => {
      const left = [...shown.keys()].filter((each) => each !== run);
      if (left.length) show(shown.has(run) ? left : [...left, run]);
    };
    const { nodes, className } = verdictSection({ runs, shown, causes: this.causes, choose: (run) => show([run]), toggle });
    refill(this.verdict, nodes, [...shown.keys()].join());
    this.verdict.className = `card verdict ${className}`;
    this.verdict.hidden = !nodes.length;
  }

  // The ends of the x axis of a run. All runs share them, unless the axis counts observations while a zoom names steps.
  domain(run) {
    const axis = AXES[this.view.axis];
    const { from, to } = this.view;
    const ends = [...this.grids.values()].filter((grid) => grid.steps.length).map((grid) => axis.edges(grid.steps));
    const all = [Math.min(...ends.map((each) => each[0])), Math.max(...ends.map((each) => each[each.length - 1]))];
    const grid = this.grids.get(run);
    if (!grid.steps.length) return all;
    return [from === null ? all[0] : axis.at(from, grid), to === null ? all[1] : Math.max(axis.at(to, grid), from === null ? all[0] : axis.at(from, grid) + 1e-6)];
  }

  fillMaps() {
    this.width = this.maps.clientWidth;
    const runs = [...this.about.keys()];
    const both = this.view.difference && runs.length === 2 ? difference(this.rows.get(runs[0]).grid, this.rows.get(runs[1]).grid, this.metric) : null;
    const left = Math.max(60, ...[...this.rows.values()].map(({ sites, facts }) => Heatmap.room(sites, facts)));
    const kept = new Map();
    for (const run of runs) kept.set(run, this.panels.get(run) ?? this.panel(run));
    if (both !== null) kept.set(DIFFERENCE, this.panels.get(DIFFERENCE) ?? this.panel(DIFFERENCE));
    this.panels = kept;
    const order = [...kept.values()].map((panel) => panel.element);
    if (order.length !== this.maps.children.length || order.some((each, index) => each !== this.maps.children[index])) this.maps.replaceChildren(...order);
    this.layOut();
    const common = { theme: this.theme, axis: this.view.axis, left, step: this.view.step, print: this.print, view: this.view };
    for (const run of runs) {
      const rows = this.rows.get(run);
      const about = this.about.get(run);
      const chosen = this.opened?.run === run ? rows.row.get(this.opened.site) : null;
      const [low, high] = this.ends;
      const drawn = { metric: this.metric, colours: this.colours(this.metric), low, high, domain: this.domain(run), chosen: chosen ?? null };
      kept.get(run).show({ ...common, ...drawn, ...rows, about, ...this.strips.get(run), line: this.line(run), several: runs.length > 1 });
    }
    if (both === null) return;
    const rows = this.rows.get(runs[0]);
    const { metric, grid } = both;
    const about = { ...this.about.get(runs[0]), alerts: [], verdict: null };
    const drawn = { metric, colours: this.colours(metric), low: metric.low, high: metric.high, domain: this.domain(runs[0]), chosen: null };
    const line = { ...this.line(runs[0]), name: `${shownName(runs[0])} − ${shownName(runs[1])}` };
    const sites = rows.sites.filter((site) => grid.column.has(site));
    kept.get(DIFFERENCE).show({ ...common, ...drawn, ...rows, sites, grid, about, curves: [], lacks: "", line, several: false });
  }

  // Lay the panels out in as many columns as there is room for, in rows that are equally full. Where one of those side by side had many more rows than
  // its neighbour, which would leave a hole below the neighbour, each takes the whole width.
  layOut() {
    const runs = [...this.panels.keys()];
    const most = Math.max(1, Math.floor((this.width + GAP) / (LEAST_PANEL + GAP)));
    const columns = Math.max(1, Math.ceil(runs.length / Math.ceil(runs.length / most)));
    this.maps.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
    const tall = (run) => Heatmap.tall((this.rows.get(run) ?? this.rows.values().next().value).sites.length);
    for (let at = 0; at < runs.length; at += columns) {
      const beside = runs.slice(at, at + columns);
      const heights = beside.map(tall);
      const wide = Math.max(...heights) - Math.min(...heights) > MOST_HOLE;
      beside.forEach((run) => this.panels.get(run).element.classList.toggle("wide", wide));
    }
  }

  panel(run) {
    const choose = (name, step) => {
      const { facts, grid } = this.rows.get(run) ?? this.rows.values().next().value;
      const { members, block } = facts.get(name);
      if (members && step === null) {
        const unfolded = new Set(this.view.unfolded);
        if (!unfolded.delete(block)) unfolded.add(block);
        return this.change({ unfolded });
      }
      // A block is opened at the one of its sites that is worst there.
      const row = grid.row(step ?? 0);
      const site = members ? members.find((each) => grid.at(row, grid.column.get(each)) === grid.at(row, grid.column.get(name))) ?? members[0] : name;
      return this.open({ run: run === DIFFERENCE ? null : run, site, step: step ?? this.view.step });
    };
    return new Panel(run, { choose, zoom: (values) => this.zoom(values), hover: (step) => this.hover(step), openAlert: (alert) => this.openAlert(run, alert) });
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
    const choose = (run, alert) => this.openAlert(run, alert);
    const given = { rows, several: this.about.size > 1, choose, help: this.help, causes: this.causes, about: this.about };
    const told = new Set(toldRuns(this.runs).map((run) => run.name));
    const isTold = rows.every(([run]) => told.has(run)) && new Set(rows.map(([run]) => run)).size === rows.length;
    refill(this.alerts, alertTable({ ...given, isTold, open: this.unfolded }), [...this.about.keys()].join());
    this.alerts.querySelector("summary")?.addEventListener("click", (event) => (this.unfolded = !event.currentTarget.parentElement.open));
  }

  // The step that the depth profile and the figures show: the chosen one, or else the last.
  step() {
    const last = Math.max(...[...this.grids.values()].map((grid) => grid.steps[grid.steps.length - 1] ?? 0), 0);
    return this.view.step === null ? last : Math.min(this.view.step, last);
  }

  fillDepth() {
    const runs = [...this.about.keys()].map((run) => {
      const { facts, sites, grid } = this.rows.get(run);
      return { ...this.line(run), grid, facts, sites: sites.filter((site) => !(facts.get(site).members && this.view.unfolded.has(facts.get(site).block))) };
    });
    const [low, high] = this.ends;
    const choose = (step) => this.change({ step });
    const width = Math.max(300, this.depth.clientWidth - 26);
    const open = this.opened && this.rows.get(this.opened.run)?.row.get(this.opened.site);
    const nodes = depthProfile({ runs, metric: this.metric, low, high, step: this.step(), latest: this.view.step === null, open, print: this.print, choose, width });
    refill(this.depth, nodes, "depth");
  }

  // The runs of which what belongs to a whole run is shown, that of the opened site first.
  whole() {
    return [...this.about.keys()].sort((one, other) => (other === this.opened?.run) - (one === this.opened?.run)).slice(0, MOST_CARDS);
  }

  // The ledgers of the runs shown.
  async fillLedger(turn) {
    const runs = this.whole();
    const loaded = await Promise.all(runs.map((run) => this.ledgerOf(run)));
    if (turn !== this.drawing) return undefined;
    const width = Math.max(300, this.left.clientWidth - 26);
    const given = loaded.map((each) => ({ ...each, step: this.step(), latest: this.view.step === null, width, theme: this.theme, print: this.print }));
    const nodes = ledgerSection(given);
    this.ledger.hidden = !nodes.length;
    return refill(this.ledger, nodes, `ledger\n${runs.join("\n")}`);
  }

  async ledgerOf(run) {
    const entries = await this.source.json("ledger", { run });
    const metrics = entries.length ? ["norm", "factor", "branch", "input_rms", "input_top"] : [];
    const found = await Promise.all(metrics.map((metric) => this.source.grid("ledger_values", { run, metric })));
    if (!this.inside.has(run)) this.inside.set(run, new Set());
    const open = this.inside.get(run);
    const unfold = (place) => {
      if (!open.delete(place)) open.add(place);
      return this.fillLedger(this.drawing);
    };
    const sites = new Set(this.about.get(run).sites.map(({ site }) => site));
    const grids = Object.fromEntries(metrics.map((metric, index) => [metric, found[index]]));
    return { line: this.line(run), entries, grids, open, sites, unfold, choose: (site) => this.open({ run, site }) };
  }

  // The mixtures of experts of the runs shown.
  async fillExperts(turn) {
    const runs = this.whole();
    const loaded = await Promise.all(runs.map((run) => loadMixtures(this.source, run)));
    if (turn !== this.drawing) return;
    const { from, to } = this.view;
    const look = { colours: this.scales.ramps.amount[this.theme.name], ink: this.theme.accent, print: this.print, hover: (step) => this.hover(step) };
    const shared = { from, to, step: this.step(), latest: this.view.step === null, ...look };
    const nodes = expertsSection(loaded.map((each, index) => ({ line: this.line(runs[index]), ...each, ...shared })));
    this.experts.hidden = !nodes.length;
    refill(this.experts, nodes, `experts\n${runs.join("\n")}`);
  }

  async fillDetail(turn) {
    const { from, to } = this.view;
    const about = [...this.about].map(([key, each]) => [key, each.time, each.observations, each.alerts]);
    const state = [this.opened, this.view.step, from, to, this.host.dark(), about];
    if (!this.changed("detail", ...state)) return;
    this.states.delete("detail"); // a call that is ended before it has filled the section leaves it to the next one
    if (this.opened === null) return this.detail.replaceChildren();
    const { run, site } = this.opened;
    const fact = this.about.get(run).sites.find((one) => one.site === site);
    const having = [...this.about.keys()].filter((each) => this.about.get(each).sites.some((one) => one.site === site));
    const softmax = fact.kind === "softmax";
    const [grids, spread] = await Promise.all([
      Promise.all(having.map((each) => this.source.grid("site", { run: each, site }))),
      this.source.grid(softmax ? "heads" : "histogram", { run, site }),
    ]);
    if (turn !== this.drawing) return;
    refill(
      this.detail,
      siteDetail({
        run,
        about: this.about.get(run),
        fact,
        own: grids[having.indexOf(run)],
        spread,
        compared: having.map((each, index) => ({ ...this.line(each), grid: grids[index] })),
        from,
        to,
        step: this.step(),
        at: this.view.step ?? undefined,
        scales: this.scales,
        causes: this.causes,
        shade: this.theme.name,
        theme: this.theme,
        print: this.print,
        help: this.help,
        hover: (step) => this.hover(step),
        choose: (other) => this.open({ run, site: other }),
        close: () => this.change({ site: "", run: null }),
      }),
      `${run}\n${site}`,
    );
    this.changed("detail", ...state);
  }
}

const DIFFERENCE = "difference"; // the key of the panel of the difference, which is no run

function* everything(grids) {
  for (const grid of grids) yield* grid.values;
}

// Whether a curve spans so much that it is drawn on a logarithmic scale.
function spans(points) {
  const values = points.map(([, value]) => value).filter((value) => Number.isFinite(value));
  const low = Math.min(...values);
  return low > 0 && Math.max(...values) > 50 * low;
}
