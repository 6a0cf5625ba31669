// Keeps the page up to date from /events, and asks queries. Every text comes from the runner as it is to be shown,
// and goes into the page as text, never as markup.
"use strict";

const SILENCE_MS = 6000; // The runner says something every 2 s, even if nothing changes.
const RETRY_MS = 2000;

const byId = (id) => document.getElementById(id);
let rows = new Map();
let heardAt = performance.now();
let goneSince = null;
let fetching = false;

function findRows() {
  rows = new Map([...document.querySelectorAll("[data-worker]")].map((row) => [row.dataset.worker, row]));
}

function put(element, text) {
  // Only what differs is written: a selection, and what is being read out, stay as they are.
  if (element.textContent !== text) element.textContent = text;
}

function show(view) {
  const row = rows.get(view.name);
  if (row === undefined) return null;
  const before = row.dataset.state;
  row.dataset.state = view.state;
  for (const cell of row.querySelectorAll("[data-cell]")) put(cell, view[cell.dataset.cell]);
  row.querySelector("polyline").setAttribute("points", view.spark);
  row.querySelector(".error").hidden = view.last_error === "";
  return before === view.state ? null : `${view.name}: ${view.state}`;
}

function take(update) {
  if (String(update.layout) !== byId("agents").dataset.layout) return void replaceTable();
  const news = update.changed.map(show).filter((words) => words !== null);
  put(byId("summary"), update.summary);
  document.title = `${update.summary} - em-runner`;
  if (news.length > 0) put(byId("news"), news.slice(0, 5).join(", "));
}

// There are other workers than before: the runner has reloaded its configuration.
async function replaceTable() {
  if (fetching) return;
  fetching = true;
  try {
    const answer = await fetch("./", { cache: "no-store" });
    if (!answer.ok) return;
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const chosen = byId("target").value;
    for (const id of ["agents", "target", "summary"]) byId(id).replaceWith(document.adoptNode(page.getElementById(id)));
    byId("target").value = chosen;
    if (byId("target").selectedIndex < 0) byId("target").selectedIndex = 0;
    findRows();
  } catch {
    // The next event asks again; a runner that is gone is told of by its silence.
  } finally {
    fetching = false;
  }
}

function alive() {
  heardAt = performance.now();
  if (goneSince !== null) put(byId("news"), "The runner is back.");
  goneSince = null;
  document.body.classList.remove("gone");
  byId("link").dataset.link = "live";
  put(byId("link"), "live");
}

function gone() {
  if (goneSince !== null) return;
  goneSince = new Date();
  document.body.classList.add("gone");
  byId("link").dataset.link = "gone";
  const words = `The runner is gone: nothing was heard of it since ${goneSince.toLocaleTimeString()}. ` +
    "What is shown is from before. Looking for it again.";
  put(byId("link"), words);
  put(byId("news"), words);
  document.title = "gone - em-runner";
}

function listen() {
  const source = new EventSource("events");
  source.onmessage = (event) => {
    alive();
    take(JSON.parse(event.data));
  };
  source.onerror = () => {
    source.close(); // Not its own retries: they end for good at the first answer that is not 200.
    gone();
    setTimeout(listen, RETRY_MS);
  };
  const watch = setInterval(() => {
    if (source.readyState === EventSource.CLOSED) clearInterval(watch);
    else if (performance.now() - heardAt > SILENCE_MS) source.onerror();
  }, 1000);
  heardAt = performance.now();
}

async function ask(query, target) {
  const [kind, name] = target.split(/\/(.*)/s);
  const began = performance.now();
  const answer = await fetch("agent/query", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ query, [kind]: name }),
  });
  const text = await answer.text();
  const took = performance.now() - began;
  return { ok: answer.ok, status: answer.status, worker: answer.headers.get("x-worker"), text, took };
}

function inWords({ ok, status, worker, text, took }) {
  const time = `${took < 10 ? took.toFixed(1) : took.toFixed(0)} ms`;
  if (ok) return `${worker} answered in ${time}.`;
  let error = text;
  try {
    error = JSON.parse(text).error;
  } catch {
    // Somebody between us and the runner has answered.
  }
  return `${status}, ${worker === null ? "no worker was asked" : worker} after ${time}: ${error}`;
}

function pretty(text) {
  const value = JSON.parse(text);
  // JavaScript has no integers past 2**53, nor 1.0 beside 1: what it would change is shown as it came.
  return JSON.stringify(value) === text ? JSON.stringify(value.results, null, 2) : text;
}

async function onSubmit(event) {
  event.preventDefault();
  const form = event.currentTarget;
  const [button, answer, result] = [form.querySelector("button"), byId("answer"), byId("result")];
  button.disabled = true;
  put(byId("verdict"), "asked");
  try {
    const found = await ask(form.query.value, form.target.value);
    answer.classList.toggle("failed", !found.ok);
    put(byId("verdict"), inWords(found));
    result.hidden = !found.ok;
    if (found.ok) put(result, pretty(found.text));
  } catch (error) {
    answer.classList.add("failed");
    result.hidden = true;
    put(byId("verdict"), `No answer: ${error.message}`);
  } finally {
    button.disabled = false;
    byId("query").focus();
  }
}

findRows();
put(byId("link"), "connecting"); // Without a script it says that the page has to be loaded again.
byId("ask").hidden = false;
byId("ask").querySelector("form").addEventListener("submit", onSubmit);
listen();
