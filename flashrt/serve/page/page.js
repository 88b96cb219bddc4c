// The page of a server: its sessions as trees, and what its lanes do.
//
// IS: asks the routes that every client asks, and draws what they answer. IS NOT: a place for
// state: what is not in `state` is on the server. All text is put in as text: prompts are hostile.

import { layout, merged, path } from "./tree.js";

const ROW = 34, STEP = 18, PAD = 16, COLOURS = 6;
const EVERY_MS = 1000;
const $ = (id) => document.getElementById(id);

const state = {
  status: null,
  sessions: [],
  trees: new Map(), // session -> its tree
  turns: new Map(), // session/node/messages -> messages and text
  session: null, // id of the one that is shown
  node: null, // id of the selected state
  follows: true, // the selection goes with the tip
  live: null, // {session, text, thought, said}: a turn that runs from this page
};

// -- the server -----------------------------------------------------------------------------------

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function headers(more) {
  const key = sessionStorage.getItem("flashrt-key");
  return { ...(key ? { authorization: `Bearer ${key}` } : {}), ...more };
}

async function send(method, at, body, more = {}) {
  const options = { method, headers: headers(more.headers), signal: more.signal };
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["content-type"] = "application/json";
  }
  for (;;) {
    const response = await fetch(at, options);
    if (response.ok) return response;
    const words = await response.json().then((found) => found.error?.message, () => undefined);
    if (response.status !== 401) throw new Refused(response.status, words ?? `status ${response.status}`);
    await askForKey(sessionStorage.getItem("flashrt-key") ? words : "");
    Object.assign(options.headers, headers());
  }
}

async function ask(method, at, body, more) {
  return (await send(method, at, body, more)).json();
}

let asking = null; // several requests may meet 401 at once; the user is asked once
function askForKey(words) {
  asking ??= new Promise((resolve) => {
    $("key-trouble").textContent = words ?? "";
    $("key-value").value = "";
    $("key").showModal();
    $("key-form").onsubmit = () => {
      sessionStorage.setItem("flashrt-key", $("key-value").value.trim());
      asking = null;
      resolve();
    };
  });
  return asking;
}
$("key").addEventListener("cancel", (event) => event.preventDefault());

const at = (session, rest = "") => `/v1/sessions/${encodeURIComponent(session)}${rest}`;

function match(session) {
  const found = state.sessions.find((one) => one.id === session);
  return { headers: { "if-match": `"${found.etag}"` } };
}

// -- what is there --------------------------------------------------------------------------------

async function refresh() {
  const [status, list] = await Promise.all([ask("GET", "/v1/status"), ask("GET", "/v1/sessions")]);
  state.status = status;
  state.sessions = list.data;
  if (!state.sessions.some((one) => one.id === state.session)) {
    choose(state.sessions.at(-1)?.id ?? null);
  }
  const shown = family();
  for (const known of state.trees.keys()) {
    if (!shown.some((one) => one.id === known)) state.trees.delete(known);
  }
  await Promise.all(shown.map(async (one) => {
    const tree = await ask("GET", at(one.id, "/tree")).catch(gone);
    if (tree) state.trees.set(one.id, tree);
  }));
  const now = current();
  if (now && (state.follows || !nodes().some((node) => node.id === state.node))) state.node = now.tip;
  draw();
  await loadTurns();
}

function gone(error) {
  if (error.status !== 404) throw error;
  return null;
}

/** The session that is shown, and those that share its first state. */
function family() {
  const now = current();
  return now ? state.sessions.filter((one) => one.root === now.root) : [];
}

const current = () => state.sessions.find((one) => one.id === state.session);
const nodes = () => merged(family().map((one) => state.trees.get(one.id)).filter(Boolean));

/** A node's messages and text do not change, but one session alone may have it. */
const keyOf = (node) => `${node.id}/${node.n_messages}`;

async function loadTurns() {
  const missing = nodes().filter((node) => !state.turns.has(keyOf(node)));
  if (!missing.length) return;
  let next = 0;
  const work = async () => {
    while (next < missing.length) {
      const node = missing[next++];
      const turn = await ask("GET", at(node.sessions[0], `/nodes/${node.id}`)).catch(gone);
      if (turn) state.turns.set(keyOf(node), turn);
    }
  };
  await Promise.all([work(), work(), work(), work()]);
  draw();
}

function choose(session) {
  state.session = session;
  state.follows = true;
  state.node = current()?.tip ?? null;
  sure(false);
}

// -- drawing --------------------------------------------------------------------------------------

/** An element with a class, and text or children. */
function make(tag, cls, ...inner) {
  const made = document.createElement(tag);
  if (cls) made.className = cls;
  made.append(...inner.filter((one) => one !== null));
  return made;
}

function vector(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** Replace children only where something changed, so that focus and selections stay. */
function put(element, key, children) {
  const text = JSON.stringify(key);
  if (element.dataset.key === text) return false;
  element.dataset.key = text;
  element.replaceChildren(...children());
  return true;
}

const count = (n) => n.toLocaleString("en");
const called = (session) => session.name ?? session.id.slice(0, 8);

function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (n >= 1024 && i < units.length - 1) { n /= 1024; i += 1; }
  return `${i && n < 10 ? n.toFixed(1) : Math.round(n)} ${units[i]}`;
}

function seconds(s) {
  if (s === null) return "";
  return s < 1 ? `${(s * 1e3).toFixed(s < 0.01 ? 1 : 0)} ms` : `${s.toFixed(2)} s`;
}

function draw() {
  drawHeader();
  drawSessions();
  drawTree();
  drawTalk();
  drawTurns();
  drawMemory();
}

function drawHeader() {
  const { status } = state;
  $("model").textContent = `${status.model} on ${status.device}`;
  const others = status.queue.all - status.queue.yours;
  $("queue").textContent = status.queue.all
    ? `${status.queue.all} waiting${others ? `, ${others} of other keys` : ""}` : "nobody waits";
  $("attach").hidden = !status.sees;
  $("forget").hidden = !sessionStorage.getItem("flashrt-key");
  put($("lanes"), [status.lanes, state.sessions.map(called)], () => status.lanes.map((lane) => {
    const session = state.sessions.find((one) => one.id === lane.session);
    const who = session ? `: ${called(session)}` : lane.state === "idle" || lane.is_yours ? "" : ": another key";
    const made = make("span", "lane", `${lane.index} ${lane.state}${who}`);
    made.classList.toggle("busy", lane.state !== "idle");
    made.classList.toggle("yours", lane.is_yours);
    return made;
  }));
}

function drawSessions() {
  const key = [state.sessions, state.session];
  put($("sessions"), key, () => state.sessions.map((one) => {
    const turns = `${one.n_nodes - 1} ${one.n_nodes === 2 ? "state" : "states"}`;
    const about = `${turns}, ${count(one.position)} tokens${one.is_busy ? ", busy" : ""}`;
    const made = make("button", "", make("span", "title", called(one)), make("span", "soft", about));
    made.type = "button";
    made.dataset.session = one.id;
    made.setAttribute("aria-current", one.id === state.session);
    if (state.sessions.some((other) => other.id === one.forked_from?.session)) made.classList.add("deeper");
    made.onclick = () => { choose(one.id); draw(); soon(); };
    return make("li", "", made);
  }));
}

function titleOf(node) {
  if (node.parent === null) return "start";
  const turn = state.turns.get(keyOf(node));
  if (!turn) return "…";
  const spoken = turn.messages.filter((one) => one.role !== "assistant" && one.role !== "system");
  const content = (spoken.at(-1) ?? turn.messages.at(-1))?.content;
  return (content == null ? turn.text : textOf(content)).replace(/\s+/g, " ").slice(0, 160) || "(nothing)";
}

function drawTree() {
  const now = current(), all = nodes();
  $("tree-title").textContent = now ? `Tree of ${called(now)}` : "Tree";
  $("empty").hidden = all.length > 1;
  $("tree").hidden = !now;
  const onWay = new Set(now ? path(all, now.tip) : []);
  const shown = family();
  const lanes = state.status.lanes.filter((lane) => lane.session);
  const key = [all, shown, lanes, state.session, state.node, all.map(titleOf)];
  const focus = document.activeElement?.closest?.(".node")?.dataset.node;
  put($("tree"), key, () => {
    const { rows, columns } = layout(all);
    const width = PAD * 2 + Math.max(0, columns - 1) * STEP;
    const graph = vector("svg", { width, height: rows.length * ROW, "aria-hidden": "true" });
    const x = (row) => PAD + row.column * STEP, y = (row) => row.row * ROW + ROW / 2;
    for (const row of rows.filter((one) => one.parent !== undefined)) {
      const from = rows[row.parent];
      const bend = x(from) === x(row) ? "" : `C${x(from)},${y(from) + ROW * 0.6} ${x(row)},${y(from) + ROW * 0.4} ${x(row)},${y(from) + ROW}`;
      graph.append(vector("path", {
        d: `M${x(from)},${y(from)}${bend}V${y(row)}`, class: `edge col${row.column % COLOURS}`,
      }));
    }
    for (const row of rows) {
      const cls = `col${row.column % COLOURS}`;
      if (row.node.id === now.tip) graph.append(vector("circle", { cx: x(row), cy: y(row), r: 8.5, class: `ring ${cls}` }));
      graph.append(vector("circle", { cx: x(row), cy: y(row), r: 5, class: `dot ${row.node.tier} ${cls}` }));
    }
    return [graph, ...rows.map((row) => nodeRow(row, rows, width, onWay, shown, lanes))];
  });
  if (focus) $("tree").querySelector(`[data-node="${CSS.escape(focus)}"]`)?.focus();
  drawTools(all, now, onWay);
}

function nodeRow(row, rows, width, onWay, shown, lanes) {
  const { node } = row;
  const badges = make("span", "badges");
  if (node.name) badges.append(make("span", "badge name", node.name));
  for (const one of shown.filter((session) => session.tip === node.id)) {
    badges.append(make("span", one.id === state.session ? "badge here" : "badge", called(one)));
    for (const lane of lanes.filter((found) => found.session === one.id)) {
      badges.append(make("span", "badge busy", `lane ${lane.index}, ${lane.generated_tokens} tokens`));
    }
  }
  const own = node.position - node.base;
  const size = node.parent === null ? "" : `+${count(own)}, ${count(node.position)} tokens`;
  const made = make(
    "div", onWay.has(node.id) ? "node" : "node off",
    make("span", "title", titleOf(node)), badges,
    make("span", "number", size),
    make("span", "number bytes", node.nbytes ? bytes(node.nbytes) : ""),
    make("span", "tier", node.parent === null ? "" : node.tier === "none" ? "to redo" : node.tier),
  );
  made.style.paddingLeft = `${width}px`;
  made.dataset.node = node.id;
  made.setAttribute("role", "treeitem");
  made.setAttribute("aria-level", path(rows.map((one) => one.node), node.id).length);
  made.setAttribute("aria-selected", node.id === state.node);
  made.tabIndex = node.id === state.node ? 0 : -1;
  made.onclick = () => select(node.id);
  made.onkeydown = (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1, Home: -rows.length, End: rows.length }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const to = Math.min(Math.max(row.row + step, 0), rows.length - 1);
    select(rows[to].node.id);
    $("tree").querySelector('[aria-selected="true"]').focus();
  };
  return made;
}

function select(node) {
  state.node = node;
  state.follows = node === current()?.tip;
  draw();
}

function drawTools(all, now, onWay) {
  const node = all.find((one) => one.id === state.node);
  const isTip = now && node && node.id === now.tip;
  $("fork").disabled = !node;
  $("back").disabled = !node || isTip || now.is_busy;
  $("back").textContent = node && !isTip && !onWay.has(node.id) ? "Go on from here" : "Roll back to here";
  $("name").disabled = !now || now.is_busy;
  $("delete").disabled = !now || now.is_busy;
  $("send").disabled = !now || now.is_busy || state.live !== null;
  $("system").hidden = !now || now.n_nodes > 1;
  $("where").textContent = node && !isTip
    ? `You look at an earlier state. What you say goes to the tip of ${called(now)}; fork or roll back to go on from here.` : "";
  const facts = node ? [
    ["tokens", `${count(node.position)}, ${count(node.position - node.base)} of its own`],
    ["state", node.digest ? `${bytes(node.nbytes)} of its own` : "made again when it is needed"],
    ["kept", node.tier === "none" ? "as tokens" : node.tier],
    ["ended by", node.reason],
    ["digest", node.digest?.slice(0, 16) ?? ""],
  ].filter(([, value]) => value !== "") : [];
  put($("facts"), facts, () => facts.map(fact));
}

function fact([name, value]) {
  return make("div", "", make("dt", "", name), make("dd", name === "digest" ? "mono" : "", value));
}

function drawTalk() {
  const all = nodes();
  const onWay = path(all, state.node).map((id) => all.find((node) => node.id === id));
  const isExact = $("exact").checked;
  const live = state.live?.session === state.session && state.follows ? state.live : null;
  const turns = onWay.map((node) => state.turns.get(keyOf(node)));
  const key = [state.node, isExact, live, turns.map((turn) => turn?.messages.length ?? -1)];
  const box = $("talk");
  const wasAtEnd = box.scrollTop + box.clientHeight > box.scrollHeight - 40;
  const isOther = box.dataset.node !== state.node;
  box.dataset.node = state.node ?? "";
  const changed = put(box, key, () => {
    const shown = [];
    for (const turn of turns.filter(Boolean)) {
      if (isExact && turn.text) shown.push(message("exact", "own tokens of the state", turn.text, "mono"));
      if (!isExact) shown.push(...turn.messages.map((one) => spoken(one)));
    }
    if (live) {
      if (!isExact) shown.push(...live.said.map((one) => spoken(one)));
      const made = spoken({ role: "assistant", content: live.text, reasoning_content: live.thought });
      made.classList.add("live");
      made.setAttribute("aria-live", "off"); // letter by letter is no help; the end is told
      shown.push(made);
    }
    return shown;
  });
  if (changed && (wasAtEnd || isOther)) box.scrollTop = box.scrollHeight;
}

/** The text of a content: itself, or its parts with a word for each image. */
function textOf(content, image = "[image] ") {
  if (typeof content === "string") return content;
  return (content ?? []).map((part) => (part.type === "text" ? part.text : image)).join("");
}

const pictures = new Map(); // data URI -> URL of a blob: the page loads images of no other kind

function picture(uri) {
  if (!pictures.has(uri)) {
    const [head, data] = uri.split(",");
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    pictures.set(uri, URL.createObjectURL(new Blob([bytes], { type: head.slice(5).split(";")[0] })));
  }
  const made = make("img", "picture");
  made.src = pictures.get(uri);
  made.alt = "image";
  return made;
}

function spoken(one) {
  const made = message(one.role, one.role, textOf(one.content, ""));
  const said = made.querySelector(".said");
  const shown = Array.isArray(one.content) ? one.content.filter((part) => part.image_url) : [];
  said.prepend(...shown.map((part) => picture(part.image_url.url)));
  if (one.reasoning_content) said.prepend(make("div", "thought", one.reasoning_content));
  for (const call of one.tool_calls ?? []) {
    said.append(make("div", "mono", `${call.function.name}(${call.function.arguments})`));
  }
  return made;
}

function message(cls, role, text, kind = "") {
  return make("div", `message ${cls}`, make("span", "role", role), make("div", `said ${kind}`, text));
}

function drawTurns() {
  const turns = state.status.turns.slice(-30).reverse();
  $("no-turns").hidden = turns.length > 0;
  put($("turns"), [turns, state.sessions.map(called)], () => turns.map((turn) => {
    const session = state.sessions.find((one) => one.id === turn.session);
    const fresh = turn.prompt_tokens - turn.cached_tokens;
    const bar = make("div", "bar", make("span", "cached"), make("span", "new"));
    const share = turn.prompt_tokens ? (100 * turn.cached_tokens) / turn.prompt_tokens : 0;
    bar.children[0].style.width = `${share}%`;
    bar.children[1].style.width = `${100 - share}%`;
    const isWarm = turn.cached_tokens > 0;
    const start = isWarm ? `warm: ${turn.action}` : "cold";
    const number = (text) => make("td", "number", text);
    return make(
      "tr", "",
      make("td", "", new Date(turn.ended_at * 1e3).toLocaleTimeString("en-GB")),
      make("td", "name", session ? called(session) : turn.session ? "(deleted)" : "none"),
      make("td", isWarm ? "warm" : "cold", start),
      make("td", "", bar),
      number(count(turn.cached_tokens)), number(count(fresh)), number(count(turn.generated_tokens)),
      number(seconds(turn.wait_s)), number(seconds(turn.first_token_s)), number(seconds(turn.total_s)),
    );
  }));
}

function drawMemory() {
  const { pool, capsules } = state.status;
  const rows = [["pool", `${bytes(pool.used_nbytes)} of ${bytes(pool.nbytes)}`]];
  for (const [tier, found] of Object.entries(capsules)) {
    rows.push([tier, `${count(found.n)} states${found.nbytes ? `, ${bytes(found.nbytes)}` : ""}`]);
  }
  put($("tiers"), rows, () => rows.map(fact));
}

// -- what the user does ---------------------------------------------------------------------------

function trouble(error) {
  $("trouble").hidden = !error;
  $("trouble").textContent = error ? error.message : "";
}

/** Run what a click means; tell what went wrong; see what is there now. */
async function act(work) {
  try {
    trouble(null);
    await work();
  } catch (error) {
    trouble(error);
  }
  await tick();
}

const on = (id, event, work) => $(id).addEventListener(event, (given) => {
  given.preventDefault();
  act(() => work(given));
});

on("create", "submit", async () => {
  const name = $("create-name").value.trim();
  const made = await ask("POST", "/v1/sessions", name ? { name } : {});
  $("create-name").value = "";
  await added(made);
});

async function added(made) {
  state.sessions.push(made);
  choose(made.id);
  $("text").focus();
}

on("fork", "click", async () => {
  const now = current();
  const base = called(now).replace(/ fork \d+$/, "");
  const taken = new Set(state.sessions.map(called));
  let i = 1;
  while (taken.has(`${base} fork ${i}`)) i += 1;
  const name = `${base} fork ${i}`.slice(0, 200);
  const owner = nodes().find((node) => node.id === state.node).sessions;
  const source = owner.includes(now.id) ? now.id : owner[0];
  await added(await ask("POST", at(source, "/fork"), { node: state.node, name }));
});

on("back", "click", async () => {
  const now = current(), node = nodes().find((one) => one.id === state.node);
  if (!node.sessions.includes(now.id)) {
    const other = family().find((one) => one.id === node.sessions[0]);
    throw new Error(`This state is one of ${called(other)} alone; fork it.`);
  }
  const verb = path(nodes(), now.tip).includes(node.id) ? "rollback" : "restore";
  await ask("POST", at(now.id, `/${verb}`), { node: node.id }, match(now.id));
  state.follows = true;
});

on("snapshot", "submit", async () => {
  const name = $("snapshot-name").value.trim();
  if (!name) return $("snapshot-name").focus();
  await ask("POST", at(state.session, "/snapshot"), { name }, match(state.session));
  $("snapshot-name").value = "";
});

let unsure = 0;
function sure(is) {
  clearTimeout(unsure);
  $("delete").classList.toggle("sure", is);
  $("delete").textContent = is ? "Delete it for good" : "Delete session";
  if (is) unsure = setTimeout(() => sure(false), 4000);
}

on("delete", "click", async () => {
  if (!$("delete").classList.contains("sure")) return sure(true);
  sure(false);
  await ask("DELETE", at(state.session), undefined, match(state.session));
});

on("forget", "click", async () => {
  sessionStorage.removeItem("flashrt-key");
  location.reload();
});

let stopping = null, isReading = false;

/** A file that was chosen, as a part of a message. */
function part(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve({ type: "image_url", image_url: { url: reader.result } });
    reader.onerror = () => reject(new Error(`${file.name} cannot be read`));
    reader.readAsDataURL(file);
  });
}

on("say", "submit", async () => {
  const text = $("text").value;
  if (!text.trim() || state.live || isReading) return;
  const { files } = $("files");
  isReading = true;
  const images = await Promise.all([...files].map(part)).finally(() => { isReading = false; });
  const said = [{ role: "user", content: images.length ? [...images, { type: "text", text }] : text }];
  const system = $("system").hidden ? "" : $("system").value;
  if (system.trim()) said.unshift({ role: "system", content: system });
  const body = {
    session: state.session, messages: said, stream: true, max_tokens: Number($("most").value) || 128,
  };
  state.live = { session: state.session, text: "", thought: "", said };
  state.follows = true;
  state.node = current().tip;
  stopping = new AbortController();
  $("stop").hidden = false;
  $("text").value = $("system").value = $("files").value = "";
  draw();
  try {
    const more = { ...match(state.session), signal: stopping.signal };
    await hear(await send("POST", "/v1/chat/completions", body, more));
  } catch (error) {
    if (error.name !== "AbortError") {
      $("text").value = text; // nothing was said, or not all of it
      $("files").files = files;
      throw error;
    }
  } finally {
    state.live = null;
    $("stop").hidden = true;
  }
});

/** Server-sent events of a chat reply, into `state.live`. */
async function hear(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      const delta = chunk.choices[0]?.delta ?? {};
      state.live.text += delta.content ?? "";
      state.live.thought += delta.reasoning_content ?? "";
      for (const call of delta.tool_calls ?? []) {
        state.live.text += `${call.function.name ? `${call.function.name} ` : ""}${call.function.arguments ?? ""}`;
      }
    }
    drawTalk();
  }
}

$("stop").onclick = () => stopping?.abort();
$("exact").onchange = () => drawTalk();
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!$("send").disabled) $("say").requestSubmit();
  }
};

$("arena").addEventListener("toggle", () => {
  if (!$("arena").open || $("arena-map").src) return;
  act(async () => {
    const found = await (await send("GET", "/v1/arena.svg")).blob();
    $("arena-map").src = URL.createObjectURL(new Blob([found], { type: "image/svg+xml" }));
  });
});

// -- the clock ------------------------------------------------------------------------------------

let timer = 0, running = null, isLost = false;

/** See what is there, and again after a while; one at a time. */
async function tick() {
  clearTimeout(timer);
  running = (running ?? Promise.resolve()).then(refresh).then(
    () => { if (isLost) trouble(null); isLost = false; },
    (error) => {
      isLost = !(error instanceof Refused);
      trouble(isLost ? new Error(`The server does not answer: ${error.message}`) : error);
    },
  );
  await running;
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(tick, EVERY_MS);
}

const soon = () => { tick(); };
document.addEventListener("visibilitychange", () => { if (!document.hidden) soon(); });
tick();
