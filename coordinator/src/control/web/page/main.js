// Which view is shown, who is logged in, and whether the coordinator is there.

import * as fleet from "./fleet.js";
import { compareView } from "./compare.js";
import { jobView } from "./job.js";
import { jobsView } from "./jobs.js";
import { el, say } from "./text.js";
import { workersView } from "./workers.js";

const main = document.getElementById("main");
const link = document.getElementById("link");
let leave = () => {};

// The address is `#/jobs`, `#/jobs/NAME`, `#/compare/NAME/NAME...` or `#/workers`.
function show() {
  const [page = "jobs", ...names] = location.hash.replace(/^#\//, "").split("/").filter(Boolean).map(decodeURIComponent);
  leave();
  const view = page === "workers" ? workersView()
    : page === "compare" && names.length ? compareView(names)
    : page === "jobs" && names.length ? jobView(names[0])
    : jobsView();
  leave = view.leave;
  main.replaceChildren(...view.nodes);
  document.title = `${view.title} - Tunefleet`;
  for (const anchor of document.querySelectorAll("nav a")) {
    const isHere = anchor.hash === `#/${page === "workers" ? "workers" : "jobs"}`;
    if (isHere) anchor.setAttribute("aria-current", "page");
    else anchor.removeAttribute("aria-current");
  }
  say(view.title);
}

function onLink(isUp) {
  link.textContent = isUp ? "live" : "no connection, trying again";
  link.classList.toggle("down", !isUp);
  if (!isUp) {
    // A token that was revoked ends the stream as well.
    fetch("/api/session").then((answer) => answer.status === 401 && login()).catch(() => {});
  }
}

function begin(session) {
  document.getElementById("logout").hidden = !session.asks_for_tokens;
  window.onhashchange = () => {
    show();
    main.focus();
  };
  fleet.connect(onLink);
  show();
}

function login() {
  leave();
  leave = () => {};
  fleet.disconnect();
  window.onhashchange = null;
  link.textContent = "not logged in";
  link.classList.remove("down");
  const token = el("input", { type: "password", id: "token", name: "token", required: true, autocomplete: "current-password" });
  const fault = el("p", { className: "bad", role: "alert" });
  // For whoever keeps passwords.
  const user = el("input", { type: "text", name: "username", value: "tunefleet", autocomplete: "username", hidden: true });
  const form = el("form", { onsubmit: async (event) => {
    event.preventDefault();
    const answer = await fetch("/login", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ token: token.value }) });
    if (answer.ok) return start();
    fault.textContent = (await answer.json().catch(() => ({}))).error ?? "the coordinator does not answer";
    token.select();
  } }, user, el("label", { for: "token" }, "Token"), token, el("button", { type: "submit" }, "Log in"), fault);
  main.replaceChildren(el("section", { className: "login" }, el("h1", {}, "Log in"),
    el("p", { className: "soft" }, "A viewer's token is enough: `coordinator tokens create NAME --role viewer` makes one."), form));
  document.title = "Log in - Tunefleet";
  token.focus();
}

async function start() {
  try {
    // A launch prints an address that logs in.
    if (location.hash.startsWith("#token=")) {
      const token = location.hash.slice("#token=".length);
      history.replaceState(null, "", "#/jobs");
      await fetch("/login", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ token }) });
    }
    const answer = await fetch("/api/session");
    if (answer.status === 401) return login();
    if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).error ?? answer.statusText);
    begin(await answer.json());
  } catch (error) {
    link.textContent = "no connection";
    link.classList.add("down");
    main.replaceChildren(el("p", { className: "bad", role: "alert" }, String(error.message ?? error)));
  }
}

document.getElementById("logout").addEventListener("click", async () => {
  await fetch("/logout", { method: "POST" });
  login();
});

const THEMES = ["system", "light", "dark"];
const theme = document.getElementById("theme");
function paint(name) {
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  theme.textContent = `Theme: ${name}`;
  theme.value = name;
}
theme.addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(theme.value) + 1) % THEMES.length];
  localStorage.setItem("theme", next);
  paint(next);
});
paint(THEMES.includes(localStorage.getItem("theme")) ? localStorage.getItem("theme") : "system");
start();
