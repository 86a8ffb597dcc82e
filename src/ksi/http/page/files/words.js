// Formats of numbers, times, money and states.

import { now } from "./api.js";
import { h } from "./dom.js";

const whole = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export const count = (number) => whole.format(number ?? 0);

/** A number in a short form. */
export const compact = (number) => (Math.abs(number ?? 0) < 10_000 ? count(number) : short.format(number));

export function dollars(usd) {
  if (usd === null || usd === undefined) return "unknown";
  if (usd === 0) return "$0";
  if (usd < 0.01) return "under 1¢";
  return `$${usd.toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 })}`;
}

/** A duration in at most two units. */
export function span(seconds) {
  const left = Math.max(0, seconds);
  if (left < 0.9995) return `${Math.round(left * 1000)} ms`;
  if (left < 10) return `${left.toFixed(1)} s`;
  if (left < 59.5) return `${Math.round(left)} s`;
  const minutes = Math.round(left / 60);
  if (left < 600) return `${Math.floor(left / 60)} min ${String(Math.floor(left % 60)).padStart(2, "0")} s`;
  if (minutes < 60) return `${minutes} min`;
  if (minutes < 48 * 60) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return `${Math.round(left / 86_400)} days`;
}

const coarse = (seconds) => (seconds < 60 ? `${Math.floor(Math.max(0, seconds))} s` : span(seconds));

const today = (date) => date.toDateString() === new Date(now() * 1000).toDateString();

/** A time of day, with the day where it is not today. */
export function clock(unix) {
  const date = new Date(unix * 1000);
  const time = date.toLocaleTimeString("en-GB");
  return today(date) ? time : `${date.toLocaleDateString("en", { month: "short", day: "numeric" })} ${time.slice(0, 5)}`;
}

const exact = (unix) => new Date(unix * 1000).toLocaleString("en-GB", { dateStyle: "full", timeStyle: "long" });

function timeElement(kind, unix) {
  const element = h("time", { "data-kind": kind, "data-at": unix, datetime: new Date(unix * 1000).toISOString(), title: exact(unix) });
  element.textContent = said(kind, unix);
  return element;
}

function said(kind, unix) {
  const away = unix - now();
  if (kind === "for") return coarse(-away);
  if (kind === "in") return away > 0 ? `in ${coarse(away)}` : "now";
  if (kind === "until") return away > 0 ? `${clock(unix)} (in ${coarse(away)})` : `${clock(unix)} (now)`;
  return `${coarse(-away)} ago`;
}

/** Time since a moment; it is updated every second. */
export const ago = (unix) => (unix ? timeElement("ago", unix) : "–");
/** Duration since a moment. */
export const since = (unix) => (unix ? timeElement("for", unix) : "–");
/** A future moment and the time until then. */
export const until = (unix) => (unix ? timeElement("until", unix) : "–");
/** The time until a moment. */
export const within = (unix) => (unix ? timeElement("in", unix) : "–");
/** A past moment as the time of day. */
export const at = (unix) => (unix ? h("time", { datetime: new Date(unix * 1000).toISOString(), title: exact(unix) }, clock(unix)) : "–");

/** Update all times on the page. */
export function tick() {
  for (const element of document.querySelectorAll("time[data-kind]")) {
    const text = said(element.dataset.kind, Number(element.dataset.at));
    if (element.textContent !== text) element.textContent = text;
  }
}

const COLOURS = {
  running: "run", completed: "good", queued: "calm", scheduled: "calm", retrying: "wait", parked: "wait", held: "wait",
  waiting_input: "wait", failed: "bad", blocked: "bad", expired: "bad", cancelled: "calm", interrupted: "wait",
  shutdown: "calm", fenced: "bad", open: "good", tripped: "bad", exhausted: "bad", closed: "calm", delivered: "good",
  taken: "run", retried: "calm",
};

/** A state as a word with a colour. */
export const state = (name) => h("span", { class: `state ${COLOURS[name] ?? "calm"}` }, String(name ?? "unknown").replaceAll("_", " "));

export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

/** At most so many characters, with an ellipsis. */
export const cut = (text, most) => (text.length > most ? `${text.slice(0, most)}…` : text);

/** The content of a message as text, with a placeholder for blocks that are not text. */
export function textOf(content) {
  if (content === null || content === undefined) return "";
  if (typeof content === "string") return content;
  if (!Array.isArray(content)) return JSON.stringify(content, null, 2);
  return content.map((block) => (block.type === "text" ? block.text : blockText(block))).join("\n");
}

function blockText(block) {
  if (block.type === "tool_use") return `[calls ${block.name}] ${JSON.stringify(block.input)}`;
  if (block.type === "tool_result") return `[result of ${block.tool_use_id}] ${textOf(block.content)}`;
  if (block.type === "thinking") return `[thinking] ${block.thinking ?? ""}`;
  return `[${block.type ?? "block"}]`;
}
