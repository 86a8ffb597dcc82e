// Why a request waits, in a sentence, with the actions that would let it run.

import { cancelRequest, enableProvider, releaseLock, resetProvider, resume } from "./acts.js";
import { h } from "./dom.js";
import { conversationLink, requestLink } from "./ui.js";
import { clock, plural, until } from "./words.js";

/** Whether a pattern with * and ? fits a name. */
export function fits(pattern, name) {
  const source = [...pattern].map((one) => (one === "*" ? ".*" : one === "?" ? "." : one.replace(/[\\^$.|+()[\]{}]/g, "\\$&"))).join("");
  return new RegExp(`^${source}$`, "s").test(name);
}

export const serving = (providers, model) => Object.entries(providers).filter(([, one]) => one.models.some((pattern) => fits(pattern, model)));

/** The reasons why a provider gets no calls, each with its remedy. */
export function troubles(name, provider, model = null) {
  const own = model === null ? null : model.slice(model.indexOf("/") + 1);
  const found = [];
  if (!provider.enabled) found.push({ text: provider.disabled ?? `${name} is disabled`, remedy: enableProvider(name), tone: "wait" });
  for (const limit of provider.limits)
    if (own === null || limit.models === null || fits(limit.models, own)) found.push({ text: `${name}: ${limit.sentence}`, until: limit.until, told: true, remedy: resetProvider(name), tone: limit.cause === "login" || limit.cause === "model_gone" ? "bad" : "wait" });
  if (provider.breaker === "open") found.push({ text: `${name}: circuit open after repeated failures${provider.last_error?.message ? `: ${provider.last_error.message}` : ""}`, until: provider.open_until, remedy: resetProvider(name), tone: "bad" });
  if (provider.problem) found.push({ text: `${name}: ${provider.problem}`, tone: "bad" });
  return found;
}

function last_words(request) {
  const last = request.attempts?.at(-1);
  return [last?.error, last?.message].filter(Boolean).join(": ") || "no reason given";
}

/** What a request waits for, as `{text, remedies}`; null if it runs or has ended. */
export function waits(request, providers, pauses, lock = null) {
  switch (request.status) {
    case "scheduled":
      return { text: ["It is scheduled for ", until(request.due_at)], remedies: [] };
    case "retrying":
      return { text: [`It failed (${last_words(request)}) and is retried at `, until(request.due_at)], remedies: [] };
    case "parked":
      return { text: [`Its provider is limited or away (${last_words(request)}); it continues at `, until(request.due_at)], remedies: remedies(at_providers(request, providers)) };
    case "held":
      return { text: ["It is held until it is released"], remedies: [] };
    case "waiting_input":
      return { text: ["It waits for a decision"], remedies: [] };
    case "queued":
      return in_line(request, lock) ?? on_hold(request, pauses) ?? full(request, providers) ?? { text: ["It waits in the queue"], remedies: [] };
    default:
      return null;
  }
}

function in_line(request, lock) {
  const before = request.position ?? 0;
  if (!request.holder && !before) return request.node ? { text: [`It waits for the machine ${request.node}, where its dialogue lives`], remedies: [] } : null;
  return {
    text: ["It waits for the lock of its conversation ", conversationLink(request.session_id), before ? `, behind ${plural(before, "other")} in the queue` : "", request.holder ? ["; the holder is ", holder(request.holder, lock)] : ""],
    remedies: lock?.holder ? [lock.holder_kind === "external" ? releaseLock(lock.holder, lock.fence, lock.conversation_id) : cancelRequest(lock.holder)] : [],
  };
}

const holder = (name, lock) => (lock?.holder === name && lock.holder_kind === "external" ? [h("span", { class: "id" }, name), ", which is external"] : requestLink(name));

function on_hold(request, pauses) {
  if (!request.paused) return null;
  return { text: [request.paused], remedies: pauses.filter((one) => one.sentence === request.paused).map(resume) };
}

const remedies = (found) => found.map((one) => one.remedy).filter(Boolean);

const at_providers = (request, providers) => serving(providers, request.requested_model ?? "").flatMap(([name, one]) => troubles(name, one, request.requested_model ?? ""));

function full(request, providers) {
  const found = at_providers(request, providers);
  if (found.length) return { text: found.map((one, place) => [place ? "; " : "", one.text, one.until ? `, until ${clock(one.until)}` : ""]), remedies: remedies(found) };
  const busy = serving(providers, request.requested_model ?? "").filter(([, one]) => one.running >= one.max_concurrency);
  if (!busy.length) return null;
  return { text: [`It waits for a free slot: ${busy.map(([name, one]) => `${name} uses ${one.running} of ${one.max_concurrency}`).join(", ")}`], remedies: [] };
}

/** Why the request of a row waits, as far as its row tells. */
export function in_short(row, providers, { paused, draining }) {
  if (draining) return "the daemon drains";
  const names = { all: "", agent: row.agent_id, session: row.session_id, priority: row.priority };
  const pause = paused.find((one) => one.scope in names && (one.name ?? "") === (names[one.scope] ?? "-"));
  if (pause) return pause.sentence;
  const found = serving(providers, row.model ?? "");
  const able = found.filter(([name, one]) => !troubles(name, one, row.model ?? "").length && !one.paused);
  if (found.length && !able.length) return found.map(([name, one]) => troubles(name, one, row.model)[0]?.text ?? one.paused).join("; ");
  if (found.length && able.every(([, one]) => one.running >= one.max_concurrency)) return `${able.map(([name, one]) => `${name} uses ${one.running} of ${one.max_concurrency} slots`).join(", ")}`;
  return "its conversation's lock, or its turn";
}

/** A notice with the sentence and its remedies. */
export const reason = (found) => h("div", { class: "notice wait" }, h("p", found.text), found.remedies.length ? h("div", { class: "buttons" }, found.remedies) : null);
