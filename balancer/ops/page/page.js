// Keeps the page as the balancer's status document says, and sends what the operator wants done.
// Names and errors come from elsewhere: they become text, never markup.

const STALE_MS = 35_000; // the server speaks at least every ten seconds
const $ = (id) => document.getElementById(id);
const words = new Map(
  [...$("words").content.children].map((each) => [each.dataset.event, each.textContent]),
);
const base = new URL("..", location.href).href.replace(/\/$/, "");

let told = null; // the last status document
let toldAt = 0;
let states = null; // of each backend, to announce what changes

// -- elements -----------------------------------------------------------------------------------

const write = (element, text) => {
  if (element.textContent !== String(text)) element.textContent = text;
};

const fill = (element, texts) => {
  for (const [name, text] of Object.entries(texts)) {
    write(element.querySelector(`[data-f="${name}"]`), text);
  }
};

const mark = (element, name, value) => {
  if (element.dataset[name] !== value) element.dataset[name] = value;
};

const hide = (element, hidden) => {
  if (element.hidden !== hidden) element.hidden = hidden;
};

// Makes the keyed children of `parent` those of `items`, in order; what stays keeps its focus.
// A child without a key, such as the head of a row, stays where it is.
function each(parent, template, items, keyOf, update) {
  const wanted = new Set(items.map(keyOf));
  const old = new Map();
  for (const child of [...parent.querySelectorAll(":scope > [data-key]")]) {
    if (wanted.has(child.dataset.key)) old.set(child.dataset.key, child);
    else child.remove();
  }
  let next = parent.querySelector(":scope > [data-key], :scope > [data-end]");
  for (const item of items) {
    const child = old.get(keyOf(item)) ?? $(template).content.firstElementChild.cloneNode(true);
    child.dataset.key = keyOf(item);
    if (child === next) next = next.nextElementSibling;
    else parent.insertBefore(child, next);
    update(child, item);
  }
}

// -- words --------------------------------------------------------------------------------------

const since = () => (performance.now() - toldAt) / 1000;
const left = (seconds) => Math.max(0, Math.ceil(seconds - since()));

function span(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${Math.round(seconds / 86400)} days`;
}

const clock = (at) => new Date(at * 1000).toLocaleTimeString([], { hourCycle: "h23" });

function breakerText(breaker) {
  const why = breaker.reason ? `: ${breaker.reason}` : "";
  if (breaker.state === "half_open") return `half-open, a trial is under way${why}`;
  if (breaker.state !== "open") return breaker.state;
  const wait = left(breaker.retry_in_s);
  if (wait > 0) return `open, next trial in ${wait} s${why}`;
  return `open, ${breaker.trial || "the next trial is due"}${why}`;
}

const broken = (model) => model?.breaker && model.breaker.state !== "closed";
const health = (backend) =>
  backend.up === null ? "not checked yet"
    : backend.up ? "answers checks" : backend.error || "does not answer";

function notes(backend) {
  const found = backend.models
    .filter(broken)
    .map((model) => `${model.name}: breaker ${breakerText(model.breaker)}`);
  return backend.trouble ? [backend.trouble, ...found] : found;
}

// -- parts --------------------------------------------------------------------------------------

function showCard(card, backend) {
  mark(card, "state", backend.state);
  const loaded = backend.models.filter((m) => m.state === "loaded").map((m) => m.name);
  fill(card, {
    name: backend.name,
    state: backend.state,
    url: backend.url,
    version: backend.version ? `Ollama ${backend.version}` : "",
    calls: `${backend.in_flight} running` + (backend.slots ? `, ${backend.slots} slots` : ""),
    memory: (loaded.join(", ") || "nothing") + (backend.loading ? `, loading ${backend.loading}` : ""),
    health: health(backend),
    breaker: breakerText(backend.breaker),
    switch: backend.switch,
  });
  const list = card.querySelector('[data-f="notes"]');
  const lines = notes(backend);
  while (list.children.length > lines.length) list.lastElementChild.remove();
  lines.forEach((line, at) => write(list.children[at] ?? list.appendChild(document.createElement("li")), line));
  showActs(card, backend);
}

function showActs(card, backend) {
  const serving = backend.switch === "serving";
  const wanted = {
    drain: serving,
    resume: !serving,
    disable: backend.switch !== "disabled",
    reset: backend.breaker.state !== "closed" || backend.models.some(broken),
  };
  const focused = document.activeElement;
  hide(card.querySelector(".acts"), false);
  for (const button of card.querySelectorAll("[data-act]")) {
    hide(button, !wanted[button.dataset.act]);
    write(button.querySelector(".sr"), ` ${backend.name}`);
  }
  if (card.contains(focused) && focused.hidden) card.querySelector("[data-act]:not([hidden])").focus();
}

function showGrid(backends, queue) {
  const have = new Map(backends.map((b) => [b.name, new Map(b.models.map((m) => [m.name, m]))]));
  const models = new Set([...have.values()].flatMap((of) => [...of.keys()]));
  for (const model of Object.keys(queue.per_model)) models.add(model);
  const nameOf = (backend) => backend.name;
  each($("known"), "option", [...models].sort(), (model) => model, (option, model) => {
    option.value = model;
  });
  each($("heads"), "head", backends, nameOf, (th, backend) => write(th, backend.name));
  each($("rows"), "row", [...models].sort(), (model) => model, (row, model) => {
    fill(row, { model, waiting: queue.per_model[model] ?? "–" });
    mark(row.lastElementChild, "state", queue.per_model[model] ? "waiting" : "absent");
    each(row, "cell", backends, nameOf, (cell, backend) => {
      const of = have.get(backend.name).get(model);
      const state = !of ? "absent" : broken(of) ? "broken" : of.state;
      mark(cell, "state", state);
      write(cell.querySelector(".at"), backend.name);
      fill(cell, { what: of ? state : "–", count: of?.in_flight ? `${of.in_flight} running` : "" });
    });
  });
}

function showEvents(events) {
  const keyOf = (e) => [e.at, e.event, e.backend, e.model].join(" ");
  each($("events"), "event", events, keyOf, (item, e) => {
    mark(item, "event", e.event);
    fill(item, {
      time: clock(e.at),
      backend: e.backend,
      event: words.get(e.event) ?? e.event,
      model: e.model,
      text: e.text,
      times: e.count > 1 ? `${e.count} times` : "",
    });
    item.querySelector("time").dateTime = new Date(e.at * 1000).toISOString();
  });
  hide($("calm"), events.length > 0);
}

function show() {
  const { backends, queue } = told;
  const up = backends.filter((backend) => backend.state === "up").length;
  const word = told.draining ? "draining" : told.ready ? "ready" : "not ready";
  const share = `${up}/${backends.length}`;
  document.title = `${share} up – ollama-balancer`;
  write($("ready"), word);
  mark($("ready"), "state", word);
  write($("version"), told.version);
  write($("since"), `up for ${span(Date.now() / 1000 - told.started_at)}`);
  write($("up"), share);
  write($("running"), told.running);
  write($("depth"), queue.depth);
  write($("oldest"), queue.depth ? span(queue.oldest_s + since()) : "–");
  const problems = told.config.rejected.map((text) => `Configuration rejected, the previous one stays: ${text}`);
  if ($("rejected").textContent.trim() !== problems.join("")) {
    $("rejected").replaceChildren(...problems.map((text) => {
      const item = document.createElement("li");
      item.textContent = text;
      return item;
    }));
  }
  hide($("none"), backends.length > 0);
  each($("cards"), "card", backends, (backend) => backend.name, showCard);
  showGrid(backends, queue);
  showEvents(told.recent ?? []);
}

// -- what changes is said aloud -----------------------------------------------------------------

const say = (text) => write($("said"), text && `${clock(Date.now() / 1000)}  ${text}`);

function announce(document_) {
  const now = new Map(document_.backends.map((backend) => [backend.name, backend.state]));
  const news = document_.backends
    .filter((backend) => states && states.get(backend.name) !== backend.state)
    .map((b) => `${b.name} is ${b.state}${b.state === "down" ? ` (${health(b)})` : b.state === "broken" && b.breaker.reason ? ` (${b.breaker.reason})` : ""}`);
  for (const name of states?.keys() ?? []) if (!now.has(name)) news.push(`${name} has been removed`);
  if (news.length) say(news.join("; "));
  states = now;
}

// -- the stream ---------------------------------------------------------------------------------

let retry_s = 1;

function link(state, text) {
  mark($("link"), "link", state);
  write($("link"), text);
}

function listen() {
  const source = new EventSource("events");
  source.addEventListener("status", (event) => {
    told = JSON.parse(event.data);
    toldAt = performance.now();
    retry_s = 1;
    link("live", "live");
    announce(told);
    show();
  });
  source.addEventListener("error", () => {
    link("lost", "connection lost, trying again");
    if (source.readyState !== EventSource.CLOSED) return; // it tries again by itself
    setTimeout(listen, retry_s * 1000);
    retry_s = Math.min(30, retry_s * 2);
  });
}

setInterval(() => {
  if (!told) return;
  if (since() * 1000 > STALE_MS) link("lost", `nothing heard for ${span(since())}`);
  if ($("link").dataset.link === "live") show(); // seconds count down
}, 1000);

// -- steering -----------------------------------------------------------------------------------

async function act(name, action) {
  const url = `backends/${encodeURIComponent(name)}/${action}`;
  const asked = { method: "POST", headers: { "Content-Type": "application/json" }, body: "{}" };
  try {
    const answer = await fetch(url, asked);
    if (answer.ok) return;
    const body = await answer.json().catch(() => ({}));
    say(`${action} ${name}: ${body.error ?? `refused (${answer.status})`}`);
  } catch {
    say(`${action} ${name}: the balancer does not answer`);
  }
}

const cards = () => [...$("cards").children];
const current = () => document.activeElement?.closest?.(".card") ?? null;

$("cards").addEventListener("click", (event) => {
  const button = event.target.closest("[data-act]");
  if (button) act(button.closest(".card").dataset.key, button.dataset.act);
});

function step(by) {
  const all = cards();
  const at = all.indexOf(current());
  const next = at < 0 ? (by > 0 ? 0 : all.length - 1) : at + by;
  all[Math.max(0, Math.min(all.length - 1, next))]?.focus();
}

function press(action) {
  const button = current()?.querySelector(`[data-act="${action}"]:not([hidden])`);
  button?.click();
}

const keys = {
  j: () => step(1),
  k: () => step(-1),
  d: () => press("drain"),
  r: () => press("resume"),
  b: () => press("reset"),
  m: () => document.querySelector(".scroll").focus(),
  "?": () => $("keys").showModal(),
};

document.addEventListener("keydown", (event) => {
  const busy = event.ctrlKey || event.metaKey || event.altKey || $("keys").open;
  if (busy || event.target.closest("input, textarea, select") || !$("single").checked) return;
  const wanted = keys[event.key];
  if (!wanted) return;
  event.preventDefault();
  wanted();
});

$("help").addEventListener("click", () => $("keys").showModal());

// -- connecting a client ------------------------------------------------------------------------

for (const each of document.querySelectorAll("[data-base]")) write(each, base);

for (const button of document.querySelectorAll(".copy")) {
  if (!navigator.clipboard) break; // only where the page is local, or came by TLS
  hide(button, false);
  button.addEventListener("click", async () => {
    const line = button.previousElementSibling.textContent;
    await navigator.clipboard.writeText(line).then(() => say(`copied: ${line}`), () => say("the browser does not let this page copy"));
  });
}

// -- where a call would go ----------------------------------------------------------------------

function line(tag, text) {
  const element = document.createElement(tag);
  element.textContent = text;
  return element;
}

function verdict(told) {
  const { outcome, model, backends } = told;
  const goes = outcome.backend ? `${model} would go to ${outcome.backend}` : `${model}: ${outcome.kind}`;
  const list = document.createElement("ol");
  const inOrder = [...backends].sort((a, b) => (a.order ?? Infinity) - (b.order ?? Infinity));
  for (const each of inOrder) {
    const what = each.may_serve ? [each.state, each.reason] : ["no", each.reason];
    list.append(line("li", `${each.name}: ${what.filter(Boolean).join(", ")}`));
  }
  return [line("p", outcome.text ? `${goes}. ${outcome.text}` : goes), list];
}

async function explain(model) {
  try {
    const answer = await fetch(`explain?model=${encodeURIComponent(model)}`);
    const told = await answer.json();
    $("answer").replaceChildren(...(answer.ok ? verdict(told) : [line("p", told.error)]));
  } catch {
    $("answer").replaceChildren(line("p", "the balancer does not answer"));
  }
}

$("explain").addEventListener("submit", (event) => {
  event.preventDefault(); // nothing is ever sent as a form
  if ($("asked").value) explain($("asked").value);
});

hide($("help"), false);
hide($("explain"), false);
link("wait", "connecting");
listen();
