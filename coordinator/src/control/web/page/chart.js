// Lines over a common axis, as SVG: a cursor by pointer and by arrow keys, values as text, a table instead.

import { el, number, say } from "./text.js";

const SVG = "http://www.w3.org/2000/svg";
const DASHES = ["", "6 3", "2 2", "8 3 2 3", "1 3", "10 4"];
const [LEFT, RIGHT, TOP, BOTTOM] = [54, 10, 10, 24];
const TABLE_ROWS = 50;

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// Round numbers that part [low, high] in about `count` steps.
export function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= raw);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n += 1) found.push(n * step);
  return found;
}

export function key(index) {
  const line = svg("line", { x1: 0, y1: 5, x2: 24, y2: 5, class: `line s${index % 6}`, "stroke-dasharray": DASHES[index % 6] });
  return svg("svg", { viewBox: "0 0 24 10", "aria-hidden": "true" }, line);
}

// series: {name, points: [[x, y], ...] in order of x, index: colour and dash}
export class Chart {
  constructor({ title, format = number, axis = number }) {
    Object.assign(this, { title, format, axis, series: [], marks: [], cursor: null });
    this.readout = el("output");
    this.plot = svg("svg", { tabindex: "0", role: "img" });
    this.legend = el("div", { className: "legend" });
    this.values = el("div", { className: "table", hidden: true });
    const toggle = el("button", { type: "button", "aria-pressed": "false", onclick: () => {
      this.values.hidden = !this.values.hidden;
      toggle.setAttribute("aria-pressed", String(!this.values.hidden));
      this.draw();
    } }, "Table");
    this.node = el("figure", {}, el("figcaption", {}, title, this.readout, toggle), this.plot, this.legend, this.values);
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.move(null));
    this.plot.addEventListener("keydown", (event) => this.step(event));
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.plot);
  }

  set(series, marks = []) {
    Object.assign(this, { series: series.filter(({ points }) => points.length > 0), marks });
    if (!this.scheduled) {
      this.scheduled = true;
      requestAnimationFrame(() => {
        this.scheduled = false;
        this.draw();
      });
    }
  }

  bounds() {
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const { points } of this.series) {
      for (const [x, y] of points) {
        if (!Number.isFinite(y)) continue;
        if (x < x0) x0 = x;
        if (x > x1) x1 = x;
        if (y < y0) y0 = y;
        if (y > y1) y1 = y;
      }
    }
    if (x0 === x1) x1 = x0 + 1;
    const pad = y1 > y0 ? (y1 - y0) * 0.05 : Math.abs(y1) * 0.1 || 1;
    return { x0, x1, y0: y0 - pad, y1: y1 + pad };
  }

  draw() {
    const { width, height } = this.plot.getBoundingClientRect();
    if (!width) return;
    this.plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
    if (!this.series.length) {
      const text = svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing logged yet");
      this.plot.replaceChildren(text);
      this.plot.setAttribute("aria-label", `${this.title}: nothing logged yet`);
      return;
    }
    const { x0, x1, y0, y1 } = this.bounds();
    const scaleX = (x) => LEFT + ((x - x0) / (x1 - x0)) * (width - LEFT - RIGHT);
    const scaleY = (y) => TOP + (1 - (y - y0) / (y1 - y0)) * (height - TOP - BOTTOM);
    Object.assign(this, { scaleX, scaleY, x0, x1 });
    const parts = [];
    for (const y of ticks(y0, y1, 4)) {
      parts.push(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: scaleY(y), y2: scaleY(y) }));
      parts.push(svg("text", { x: LEFT - 6, y: scaleY(y) + 4, "text-anchor": "end" }, this.format(y)));
    }
    for (const x of ticks(x0, x1, Math.max(2, Math.floor(width / 120)))) {
      parts.push(svg("text", { x: scaleX(x), y: height - 6, "text-anchor": "middle" }, this.axis(x)));
    }
    for (const { x, label } of this.marks) {
      if (x < x0 || x > x1) continue;
      const mark = svg("line", { class: "mark", x1: scaleX(x), x2: scaleX(x), y1: TOP, y2: height - BOTTOM });
      mark.append(svg("title", {}, label));
      parts.push(mark);
    }
    for (const { points, index, dots } of this.series) {
      let path = "";
      let pen = "M";
      for (const [x, y] of points) {
        if (!Number.isFinite(y)) {
          pen = "M";
          continue;
        }
        path += `${pen}${scaleX(x).toFixed(1)} ${scaleY(y).toFixed(1)}`;
        pen = "L";
      }
      parts.push(svg("path", { class: `line s${index % 6}`, d: path, "stroke-dasharray": DASHES[index % 6] }));
      if (dots || points.length === 1) {
        for (const [x, y] of points) {
          if (Number.isFinite(y)) parts.push(svg("circle", { class: `line s${index % 6}`, cx: scaleX(x), cy: scaleY(y), r: 2.5 }));
        }
      }
    }
    this.line = svg("line", { class: "cursor", y1: TOP, y2: height - BOTTOM, visibility: "hidden" });
    this.plot.replaceChildren(...parts, this.line);
    this.legend.replaceChildren(...(this.series.length > 1 ? this.series.map(({ name, index }) => el("span", {}, key(index), " ", name)) : []));
    this.plot.setAttribute("aria-label", `${this.title}. ${this.summary()} Use the arrow keys to read values.`);
    this.move(this.cursor, false);
    if (!this.values.hidden) this.tabulate();
  }

  summary() {
    return this.series.map(({ name, points }) => {
      const finite = points.filter(([, y]) => Number.isFinite(y));
      if (!finite.length) return `${name}: no finite value.`;
      const [first, last] = [finite[0], finite[finite.length - 1]];
      const lowest = finite.reduce((least, point) => (point[1] < least[1] ? point : least));
      return `${name}: ${this.format(first[1])} at ${this.axis(first[0])}, ${this.format(last[1])} at ${this.axis(last[0])}, ` +
        `lowest ${this.format(lowest[1])} at ${this.axis(lowest[0])}.`;
    }).join(" ");
  }

  tabulate() {
    const rows = this.series.flatMap(({ name, points }) => {
      const every = Math.max(1, Math.ceil(points.length / TABLE_ROWS));
      const kept = points.filter((_, index) => index % every === 0 || index === points.length - 1);
      return kept.map(([x, y]) => el("tr", {}, el("td", {}, name), el("td", { className: "n" }, this.axis(x)), el("td", { className: "n" }, this.format(y))));
    });
    this.values.replaceChildren(el("table", {}, el("caption", { className: "unseen" }, this.title),
      el("thead", {}, el("tr", {}, ["series", "at", "value"].map((name) => el("th", { scope: "col" }, name)))), el("tbody", {}, rows)));
  }

  nearest(points, x) {
    let [low, high] = [0, points.length - 1];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (points[middle][0] <= x) low = middle;
      else high = middle;
    }
    return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? points[low] : points[high];
  }

  point(event) {
    if (!this.series.length) return;
    const box = this.plot.getBoundingClientRect();
    const share = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
    this.move(this.x0 + Math.min(1, Math.max(0, share)) * (this.x1 - this.x0));
  }

  step(event) {
    if (!this.series.length) return;
    const points = this.series[0].points;
    const at = this.cursor === null ? points.length - 1 : points.indexOf(this.nearest(points, this.cursor));
    const by = Math.max(1, Math.floor(points.length / 40));
    const to = { ArrowLeft: at - by, ArrowRight: at + by, Home: 0, End: points.length - 1 }[event.key];
    if (to === undefined) {
      if (event.key === "Escape") this.move(null);
      return;
    }
    event.preventDefault();
    this.move(points[Math.min(points.length - 1, Math.max(0, to))][0]);
    say(this.readout.textContent);
  }

  move(x, draws = true) {
    this.cursor = x;
    if (x === null || !this.series.length) {
      this.line?.setAttribute("visibility", "hidden");
      if (draws) this.readout.textContent = "";
      return;
    }
    const found = this.series.map(({ name, points }) => ({ name, point: this.nearest(points, x) }));
    const at = found[0].point[0];
    this.line.setAttribute("x1", this.scaleX(at));
    this.line.setAttribute("x2", this.scaleX(at));
    this.line.setAttribute("visibility", "visible");
    const values = found.map(({ name, point }) => (found.length > 1 ? `${name} ${this.format(point[1])}` : this.format(point[1])));
    this.readout.textContent = `${this.axis(at)}: ${values.join(", ")}`;
  }

  close() {
    this.observer.disconnect();
  }
}
