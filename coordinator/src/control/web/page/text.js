// Elements, numbers and times as text. Nothing of a job ever becomes markup: text nodes only.

export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key in node && !key.startsWith("aria") && key !== "list" && key !== "for") node[key] = value;
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export const number = (value, digits = 4) =>
  value === null || value === undefined || !Number.isFinite(value) ? "-" : String(Number(value.toPrecision(digits)));

export function grouped(value) {
  return value === null || value === undefined || !Number.isFinite(value) ? "-" : Math.round(value).toLocaleString("en");
}

export function duration(seconds) {
  if (!Number.isFinite(seconds) || seconds <= 0) return "-";
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

export const time = (unixMs) => (unixMs ? new Date(unixMs).toLocaleString() : "-");
export const percent = (ratio) => (Number.isFinite(ratio) ? `${(100 * ratio).toFixed(1)}%` : "-");

const TONES = {
  running: "good", completed: "good", ready: "good", failed: "bad", lost: "bad", excluded: "bad",
  restarting: "warn", stopping: "warn", suspect: "warn", draining: "warn", queued: "", suspended: "warn",
};
export const state = (name) => el("span", { className: `state ${TONES[name] ?? ""}` }, name);

// For screen readers.
export function say(text) {
  document.getElementById("said").textContent = text;
}
