// One job: how it stands, why it failed, its curves, attempts, events and logs.

import { jobs, onChange } from "./fleet.js";
import { Curves } from "./curves.js";
import { panels } from "./panels.js";
import { duration, el, grouped, number, percent, state, time } from "./text.js";

const EVENTS = 300;
const LOG_LINES = 2000;

function facts(row) {
  const all = [
    ["State", state(row.state)], ["Method", row.method], ["Stage", row.stage ?? "-"],
    ["Step", `${grouped(row.step)} / ${grouped(row.steps)}`], ["Loss", number(row.loss)],
    ["Tokens/s", grouped(row.tokens_per_second)], ["Time left", duration(row.remaining_seconds)],
    ["Goodput", percent(row.goodput_ratio)], ["Attempt", String(row.attempt)], ["Priority", String(row.priority)],
    ["Workers", row.workers.join(", ") || "-"], ["Submitted", time(row.submitted_unix_ms)], ["Output", row.output],
  ];
  return all.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)));
}

function attemptRow(attempt) {
  const seconds = ((attempt.ended_unix_ms || Date.now()) - attempt.began_unix_ms) / 1000;
  return el("tr", {}, el("td", { className: "n" }, String(attempt.attempt)), el("td", {}, state(attempt.state)),
    el("td", { className: "n" }, grouped(attempt.step)), el("td", {}, time(attempt.began_unix_ms)), el("td", { className: "n" }, duration(seconds)),
    el("td", {}, attempt.kind === "unknown" ? "" : attempt.kind), el("td", { className: "name" }, attempt.cause));
}

function tableOf(caption, heads, body) {
  return el("div", { className: "table" }, el("table", {}, el("caption", { className: "unseen" }, caption),
    el("thead", {}, el("tr", {}, heads.map((name) => el("th", { scope: "col" }, name)))), body));
}

function causeOf(failure) {
  const who = failure.rank === null ? "" : `rank ${failure.rank} on worker ${failure.worker}: `;
  const nodes = [el("strong", {}, `${failure.stage} failed (${failure.kind})`), el("div", {}, who + failure.cause)];
  if (failure.log_path) nodes.push(el("div", { className: "soft" }, `log: ${failure.log_path}`));
  if (failure.last_lines?.length) nodes.push(el("pre", {}, failure.last_lines.join("\n")));
  return nodes;
}

function logs(job) {
  const rank = el("input", { type: "number", min: "0", id: "rank", style: "width: 5rem", placeholder: "all" });
  const attempt = el("input", { type: "number", min: "1", id: "attempt", style: "width: 5rem", placeholder: "last" });
  const out = el("pre", { className: "log", tabIndex: 0, role: "log", "aria-label": "Log lines" });
  const lines = [];
  let source = null;
  const close = () => {
    source?.close();
    source = null;
    open.textContent = "Follow";
    open.setAttribute("aria-pressed", "false");
  };
  const follow = () => {
    if (source) return close();
    lines.length = 0;
    out.textContent = "";
    const query = new URLSearchParams();
    if (rank.value) query.set("rank", rank.value);
    if (attempt.value) query.set("attempt", attempt.value);
    source = new EventSource(`/api/jobs/${encodeURIComponent(job)}/logs?${query}`);
    open.textContent = "Stop";
    open.setAttribute("aria-pressed", "true");
    source.addEventListener("lines", (event) => {
      const told = JSON.parse(event.data);
      const isAtEnd = out.scrollTop + out.clientHeight >= out.scrollHeight - 8;
      lines.push(...told.lines.map((line) => `${told.worker} ${told.stage} rank ${told.rank}: ${line}`));
      lines.splice(0, Math.max(0, lines.length - LOG_LINES));
      out.textContent = lines.join("\n");
      if (isAtEnd) out.scrollTop = out.scrollHeight;
    });
    source.addEventListener("fault", (event) => {
      out.textContent += `\n${JSON.parse(event.data).error}`;
      close();
    });
    source.addEventListener("over", close);
    source.addEventListener("error", close);
  };
  const open = el("button", { type: "button", "aria-pressed": "false", id: "follow", onclick: follow }, "Follow");
  const bar = el("div", { className: "bar" }, el("label", { for: "attempt" }, "Attempt"), attempt, el("label", { for: "rank" }, "Rank"), rank, open);
  return { nodes: [bar, out], close };
}

export function jobView(name) {
  const curves = new Curves(name);
  const shown = panels([{ name, curves }]);
  const summary = el("dl", { className: "facts" });
  const cause = el("section", { className: "cause", hidden: true, "aria-label": "Cause of the failure" });
  const detail = el("p", { className: "soft" });
  const fault = el("p", { className: "bad", role: "alert" });
  const attempts = el("tbody");
  const events = el("tbody");
  const log = logs(name);
  let stream = null;

  const draw = () => {
    const row = jobs.get(name);
    if (!row) return;
    summary.replaceChildren(...facts(row));
    detail.textContent = row.state === "failed" ? "" : row.detail;
    if (row.state !== "failed" && row.state !== "restarting") cause.hidden = true;
  };
  const drawAttempts = async () => {
    const answer = await fetch(`/api/jobs/${encodeURIComponent(name)}`).catch(() => null);
    if (!answer?.ok) return;
    const job = await answer.json();
    attempts.replaceChildren(...job.attempts.slice().reverse().map(attemptRow));
  };
  const take = (event) => {
    if (event.sequence > curves.through && curves.take(event)) shown.draw();
    const failure = event.failure ?? null;
    if (failure) {
      cause.replaceChildren(...causeOf(failure), ...(event.decision ? [el("div", { className: "soft" }, event.decision)] : []));
      cause.hidden = false;
    }
    if (["state", "attempt_ended", "stage"].includes(event.kind)) drawAttempts();
    if (event.kind === "step" || event.kind === "section") return;
    events.prepend(el("tr", {}, el("td", {}, time(event.unix_ms)), el("td", { className: "n" }, String(event.attempt)), el("td", { className: "name" }, event.said)));
    while (events.childElementCount > EVENTS) events.lastElementChild.remove();
  };
  // What has happened, thinned out; then what comes.
  const begin = async () => {
    try {
      await curves.load();
    } catch (error) {
      fault.textContent = error.message;
      return;
    }
    shown.draw();
    drawAttempts();
    for (const event of curves.events) take(event);
    stream = new EventSource(`/api/jobs/${encodeURIComponent(name)}/events?after=${curves.through}`);
    stream.addEventListener("event", (event) => take(JSON.parse(event.data)));
  };
  const stop = onChange(draw);
  draw();
  begin();
  const leave = () => {
    stop();
    stream?.close();
    log.close();
    shown.close();
  };
  return { title: name, leave, nodes: [
    el("h1", {}, name), fault, cause, summary, detail, ...shown.nodes,
    el("h2", {}, "Attempts"), tableOf("Attempts, newest first", ["Attempt", "State", "Step", "Began", "Took", "Kind", "Cause"], attempts),
    el("h2", {}, "Logs"), ...log.nodes,
    el("h2", {}, "Events"), tableOf("Events, newest first", ["Time", "Attempt", "Event"], events),
  ] };
}
