// All jobs and workers, kept up to date by one stream of what has changed.

export const jobs = new Map();
export const workers = new Map();
const listeners = new Set();
let source = null;
let scheduled = false;

// Calls `changed` after each change, at most once a frame, until the returned function is called.
export function onChange(changed) {
  listeners.add(changed);
  return () => listeners.delete(changed);
}

function notify() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    for (const changed of listeners) changed();
  });
}

function take(known, key, { whole, changed, gone }) {
  if (whole) known.clear();
  for (const row of changed) known.set(row[key], row);
  for (const name of gone) known.delete(name);
  notify();
}

export function connect(onLink) {
  source?.close();
  source = new EventSource("/api/fleet");
  source.addEventListener("open", () => onLink(true));
  source.addEventListener("error", () => onLink(false));
  source.addEventListener("jobs", (event) => take(jobs, "job", JSON.parse(event.data)));
  source.addEventListener("workers", (event) => take(workers, "name", JSON.parse(event.data)));
}

export function disconnect() {
  source?.close();
  source = null;
  jobs.clear();
  workers.clear();
}
