// Keeps the page up to date with the events of GET /events, and sends queries. The runner formats
// every text. The page inserts texts as text, never as markup.
"use strict";

const SILENCE_MS = 6000; // The runner sends an event at least every 2 s.
const RETRY_MS = 2000;
const HIDDEN_MS = 10000;
const ANNOUNCE_MS = 100;
const MAX_ANNOUNCED = 6;
const OUTDATED = "This page shows the last known state.";

const byId = (id) => document.getElementById(id);
let rows = new Map(); // Each worker's part of the table, by its name.
let cells = new Map(); // Each worker's cells. An event has only those that have changed.
let lastEventAt = performance.now();
let isFetching = false;
let source = null;
let retry = null;
let failedStreams = 0;
let pendingQuery = null;
let announcements = [];

// --- the table ---

function findRows() {
  const found = [...document.querySelectorAll("[data-worker]")];
  rows = new Map(found.map((row) => [row.dataset.worker, row]));
}

function setText(element, text) {
  // An equal text is not written again: that would clear the user's selection, and a screen reader
  // would read the text again.
  if (element.textContent !== text) element.textContent = text;
}

// Writes a worker's cells into its row. Returns what to announce, or null.
function updateRow(view) {
  const row = rows.get(view.name);
  if (row === undefined) return null;
  const before = statusOf(row);
  row.dataset.state = view.state;
  for (const cell of row.querySelectorAll("[data-cell]")) setText(cell, view[cell.dataset.cell]);
  row.querySelector("polyline").setAttribute("points", view.spark);
  row.querySelector(".error").hidden = view.last_errors === "";
  return announcementOf(view.name, before, statusOf(row));
}

function statusOf(row) {
  const restarts = row.querySelector("[data-cell=restarts]").textContent;
  return { state: row.dataset.state, restarts };
}

// Returns what a screen reader reads: that a worker is ready or no longer ready, has failed, or was
// restarted. While its node does not answer, a worker changes between the other states repeatedly.
function announcementOf(name, before, now) {
  const readinessChanged = (before.state === "ready") !== (now.state === "ready");
  const isImportant = readinessChanged || now.state === "failed";
  if (before.state !== now.state && isImportant) return `${name}: ${now.state}`;
  // A restart may be too fast for its states to be seen. The count starts again at 0 with another
  // runner, or at another node.
  if (before.restarts === now.restarts || now.restarts === "0") return null;
  return `${name}: restarted`;
}

// --- the list of workers that are not ready ---

function notReadyLinks() {
  const links = [...byId("not-ready").querySelectorAll("a")];
  return new Map(links.map((link) => [link.dataset.name, link]));
}

// Focuses a worker's link in the list, or its row if it has become ready.
function focusWorker(name) {
  const link = notReadyLinks().get(name);
  if (link !== undefined) return link.focus();
  const row = rows.get(name)?.querySelector("th");
  if (!row) return;
  row.tabIndex = -1;
  row.focus({ preventScroll: true });
}

function newLink(name) {
  const link = document.createElement("a");
  link.href = `#worker-${name}`;
  link.dataset.name = name;
  link.append(`${name} `, document.createElement("strong"));
  return link;
}

// With many workers, the header lists those that are not ready. A worker keeps its link element,
// because the link may have the keyboard's focus.
function updateNotReadyList() {
  const list = byId("not-ready");
  const found = [...rows].filter(([, row]) => row.dataset.state !== "ready");
  list.hidden = found.length === 0 || rows.size <= Number(list.dataset.threshold);
  const shown = new Map(list.hidden ? [] : found);
  const links = notReadyLinks();
  const focused = document.activeElement.closest("#not-ready a")?.dataset.name;
  for (const [name, link] of links) if (!shown.has(name)) link.remove();
  let previous = null;
  for (const [name, row] of shown) {
    const link = links.get(name) ?? newLink(name);
    if (!links.has(name)) {
      if (previous === null) list.prepend(link);
      else previous.after(link);
    }
    // The style sheet orders the links by state: a link that is moved loses the focus.
    link.dataset.state = row.dataset.state;
    setText(link.querySelector("strong"), row.dataset.state);
    previous = link;
  }
  if (focused !== undefined && !shown.has(focused)) focusWorker(focused);
}

// --- events ---

// Has a screen reader read these texts, together with others of the same moment.
function announce(texts) {
  if (texts.length === 0) return;
  if (announcements.length === 0) {
    // Emptied first, so that the same text is read again.
    setText(byId("announcements"), "");
    setTimeout(() => {
      const all = announcements.splice(0);
      const more = all.length - MAX_ANNOUNCED;
      const shown = all.slice(0, MAX_ANNOUNCED).join(", ");
      setText(byId("announcements"), more > 0 ? `${shown} and ${more} more` : shown);
    }, ANNOUNCE_MS);
  }
  announcements.push(...texts);
}

function onUpdate(update) {
  for (const changed of update.changed) {
    cells.set(changed.name, { ...cells.get(changed.name), ...changed });
  }
  if (update.version !== document.body.dataset.version) return void reloadPage(update.version);
  if (String(update.table_id) !== byId("agents").dataset.tableId) return void replaceTable();
  markLive();
  const changes = update.changed.map(({ name }) => updateRow(cells.get(name)));
  updateNotReadyList();
  setText(byId("summary"), update.summary);
  document.title = `${update.summary} - em-runner`;
  announce(changes.filter((text) => text !== null));
}

// --- the page after a reload of the configuration, or an upgrade ---

// Fetches this page again and calls `use` with it.
async function fetchPage(use) {
  if (isFetching) return;
  isFetching = true;
  try {
    const signal = AbortSignal.timeout(SILENCE_MS);
    const response = await fetch("./", { cache: "no-store", signal });
    if (!response.ok) throw new Error(`the response has status ${response.status}`);
    const page = new DOMParser().parseFromString(await response.text(), "text/html");
    if (!page.body.dataset.version) throw new Error("the response is not from em-runner");
    use(page);
  } catch (error) {
    markStale(`This page cannot be updated: ${error.message}. ${OUTDATED} Trying again.`, "stale");
  } finally {
    isFetching = false;
  }
}

// Reloads the page because another version of em-runner runs, which has another page and script.
// The form and the open errors are restored. The new page is fetched first: during an upgrade a
// proxy may answer, and a page of the proxy would not update itself.
function reloadPage(version) {
  return fetchPage((page) => {
    if (page.body.dataset.version !== version) throw new Error("the page has another version");
    const query = byId("query");
    const hasFocus = document.activeElement === query;
    const form = [query.value, selectedTarget(), hasFocus, workersWithOpenErrors()];
    try {
      sessionStorage.setItem("form", JSON.stringify(form));
    } catch {
      // The browser stores nothing for this page: the form is lost.
    }
    location.reload();
  });
}

function restoreForm() {
  let form = null;
  try {
    form = JSON.parse(sessionStorage.getItem("form"));
    sessionStorage.removeItem("form");
  } catch {
    // As in `reloadPage`.
  }
  if (form === null) return;
  const [query, target, hadFocus, open = []] = form; // An older version may have stored less.
  byId("query").value = query;
  selectTarget(target);
  if (hadFocus) byId("query").focus({ preventScroll: true });
  openErrors(open);
}

function workersWithOpenErrors() {
  return [...rows].filter(([, row]) => row.querySelector("details").open).map(([name]) => name);
}

function openErrors(names) {
  for (const name of names) rows.get(name)?.querySelector("details").setAttribute("open", "");
}

// Returns a function that restores the keyboard's focus after the table was replaced.
function rememberFocus() {
  const focused = document.activeElement;
  const worker = focused.closest("[data-worker]")?.dataset.worker;
  const link = focused.closest("#not-ready a")?.dataset.name;
  if (link !== undefined) return () => focusWorker(link);
  if (focused.tagName === "TH" && worker !== undefined) return () => focusWorker(worker);
  if (worker !== undefined) return () => rows.get(worker)?.querySelector("summary").focus();
  if (focused === byId("target")) return () => byId("target").focus();
  return () => {};
}

// Replaces the table because the runner has reloaded its configuration and has other workers now.
function replaceTable() {
  return fetchPage((page) => {
    const before = new Map([...rows].map(([name, row]) => [name, statusOf(row)]));
    const target = selectedTarget();
    const open = workersWithOpenErrors();
    const restoreFocus = rememberFocus();
    for (const id of ["agents", "target", "summary", "not-ready"]) {
      byId(id).replaceWith(document.adoptNode(page.getElementById(id)));
    }
    findRows();
    // Events that arrived while the page was being fetched are not sent again.
    for (const name of rows.keys()) if (cells.has(name)) updateRow(cells.get(name));
    updateNotReadyList();
    selectTarget(target);
    openErrors(open);
    restoreFocus();
    announce(changesSince(before));
    markLive();
  });
}

function changesSince(before) {
  const added = [];
  const changed = [];
  for (const [name, row] of rows) {
    const now = statusOf(row);
    if (before.has(name)) changed.push(announcementOf(name, before.get(name), now));
    else added.push(`${name} added: ${now.state}`);
  }
  const gone = [...before.keys()].filter((name) => !rows.has(name));
  const removed = gone.map((name) => `${name} removed`);
  return [...added, ...changed.filter((text) => text !== null), ...removed];
}

function selectedTarget() {
  const list = byId("target");
  return list.selectedOptions[0]?.dataset.missing ?? list.value;
}

function selectTarget(target) {
  const list = byId("target");
  list.value = target;
  if (list.selectedIndex >= 0 || target === "") return;
  // A query must not go to another target than the user selected. The browser does not submit the
  // form while this option is selected, because its value is empty.
  const text = `${target.replace("/", " ")} was removed: select another`;
  const missing = new Option(text, "", true, true);
  missing.dataset.missing = target; // A later reload may add it again.
  list.prepend(missing);
}

// --- the connection to the runner ---

function markLive() {
  const before = byId("connection").dataset.connection;
  if (before === "gone") announce(["The runner is back"]);
  else if (before !== undefined && before !== "live") announce(["The page is live again"]);
  document.body.classList.remove("stale");
  byId("connection").dataset.connection = "live";
  setText(byId("connection"), "live");
}

// Shows that the page is not up to date, and why.
function markStale(text, connection) {
  const isNew = byId("connection").dataset.connection !== connection;
  setText(byId("connection"), text);
  if (!isNew) return; // The same problem again is not announced, even if its text differs.
  document.body.classList.add("stale");
  byId("connection").dataset.connection = connection;
  announce([text]);
  setText(byId("summary"), "current state unknown");
  document.title = `${connection} - em-runner`;
}

function markGone() {
  // With the date, because a page on a wall display may show it for days.
  const since = new Date(Date.now() - (performance.now() - lastEventAt)).toLocaleString();
  markStale(`The runner is unreachable since ${since}. ${OUTDATED} Trying again.`, "gone");
  pendingQuery?.abort(new Error("the runner is unreachable"));
}

// Finds out why a stream has ended: the runner may be up, but refuse this stream.
async function diagnose() {
  let response;
  try {
    const signal = AbortSignal.timeout(SILENCE_MS);
    response = await fetch("events", { method: "HEAD", cache: "no-store", signal });
  } catch {
    return markGone();
  }
  if (!response.ok) {
    const problem = `The runner is up, but answers with status ${response.status}`;
    return markStale(`${problem}: reload the page. ${OUTDATED}`, "refused");
  }
  // Either the connection broke, or too many pages are open. The next attempts show which.
  failedStreams += 1;
  if (failedStreams < 3) return;
  const problem = "The runner is up, but too many pages are open: close some of them";
  markStale(`${problem}. ${OUTDATED}`, "full");
}

function connect() {
  clearTimeout(retry);
  source?.close();
  cells = new Map(); // The first event of a stream has all cells.
  const stream = new EventSource("events");
  source = stream;
  const startedAt = performance.now();
  const onEnd = async () => {
    // EventSource itself stops trying after a response other than 200.
    stream.close();
    clearInterval(watch);
    await diagnose();
    if (source === stream) retry = setTimeout(connect, RETRY_MS);
  };
  const watch = setInterval(() => {
    if (stream.readyState === EventSource.CLOSED) return clearInterval(watch);
    if (performance.now() - Math.max(lastEventAt, startedAt) <= SILENCE_MS) return;
    markGone();
    onEnd();
  }, 1000);
  stream.onmessage = (event) => {
    lastEventAt = performance.now();
    failedStreams = 0;
    onUpdate(JSON.parse(event.data));
    if (!document.hidden) return;
    // A browser opens at most six connections to one server for all its pages. So a hidden page
    // reads one event now and then, and keeps no connection.
    stream.close();
    clearInterval(watch);
    retry = setTimeout(connect, HIDDEN_MS);
  };
  stream.onerror = onEnd;
}

// --- queries ---

async function sendQuery(query, target, signal) {
  const [kind, name] = target.split(/\/(.*)/s);
  const startedAt = performance.now();
  const response = await fetch("agent/query", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ query, [kind]: name }),
    signal,
  });
  const text = await response.text();
  const tookMs = performance.now() - startedAt;
  const worker = response.headers.get("x-worker");
  return { ok: response.ok, status: response.status, worker, text, tookMs };
}

function describe({ ok, status, worker, text, tookMs }) {
  const time = `${tookMs < 10 ? tookMs.toFixed(1) : tookMs.toFixed(0)} ms`;
  if (ok) return `${worker} answered in ${time}.`;
  let error = text;
  try {
    error = JSON.parse(text).error;
  } catch {
    // A proxy has answered, with a text of another form.
  }
  return `${status}, ${worker ?? "no worker received the query"} after ${time}: ${error}`;
}

function formatResult(text) {
  const value = JSON.parse(text);
  // JavaScript has no integers beyond 2**53, and 1.0 is 1. A result that it would change is shown
  // as it was received.
  return JSON.stringify(value) === text ? JSON.stringify(value.results, null, 2) : text;
}

async function onSubmit(event) {
  event.preventDefault();
  if (pendingQuery !== null) return; // The previous query is answered first.
  const form = event.currentTarget;
  const button = form.querySelector("button");
  const answer = byId("answer");
  const result = byId("result");
  button.setAttribute("aria-disabled", "true"); // With `disabled` it would lose the focus.
  result.hidden = true; // The result of the previous query.
  answer.classList.remove("failed");
  setText(byId("verdict"), "sent");
  pendingQuery = new AbortController();
  try {
    const found = await sendQuery(form.query.value, form.target.value, pendingQuery.signal);
    answer.classList.toggle("failed", !found.ok);
    setText(byId("verdict"), describe(found));
    result.hidden = !found.ok;
    if (found.ok) setText(result, formatResult(found.text));
  } catch (error) {
    answer.classList.add("failed");
    // `fetch` raises a TypeError if there is no connection.
    const reason = error instanceof TypeError ? "the runner is unreachable" : error.message;
    setText(byId("verdict"), `No answer: ${reason}`);
  } finally {
    pendingQuery = null;
    button.removeAttribute("aria-disabled");
  }
}

function onMissingTarget() {
  byId("result").hidden = true;
  byId("answer").classList.add("failed");
  const text = "The query was not sent: its target was removed. Select another.";
  setText(byId("verdict"), text);
}

function onKey(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  event.target.form.requestSubmit();
}

function onVisibilityChange() {
  if (document.hidden) return;
  const isOutdated = performance.now() - lastEventAt > SILENCE_MS;
  if (isOutdated && byId("connection").dataset.connection === "live") {
    delete byId("connection").dataset.connection; // The page is live again after the next event.
    setText(byId("connection"), "connecting");
  }
  connect();
}

// The header's height varies. Sticky parts below it, and scrolling to a link, depend on it.
function onHeaderResize([header]) {
  const height = header.borderBoxSize[0].blockSize;
  const focused = document.activeElement;
  document.documentElement.style.setProperty("--header", `${height}px`);
  const isCovered = focused.closest("main") && focused.getBoundingClientRect().top < height;
  const isSticky = getComputedStyle(header.target).position === "sticky";
  if (isCovered && isSticky) focused.scrollIntoView({ block: "nearest" });
}

findRows();
setText(byId("connection"), "connecting"); // Without scripts, the served text asks for a reload.
byId("query-section").hidden = false;
byId("to-form").hidden = false;
restoreForm();
new ResizeObserver(onHeaderResize).observe(document.querySelector("header"));
byId("query-section").querySelector("form").addEventListener("submit", onSubmit);
byId("query").addEventListener("keydown", onKey);
// On the section, because a reload of the configuration replaces the list of targets.
const onInvalid = (event) => event.target === byId("target") && onMissingTarget();
byId("query-section").addEventListener("invalid", onInvalid, true);
document.addEventListener("visibilitychange", onVisibilityChange);
connect();
