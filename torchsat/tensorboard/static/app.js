// The Saturation view: what is chosen, in the address of the page; controls, heatmaps, alerts, depth profile, and one site in detail.

import { LINES, along, bands, element, lines, number, percent, printed, range, short, ticks } from "./charts.js";
import { AXES, Heatmap } from "./heatmap.js";

const KINDS = { module: "modules", call: "calls", recurrent: "recurrent gates", softmax: "softmaxes" };
const ORDERS = { flow: "data flow", worst: "worst first" };
const CURVES = ["relative_derivative", "attenuation", "grad_z_rms", "update_ratio", "z_std", "entropy_min", "logit_std"];
const FIRST_RUNS = 2;
const EMPTY = 3000; // milliseconds until a server without data is asked again
const FIRST_METRIC = "excess";

const THEMES = {
  light: { page: "#ffffff", ink: "#202124", faint: "#5f6368", rule: "#9aa0a6", missing: "#c6cacf", accent: "#0b57d0", critical: "#c5221f", warning: "#a85b00" },
  dark: { page: "#202124", ink: "#e8eaed", faint: "#a9aeb4", rule: "#6b7075", missing: "#54585d", accent: "#8ab4f8", critical: "#ff8a80", warning: "#fdd663" },
};

// What the address says; all that is not there has its default.
function decode(query) {
  return {
    runs: query.has("runs") ? query.getAll("runs").filter(Boolean) : null,
    metric: query.get("metric") ?? FIRST_METRIC,
    run: query.get("run"),
    site: query.get("site"), // null: not said, so that of the first alert; "": none
    step: query.has("step") && Number.isFinite(Number(query.get("step"))) ? Number(query.get("step")) : null,
    order: Object.hasOwn(ORDERS, query.get("order") ?? "") ? query.get("order") : "flow",
    axis: Object.hasOwn(AXES, query.get("axis") ?? "") ? query.get("axis") : "step",
    filter: query.get("filter") ?? "",
    hidden: new Set((query.get("hidden") ?? "").split(".").filter((kind) => Object.hasOwn(KINDS, kind))),
  };
}

function encode(view) {
  const query = new URLSearchParams();
  if (view.runs !== null) (view.runs.length ? view.runs : [""]).forEach((run) => query.append("runs", run));
  if (view.metric !== FIRST_METRIC) query.set("metric", view.metric);
  if (view.run !== null && view.site) query.set("run", view.run);
  if (view.site !== null) query.set("site", view.site);
  if (view.step !== null) query.set("step", view.step);
  if (view.order !== "flow") query.set("order", view.order);
  if (view.axis !== "step") query.set("axis", view.axis);
  if (view.filter) query.set("filter", view.filter);
  if (view.hidden.size) query.set("hidden", [...view.hidden].join("."));
  return query;
}

function shownName(run) {
  return run.replace(/\/torchsat$/, "") || run;
}

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
    this.choices = element("div", { className: "group" });
    this.aside = element("div", { className: "group" });
    // The field stays the same element, so that typing in it is never cut short.
    this.filter = element("input", { type: "search", value: this.view.filter, placeholder: "part of a name", size: 16 });
    this.filter.dataset.control = "filter";
    this.filter.addEventListener("input", () => this.change({ filter: this.filter.value }));
    const field = element("label", {}, element("span", { textContent: "Sites" }), this.filter);
    this.controls = element("header", { className: "controls" }, this.choices, field, this.aside);
    this.maps = element("main", { className: "maps" });
    this.message = element("p", { className: "message", role: "status" });
    this.alerts = element("section", { className: "card alerts" });
    this.depth = element("section", { className: "card depth" });
    this.detail = element("section", { className: "card detail" });
    this.alerts.setAttribute("aria-label", "Alerts");
    this.depth.setAttribute("aria-label", "Depth profile");
    this.detail.setAttribute("aria-label", "Site");
    const left = element("div", { className: "left" }, this.maps, this.alerts, this.depth);
    this.frame = element("div", { className: "torchsat" }, this.controls, this.message, element("div", { className: "columns" }, left, this.detail));
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

  // Everything anew from the view. A newer call ends an older one at its next pause.
  async draw() {
    const turn = ++this.drawing;
    const failed = (error) => {
      if (turn === this.drawing) this.message.textContent = `This view could not be loaded: ${error.message}`;
    };
    try {
      const [scales, runs] = await Promise.all([this.source.json("scales"), this.source.json("runs")]);
      if (turn !== this.drawing) return;
      this.scales = scales;
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

  chosen() {
    const known = this.runs.map((run) => run.name);
    if (this.view.runs !== null) return known.filter((run) => this.view.runs.includes(run));
    const newest = [...this.runs].sort((one, other) => other.time - one.time).slice(0, FIRST_RUNS);
    return known.filter((run) => newest.some((each) => each.name === run));
  }

  // The run and site whose details are shown: what the view says, or the place of the first alert; null where there is none.
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
    const focused = document.activeElement?.dataset?.control;
    this.fillControls();
    this.fillMaps();
    this.fillAlerts();
    this.fillDepth();
    if (focused) this.controls.querySelector(`[data-control="${focused}"]`)?.focus();
    performance.measure("torchsat.fill", "torchsat.fill.start");
  }

  fillControls() {
    const select = (name, title, options, value) => {
      const made = element("select", { title }, ...options.map(([key, text]) => element("option", { value: key, textContent: text, selected: key === value })));
      made.dataset.control = name;
      made.addEventListener("change", () => this.change({ [name]: made.value }));
      return element("label", {}, element("span", { textContent: title }), made);
    };
    const present = new Set([...this.about.values()].flatMap((about) => about.metrics));
    const metrics = this.scales.metrics.filter((metric) => present.has(metric.name) || metric === this.metric);
    const open = this.controls.querySelector("details")?.open ?? false;
    const boxes = this.runs.map((run) => {
      const box = element("input", { type: "checkbox", checked: this.about.has(run.name) });
      box.dataset.control = `run ${run.name.replace(/["\\]/g, "\\$&")}`;
      box.addEventListener("change", () => {
        const runs = new Set(this.about.keys());
        if (box.checked) runs.add(run.name);
        else runs.delete(run.name);
        this.change({ runs: [...runs] });
      });
      const aside = element("small", { textContent: ` ${run.sites} sites` });
      return element("label", {}, box, element("span", { textContent: shownName(run.name) }), aside);
    });
    const runs = element("details", { className: "runs", open }, element("summary", { textContent: `Runs: ${this.about.size} of ${this.runs.length}` }), element("div", {}, ...boxes));
    runs.querySelector("summary").dataset.control = "runs";
    const there = new Set([...this.about.values()].flatMap((about) => about.sites.map((site) => site.kind)));
    const kinds = Object.entries(KINDS).filter(([kind]) => there.has(kind)).map(([kind, text]) => {
      const box = element("input", { type: "checkbox", checked: !this.view.hidden.has(kind) });
      box.dataset.control = `kind ${kind}`;
      box.addEventListener("change", () => {
        const hidden = new Set(this.view.hidden);
        if (box.checked) hidden.delete(kind);
        else hidden.add(kind);
        this.change({ hidden });
      });
      return element("label", { className: "kind" }, box, text);
    });
    const orders = Object.entries(ORDERS);
    const axes = Object.entries(AXES).map(([key, axis]) => [key, axis.title]);
    this.choices.replaceChildren(
      select("metric", "Metric", metrics.map((metric) => [metric.name, metric.title]), this.metric.name),
      runs,
      select("order", "Order", orders, this.view.order),
      select("axis", "x axis", axes, this.view.axis),
    );
    if (this.filter.value !== this.view.filter) this.filter.value = this.view.filter;
    const shown = [kinds.length > 1 ? element("fieldset", { className: "kinds" }, ...kinds) : null, this.legend()];
    this.aside.replaceChildren(...shown.filter(Boolean));
  }

  legend() {
    const [low, high] = this.ends;
    const bar = element("canvas", { width: 256, height: 1, className: "ramp" });
    const pen = bar.getContext("2d");
    const turned = this.metric.ramp === "heat" && this.metric.worst === "low";
    this.colours.forEach((colour, index) => {
      pen.fillStyle = colour;
      pen.fillRect(turned ? 255 - index : index, 0, 1, 1);
    });
    const text = (value) => (this.metric.form === "share" ? `${Number((100 * value).toPrecision(3))} %` : short(value));
    const marks = ticks(this.metric.scale, low, high, 4).map((value) => {
      const mark = element("span", { textContent: text(value) });
      mark.style.left = `${100 * along(this.metric.scale, value, low, high)}%`;
      return mark;
    });
    const explained = element("p", { className: "says", textContent: this.metric.says });
    return element("div", { className: "key-of-colours" }, element("div", { className: "bar" }, bar, ...marks), explained);
  }

  colour(run) {
    return LINES[[...this.about.keys()].indexOf(run) % LINES.length];
  }

  // The sites of a run that have this metric, and of these the ones that pass the filters, in the order wanted.
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
      });
    }
  }

  panel(run) {
    const title = element("h2");
    const key = element("i", { className: "key" });
    const aside = element("span", { className: "aside" });
    const heatmap = new Heatmap((site, step) => this.change({ run, site, step: step ?? this.view.step }));
    const made = element("section", { className: "panel" }, element("div", { className: "heading" }, key, title, aside), heatmap.element);
    made.dataset.run = run;
    return { element: made, title, key, aside, heatmap };
  }

  // Whether what a part shows has changed since it was last filled: a reload that brings nothing new must not take the focus away.
  changed(part, ...given) {
    const state = JSON.stringify(given);
    if (this.states.get(part) === state) return false;
    this.states.set(part, state);
    return true;
  }

  fillAlerts() {
    if (!this.changed("alerts", [...this.about].map(([run, about]) => [run, about.alerts]))) return;
    const rows = [...this.about].flatMap(([run, about]) => about.alerts.map((alert) => [run, alert]));
    const several = this.about.size > 1;
    const made = rows.map(([run, alert]) => {
      const site = alert.places[0] ?? null;
      const open = element("button", { type: "button", className: "link", textContent: alert.site, disabled: site === null });
      open.addEventListener("click", () => this.change({ run, site, step: alert.fired }));
      const until = ended(alert, "");
      return element(
        "tr",
        {},
        element("td", { className: alert.severity, textContent: alert.severity }),
        several ? element("td", { textContent: shownName(run) }) : null,
        element("td", {}, open),
        element("td", { textContent: alert.rule }),
        element("td", { textContent: `since ${alert.since}, ${until}` }),
        element("td", { textContent: alert.causes.length ? `${alert.causes[0].name} ${percent(alert.causes[0].share)}` : "" }),
      );
    });
    const heads = ["", ...(several ? ["run"] : []), "site", "rule", "steps", "first cause"].map((text) => element("th", { textContent: text }));
    this.alerts.replaceChildren(
      element("h2", { textContent: `Alerts (${rows.length})` }),
      rows.length
        ? element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...made))
        : element("p", { textContent: "No alert was raised in the runs shown." }),
      element("p", { className: "aside", textContent: "A click on a row of a heatmap, or Enter on it, opens a site: its derivatives over time, its curves, its alerts with causes and remedies." }),
    );
  }

  // The step that the depth profile and the figures show: the chosen one, else the last.
  step() {
    const last = Math.max(...[...this.grids.values()].map((grid) => grid.steps[grid.steps.length - 1] ?? 0), 0);
    return this.view.step === null ? last : Math.min(this.view.step, last);
  }

  fillDepth() {
    const steps = [...new Set([...this.grids.values()].flatMap((grid) => Array.from(grid.steps)))].sort((one, other) => one - other);
    const step = this.step();
    const [low, high] = this.ends;
    const names = merged([...this.about.keys()].map((run) => this.sites.get(run)));
    const place = new Map(names.map((name, index) => [name, index]));
    const series = [...this.grids].filter(([, grid]) => grid.steps.length && grid.steps[0] <= step).map(([run, grid]) => {
      const row = grid.row(step);
      const points = this.sites.get(run).map((site) => [place.get(site), grid.at(row, grid.column.get(site))]);
      points.sort((one, other) => one[0] - other[0]);
      const then = grid.steps[row] === step ? "" : `, step ${grid.steps[row]}`;
      return { name: shownName(run) + then, colour: this.colour(run), points };
    });
    const slider = element("input", { type: "range", min: 0, max: Math.max(0, steps.length - 1), step: 1 });
    slider.value = String(Math.max(0, steps.findLastIndex((each) => each <= step)));
    slider.dataset.control = "step";
    slider.setAttribute("aria-label", "step of the depth profile");
    const said = element("output", { textContent: `step ${step}` });
    slider.addEventListener("input", () => {
      said.textContent = `step ${steps[slider.value]}`;
    });
    slider.addEventListener("change", () => this.change({ step: steps[slider.value] }));
    const refocus = document.activeElement?.dataset?.control === "step";
    const chart = names.length
      ? lines({
          title: `${this.metric.title} by depth: from the first site to the last`,
          series,
          scale: this.metric.scale,
          low,
          high,
          xLow: 0,
          xHigh: Math.max(1, names.length - 1),
          form: this.metric.form,
          xName: "site",
          xLabel: (index) => names[index] ?? "",
          at: place.get(this.open?.site),
          width: 680,
          height: 170,
        })
      : element("p", { textContent: "No site is shown." });
    this.depth.replaceChildren(element("h2", { textContent: "Depth profile" }), element("label", { className: "slider" }, slider, said), chart);
    if (refocus) slider.focus();
  }

  async fillDetail(turn) {
    const about = [...this.about].map(([key, each]) => [key, each.time, each.observations, each.alerts]);
    if (!this.changed("detail", this.open, this.view.step, this.host.dark(), about)) return;
    this.states.delete("detail"); // until it is filled
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
    const own = grids[having.indexOf(run)];
    const made = [this.facts(run, fact), ...this.told(run, site), this.figures(own, fact)];
    const charts = element("div", { className: "charts" });
    const steps = grids.flatMap((grid) => [grid.steps[0], grid.steps[grid.steps.length - 1]]).filter((step) => step !== undefined);
    const shared = { xLow: Math.min(...steps), xHigh: Math.max(...steps), at: this.view.step ?? undefined };
    if (spread.steps.length) charts.append(softmax ? this.heads(spread, shared) : this.histogram(spread, shared));
    charts.append(...this.curves(fact, having, grids, run, shared));
    this.detail.replaceChildren(...made, charts);
    this.changed("detail", this.open, this.view.step, this.host.dark(), about);
  }

  facts(run, fact) {
    const role = fact.output ? ", makes an output of the model" : fact.gate ? ", a gate of another signal" : "";
    const fed = this.about.get(run).layers.filter((layer) => layer.feeds.includes(fact.site)).map((layer) => layer.name);
    const close = element("button", { type: "button", className: "close", textContent: "×", title: "close" });
    close.addEventListener("click", () => this.change({ site: "", run: null }));
    const text = `${fact.activation}${role}${fact.units ? `, ${fact.units} units` : ""}${fed.length ? `, fed by ${fed.join(", ")}` : ""}, in ${shownName(run)}`;
    return element("div", { className: "facts" }, close, element("h2", { textContent: fact.site }), element("p", { textContent: text }));
  }

  // The alerts of a site: what, since when, why with which shares, what to try.
  told(run, site) {
    const found = this.about.get(run).alerts.filter((alert) => alert.places.includes(site) || alert.also.includes(site));
    return found.map((alert) => {
      const until = ended(alert, "step ");
      const head = element("p", {}, element("b", { className: alert.severity, textContent: `${alert.severity}: ${alert.rule}` }), ` since step ${alert.since}, raised at step ${alert.fired}, ${until}`);
      const causes = alert.causes.map((cause) => {
        const share = element("span", { className: "share" });
        share.style.width = `${Math.round(100 * cause.share)}%`;
        return element(
          "li",
          {},
          element("div", { className: "blame" }, share, element("b", { textContent: `${cause.name} ${percent(cause.share)}` })),
          element("div", { textContent: cause.evidence }),
          element("div", { className: "remedy" }, element("b", { textContent: "Try: " }), cause.remedy),
        );
      });
      const origin = alert.places.includes(site) ? null : element("p", { textContent: `It began at ${alert.site}; this site suffers from the same.` });
      const also = alert.also.length ? element("p", { textContent: `Also: ${alert.also.join(", ")}` }) : null;
      return element("article", { className: `alert ${alert.severity}` }, head, origin, element("p", { textContent: alert.message }), causes.length ? element("ol", {}, ...causes) : null, also);
    });
  }

  figures(grid, fact) {
    const row = grid.row(this.step());
    const cells = this.scales.metrics
      .map((metric) => [metric, grid.at(row, grid.column.get(metric.name))])
      .filter(([, value]) => !Number.isNaN(value))
      .map(([metric, value]) => element("div", { title: metric.says }, element("span", { textContent: metric.title }), element("b", { textContent: printed(metric, value) })));
    const normal = fact.normal_derivative === null ? "" : ` On N(0, 1) inputs ${fact.activation} has E|f'| / peak ${number(fact.normal_derivative)} and ${percent((fact.normal_low ?? 0) + (fact.normal_high ?? 0))} saturated.`;
    return element("div", { className: "figures" }, element("p", { textContent: `At step ${grid.steps[row]}.${normal}` }), element("div", { className: "cells" }, ...cells));
  }

  histogram(grid, shared) {
    const label = (step, bin, value) => `step ${step}, |f'| / peak from ${number(edge(bin))} to ${number(edge(bin + 1))}: ${Number.isNaN(value) ? "not measured" : percent(value)}`;
    const dark = this.host.dark() ? "dark" : "light";
    return bands({ title: "|f'| / peak over time: share of elements, log scales", grid, colours: this.scales.ramps.amount[dark], label, ends: ["1", "0"], scale: "log", low: 1e-4, ink: this.theme.accent, ...shared });
  }

  heads(grid, shared) {
    const label = (step, head, value) => `step ${step}, head ${head}: ${Number.isNaN(value) ? "not measured" : number(value)}`;
    const dark = this.host.dark() ? "dark" : "light";
    const colours = [...this.scales.ramps.heat[dark]].reverse();
    return bands({ title: "Entropy of each head over time: 1 even, 0 one key", grid, colours, label, ends: [`head ${grid.names.length - 1}`, "head 0"], scale: "linear", low: 0, ink: this.theme.accent, ...shared });
  }

  curves(fact, having, grids, run, shared) {
    const several = having.length > 1;
    const made = [];
    const own = grids[having.indexOf(run)];
    if (own.points("saturated").some(([, value]) => !Number.isNaN(value))) {
      const series = several
        ? having.map((each, index) => ({ name: shownName(each), colour: this.colour(each), points: grids[index].points("saturated") }))
        : [["saturated", LINES[0]], ["low", LINES[5]], ["high", LINES[1]], ["stuck", LINES[3]]].map(([name, tint], index) => ({ name: name === "stuck" ? "stuck units" : name, colour: tint, dash: index ? "4 3" : "", points: own.points(name) }));
      made.push(lines({ ...shared, title: "Saturated share", series, scale: "linear", low: 0, high: 1, form: "share" }));
    }
    for (const name of CURVES) {
      const metric = this.scales.metrics.find((each) => each.name === name);
      const series = having.map((each, index) => ({ name: shownName(each), colour: this.colour(each), points: grids[index].points(name) }));
      const values = series.flatMap((each) => each.points.map(([, value]) => value)).filter((value) => Number.isFinite(value) && (metric.scale !== "log" || value > 0));
      if (!values.length) continue;
      let [low, high] = metric.ramp === "heat" && metric.scale === "linear" ? [metric.low, metric.high] : range({ ...metric, low: null, high: null }, values);
      if (name === "attenuation") high = Math.max(1, high);
      const limit = name === "relative_derivative" ? fact.normal_derivative : undefined;
      const title = metric.title + (limit ? " (dashed: on N(0, 1) inputs)" : "");
      made.push(lines({ ...shared, title, series, scale: metric.scale, low, high, form: metric.form, limit }));
    }
    return made;
  }
}

function* everything(grids) {
  for (const grid of grids) yield* grid.values;
}

function ended(alert, word) {
  if (alert.cleared === null) return "still firing";
  return alert.gone ? `its place is gone after ${word}${alert.cleared}` : `cleared at ${word}${alert.cleared}`;
}

// Names of several lists in one order: what a shorter list alone has stands after its neighbour there.
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

// Edges of the histogram's bins: 0, then each octave from 2^-24 to 1 in two, as HISTOGRAM_EDGES in record.py.
function edge(index) {
  if (index === 0) return 0;
  return 2 ** (Math.floor((index - 1) / 2) - 24) * (index % 2 ? 1 : 1.5);
}
