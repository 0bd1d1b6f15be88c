// One run: its heading, the strip of its scalars, its heatmap, and buttons that save what is shown.

import { element } from "./charts.js";
import { asPicture, asTable, save } from "./export.js";
import { RIGHT } from "./frame.js";
import { Heatmap } from "./heatmap.js";
import { number } from "./numbers.js";
import { Strip } from "./strip.js";
import { badge } from "./verdict.js";


export class Panel {
  // `choose`, `zoom`, `hover`: see Heatmap. `openAlert(alert)` is called when a flag is clicked.
  constructor(run, { choose, zoom, hover, openAlert }) {
    this.title = element("h2");
    this.key = element("i", { className: "dot" });
    this.badge = element("span");
    this.aside = element("span", { className: "aside" });
    this.strip = new Strip(openAlert, hover);
    this.heatmap = new Heatmap(choose, zoom, hover);
    const button = (text, title, work) => {
      const made = element("button", { type: "button", className: "small", textContent: text, title });
      made.addEventListener("click", work);
      return made;
    };
    const buttons = element("span", { className: "saves" }, button("PNG", "save this picture", () => this.picture()), button("CSV", "save the numbers of this picture", () => this.table()));
    const heading = element("div", { className: "heading" }, this.key, this.title, this.badge, buttons, this.aside);
    this.element = element("section", { className: "panel" }, heading, this.strip.element, this.heatmap.element);
    this.element.dataset.run = run;
  }

  // given: what Heatmap.show takes, and about (the description of the run), curves and lacks (see Strip), line ({name, colour, dash}), several (whether other runs
  // are shown), view, measured, filtered (see rowsOf).
  show(given) {
    this.given = given;
    const { about, curves, lacks, line, several, sites, facts, grid, measured, filtered, axis, domain, left, theme } = given;
    const without = about.sites.length - measured;
    const shown = sites.reduce((count, site) => count + (facts.get(site).members?.length ?? 1), 0);
    const count = measured - filtered;
    const aside = [without ? `${without} have no such number` : "", filtered ? `${filtered} filtered out` : ""].filter(Boolean).join(", ");
    this.title.textContent = line.name;
    this.key.style.background = line.colour;
    this.key.hidden = !several;
    this.badge.replaceChildren(...(about.verdict ? [badge(about.verdict)] : []));
    const doubt = about.verdict?.health === "in doubt" ? `. ${about.verdict.margin}.` : "";
    this.aside.textContent =
      ` ${about.observations} observation${about.observations === 1 ? "" : "s"}, steps ${about.first} to ${about.last}, ` +
      `${Math.min(shown, count)} of ${about.sites.length} sites${aside ? ` (${aside})` : ""}${doubt}`;
    if (about.verdict === null) this.aside.textContent = ` ${given.metric.says} Blue: less, at most ${number(-given.low)}; brown: more. ${sites.length} ${sites.length === 1 ? "site" : "sites"} in both.`;
    const width = Math.max(left + RIGHT + 60, this.heatmap.element.clientWidth || 900);
    this.strip.show({ curves, lacks, alerts: about.alerts, grid, axis, domain, left, width, right: RIGHT, colour: line.colour, theme });
    this.heatmap.show({ ...given, alerts: about.alerts, label: line.name });
    this.empty(sites.length, measured);
  }

  // Say why there is no row.
  empty(rows, measured) {
    this.heatmap.element.classList.toggle("empty", !rows);
    this.heatmap.element.dataset.why = rows ? "" : this.given.about.verdict === null ? "The two runs have no site in common." : measured ? "The filter leaves no site." : `No site of this run has the metric ${this.given.metric.title}.`;
  }

  get name() {
    return `${this.given.line.name}-${this.given.metric.name}`;
  }

  picture() {
    const { line, metric, theme } = this.given;
    asPicture(this.heatmap.canvas, `${line.name}: ${metric.title}`, theme).toBlob((blob) => save(blob, `${this.name}.png`));
  }

  table() {
    const { grid, sites, view } = this.given;
    save(new Blob([asTable({ grid, sites, from: view.from, to: view.to })], { type: "text/csv" }), `${this.name}.csv`);
  }
}
