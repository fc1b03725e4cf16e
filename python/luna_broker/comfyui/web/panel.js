// Draws an answer about brokers. Facts in, elements out.
import { h } from "./elements.js";

const UNITS = ["B", "KB", "MB", "GB", "TB"];

export function size(bytes) {
  let unit = 0;
  for (; bytes >= 1000 && unit + 1 < UNITS.length; unit++) bytes /= 1000;
  return `${unit ? bytes.toFixed(1) : bytes} ${UNITS[unit]}`;
}

export function absent({ kind, message, remedy }) {
  return h(
    "section",
    { className: "luna-absent" },
    h("i", { className: "pi pi-exclamation-circle" }),
    h("strong", {}, kind === "ConnectionLost" ? "No broker" : "No answer"),
    h("p", {}, sentence(message)),
    h("p", {}, sentence(remedy)),
    h("p", { className: "luna-faint" }, "Loaders with mode auto load models themselves meanwhile."),
  );
}

export function overview(broker) {
  const waiting = broker.lanes.reduce((sum, lane) => sum + lane.queued, 0);
  return h(
    "div",
    {},
    h(
      "section",
      { className: "luna-figures" },
      figure(size(broker.saved_bytes), "memory saved"),
      figure(size(broker.bytes), "held once"),
      figure(waiting, "waiting"),
    ),
    list("Models that it runs", broker.models.map(model), "none yet: they are loaded with the first request"),
    list("Weights that workers attach", broker.weights.map(weights), "none"),
    list("Lanes", broker.lanes.map(lane), "none"),
    list("Sessions", broker.sessions.map(session), "none: no worker is connected"),
    h("footer", { className: "luna-faint" }, `${broker.version} at ${broker.address}, process ${broker.pid}`),
    h(
      "footer",
      { className: "luna-faint" },
      `up ${duration(broker.uptime_s)}, ${broker.requests} requests, ${broker.faults} failed, ` +
        `${broker.sessions_lost} sessions lost`,
    ),
  );
}

function figure(value, name) {
  return h("div", {}, h("b", {}, String(value)), h("span", {}, name));
}

function list(title, rows, nothing) {
  const shown = rows.length ? rows : [h("p", { className: "luna-faint" }, nothing)];
  return h("section", {}, h("h3", {}, title), ...shown);
}

// Of a file, its name; the tooltip has the path.
function row(name, value, ...details) {
  const lines = details.filter(Boolean).map((detail) => h("div", { className: "luna-faint" }, detail));
  const short = h("span", { title: name }, name.split(/[/\\]/).at(-1));
  const head = h("div", { className: "luna-head" }, short, h("span", {}, value));
  return h("div", { className: "luna-row" }, head, ...lines);
}

function model(model) {
  const whose = model.is_the_brokers ? plural(model.users, "session") : "loaded by a worker itself";
  const about = `${model.service}, ${model.family} on ${model.device}, ${whose}`;
  return row(model.name, size(model.bytes), about, saved(model));
}

function weights(set) {
  const written = set.diverged_bytes ? `${size(set.diverged_bytes)} written to by workers` : "";
  const state = set.state === "ready" ? "" : set.state;
  const about = [set.types.join(", "), `on ${set.device}`, state].filter(Boolean).join(" ");
  const attached = `${about}, attached by ${set.holders.join(", ") || "nobody"}`;
  return row(set.name, size(set.bytes), attached, saved(set), written);
}

function saved({ saved_bytes: bytes }) {
  return bytes ? `${size(bytes)} saved` : "";
}

function lane(lane) {
  const state = lane.permitted ? `held by ${lane.permitted}` : lane.busy ? "running" : "idle";
  const shared = lane.batches < lane.completed ? `, in ${lane.batches} batches` : "";
  const waiting = `${lane.queued} of ${lane.capacity} waiting, ${lane.completed} done${shared}`;
  const drawn = row(`${lane.service} on ${lane.device}`, state, waiting);
  if (lane.busy || lane.permitted) drawn.classList.add("luna-busy");
  if (lane.queued) drawn.append(h("progress", { max: lane.capacity, value: lane.queued }));
  return drawn;
}

function session(session) {
  const rungs = session.rungs.map((rung) => `${rung.device} by ${rung.rung}: ${rung.reason}`);
  const drawn = row(session.name, session.is_own ? "this ComfyUI" : plural(session.requests, "request"), ...rungs);
  if (session.is_own) drawn.classList.add("luna-own");
  return drawn;
}

function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

function duration(seconds) {
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return `${Math.round(seconds / 3600)} h`;
}

function sentence(text) {
  return text ? `${text[0].toUpperCase()}${text.slice(1)}.` : "";
}
