// All jobs.

import { jobs, onChange } from "./fleet.js";
import { Table } from "./table.js";
import { duration, el, grouped, number, state, time } from "./text.js";

export const address = (job) => `#/jobs/${encodeURIComponent(job)}`;

export function jobsView() {
  const chosen = new Set();
  const compare = el("button", { type: "button", disabled: true, onclick: () => {
    location.hash = `#/compare/${[...chosen].map(encodeURIComponent).join("/")}`;
  } }, "Compare");
  const choose = (row) => el("input", { type: "checkbox", checked: chosen.has(row.job), "aria-label": `choose ${row.job} to compare`,
    "data-focus": "choose", onchange: (event) => {
      if (event.target.checked) chosen.add(row.job);
      else chosen.delete(row.job);
      compare.disabled = chosen.size < 2;
      compare.textContent = chosen.size < 2 ? "Compare" : `Compare ${chosen.size}`;
    } });
  const share = (row) => (row.steps ? row.step / row.steps : 0);
  const table = new Table({
    caption: "Jobs", key: (row) => row.job, sortBy: "Submitted", descending: true,
    columns: [
      { label: "", cell: choose },
      { label: "Job", name: true, value: (row) => row.job, cell: (row) => el("a", { href: address(row.job), "data-focus": "job" }, row.job) },
      { label: "State", value: (row) => row.state, cell: (row) => state(row.state) },
      { label: "Method", value: (row) => row.method, cell: (row) => row.method },
      { label: "Stage", value: (row) => row.stage ?? "", cell: (row) => row.stage ?? "-" },
      { label: "Progress", value: share, cell: (row) => [el("progress", { max: Math.max(1, row.steps), value: row.step, "aria-label": `${row.step} of ${row.steps} steps` }),
        ` ${grouped(row.step)} / ${grouped(row.steps)}`] },
      { label: "Loss", numeric: true, value: (row) => row.loss ?? Infinity, cell: (row) => number(row.loss) },
      { label: "Tokens/s", numeric: true, value: (row) => row.tokens_per_second, cell: (row) => grouped(row.tokens_per_second) },
      { label: "Left", numeric: true, value: (row) => row.remaining_seconds, cell: (row) => duration(row.remaining_seconds) },
      { label: "Attempt", numeric: true, value: (row) => row.attempt, cell: (row) => String(row.attempt) },
      { label: "Submitted", value: (row) => row.submitted_unix_ms, cell: (row) => time(row.submitted_unix_ms) },
    ],
  });
  const count = el("span", { className: "soft", id: "count" });
  const draw = () => {
    const shown = table.draw([...jobs.values()]);
    count.textContent = `${shown} of ${jobs.size}`;
  };
  const search = el("input", { type: "search", placeholder: "name, state, method", "aria-label": "Filter jobs", oninput: () => {
    table.filter = search.value.trim();
    draw();
  } });
  const stop = onChange(draw);
  draw();
  return { title: "Jobs", leave: stop, nodes: [el("h1", {}, "Jobs"), el("div", { className: "bar" }, search, compare, count), table.node] };
}
