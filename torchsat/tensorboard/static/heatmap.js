// One run as a picture of sites x steps. An observation fills the space from its step to the next one. Every pixel shows a stored number. If several
// observations share a pixel it shows the worst of them, or the latest if neither end of the metric's scale is bad.

import { element } from "./charts.js";
import { AXES, FONT, TOP, aside, drawAlerts, drawAxis, drawNames } from "./frame.js";
import { along } from "./numbers.js";

// Sizes in CSS pixels.
const LEAST_LEFT = 60; // the room for names of sites
const MOST_LEFT = 220;
const RIGHT = 18; // the room for the dots of alerts that still fire
const AXIS = 20; // the height of the x axis
const LEAST_ROW = 3;
const MOST_ROW = 24;
const HEIGHT = 560; // of all rows, if they are neither too small nor too large then

export class Heatmap {
  // `choose(site, step)` is called on a click or on Enter. The step is null after a click on the name of a site.
  constructor(choose) {
    this.choose = choose;
    this.canvas = element("canvas", { className: "heat", tabIndex: 0 });
    this.canvas.setAttribute("role", "application");
    this.mark = element("canvas", { className: "mark" });
    this.tip = element("div", { className: "tip", hidden: true });
    this.said = element("div", { className: "said" });
    this.said.setAttribute("aria-live", "polite");
    this.element = element("div", { className: "heatmap" }, this.canvas, this.mark, this.tip, this.said);
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.leave());
    this.canvas.addEventListener("click", (event) => {
      const cell = this.cell(event);
      if (cell) this.choose(cell.site, cell.step);
    });
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("blur", () => this.leave());
    this.cursor = null;
  }

  // Draw. given: {grid, sites (names in order), facts (by name), metric, colours (CSS), low, high, axis, domain (of the x axis), alerts, chosen (a site),
  // step, theme, label, print}
  show(given) {
    performance.mark("torchsat.draw.start");
    const held = this.cursor && { site: this.given.sites[this.cursor.place], step: this.given.grid.steps[this.cursor.row] };
    this.given = given;
    this.cursor = null;
    this.tip.hidden = true;
    const { grid, sites, axis, domain } = given;
    this.edges = AXES[axis].edges(grid.steps);
    this.scale = window.devicePixelRatio || 1;
    const names = sites.map((site) => site + aside(given.facts.get(site)));
    this.left = Math.min(MOST_LEFT, Math.max(LEAST_LEFT, 14 + widest(this.canvas.getContext("2d"), names)));
    this.width = Math.max(this.left + RIGHT + 60, this.element.clientWidth || 900);
    this.row = Math.max(LEAST_ROW, Math.min(MOST_ROW, Math.floor(HEIGHT / Math.max(1, sites.length))));
    this.height = TOP + this.row * sites.length + AXIS;
    this.plot = this.width - this.left - RIGHT;
    this.domain = domain;
    for (const canvas of [this.canvas, this.mark]) {
      canvas.width = Math.round(this.width * this.scale);
      canvas.height = Math.round(this.height * this.scale);
      canvas.style.width = `${this.width}px`;
      canvas.style.height = `${this.height}px`;
    }
    this.canvas.setAttribute("aria-label", `${given.label}: ${given.metric.title}, ${sites.length} sites by ${grid.steps.length} observations. Arrow keys move, Enter opens a site.`);
    const pen = this.canvas.getContext("2d");
    pen.scale(this.scale, this.scale);
    pen.font = FONT;
    this.paint(pen);
    drawNames(pen, this);
    drawAxis(pen, this);
    drawAlerts(pen, this);
    if (held && sites.includes(held.site) && grid.steps.includes(held.step)) this.move({ place: sites.indexOf(held.site), row: grid.steps.indexOf(held.step) });
    this.outline();
    performance.measure("torchsat.draw", "torchsat.draw.start");
  }

  // For each device pixel of a row, the first and the last of the observations that it stands for; -1 if there are none.
  columns() {
    const [start, end] = this.domain;
    const count = Math.max(1, Math.round(this.plot * this.scale));
    const span = (end - start) / count;
    const [first, last] = [new Int32Array(count).fill(-1), new Int32Array(count).fill(-1)];
    const n = this.edges.length - 1;
    let at = 0;
    for (let column = 0; column < count; column++) {
      const [from, to] = [start + column * span, start + (column + 1) * span];
      if (to <= this.edges[0] || from >= this.edges[n]) continue;
      while (at < n - 1 && this.edges[at + 1] <= from + span * 1e-9) at++;
      let until = at;
      while (until < n - 1 && this.edges[until + 1] < to - span * 1e-9) until++;
      first[column] = at;
      last[column] = until;
    }
    return { first, last, count };
  }

  // Of the observations `first` to `last`, which share a pixel, the one that the pixel shows.
  pick(column, first, last) {
    const { grid, metric } = this.given;
    let found = last;
    if (metric.worst === null) {
      while (found > first && Number.isNaN(grid.at(found, column))) found--;
      return found;
    }
    let best = grid.at(found, column);
    for (let row = last - 1; row >= first; row--) {
      const value = grid.at(row, column);
      if (Number.isNaN(value)) continue;
      if (Number.isNaN(best) || (metric.worst === "high" ? value > best : value < best)) [found, best] = [row, value];
    }
    return found;
  }

  // The index of the colour of a number, as `shade` in colours.py.
  shade(value) {
    const { metric, low, high, colours } = this.given;
    const position = Math.min(1, Math.max(0, along(metric.scale, value, low, high)));
    return Math.floor((metric.reversed ? 1 - position : position) * (colours.length - 1) + 0.5);
  }

  // The cells: one pixel per row of a buffer, enlarged to the height of a row. Where there is no number, the page shows through grey stripes.
  paint(pen) {
    const { grid, sites, colours, theme } = this.given;
    this.shown = this.columns();
    const { first, last, count } = this.shown;
    if (!sites.length) return;
    const image = new ImageData(count, sites.length);
    const pixels = new Uint32Array(image.data.buffer);
    const packed = colours.map(word);
    const [blank, stripe] = [word(theme.page), word(theme.missing)];
    sites.forEach((site, place) => {
      const column = grid.column.get(site);
      let known = [-2, -2];
      let colour = 0;
      for (let x = 0; x < count; x++) {
        if (first[x] < 0) continue;
        if (first[x] !== known[0] || last[x] !== known[1]) {
          known = [first[x], last[x]];
          const value = column === undefined ? NaN : grid.at(this.pick(column, first[x], last[x]), column);
          colour = Number.isNaN(value) ? 0 : packed[this.shade(value)];
        }
        pixels[place * count + x] = colour || (x % 6 ? blank : stripe);
      }
    });
    const buffer = element("canvas", { width: count, height: sites.length });
    buffer.getContext("2d").putImageData(image, 0, 0);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(buffer, this.left, TOP, this.plot, this.row * sites.length);
    pen.strokeStyle = theme.rule;
    pen.strokeRect(this.left - 0.5, TOP - 0.5, this.plot + 1, this.row * sites.length + 1);
  }

  // The position of a step on the x axis, in CSS pixels; null if it lies before the first observation.
  place(step) {
    const { grid } = this.given;
    if (!grid.steps.length || step < grid.steps[0]) return null;
    const [start, end] = this.domain;
    const at = this.edges[grid.row(step)];
    return this.left + (this.plot * (at - start)) / (end - start);
  }

  // Outlines of the chosen row and step and of the cell under the cursor, on a canvas of their own, so that they can be drawn anew alone.
  outline() {
    const { sites, chosen, step, theme } = this.given;
    const pen = this.mark.getContext("2d");
    pen.setTransform(this.scale, 0, 0, this.scale, 0, 0);
    pen.clearRect(0, 0, this.width, this.height);
    pen.strokeStyle = theme.accent;
    pen.lineWidth = 1.5;
    const row = sites.indexOf(chosen);
    if (row >= 0) pen.strokeRect(this.left - 1, TOP + row * this.row, this.plot + 2, this.row);
    const x = step === null ? null : this.place(step);
    if (x !== null) {
      pen.setLineDash([3, 3]);
      pen.beginPath();
      pen.moveTo(x, TOP);
      pen.lineTo(x, TOP + this.row * sites.length);
      pen.stroke();
      pen.setLineDash([]);
    }
    if (this.cursor) {
      const box = this.box(this.cursor.place, this.cursor.row);
      pen.strokeStyle = theme.ink;
      pen.strokeRect(box.x - 1, box.y - 1, Math.max(3, box.width + 2), box.height + 2);
    }
  }

  // The rectangle of a cell, in CSS pixels from the upper left corner of the canvas.
  box(place, row) {
    const [start, end] = this.domain;
    const x = (at) => this.left + (this.plot * (at - start)) / (end - start);
    return { x: x(this.edges[row]), y: TOP + place * this.row, width: x(this.edges[row + 1]) - x(this.edges[row]), height: this.row };
  }

  // What is under the pointer: a reading over a cell; {site, place, step: null} over the name of a site; null elsewhere.
  cell(event) {
    const { sites, grid } = this.given;
    const box = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const place = Math.floor((y - TOP) / this.row);
    if (place < 0 || place >= sites.length) return null;
    const site = sites[place];
    if (x < this.left) return { site, place, step: null };
    const pixel = Math.floor(((x - this.left) / this.plot) * this.shown.count);
    const [first, last] = [this.shown.first[pixel], this.shown.last[pixel]];
    if (first === undefined || first < 0) return null;
    const column = grid.column.get(site);
    return this.reading(place, column === undefined ? last : this.pick(column, first, last), first, last);
  }

  // One number with its site and step. `from` and `to`: the steps of the observations that share its pixel.
  reading(place, row, first = row, last = row) {
    const { sites, grid } = this.given;
    const column = grid.column.get(sites[place]);
    const value = column === undefined ? NaN : grid.at(row, column);
    return { site: sites[place], place, row, step: grid.steps[row], value, from: grid.steps[first], to: grid.steps[last] };
  }

  point(event) {
    const cell = this.cell(event);
    if (!cell) return this.leave();
    const box = this.canvas.getBoundingClientRect();
    this.tell(cell, event.clientX - box.left, event.clientY - box.top);
  }

  // Show a tip about a reading beside a position.
  tell(cell, x, y) {
    const { metric, facts, alerts, print } = this.given;
    const fact = facts.get(cell.site);
    const rows = [element("b", { textContent: cell.site })];
    if (fact) rows.push(element("div", { textContent: fact.activation + (fact.output ? ", makes an output" : fact.gate ? ", a gate" : "") }));
    if (cell.step !== null) {
      rows.push(element("div", { textContent: `${metric.title}: ${print.value(metric, cell.value)}` }));
      const among = metric.worst === null ? "latest" : "worst";
      rows.push(element("div", { textContent: `step ${cell.step}` + (cell.from === cell.to ? "" : ` (${among} of steps ${cell.from} to ${cell.to})`) }));
    }
    for (const alert of alerts) {
      const here = alert.places.includes(cell.site);
      const then = cell.step === null || (cell.step >= alert.since && (alert.cleared === null || cell.step <= alert.cleared));
      if (here && then) rows.push(element("div", { className: alert.severity, textContent: `${alert.rule}, since step ${alert.since}${alert.cleared === null ? "" : `, ${alert.gone ? "gone after" : "cleared at"} ${alert.cleared}`}` }));
    }
    this.tip.replaceChildren(...rows);
    this.tip.hidden = false;
    const left = x + 16 + this.tip.offsetWidth > this.width ? x - 12 - this.tip.offsetWidth : x + 16;
    this.tip.style.left = `${Math.max(0, left)}px`;
    this.tip.style.top = `${y + 14}px`;
  }

  leave() {
    this.tip.hidden = true;
    if (this.cursor) {
      this.cursor = null;
      this.outline();
    }
  }

  key(event) {
    const { sites, grid, chosen, step } = this.given;
    if (!sites.length || !grid.steps.length) return;
    const start = { place: Math.max(0, sites.indexOf(chosen)), row: step === null ? grid.steps.length - 1 : grid.row(step) };
    const at = this.cursor ?? start;
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [-10, 0], PageDown: [10, 0] };
    if (event.key === "Enter" || event.key === " ") this.choose(sites[at.place], grid.steps[at.row]);
    else if (event.key === "Escape") return this.leave();
    else if (event.key === "Home" || event.key === "End") this.cursor = { place: at.place, row: event.key === "Home" ? 0 : grid.steps.length - 1 };
    else if (event.key in moves) {
      const [down, right] = this.cursor ? moves[event.key] : [0, 0];
      this.cursor = {
        place: Math.min(sites.length - 1, Math.max(0, at.place + down)),
        row: Math.min(grid.steps.length - 1, Math.max(0, at.row + right)),
      };
    } else return;
    event.preventDefault();
    if (this.cursor) this.move(this.cursor);
  }

  // Move the cursor of the keyboard to a cell, and say what is there for screen readers.
  move(cursor) {
    this.cursor = cursor;
    const cell = this.reading(cursor.place, cursor.row);
    const box = this.box(cell.place, cell.row);
    this.tell(cell, box.x + box.width / 2, box.y + box.height);
    this.said.textContent = `${cell.site}, step ${cell.step}, ${this.given.metric.title} ${this.given.print.value(this.given.metric, cell.value)}`;
    this.outline();
  }
}

// The width of the widest text, in pixels.
function widest(pen, texts) {
  pen.font = `bold ${FONT}`;
  return Math.ceil(Math.max(0, ...texts.map((text) => pen.measureText(text).width)));
}

// A CSS colour as one little-endian pixel of an image.
function word(colour) {
  const value = Number.parseInt(colour.slice(1), 16);
  return (0xff000000 | ((value & 0xff) << 16) | (value & 0xff00) | (value >> 16)) >>> 0;
}
