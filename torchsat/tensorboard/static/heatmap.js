// One run as a picture of sites x steps. An observation fills the space from its step to the next one. Every pixel shows a stored number. If several
// observations share a pixel it shows the worst of them, or the latest if neither end of the metric's scale is bad.

import { element } from "./charts.js";
import { AXES, FONT, RIGHT, TOP, aside, drawAlerts, drawAxis, drawNames, titled } from "./frame.js";
import { along, worse } from "./numbers.js";

// Sizes in CSS pixels.
const LEAST_LEFT = 60; // the room for names of sites
const MOST_LEFT = 220;
const AXIS = 20; // the height of the x axis
const LEAST_ROW = 3;
const MOST_ROW = 20;
const HEIGHT = 460; // of all rows, if they are neither too small nor too large then

const [MISSING, BROKEN] = [-1, -2]; // how an observation looks that has no number, and one that is not finite
const DRAG = 5; // how far the pointer must move until it draws a frame to zoom in on

export class Heatmap {
  // `choose(row, step)` is called on a click or on Enter with the name of a row. The step is null after a click on the name. `zoom({from, to, top, bottom})`
  // is called with the steps and rows to zoom in on, and with null to see all again; `hover(step)` with the step under the pointer.
  constructor(choose, zoom, hover) {
    Object.assign(this, { choose, zoom, hover, frame: null });
    this.canvas = element("canvas", { className: "heat", tabIndex: 0 });
    this.canvas.setAttribute("role", "application");
    this.mark = element("canvas", { className: "mark" });
    this.tip = element("div", { className: "tip", hidden: true });
    this.said = element("div", { className: "said" });
    this.said.setAttribute("aria-live", "polite");
    this.element = element("div", { className: "heatmap crossed" }, this.canvas, this.mark, this.tip, this.said);
    this.element.cross = (step) => {
      this.crossed = step;
      this.outline();
    };
    this.crossed = null;
    this.canvas.addEventListener("pointerdown", (event) => this.press(event));
    this.canvas.addEventListener("pointerup", (event) => this.release(event));
    this.canvas.addEventListener("dblclick", () => this.zoom(null));
    this.canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.leave());
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("blur", () => this.leave());
    this.cursor = null;
  }

  // The room that the names of these rows take, in pixels.
  static room(sites, facts) {
    const pen = element("canvas").getContext("2d");
    const names = sites.map((site) => titled(facts.get(site) ?? { site }) + aside(facts.get(site)));
    return Math.min(MOST_LEFT, Math.max(LEAST_LEFT, 14 + widest(pen, names)));
  }

  // The height of so many rows, in pixels.
  static tall(count) {
    return count * Math.max(LEAST_ROW, Math.min(MOST_ROW, Math.floor(HEIGHT / Math.max(1, count))));
  }

  // Draw. given: {grid, sites (names of the rows in order), facts (by name), row (from each site to its row), metric, colours (CSS), low, high, axis,
  // domain (of the x axis), left (the room for the names), alerts, chosen (a row), step, theme, label, print}
  show(given) {
    performance.mark("torchsat.draw.start");
    const held = this.cursor && { site: this.given.sites[this.cursor.place], step: this.given.grid.steps[this.cursor.row] };
    this.given = given;
    this.cursor = null;
    this.tip.hidden = true;
    const { grid, sites, axis, domain } = given;
    this.edges = AXES[axis].edges(grid.steps);
    this.scale = window.devicePixelRatio || 1;
    this.left = given.left;
    this.width = Math.max(this.left + RIGHT + 60, this.element.clientWidth || 900);
    this.row = sites.length ? Heatmap.tall(sites.length) / sites.length : MOST_ROW;
    this.height = TOP + this.row * sites.length + AXIS;
    this.plot = this.width - this.left - RIGHT;
    this.domain = domain;
    for (const canvas of [this.canvas, this.mark]) {
      canvas.width = Math.round(this.width * this.scale);
      canvas.height = Math.round(this.height * this.scale);
      canvas.style.width = `${this.width}px`;
      canvas.style.height = `${this.height}px`;
    }
    this.canvas.setAttribute("aria-label", `${given.label}: ${given.metric.title}, ${sites.length} sites by ${grid.steps.length} observations. Arrow keys move, Enter opens a site, f unfolds a block, plus and minus zoom, 0 shows all.`);
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
      if (worse(metric, value, best)) [found, best] = [row, value];
    }
    return found;
  }

  // The index of the colour of a number, as `shade` in colours.py.
  shade(value) {
    const { metric, low, high, colours } = this.given;
    const position = Math.min(1, Math.max(0, along(metric.scale, value, low, high)));
    return Math.floor((metric.reversed ? 1 - position : position) * (colours.length - 1) + 0.5);
  }

  // What each observation of a row looks like: the index of its colour, or one of MISSING and BROKEN. It is kept as long as the numbers and the scale
  // are the same, so that zooming need not compute it again.
  looks(site) {
    const { grid, metric, low, high } = this.given;
    const kept = this.kept;
    if (!kept || kept.grid !== grid || kept.metric !== metric || kept.low !== low || kept.high !== high) this.kept = { grid, metric, low, high, rows: new Map() };
    if (!this.kept.rows.has(site)) {
      const column = grid.column.get(site);
      const found = new Int16Array(grid.steps.length).fill(MISSING);
      for (let row = 0; column !== undefined && row < found.length; row++) {
        const value = grid.at(row, column);
        if (!Number.isNaN(value)) found[row] = Number.isFinite(value) ? this.shade(value) : BROKEN;
      }
      this.kept.rows.set(site, found);
    }
    return this.kept.rows.get(site);
  }

  // The pixels of a row that show the same observations, as four numbers each: first pixel, pixel behind the last, first observation, last observation.
  spans() {
    const { first, last, count } = this.shown;
    const found = new Int32Array(4 * count);
    let size = 0;
    for (let x = 0; x < count; ) {
      let end = x + 1;
      while (end < count && first[end] === first[x] && last[end] === last[x]) end++;
      if (first[x] >= 0) {
        found.set([x, end, first[x], last[x]], size);
        size += 4;
      }
      x = end;
    }
    return found.subarray(0, size);
  }

  // The cells: one pixel per row of a buffer, enlarged to the height of a row. Where there is no number, the page shows through grey stripes.
  paint(pen) {
    const { sites, colours, theme, metric } = this.given;
    this.shown = this.columns();
    const { count } = this.shown;
    if (!sites.length) return;
    performance.mark("torchsat.paint.start");
    const image = new ImageData(count, sites.length);
    const pixels = new Uint32Array(image.data.buffer);
    const packed = Uint32Array.from(colours, word);
    const [blank, stripe, alarm] = [word(theme.page), word(theme.missing), word(theme.critical)];
    const hatched = []; // what is not finite, as [place, first pixel, pixel behind the last]
    const spans = this.spans();
    // The worst of several observations has the largest index, unless a low number is bad and its ramp is not reversed.
    const sign = metric.worst === "low" && !metric.reversed ? -1 : 1;
    const picks = metric.worst !== null;
    sites.forEach((site, place) => {
      const looks = this.looks(site);
      const start = place * count;
      for (let index = 0; index < spans.length; index += 4) {
        const x = spans[index];
        const end = spans[index + 1];
        const from = spans[index + 2];
        let look = looks[spans[index + 3]];
        for (let row = spans[index + 3] - 1; row >= from && look !== BROKEN; row--) {
          const other = looks[row];
          if (other === BROKEN || look === MISSING || (picks && other !== MISSING && sign * other > sign * look)) look = other;
        }
        if (look === MISSING) for (let at = x; at < end; at++) pixels[start + at] = at % 6 ? blank : stripe;
        else {
          const colour = look === BROKEN ? alarm : packed[look];
          for (let at = x; at < end; at++) pixels[start + at] = colour;
        }
        if (look === BROKEN) hatched.push([place, x, end]);
      }
    });
    performance.measure("torchsat.paint", "torchsat.paint.start");
    const buffer = element("canvas", { width: count, height: sites.length });
    buffer.getContext("2d").putImageData(image, 0, 0);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(buffer, this.left, TOP, this.plot, this.row * sites.length);
    this.hatch(pen, hatched, count);
    pen.strokeStyle = theme.rule;
    pen.strokeRect(this.left - 0.5, TOP - 0.5, this.plot + 1, this.row * sites.length + 1);
  }

  // Diagonal stripes over the cells of what is not finite: they must look neither like a number nor like a gap.
  hatch(pen, cells, count) {
    if (!cells.length) return;
    const tile = element("canvas", { width: 8, height: 8 });
    const brush = tile.getContext("2d");
    brush.fillStyle = this.given.theme.page;
    for (let y = 0; y < 8; y++) for (const x of [0, 1, 2]) brush.fillRect((x + y) % 8, y, 1, 1);
    pen.save();
    pen.fillStyle = pen.createPattern(tile, "repeat");
    const pixel = this.plot / count;
    for (const [place, x, end] of cells) pen.fillRect(this.left + x * pixel, TOP + place * this.row, (end - x) * pixel, this.row);
    pen.restore();
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
    if (row >= 0) pen.strokeRect(this.left - 1.5, TOP + row * this.row - 1.5, this.plot + 3, this.row + 3);
    const inside = (at) => at !== null && at >= this.left && at <= this.left + this.plot;
    const under = this.crossed === null ? null : this.at(this.crossed);
    if (inside(under)) {
      pen.fillStyle = theme.ink;
      pen.globalAlpha = 0.55;
      pen.fillRect(Math.round(under), TOP, 1, this.row * sites.length);
      pen.globalAlpha = 1;
    }
    if (this.frame) {
      const { x, y, width, height } = this.frame;
      pen.fillStyle = theme.accent;
      pen.globalAlpha = 0.2;
      pen.fillRect(x, y, width, height);
      pen.globalAlpha = 1;
      pen.strokeRect(x, y, width, height);
    }
    const x = step === null ? null : this.place(step);
    if (inside(x)) {
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

  // The position of any step, which need not be one of an observation.
  at(step) {
    const [start, end] = this.domain;
    return this.left + (this.plot * (AXES[this.given.axis].at(step, this.given.grid) - start)) / (end - start);
  }

  // The step at a position.
  stepAt(x) {
    const [start, end] = this.domain;
    return AXES[this.given.axis].step(start + ((x - this.left) / this.plot) * (end - start), this.given.grid);
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
    if (this.drag(event)) return;
    const cell = this.cell(event);
    if (!cell) return this.leave();
    const box = this.canvas.getBoundingClientRect();
    this.tell(cell, event.clientX - box.left, event.clientY - box.top);
    if (cell.step !== null) this.hover(this.stepAt(event.clientX - box.left));
  }

  // The position of the pointer within the cells.
  within(event) {
    const box = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const [right, bottom] = [this.left + this.plot, TOP + this.row * this.given.sites.length];
    return { x: Math.min(right, Math.max(this.left, x)), y: Math.min(bottom, Math.max(TOP, y)), inside: x >= this.left && x <= right };
  }

  press(event) {
    if (event.button !== 0) return;
    this.pressed = this.within(event);
    if (this.pressed.inside) this.canvas.setPointerCapture(event.pointerId);
  }

  // Draw the frame between where the pointer was pressed and where it is; false if no frame is being drawn.
  drag(event) {
    if (!this.pressed?.inside || !(event.buttons & 1)) return false;
    const { x, y } = this.within(event);
    const [width, height] = [Math.abs(x - this.pressed.x), Math.abs(y - this.pressed.y)];
    if (Math.max(width, height) < DRAG && !this.frame) return false;
    // A frame that is low means steps only, one that is narrow rows only.
    const [all, rows] = [width < DRAG, height < Math.max(DRAG, this.row / 2)];
    const area = { x: this.left, y: TOP, width: this.plot, height: this.row * this.given.sites.length };
    if (!all) Object.assign(area, { x: Math.min(x, this.pressed.x), width });
    if (!rows) Object.assign(area, { y: Math.min(y, this.pressed.y), height });
    this.frame = { ...area, all, rows };
    this.tip.hidden = true;
    this.outline();
    return true;
  }

  release(event) {
    const frame = this.frame;
    const pressed = this.pressed;
    this.frame = this.pressed = null;
    if (frame) {
      const { sites } = this.given;
      const place = (y) => Math.min(sites.length - 1, Math.max(0, Math.floor((y - TOP) / this.row)));
      const steps = frame.all ? {} : { from: Math.floor(this.stepAt(frame.x)), to: Math.ceil(this.stepAt(frame.x + frame.width)) };
      const rows = frame.rows ? {} : { top: sites[place(frame.y)], bottom: sites[place(frame.y + frame.height - 1)] };
      this.outline();
      return this.zoom({ ...steps, ...rows });
    }
    const cell = pressed && this.cell(event);
    if (cell) this.choose(cell.site, cell.step);
  }

  // With Ctrl (or the command key) the wheel zooms about the step under the pointer. Without, the page scrolls.
  wheel(event) {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    const at = this.within(event);
    if (at.inside) this.zoomBy(event.deltaY < 0 ? 0.8 : 1.25, this.stepAt(at.x));
  }

  zoomBy(factor, about) {
    const [from, to] = [this.stepAt(this.left), this.stepAt(this.left + this.plot)];
    this.zoom({ from: Math.floor(about - (about - from) * factor), to: Math.ceil(about + (to - about) * factor) });
  }

  // Show a tip about a reading beside a position.
  tell(cell, x, y) {
    const { metric, facts, alerts, print } = this.given;
    const fact = facts.get(cell.site);
    const rows = [element("b", { textContent: cell.site })];
    if (fact?.members) rows.push(element("div", { textContent: `${fact.members.length} sites; a click on the name unfolds them` }));
    else if (fact) rows.push(element("div", { textContent: fact.activation + (fact.output ? ", makes an output" : fact.gate ? ", a gate" : "") }));
    if (cell.step !== null) {
      rows.push(element("div", { textContent: `${metric.title}: ${print.value(metric, cell.value)}` }));
      const among = metric.worst === null ? "latest" : "worst";
      rows.push(element("div", { textContent: `step ${cell.step}` + (cell.from === cell.to ? "" : ` (${among} of steps ${cell.from} to ${cell.to})`) }));
    }
    for (const alert of alerts) {
      const here = [...alert.places, ...alert.also].some((site) => this.given.row.get(site) === cell.site);
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
    this.hover(null);
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
    else if (event.key === "f") this.choose(sites[at.place], null);
    else if (event.key === "Escape") return this.leave();
    else if (event.key === "+" || event.key === "-") this.zoomBy(event.key === "+" ? 0.7 : 1 / 0.7, grid.steps[at.row]);
    else if (event.key === "0") this.zoom(null);
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
