// The strip above a heatmap, on its x axis: the user's loss, the learning rate, and a flag at each step at which an alert was raised.

import { drawn, element } from "./charts.js";
import { AXES } from "./frame.js";
import { along, number, range } from "./numbers.js";
import { refill } from "./refill.js";

const TALL = 58;
const [ABOVE, BELOW] = [12, 4]; // the room for flags, and below the lines

export class Strip {
  // `choose(alert)` is called when a flag is clicked, `hover(step)` when the pointer moves.
  constructor(choose, hover) {
    this.choose = choose;
    this.hover = hover;
    this.said = element("div", { className: "strip-said" });
    this.drawing = element("div", { className: "strip-lines" });
    this.element = element("div", { className: "strip crossed" }, this.said, this.drawing);
    this.element.cross = (step) => this.cross(step);
    this.drawing.addEventListener("pointermove", (event) => this.hover(this.step(event)));
    this.drawing.addEventListener("pointerleave", () => this.hover(null));
  }

  // Draw. given: {curves: [{name, points, dash, scale}], lacks, alerts, grid, axis, domain, left, width, right (pixels), colour, theme}. `lacks` says
  // which curve the run does not have; empty: none.
  show(given) {
    this.given = given;
    this.element.hidden = !given.curves.length && !given.alerts.length;
    const { curves, alerts, left, width, right, colour, theme } = given;
    this.plot = width - left - right;
    const svg = drawn("svg", { width, height: TALL, class: "strip-picture", role: "group", "aria-label": `${curves.map((each) => each.name).join(", ")}, and alerts` });
    svg.append(drawn("line", { x1: left, x2: left + this.plot, y1: TALL - 1, y2: TALL - 1, class: "rule" }));
    this.line = drawn("line", { y1: 0, y2: TALL, class: "cross", visibility: "hidden" });
    svg.append(drawn("path", { d: curves.map((curve) => this.broken(curve)).join(""), stroke: theme.critical, class: "series" }));
    for (const curve of curves) svg.append(drawn("path", { d: this.path(curve), stroke: curve.dash ? theme.faint : colour, class: "series", "stroke-dasharray": curve.dash }));
    for (const alert of alerts) svg.append(...this.flag(alert));
    svg.append(this.line);
    refill(this.drawing, [svg], "strip");
    this.say(null);
  }

  // The position of a step in pixels; it lies outside the plot where the step is not in sight.
  x(step) {
    const { axis, grid, domain, left } = this.given;
    return left + (this.plot * (AXES[axis].at(step, grid) - domain[0])) / (domain[1] - domain[0]);
  }

  path({ points, scale }) {
    const { left } = this.given;
    const shown = points.filter(([step, value]) => Number.isFinite(value) && this.x(step) >= left - 1 && this.x(step) <= left + this.plot + 1);
    const [low, high] = range({ low: null, high: null, scale }, shown.map(([, value]) => value));
    const y = (value) => ABOVE + (TALL - ABOVE - BELOW) * (1 - Math.min(1, Math.max(0, along(scale, value, low, high))));
    let path = "";
    let pen = "M";
    for (const [step, value] of points) {
      if (!Number.isFinite(value)) pen = "M";
      else if (this.x(step) >= left - 1 && this.x(step) <= left + this.plot + 1) {
        // A stroke of no length makes a point of its own visible where its neighbours are missing.
        path += `${pen}${this.x(step).toFixed(1)} ${y(value).toFixed(1)}${pen === "M" ? "h0" : ""}`;
        pen = "L";
      }
    }
    return path;
  }

  // Ticks at the steps at which a curve is not finite.
  broken({ points }) {
    const { left } = this.given;
    const at = points.filter(([, value]) => Math.abs(value) === Infinity).map(([step]) => this.x(step));
    return at.filter((x) => x >= left - 1 && x <= left + this.plot + 1).map((x) => `M${x.toFixed(1)} ${TALL - 5}v4`).join("");
  }

  flag(alert) {
    const { left, theme } = this.given;
    const x = this.x(alert.fired);
    if (x < left - 1 || x > left + this.plot + 1) return [];
    const made = drawn("path", { d: `M${x} 1l8 4l-8 4z M${x} 1V${TALL}`, class: "flag", tabindex: 0, role: "button", stroke: theme[alert.severity], fill: theme[alert.severity] });
    made.append(drawn("title", {}, `${alert.severity}: ${alert.site}: ${alert.rule} since step ${alert.since}, raised at step ${alert.fired}`));
    made.addEventListener("click", () => this.choose(alert));
    made.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      this.choose(alert);
    });
    return [made];
  }

  step(event) {
    const { axis, grid, domain, left } = this.given;
    const at = event.clientX - this.drawing.getBoundingClientRect().left;
    return AXES[axis].step(domain[0] + ((at - left) / this.plot) * (domain[1] - domain[0]), grid);
  }

  cross(step) {
    const x = step === null ? -1 : this.x(step);
    const inside = x >= this.given.left && x <= this.given.left + this.plot;
    this.line.setAttribute("visibility", inside ? "visible" : "hidden");
    if (inside) {
      this.line.setAttribute("x1", x);
      this.line.setAttribute("x2", x);
    }
    this.say(inside ? step : null);
  }

  // Write the names of the curves, with their values at a step, or else their last ones.
  say(step) {
    const { curves, colour, theme } = this.given;
    const nodes = curves.flatMap(({ name, points, dash, scale }) => {
      const point = points.findLast(([at, value]) => (step === null || at <= step) && !Number.isNaN(value));
      const key = element("i", { className: "key" });
      key.style.borderTop = `2px ${dash ? "dashed" : "solid"} ${dash ? theme.faint : colour}`;
      const values = points.map(([, value]) => value).filter(Number.isFinite);
      const [low, high] = [Math.min(...values), Math.max(...values)];
      const span = low < high ? ` (${number(low)} to ${number(high)}${scale === "log" ? ", log" : ""})` : "";
      return [element("span", {}, key, element("span", { textContent: `${name} ${point ? (Number.isFinite(point[1]) ? number(point[1]) : "not finite") : ""}${span}` }))];
    });
    this.said.replaceChildren(...nodes, this.given.lacks);
    this.said.style.paddingLeft = `${this.given.left}px`;
  }
}
