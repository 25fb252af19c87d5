// All workers.

import { onChange, workers } from "./fleet.js";
import { address } from "./jobs.js";
import { Table } from "./table.js";
import { duration, el, grouped, state } from "./text.js";

export function workersView() {
  const links = (row) => row.jobs.flatMap((job, index) => [index ? ", " : "", el("a", { href: address(job) }, job)]);
  const table = new Table({
    caption: "Workers", key: (row) => row.name, sortBy: "Worker",
    columns: [
      { label: "Worker", name: true, value: (row) => row.name, cell: (row) => row.name },
      { label: "State", value: (row) => row.state, cell: (row) => state(row.state) },
      { label: "Slots", numeric: true, value: (row) => row.used_slots, cell: (row) => `${row.used_slots} / ${row.slots}` },
      { label: "GPUs", value: (row) => row.gpus, cell: (row) => (row.gpus ? `${row.gpus} x ${row.gpu_name || "GPU"}` : "-") },
      { label: "Cores", numeric: true, value: (row) => row.cores, cell: (row) => grouped(row.cores) },
      { label: "Memory", numeric: true, value: (row) => row.memory_bytes, cell: (row) => `${grouped(row.memory_bytes / 2 ** 30)} GiB` },
      { label: "Silent for", numeric: true, value: (row) => row.silent_seconds, cell: (row) => duration(row.silent_seconds) },
      { label: "Jobs", value: (row) => row.jobs.join(" "), cell: links },
      { label: "Version", value: (row) => row.version, cell: (row) => row.version },
      { label: "Note", value: (row) => row.detail, cell: (row) => row.detail },
    ],
  });
  const count = el("span", { className: "soft", id: "count" });
  const draw = () => {
    const shown = table.draw([...workers.values()]);
    const slots = [...workers.values()].reduce((sum, row) => [sum[0] + row.used_slots, sum[1] + row.slots], [0, 0]);
    count.textContent = `${shown} of ${workers.size}, ${slots[0]} of ${slots[1]} slots taken`;
  };
  const search = el("input", { type: "search", placeholder: "name, state, job", "aria-label": "Filter workers", oninput: () => {
    table.filter = search.value.trim();
    draw();
  } });
  const stop = onChange(draw);
  draw();
  return { title: "Workers", leave: stop, nodes: [el("h1", {}, "Workers"), el("div", { className: "bar" }, search, count), table.node] };
}
