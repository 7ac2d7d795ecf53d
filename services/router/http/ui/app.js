"use strict";

// Parts of the time to first token, named and ordered like `timing` in docs/reference/openai.md.
const DECODER_FIRST = ["handoff", "first_step"]; // only of answers whose first token the decoder samples
const PARTS = ["router_queue", "decode_reservation", "prefill_queue", "prefill_compute", ...DECODER_FIRST, "return_path",
  "unattributed"];
const TIMES = { ttft: "first token", ...Object.fromEntries(PARTS.map((p) => [p, "· " + p.replaceAll("_", " ")])),
  itl: "between tokens", total: "end to end" };
const POLL_MS = 1000;
const GONE_MS = 60000; // time for which the page shows a worker that has left

const $ = (id) => document.getElementById(id);
let messages = []; // of the chat that the page shows; a new chat has its own, which an older answer never reaches
const seen = new Map(); // key of an entry -> {id, stage, at}; `at` is when the status last had the entry
const key = ({ id, stage }) => `${stage} ${id}`; // a worker with both stages has an entry in each
let model = "";
let tiersListed = false; // whether /v1/models has said which tiers there are
let running = null; // AbortController of the running answer, or null

function node(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function headers() {
  const key = $("key").value.trim();
  return key ? { authorization: "Bearer " + key } : {};
}

async function problemOf(response) {
  if (response.status === 401) {
    return $("key").value.trim() ? "The API key is not valid." : "This server requires an API key: enter it below.";
  }
  try {
    return (await response.json()).error.message;
  } catch {
    return "HTTP " + response.status;
  }
}

// Chat

function turn(who, text) {
  const made = node("article", "turn");
  made.append(node("div", "who", who), node("div", "text", text));
  $("log").append(made);
  $("log").scrollTop = $("log").scrollHeight;
  return made;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function answer() {
  const shown = turn("Answer", "");
  const thought = node("div", "thought quiet"), text = shown.querySelector(".text");
  text.before(thought);
  const chat = messages;
  let whole = "", reported = null, usage = null, finish = null;
  running = new AbortController();
  $("log").setAttribute("aria-busy", "true");
  busy(true);
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      signal: running.signal,
      headers: { "content-type": "application/json", ...headers() },
      body: JSON.stringify({
        model: $("tier").value || model, messages: chat, stream: true, stream_options: { include_usage: true },
        max_tokens: Number($("max-tokens").value), temperature: Number($("temperature").value),
      }),
    });
    if (!response.ok) throw new Error(await problemOf(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      thought.append(event.choices[0]?.delta?.reasoning_content ?? "");
      whole += event.choices[0]?.delta?.content ?? "";
      text.textContent = whole;
      $("log").scrollTop = $("log").scrollHeight;
      finish = event.choices[0]?.finish_reason ?? finish;
      reported = event.overfill?.choices?.[0] ?? reported;
      usage = event.usage ?? usage;
    }
    if (finish === "length") shown.append(node("div", "cut quiet", "Cut at the limit “Max tokens”; raise it for a longer answer."));
    if (reported) shown.append(details(reported, usage));
  } catch (error) {
    if (error.name !== "AbortError") {
      shown.classList.add("failed");
      text.textContent = whole + (whole ? "\n" : "") + error.message;
    }
  } finally {
    running = null;
    $("log").setAttribute("aria-busy", "false");
    $("log").scrollTop = $("log").scrollHeight;
    busy(false);
  }
  chat.push({ role: "assistant", content: whole });
}

function details(reported, usage) {
  const timing = reported.timing, ttft = timing.ttft_ms, made = node("div", "details");
  const values = PARTS.slice(0, -1).map((part) => timing[part + "_ms"] ?? 0);
  values.push(Math.max(0, ttft - values.reduce((a, b) => a + b, 0)));
  const rest = (timing.total_ms - ttft) / 1000, tokens = (usage?.completion_tokens ?? 0) - 1;
  const facts = ["first token " + ms(ttft)];
  if (tokens > 0 && rest > 0) facts.push((tokens / rest).toFixed(1) + " tokens/s");
  const place = (stage) => {
    const worker = reported[stage + "_worker"], engine = reported[stage + "_engine"];
    return engine ? worker + " (" + engine + ")" : worker;
  };
  facts.push(place("prefill") + " → " + place("decode"));
  if (!$("tier-field").hidden) facts.push(writers(reported));
  if (reported.migrations) facts.push("migrated " + count(reported.migrations, "time"));
  if (usage) facts.push(usage.prompt_tokens + " tokens in, " + usage.completion_tokens + " out");
  const bar = node("div", "bar"), legend = node("ul", "legend");
  PARTS.forEach((part, i) => {
    if (DECODER_FIRST.includes(part) && timing[part + "_ms"] === null) return;
    const name = part.replaceAll("_", " "), share = node("span", "p" + i), item = node("li");
    share.style.width = (100 * values[i]) / ttft + "%";
    share.dataset.part = part;
    share.dataset.ms = values[i];
    bar.append(share);
    item.append(node("span", "swatch p" + i), " " + name + " " + ms(values[i]));
    legend.append(item);
  });
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", "Parts of the time to first token, listed below");
  bar.dataset.ttft = ttft;
  made.append(node("div", "facts", facts.join(" · ")), bar, legend);
  return made;
}

// The tiers that wrote an answer: from which token each did, and why not the requested one.
function writers(reported) {
  const [first, ...others] = reported.parts;
  const text = "tier " + [first.tier, ...others.map((part) => part.tier + " from token " + part.first_index)].join(", then ");
  return reported.brownout_from ? text + ", because " + reported.brownout_from + " is overloaded" : text;
}

const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
const figure = (value) => (value < 10000 ? value.toFixed(1) : (value / 1000).toFixed(1) + " s"); // fits a column
const ms = (value) => (value < 100 ? value.toFixed(1) : Math.round(value)) + " ms";

function busy(on) {
  $("send").disabled = on;
  $("stop").disabled = !on;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const prompt = $("prompt").value.trim();
  if (!prompt || running) return;
  $("prompt").value = "";
  messages.push({ role: "user", content: prompt });
  turn("You", prompt);
  answer();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  messages = [];
  $("log").replaceChildren();
  $("prompt").focus();
});
$("key").addEventListener("change", () => sessionStorage.setItem("overfill-key", $("key").value));
$("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return; // would send the form, whose message is empty
  event.preventDefault();
  $("prompt").focus();
});
$("key").value = sessionStorage.getItem("overfill-key") ?? "";

// Workers

async function poll() {
  try {
    const response = await fetch("/status", { headers: headers(), signal: AbortSignal.timeout(2 * POLL_MS) });
    $("key").classList.toggle("wrong", response.status === 401);
    if (!response.ok) throw new Error(await problemOf(response));
    show(await response.json());
    if (!tiersListed) await listTiers();
    $("problem").textContent = "";
  } catch (error) {
    $("problem").textContent = error instanceof TypeError || error.name === "TimeoutError"
      ? "The router does not answer." : error.message;
  }
  setTimeout(poll, POLL_MS);
}

async function listTiers() {
  const response = await fetch("/v1/models", { headers: headers(), signal: AbortSignal.timeout(2 * POLL_MS) });
  if (!response.ok) return; // a key may show the status only
  const { data } = await response.json();
  const choices = data.filter(({ id, overfill }) => id === model + ":" + overfill.tier);
  const usual = data.find(({ id }) => id === model)?.overfill.tier;
  $("tier").replaceChildren(...choices.map(({ id, overfill: { tier } }) => new Option(tier, id, tier === usual, tier === usual)));
  $("tier-field").hidden = choices.length < 2;
  tiersListed = true;
}

function show(status) {
  model = status.model;
  $("model").textContent = model;
  $("traffic").textContent = `${status.running} running · ${status.waiting} waiting · ` +
    `${status.tokens_per_second.toFixed(1)} tokens/s · ${count(status.answers_last_minute, "answer")} in the last minute`;
  const now = Date.now(), here = new Set(status.workers.map(key));
  for (const worker of status.workers) seen.set(key(worker), { id: worker.id, stage: worker.stage, at: now });
  const gone = [...seen].filter(([entry, { at }]) => !here.has(entry) && now - at < GONE_MS);
  const all = [...status.workers, ...gone.map(([, { id, stage }]) => ({ id, stage, state: "gone", kv_blocks: null }))];
  all.sort((a, b) => a.id.localeCompare(b.id));
  for (const stage of ["prefill", "decode"]) {
    const rows = all.filter((worker) => worker.stage === stage).map(row);
    $(stage).replaceChildren(...(rows.length ? rows : [node("li", "quiet", "no worker")]));
  }
  $("times").replaceChildren(...Object.entries(TIMES).filter(
    ([name]) => status.timing_ms[name] || !DECODER_FIRST.includes(name)
  ).map(([name, label]) => {
    const line = node("tr"), found = status.timing_ms[name], head = node("th", "", label);
    head.scope = "row";
    line.append(head, ...["p50", "p90", "p99"].map((mark) => node("td", "", found ? figure(found[mark]) : "–")));
    return line;
  }));
}

function row(worker) {
  const made = node("li"), kv = worker.kv_blocks;
  made.dataset.worker = worker.id;
  made.append(node("span", "state " + worker.state, worker.state), node("span", "name", worker.id));
  if (worker.colocated) made.append(node("span", "quiet", " both stages"));
  if (worker.tier && !$("tier-field").hidden) made.append(node("span", "quiet", " tier " + worker.tier));
  if (!kv) return made;
  const bar = node("div", "bar");
  for (const kind of ["used", "cached", "free"]) {
    const share = node("span", kind);
    share.style.width = (100 * kv[kind]) / Math.max(1, kv.total) + "%";
    bar.append(share);
  }
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", "KV blocks, counted below");
  made.append(bar, node("div", "quiet", `${worker.running} running · ${worker.waiting} waiting · ` +
    `KV ${kv.used} used, ${kv.cached} cached, ${kv.free} free`));
  return made;
}

poll();
$("prompt").focus();
