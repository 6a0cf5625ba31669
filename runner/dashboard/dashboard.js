// Keeps the page up to date from /events, and asks queries. Every text comes from the runner as it is to be shown,
// and goes into the page as text, never as markup.
"use strict";

const SILENCE_MS = 6000; // The runner says something every 2 s, even if nothing changes.
const RETRY_MS = 2000;
const HIDDEN_MS = 10000;
const NEWS_MS = 100;

const byId = (id) => document.getElementById(id);
let rows = new Map();
let known = new Map(); // Each worker's cells as the stream has told them; it tells of each only what changes.
let heardAt = performance.now();
let fetching = false;
let source = null;
let retry = null;
let refusals = 0;
let asking = null;
let telling = [];

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
  const before = standing(row);
  row.dataset.state = view.state;
  for (const cell of row.querySelectorAll("[data-cell]")) put(cell, view[cell.dataset.cell]);
  row.querySelector("polyline").setAttribute("points", view.spark);
  row.querySelector(".error").hidden = view.last_error === "";
  return change(view.name, before, standing(row));
}

function standing(row) {
  return { state: row.dataset.state, restarts: row.querySelector("[data-cell=restarts]").textContent };
}

// What is worth an interruption: whether a worker is ready, that it failed or was restarted. While its node hangs it
// goes through the other states again and again.
function change(name, before, now) {
  const worth = (before.state === "ready") !== (now.state === "ready") || now.state === "failed";
  if (before.state !== now.state && worth) return `${name}: ${now.state}`;
  // Too fast for its states to be seen. Of another runner's, or at another node, the count begins again.
  return before.restarts === now.restarts || now.restarts === "0" ? null : `${name}: restarted`;
}

// The keyboard stays at a worker: at its link in the list of those that are not ready, or in its row once it is ready.
function focusOn(name) {
  const link = [...byId("troubled").querySelectorAll("a")].find((each) => each.dataset.name === name);
  const row = rows.get(name)?.querySelector("th");
  if (row && !link) row.tabIndex = -1;
  (link ?? row)?.focus({ preventScroll: row !== undefined && !link });
}

// Of more than a few workers, those that are not ready, in the header. A link stays its worker's: somebody may be on it.
function listTroubled() {
  const list = byId("troubled");
  const found = [...rows].filter(([, row]) => row.dataset.state !== "ready");
  list.hidden = found.length === 0 || rows.size <= Number(list.dataset.glance);
  const shown = new Map(list.hidden ? [] : found.map(([name, row]) => [name, row.dataset.state]));
  const links = new Map([...list.querySelectorAll("a")].map((link) => [link.dataset.name, link]));
  const focused = document.activeElement.closest("#troubled a")?.dataset.name;
  for (const [name, link] of links) if (!shown.has(name)) link.remove();
  let before = null;
  for (const [name, state] of shown) {
    let link = links.get(name);
    if (link === undefined) {
      link = document.createElement("a");
      link.href = `#worker-${name}`;
      link.dataset.name = name;
      link.append(`${name} `, document.createElement("strong"));
      if (before === null) list.prepend(link);
      else before.after(link);
    }
    link.dataset.state = state; // The style sheet shows the worst first: a link that were moved would lose the focus.
    put(link.querySelector("strong"), state);
    before = link;
  }
  if (focused !== undefined && !shown.has(focused)) focusOn(focused);
}

// What is read out. All that happens at the same moment is one piece of news, and the same words again are news too.
function tell(words) {
  if (words.length === 0) return;
  if (telling.length === 0) {
    put(byId("news"), "");
    setTimeout(() => {
      const more = telling.length > 6 ? ` and ${telling.length - 6} more` : "";
      put(byId("news"), telling.splice(0).slice(0, 6).join(", ") + more);
    }, NEWS_MS);
  }
  telling.push(...words);
}

function take(update) {
  for (const cells of update.changed) known.set(cells.name, { ...known.get(cells.name), ...cells });
  if (update.version !== document.body.dataset.version) return void loadAnew(update.version);
  if (String(update.layout) !== byId("agents").dataset.layout) return void replaceTable();
  alive();
  const news = update.changed.map(({ name }) => show(known.get(name))).filter((words) => words !== null);
  listTroubled();
  put(byId("summary"), update.summary);
  document.title = `${update.summary} - em-runner`;
  tell(news);
}

// Asks for the page, and has `use` do something with it. While it cannot be had, what is shown is from before.
async function withThePage(use) {
  if (fetching) return;
  fetching = true;
  try {
    const answer = await fetch("./", { cache: "no-store", signal: AbortSignal.timeout(SILENCE_MS) });
    if (!answer.ok) throw new Error(`the page is answered ${answer.status}`);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (!page.body.dataset.version) throw new Error("something else answers in its place");
    use(page);
  } catch (error) {
    lost(`This page could not be brought up to date: ${error.message}. What is shown is from before. Trying again.`, "stale");
  } finally {
    fetching = false;
  }
}

// The runner was replaced by another version: its page and its script are others too. What was typed, and what was
// open, is kept. Not before that page is there: nobody stands by to mend what a proxy says meanwhile.
function loadAnew(version) {
  return withThePage((page) => {
    if (page.body.dataset.version !== version) throw new Error("it is still the page of another version");
    const query = byId("query");
    try {
      const kept = [query.value, chosenTarget(), document.activeElement === query, withOpenErrors()];
      sessionStorage.setItem("typed", JSON.stringify(kept));
    } catch {
      // A browser that keeps nothing for anybody.
    }
    location.reload();
  });
}

function takeUpWhatWasKept() {
  let kept = null;
  try {
    kept = JSON.parse(sessionStorage.getItem("typed"));
    sessionStorage.removeItem("typed");
  } catch {
    // As above.
  }
  if (kept === null) return;
  const [query, target, focused, open = []] = kept; // Another version's page may have kept less.
  byId("query").value = query;
  choose(target);
  if (focused) byId("query").focus({ preventScroll: true });
  openErrors(open);
}

function withOpenErrors() {
  return [...rows].filter(([, row]) => row.querySelector("details").open).map(([name]) => name);
}

function openErrors(names) {
  for (const name of names) rows.get(name)?.querySelector("details").setAttribute("open", "");
}

// There are other workers than before: the runner has reloaded its configuration.
function replaceTable() {
  return withThePage((page) => {
    const [chosen, before] = [chosenTarget(), new Map([...rows].map(([name, row]) => [name, standing(row)]))];
    const [open, focused] = [withOpenErrors(), document.activeElement];
    const [inTable, inList] = [focused.closest("[data-worker]")?.dataset.worker, focused === byId("target")];
    const onLink = focused.closest("#troubled a")?.dataset.name ?? (focused.tagName === "TH" ? inTable : undefined);
    for (const id of ["agents", "target", "summary", "troubled"]) byId(id).replaceWith(document.adoptNode(page.getElementById(id)));
    findRows();
    // What the stream has told while the page was on its way is not told again.
    for (const name of rows.keys()) if (known.has(name)) show(known.get(name));
    listTroubled();
    choose(chosen);
    // What was open stays open, and the keyboard stays where it was.
    openErrors(open);
    if (inTable !== undefined && onLink === undefined) rows.get(inTable)?.querySelector("summary").focus();
    if (inList) byId("target").focus();
    if (onLink !== undefined) focusOn(onLink);
    tell([
      ...[...rows].filter(([name]) => !before.has(name)).map(([name, row]) => `${name} added: ${row.dataset.state}`),
      ...[...rows].map(([name, row]) => before.has(name) && change(name, before.get(name), standing(row))).filter(Boolean),
      ...[...before.keys()].filter((name) => !rows.has(name)).map((name) => `${name} removed`),
    ]);
    alive();
  });
}

function chosenTarget() {
  const list = byId("target");
  return list.selectedOptions[0]?.dataset.was ?? list.value;
}

function choose(target) {
  const list = byId("target");
  list.value = target;
  if (list.selectedIndex >= 0 || target === "") return;
  // Nobody's question goes to another than they chose: the form is not sent with an empty choice.
  const gone = new Option(`${target.replace("/", " ")} is gone: choose anew`, "", true, true);
  gone.dataset.was = target; // It may come back.
  list.prepend(gone);
}

function alive() {
  const was = byId("link").dataset.link;
  if (was !== undefined && was !== "live") tell([was === "gone" ? "The runner is back" : "The page is live again"]);
  document.body.classList.remove("gone");
  byId("link").dataset.link = "live";
  put(byId("link"), "live");
}

// What is shown is from before, whatever the reason.
function lost(words, link = "gone") {
  if (byId("link").dataset.link === link) return put(byId("link"), words); // That is no news, even in other words.
  document.body.classList.add("gone");
  byId("link").dataset.link = link;
  put(byId("link"), words);
  tell([words]);
  put(byId("summary"), "unknown how it stands");
  document.title = `${link} - em-runner`;
}

function gone() {
  // With the date: a screen on a wall may say so for days.
  const since = new Date(Date.now() - (performance.now() - heardAt)).toLocaleString();
  lost(`The runner is gone: nothing was heard of it since ${since}. What is shown is from before. Looking for it again.`);
  asking?.abort(new Error("the runner is gone"));
}

// A stream that ends says nothing of the runner: it may be up, and refuse this one.
async function afterTheEnd() {
  try {
    const answer = await fetch("events", { method: "HEAD", cache: "no-store", signal: AbortSignal.timeout(SILENCE_MS) });
    if (answer.ok) {
      // It was a cut, or there are too many pages; the next try tells.
      if (++refusals < 3) return;
      lost("The runner is up, but keeps no more pages up to date: close some. What is shown is from before.", "full");
    } else {
      lost(`The runner is up, but answers ${answer.status}: load the page again. What is shown is from before.`, "refused");
    }
  } catch {
    gone();
  }
}

function listen() {
  clearTimeout(retry);
  source?.close();
  known = new Map(); // A stream begins with all there is.
  const mine = (source = new EventSource("events"));
  const end = async () => {
    mine.close(); // Not its own retries: they end for good at the first answer that is not 200.
    clearInterval(watch);
    await afterTheEnd();
    if (source === mine) retry = setTimeout(listen, RETRY_MS);
  };
  const begun = performance.now();
  const watch = setInterval(() => {
    if (mine.readyState === EventSource.CLOSED) clearInterval(watch);
    else if (performance.now() - Math.max(heardAt, begun) > SILENCE_MS) {
      gone();
      end();
    }
  }, 1000);
  mine.onmessage = (event) => {
    heardAt = performance.now();
    refusals = 0;
    take(JSON.parse(event.data));
    if (!document.hidden) return;
    // A browser has six connections to one server for all its pages: one that nobody sees looks only now and then.
    mine.close();
    clearInterval(watch);
    retry = setTimeout(listen, HIDDEN_MS);
  };
  mine.onerror = end;
}

async function ask(query, target) {
  const [kind, name] = target.split(/\/(.*)/s);
  const began = performance.now();
  const answer = await fetch("agent/query", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ query, [kind]: name }),
    signal: asking.signal,
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
  if (asking !== null) return; // That one is answered first.
  const form = event.currentTarget;
  const [button, answer, result] = [form.querySelector("button"), byId("answer"), byId("result")];
  button.setAttribute("aria-disabled", "true"); // One that is `disabled` would lose the keyboard's focus.
  result.hidden = true; // An answer stands below its own question alone.
  answer.classList.remove("failed");
  put(byId("verdict"), "asked");
  asking = new AbortController();
  try {
    const found = await ask(form.query.value, form.target.value);
    answer.classList.toggle("failed", !found.ok);
    put(byId("verdict"), inWords(found));
    result.hidden = !found.ok;
    if (found.ok) put(result, pretty(found.text));
  } catch (error) {
    answer.classList.add("failed");
    const unreachable = error instanceof TypeError; // fetch's way to say that nobody was there
    put(byId("verdict"), `No answer: ${unreachable ? "the runner cannot be reached; this page looks for it" : error.message}`);
  } finally {
    asking = null;
    button.removeAttribute("aria-disabled");
  }
}

function onNoTarget() {
  byId("result").hidden = true;
  byId("answer").classList.add("failed");
  put(byId("verdict"), "Nobody was asked: the one who was chosen is gone. Choose whom to ask.");
}

findRows();
put(byId("link"), "connecting"); // Without a script it says that the page has to be loaded again.
// What sticks below the header, and what is scrolled to, keeps clear of it, however high it is now.
new ResizeObserver(([header]) => {
  const [height, focused] = [header.borderBoxSize[0].blockSize, document.activeElement];
  document.documentElement.style.setProperty("--header", `${height}px`);
  const covered = focused.closest("main") && focused.getBoundingClientRect().top < height;
  if (covered && getComputedStyle(header.target).position === "sticky") focused.scrollIntoView({ block: "nearest" });
}).observe(document.querySelector("header"));
byId("ask").hidden = byId("to-ask").hidden = false;
byId("ask").querySelector("form").addEventListener("submit", onSubmit);
byId("query").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  event.target.form.requestSubmit();
});
byId("ask").addEventListener("invalid", (event) => event.target === byId("target") && onNoTarget(), true);
takeUpWhatWasKept();
document.addEventListener("visibilitychange", () => {
  if (document.hidden) return;
  if (performance.now() - heardAt > SILENCE_MS && byId("link").dataset.link === "live") {
    delete byId("link").dataset.link; // What is shown is from before, until the stream has told otherwise.
    put(byId("link"), "connecting");
  }
  listen();
});
listen();
