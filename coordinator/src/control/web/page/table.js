// A table of many rows that change: sorted, filtered, and only what has changed is drawn again.

import { el, say } from "./text.js";

// columns: {label, value(row) to sort by, cell(row) -> node or text, numeric}
export class Table {
  constructor({ caption, columns, key, sortBy, descending = false }) {
    Object.assign(this, { columns, key, sortBy, descending, filter: "" });
    this.rows = new Map();
    this.heads = columns.map((column) => {
      const sort = el("button", { type: "button", onclick: () => this.sort(column.label) }, column.label);
      return el("th", { scope: "col", className: column.numeric ? "n" : "" }, column.value ? sort : column.label);
    });
    this.body = el("tbody");
    const head = el("thead", {}, el("tr", {}, this.heads));
    this.node = el("div", { className: "table" },
      el("table", {}, el("caption", { className: "unseen" }, caption), head, this.body));
    this.mark();
  }

  sort(label) {
    this.descending = this.sortBy === label ? !this.descending : false;
    this.sortBy = label;
    this.mark();
    this.draw(this.values);
    say(`sorted by ${label}, ${this.descending ? "descending" : "ascending"}`);
  }

  mark() {
    this.columns.forEach((column, index) => {
      const order = this.sortBy !== column.label ? "none" : this.descending ? "descending" : "ascending";
      if (column.value) this.heads[index].setAttribute("aria-sort", order);
    });
  }

  draw(values) {
    this.values = values;
    const column = this.columns.find(({ label }) => label === this.sortBy);
    const wanted = this.filter.toLowerCase();
    const shown = values.filter((row) => !wanted || this.text(row).includes(wanted));
    const order = this.descending ? -1 : 1;
    shown.sort((a, b) => {
      const [x, y] = [column.value(a), column.value(b)];
      return order * (x < y ? -1 : x > y ? 1 : 0) || (this.key(a) < this.key(b) ? -1 : 1);
    });
    const alive = new Set();
    let at = this.body.firstElementChild;
    for (const row of shown) {
      const key = this.key(row);
      alive.add(key);
      let known = this.rows.get(key);
      if (!known) {
        known = { node: el("tr"), row: null };
        this.rows.set(key, known);
      }
      if (known.row !== row) {
        known.row = row;
        const cells = this.columns.map((column) => {
          const content = column.cell(row);
          return el("td", { className: column.numeric ? "n" : column.name ? "name" : "" }, content);
        });
        // A control that has the focus keeps it.
        const focused = known.node.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
        known.node.replaceChildren(...cells);
        if (focused) known.node.querySelector(`[data-focus="${focused}"]`)?.focus();
      }
      if (known.node === at) at = at.nextElementSibling;
      else this.body.insertBefore(known.node, at);
    }
    for (const [key, known] of this.rows) {
      if (alive.has(key)) continue;
      known.node.remove();
      this.rows.delete(key);
    }
    return shown.length;
  }

  text(row) {
    return this.columns.map((column) => String(column.value?.(row) ?? "")).join(" ").toLowerCase();
  }
}
