// Several jobs over each other: full fine-tuning beside an adapter, say.

import { jobs, onChange } from "./fleet.js";
import { address } from "./jobs.js";
import { Curves } from "./curves.js";
import { panels } from "./panels.js";
import { el, grouped, number, percent, state } from "./text.js";

export function compareView(names) {
  const sources = names.map((job) => ({ job, name: job, curves: new Curves(job) }));
  const shown = panels(sources);
  const fault = el("p", { className: "bad", role: "alert" });
  const rows = el("tbody");
  const streams = [];
  const head = ["Job", "Method", "State", "Step", "Loss", "Tokens/s", "Goodput"];
  const table = el("div", { className: "table" }, el("table", {}, el("caption", { className: "unseen" }, "Jobs that are compared"),
    el("thead", {}, el("tr", {}, head.map((name) => el("th", { scope: "col" }, name)))), rows));
  const drawRows = () => {
    rows.replaceChildren(...names.map((name) => {
      const row = jobs.get(name);
      if (!row) return el("tr", {}, el("td", {}, name), el("td", { colSpan: 6 }, "not known here"));
      const source = sources.find((candidate) => candidate.job === name);
      source.name = `${name} (${row.method})`;
      const cells = [el("a", { href: address(name) }, name), row.method, state(row.state), grouped(row.step), number(row.loss),
        grouped(row.tokens_per_second), percent(row.goodput_ratio)];
      return el("tr", {}, cells.map((cell) => el("td", {}, cell)));
    }));
  };
  const stop = onChange(() => {
    drawRows();
    shown.draw();
  });
  drawRows();
  for (const { job, curves } of sources) {
    curves.load().then(() => {
      shown.draw();
      const stream = new EventSource(`/api/jobs/${encodeURIComponent(job)}/events?after=${curves.through}`);
      stream.addEventListener("event", (event) => curves.take(JSON.parse(event.data)) && shown.draw());
      streams.push(stream);
    }).catch((error) => {
      fault.textContent += `${job}: ${error.message} `;
    });
  }
  const leave = () => {
    stop();
    shown.close();
    for (const stream of streams) stream.close();
  };
  return { title: "Compare", leave, nodes: [el("h1", {}, names.join(" and ")), fault, table, ...shown.nodes] };
}
