"use strict";
// Two kinds of requests: /api/status once a second, and for each camera on the screen the next
// picture once the last one is drawn. What is known grows old visibly, whatever fails.

const PERIOD_MS = 100;      // between two pictures of a camera, at least
const LOST_MS = 2500;       // without an answer for so long, the device is lost
const KEPT_S = 120;         // of the plots
const STAGES = ["decode", "queue", "compute_input", "compute_infer", "compute_output"];
const BLIND = ["lost", "stalled", "frozen", "dark", "connecting", "ended", "unknown"];
const SVG = "http://www.w3.org/2000/svg";

const cards = new Map();    // by camera
let status = null, trouble = "", failing = 0;

// -- words ----------------------------------------------------------------------------------

const number = (x, unit = "") => x == null ? "–"
  : x.toFixed(Math.abs(x) >= 100 || x === 0 ? 0 : Math.abs(x) >= 1 ? 1 : 2) + unit;
const seconds = (x) => x == null ? "–" : x < 1 ? `${Math.round(x * 1000)} ms` : x < 120 ? `${x.toFixed(1)} s`
  : x < 7200 ? `${Math.round(x / 60)} min` : x < 172800 ? `${(x / 3600).toFixed(1)} h` : `${Math.round(x / 86400)} d`;
const size = (bytes) => bytes == null ? "–" : `${Math.round(bytes / 1e6)} MB`;
const short = (slot) => slot.length > 12 ? slot.slice(0, 12) : slot;

// -- the document: touched only where something differs, so that text can be selected -------------

const find = (selector, root = document) => root.querySelector(selector);
const field = (root, name) => find(`[data-f=${name}]`, root);
function say(node, text) { if (node.textContent !== text) node.textContent = text; }
function mark(node, name, value) {
  if (value == null) node.removeAttribute(name);
  else if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}
function chip(node, text, level) { say(node, text); mark(node, "data-level", level); }
function drawn(tag, attributes, text = "") {
  const node = document.createElementNS(SVG, tag);
  for (const name in attributes) node.setAttribute(name, attributes[name]);
  node.textContent = text;
  return node;
}
/** As many children as there are rows, each filled by `fill(child, row)`. */
function rows(parent, list, make, fill) {
  while (parent.children.length > list.length) parent.lastElementChild.remove();
  list.forEach((row, i) => fill(parent.children[i] ?? parent.appendChild(make()), row));
}
const element = (tag) => () => document.createElement(tag);
/** Rows of cells: a text, or [text, classes]. */
function table(body, matrix) {
  rows(body, matrix, element("tr"), (tr, cells) => rows(tr, cells, element("td"), (td, cell) => {
    const [text, classes] = Array.isArray(cell) ? cell : [cell, ""];
    say(td, text);
    mark(td, "class", classes || null);
  }));
}
/** Pairs of a word and its value. */
function pairs(dl, list) {
  const cells = list.flatMap(([name, value, classes]) => [["dt", name], ["dd", value, classes]]);
  while (dl.children.length > cells.length) dl.lastElementChild.remove();
  cells.forEach(([tag, text, classes], i) => {
    const node = dl.children[i] ?? dl.appendChild(document.createElement(tag));
    say(node, text);
    mark(node, "class", classes || null);
  });
}

// -- asking -----------------------------------------------------------------------------------

const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const hidden = () => document.visibilityState !== "visible";

/** The answer with its body read; null where the device gave none in time. */
async function ask(url, read, patience_ms) {
  const asked = performance.now();
  try {
    const answer = await fetch(url, { signal: AbortSignal.timeout(patience_ms) });
    const body = answer.status === 200 ? await read(answer) : await answer.text();
    failing = 0;
    return { answer, body, asked };
  } catch {
    failing ||= asked;
    return null;
  }
}

async function watch() {
  for (;; await sleep(hidden() ? 300 : 1000)) {
    if (hidden()) continue;
    const got = await ask("api/status", (answer) => answer.json(), 6000);
    if (!got) continue;
    trouble = "";
    if (got.answer.ok) show(got.body);
    else if (got.answer.status === 503) trouble = JSON.parse(got.body).error;
    else trouble = got.body;
    judge();
  }
}

async function look(card) {
  for (; cards.get(card.name) === card; await sleep(hidden() || !card.seen || failing ? 300 : 0)) {
    if (hidden() || !card.seen) continue;
    const width = Math.ceil(card.stage.clientWidth * Math.min(devicePixelRatio, 2));
    const after = card.told ? `&after=${card.told.id}` : "";
    const got = await ask(`api/picture/${card.name}?width=${width}${after}`,
      async (answer) => [JSON.parse(answer.headers.get("Vigil-Picture")),
        await createImageBitmap(await answer.blob())], 15000);
    if (got?.answer.status !== 200) {
      await sleep(got?.answer.ok ? 0 : 1000);
      continue;
    }
    const [told, bitmap] = got.body;
    // Its age counts from the asking: never younger than it is.
    Object.assign(card, { told, at: got.asked });
    paint(card, bitmap);
    judge();
    await sleep(PERIOD_MS - (performance.now() - got.asked));
  }
}

// -- a picture ----------------------------------------------------------------------------------

/** Picture and boxes change in one step, so that they always are of the same frame. */
function paint(card, bitmap) {
  const { canvas, over, told } = card;
  if (canvas.width !== bitmap.width || canvas.height !== bitmap.height)
    Object.assign(canvas, { width: bitmap.width, height: bitmap.height });
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  bitmap.close();
  const place = card.stage.getBoundingClientRect();
  const unit = 1 / Math.min(place.width / told.width, place.height / told.height); // a CSS pixel
  mark(over, "viewBox", `0 0 ${told.width} ${told.height}`);
  over.style.fontSize = `${(place.width < 500 ? 11 : 13) * unit}px`;
  over.style.strokeWidth = `${3 * unit}px`;
  const items = told.result?.items ?? [];
  const held = new Set(items.flatMap((item) => item.zones));
  const group = (kind, ...nodes) => {
    const g = drawn("g", { class: kind });
    g.append(...nodes);
    return g;
  };
  const box = ([x1, y1, x2, y2], more) => drawn("rect", { x: x1, y: y1, width: x2 - x1, height: y2 - y1, ...more });
  const taken = []; // by words, which go below their box where another is above it
  const word = (x, y, text, below) => {
    const width = text.length * 7 * unit, high = 13 * unit;
    const place = (y) => ({ x: Math.max(0, Math.min(x, told.width - width)), y: Math.max(12 * unit, y) });
    const clash = ({ x, y }) => taken.some((one) => Math.abs(one.y - y) < high && x < one.x + one.width && one.x < x + width);
    let at = place(y);
    if (below && clash(at) && !clash(place(below))) at = place(below);
    taken.push({ ...at, width });
    return drawn("text", at, text);
  };
  const zones = Object.entries(told.zones).map(([name, points]) => {
    const zone = group("zone", drawn("polygon", { points: points.join(" ") }),
      word(Math.min(...points.map((p) => p[0])) + 5 * unit, Math.min(...points.map((p) => p[1])) + 15 * unit, name));
    zone.dataset.name = name;
    if (held.has(name)) zone.dataset.held = "";
    return zone;
  });
  const truth = (told.truth ?? []).map((one) => group("truth", box(one.box)));
  const found = items.filter((item) => item.box).reverse().map((item) => { // the best on top
    const stroke = `hsl(${Math.round(item.index * 222.5 + 150) % 360} 85% 62%)`;
    const g = group("item", box(item.box, { stroke }),
      word(item.box[0], item.box[1] - 5 * unit, `${item.label} ${item.score.toFixed(2)}`, item.box[3] + 14 * unit));
    Object.assign(g.dataset, { label: item.label, score: item.score.toFixed(3) });
    return g;
  });
  Object.assign(card.stage.dataset, { ring: told.ring, sequence: told.sequence });
  over.replaceChildren(...zones, ...truth, ...found);
  rows(card.placeless, items.filter((item) => !item.box).slice(0, 5), element("li"),
    (li, item) => say(li, `${item.label} ${item.score.toFixed(2)}`));
}

/** What a card is worth now: a word, why, and how bad; no word: it is what it looks like. */
function verdict(card) {
  const { row, told } = card;
  if (failing && performance.now() - failing > LOST_MS)
    return ["no connection", `not heard from the device for ${seconds((performance.now() - failing) / 1e3)}`, "bad"];
  if (trouble) return ["not running", trouble, "bad"];
  if (BLIND.includes(row.state)) {
    const since = row.state_s == null ? "capture does not say how its camera is"
      : `${row.state_reason}${row.state_reason && ", "}for ${seconds(row.state_s)}`;
    return [row.state, since, row.state === "ended" || row.state === "connecting" ? "warn" : "bad"];
  }
  if (!told) return performance.now() - card.since < LOST_MS ? ["…", "", "none"]
    : ["no picture", row.problems.join("; "), "bad"];
  const age = card.age();
  if (row.fresh_s != null && age > row.fresh_s) return ["stale", `this picture is ${seconds(age)} old`, "bad"];
  if (told.sight !== "clear") return [told.sight, told.result?.reason ?? "", "bad"];
  if (!told.result) return ["not judged", "no lane decides on this camera", "bad"];
  const words = { not_inferred: "not judged", failed: "failed", stale: "stale" };
  if (words[told.result.validity]) return [words[told.result.validity], told.result.reason, "bad"];
  return ["", "", ""];
}

/** Say of every camera, and in the head of the page, how it stands at this moment. */
function judge() {
  let wrong = "";
  for (const card of cards.values()) {
    const [word, why, level] = verdict(card);
    const validity = word || card.told.result.validity;
    mark(card.stage, "data-alarm", word ? level : null);
    say(card.word, word.toUpperCase());
    say(card.why, why);
    chip(card.validity, validity, word ? level : validity === "valid" ? "ok" : "warn");
    say(card.ageNode, card.told ? `${seconds(card.age())} old` : "");
    mark(card.stage, "aria-label", `${card.name}: ${validity}` +
      (word || !card.told ? "" : `, ${card.told.result.items.map((item) => item.label).join(", ") || "nothing"} found`));
    if (word && level === "bad") wrong ||= `${card.name} ${word}`;
  }
  const lost = failing && performance.now() - failing > LOST_MS;
  const banner = find("#banner"), said = lost
    ? "No connection: this page has lost the device. What is shown is what it saw last." : trouble;
  banner.hidden = !said;
  mark(find("main"), "data-old", said ? "" : null);
  say(banner, said);
  const problems = status?.problems.length ?? 0;
  const text = lost ? "no connection" : trouble ? "not running" : !status ? "connecting"
    : problems ? `${problems} problem${problems > 1 ? "s" : ""}` : wrong || "all is well";
  chip(find("#verdict"), text, lost || trouble || problems || wrong ? "bad" : status ? "ok" : "none");
  const title = `${text === "all is well" ? "" : "▲ "}${wrong || text} – Vigil`;
  if (document.title !== title) document.title = title;
}

// -- what /api/status says ------------------------------------------------------------------------

function show(said) {
  status = said;
  find("main").hidden = false;
  say(find("[data-f=root]"), `${said.root}, running in ${said.run}`);
  const names = said.cameras.map((row) => row.name);
  for (const [name, card] of cards) if (!names.includes(name)) { card.node.remove(); cards.delete(name); }
  for (const row of said.cameras) {
    if (!cards.has(row.name)) open(row);
    camera(Object.assign(cards.get(row.name), { row }));
  }
  rows(find("#problems ul"), said.problems.length ? said.problems : ["none"], element("li"), (li, text) => {
    say(li, text);
    mark(li, "class", said.problems.length ? null : "fine");
  });
  rows(find("[data-f=groups]"), said.groups, () => find("#group").content.firstElementChild.cloneNode(true), models);
  rows(find("#incidents ol"), said.incidents.length ? [...said.incidents].reverse() : [null], element("li"), (li, one) => {
    rows(li, one ? [`${one.process}, ${seconds(one.age_s)} ago`, `${one.what}; ${one.outcome || "under way"}` +
      (one.recovery_ms == null ? "" : `; valid again after ${seconds(one.recovery_ms / 1e3)}`)] : ["none"],
    element("span"), say);
    li.firstElementChild.className = one ? "muted" : "";
  });
  table(find("#processes tbody"), said.processes.map((one) => [
    one.name, [one.alive ? one.state : `${one.state}, silent`, one.problem ? "bad" : ""], [number(one.work_per_s, "/s"), "n"],
    [size(one.rss_bytes), "n"], [seconds(one.uptime_s), "n wide"], [`${one.restarts ?? "–"}`, "n"]]));
  device(said);
}

function open(row) {
  const node = find("#camera").content.firstElementChild.cloneNode(true);
  const at = (selector) => find(selector, node);
  const card = {
    name: row.name, node, row, told: null, at: 0, seen: false, since: Infinity, past: [], stage: at(".stage"), canvas: at("canvas"),
    over: at(".over"), placeless: at(".placeless"), word: field(node, "word"), why: field(node, "why"),
    validity: field(node, "validity"), ageNode: field(node, "age"),
    age() { return this.told.age_s + (performance.now() - this.at) / 1e3; },
  };
  node.dataset.camera = row.name;
  say(field(node, "name"), row.name);
  at("button").onclick = () => document.fullscreenElement ? document.exitFullscreen() : card.stage.requestFullscreen();
  new IntersectionObserver(([one]) => {
    card.seen = one.isIntersecting;
    if (card.seen) card.since = Math.min(card.since, performance.now());
  }, { rootMargin: "100px" }).observe(card.stage);
  cards.set(row.name, card);
  find("#cameras").append(node);
  look(card);
}

function camera(card) {
  const { node, row, past } = card, now = performance.now() / 1e3;
  if (row.size) card.stage.style.aspectRatio = `${row.size[0]} / ${row.size[1]}`;
  chip(field(node, "state"), row.state + (row.state_s == null ? "" : ` for ${seconds(row.state_s)}`),
    row.state === "streaming" ? "ok" : ["ended", "connecting"].includes(row.state) ? "warn" : "bad");
  say(field(node, "source"), `${row.source}${row.format && ", "}${row.format}`);
  past.push({ at: now, captured: row.frames.per_s, judged: row.results.per_s, ...row.stages_ms });
  while (past[0].at < now - KEPT_S) past.shift();
  const plots = [["captured", "captured", "/s"], ["judged", "judged", "/s"], ...STAGES.map((stage) => [stage, stage.replace("_", " "), " ms"])];
  rows(find(".plots tbody", node), plots, plot, (tr, [key, name, unit]) => {
    const peak = Math.max(...past.map((one) => one[key] ?? 0));
    say(tr.children[0], name);
    say(tr.children[2], number(past.at(-1)[key], unit));
    say(tr.children[3], number(peak, unit));
    const points = past.filter((one) => one[key] != null).map((one) =>
      `${(KEPT_S - now + one.at).toFixed(1)},${(17 - 15 * one[key] / (peak || 1)).toFixed(1)}`);
    const [area, line] = find("svg", tr).children;
    mark(line, "d", points.length ? `M${points.join("L")}` : "");
    mark(area, "d", points.length ? `M${points[0].split(",")[0]},18L${points.join("L")}V18Z` : "");
  });
  find(".scores", node).hidden = row.precision == null && row.recall == null;
  say(field(node, "precision"), row.precision == null ? "–" : row.precision.toFixed(3));
  say(field(node, "recall"), row.recall == null ? "–" : row.recall.toFixed(3));
  say(field(node, "compared"), `${row.frames_compared}`);
  const account = row.account ?? {}, model = row.model;
  pairs(find(".more", node), [
    ["model", model ? `${model.name} ${model.version}` : "–"],
    ["runtime", model?.runtime || "–"],
    ["slot, release", model ? `${model.slot}, ${model.release}` : "–"],
    ["decided after, median", number(row.latency_p50_ms, " ms")],
    ["decided after, at most", number(row.latency_max_ms, " ms")],
    ["frames captured", `${account.captured ?? "–"}`],
    ...["not_inferred", "failed", "skipped", "torn", "overrun"].filter((key) => account[key])
      .map((key) => [key.replace("_", " "), `${account[key]}`]),
    ...[["reconnects", row.reconnects], ["passed over", row.passed_over], ["triggers", row.triggers],
      ["triggers missed", row.triggers_missed]].filter(([, count]) => count).map(([name, count]) => [name, `${count}`]),
  ]);
}

function plot() {
  const tr = document.createElement("tr");
  const svg = drawn("svg", { viewBox: `0 0 ${KEPT_S} 18`, preserveAspectRatio: "none", "aria-hidden": "true" });
  svg.append(drawn("path", { class: "area" }), drawn("path", {}));
  tr.append(...["th", "td", "td", "td"].map((tag) => document.createElement(tag)));
  tr.children[0].scope = "row";
  tr.children[1].append(svg);
  tr.children[2].className = tr.children[3].className = "n";
  tr.children[3].classList.add("muted");
  return tr;
}

function models(node, group) {
  say(field(node, "name"), group.name);
  const change = group.phase === "none" ? "no change of model" : `slot ${short(group.candidate)} is in ${group.phase}`;
  say(field(node, "said"), `epoch ${group.epoch}, ${change}` + (group.lanes.length < 2 ? "" : group.standby ? ", standby warm" : ", no warm standby"));
  table(find(".lanes", node), group.lanes.map((lane) => [
    lane.process.split("-").at(-1),
    [lane.role + (lane.ready ? "" : ", not ready") + (lane.trying ? ", trying" : "") +
      (lane.degraded || lane.refused ? `: ${lane.degraded || lane.refused}` : ""), lane.ready && !lane.degraded ? "" : "bad"],
    [short(lane.slot), "s"], [`${lane.judged}`, "n"], [`${lane.failed}`, "n wide"], [number(lane.infer_ms_p99, " ms"), "n"]]));
  find(".slots", node).hidden = !group.slots.length;
  table(find(".slots tbody", node), group.slots.map((slot) => [
    [short(slot.slot), "s"], [slot.state + (slot.reason && `: ${slot.reason}`), slot.state === "bad" ? "bad" : ""],
    `${slot.name} ${slot.version}, release ${slot.release}`, [`${slot.tries}`, "n"]]));
}

function device(said) {
  const health = said.health, mb = (x) => x >= 1e4 ? `${(x / 1e3).toFixed(0)} GB` : `${x.toFixed(0)} MB`;
  const hottest = health && Math.max(...Object.values(health.temperatures_c));
  pairs(find("#device dl"), [
    ...(!health ? [["health", "not heard yet"]] : [
      ["hottest sensor", Number.isFinite(hottest) ? `${hottest.toFixed(0)} °C` : "none"],
      ...(health.lost.length ? [["sensors lost", health.lost.join(", "), "bad"]] : []),
      ...(health.throttled ? [["throttled", health.throttled]] : []),
      ["pace allowed", `${Math.round(health.pace * 100)} %`, health.pace < 1 ? "bad" : ""],
      ["load", number(health.load)],
      ["memory free", mb(health.memory_free_mb)],
      ["disk free", mb(health.disk_free_mb)],
      ["shared memory free", mb(health.tmpfs_free_mb)],
      ["clock", health.clock_synced == null ? "unknown" : health.clock_synced ? "synchronised" : "not synchronised"],
    ]),
    ["pictures encoded", `${said.encoded}`],
  ]);
}

history.replaceState(null, "", location.pathname); // the token stays in its cookie
setInterval(judge, 250);
watch();
