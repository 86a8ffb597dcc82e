// Requests: lists by state, and the details of one.

import { cancelRequest, pause, requeue } from "../acts.js";
import { ask, Away, Refused } from "../api.js";
import { h } from "../dom.js";
import { chainLink, conversationLink, deliveryLink, empty, facts, link, panel, requestLink, shortConversation, shortRequest, table } from "../ui.js";
import { ago, at, count, cut, dollars, plural, since, span, state, textOf, until } from "../words.js";
import { in_short, reason, waits } from "../why.js";
import { decision } from "./approvals.js";

const LISTS = [
  ["active", "Running", "active"],
  ["ready", "Ready", "ready"],
  ["waiting", "Waiting", "queued"],
  ["delayed", "Delayed", "delayed"],
  ["failed", "Failed", "failed"],
  ["finished", "Finished", "finished"],
];

const NOTES = {
  active: "Requests that a provider works on.",
  ready: "Requests that wait for nothing but a slot, in their order by route.",
  waiting: "All queued requests, by conversation and position.",
  delayed: "Scheduled, retrying, or parked until a provider is back; the next due first.",
  failed: "Failed requests, the newest first.",
  finished: "All requests that have ended, the newest first.",
};

const EMPTY = {
  active: "No request is running.",
  ready: "No request is ready.",
  waiting: "No request is waiting.",
  delayed: "No request is delayed.",
  failed: "No request has failed.",
  finished: "No request has ended yet.",
};

function columns(which, why) {
  const live = which === "active";
  return [
    ["Request", (row) => shortRequest(row.request_id), { main: true }],
    ["State", (row) => state(row.status)],
    ["Model", (row) => row.model ?? "–"],
    ["Agent", (row) => row.agent_id ?? "–"],
    ["Conversation", (row) => shortConversation(row.session_id)],
    live ? ["Provider", (row) => row.provider ?? "–"] : ["Priority", (row) => row.priority ?? "–"],
    which === "delayed" ? ["Due", (row) => until(row.due_at)] : live ? ["Running for", (row) => since(row.started_at)] : ["failed", "finished"].includes(which) ? ["Ended", (row) => ago(row.finished_at)] : ["Queued for", (row) => since(row.enqueued_at)],
    ["delayed", "failed", "finished"].includes(which) ? ["Last failure", (row) => (row.error ? h("span", { title: row.message }, row.error, row.message ? `: ${cut(row.message, 90)}` : "") : ""), { quiet: true }] : why ? ["Waits for", (row) => why(row), { quiet: true }] : null,
    ["", (row) => (["failed", "cancelled", "expired", "blocked"].includes(row.status) ? requeue(row.request_id) : row.finished_at ? "" : cancelRequest(row.request_id)), { right: true }],
  ].filter(Boolean);
}

export const rows = (which, found, caption, why = null) => table(caption, columns(which, why), found, (row) => row.request_id);

const figure = (reply, name) => (name === "delayed" ? reply.scheduled + reply.retrying + reply.parked : name === "finished" ? reply.completed + reply.failed + reply.cancelled + reply.expired + reply.blocked : name === "ready" ? null : reply[name]);

export const list = {
  title: () => "Requests",
  on: /^(completion|conversation|queue|provider):/,
  every: 5,
  async load({ rest, query, signal }) {
    const which = LISTS.some(([name]) => name === rest[0]) ? rest[0] : "active";
    const cursor = query.get("cursor");
    const [reply, providers, pauses] = await Promise.all([
      ask("completion:queue_status", { list: which, limit: 100, ...(cursor ? { cursor } : {}) }, signal),
      ...(WAITING.has(which) ? [ask("completion:provider_status", {}, signal), ask("queue:pauses", {}, signal)] : []),
    ]);
    return { which, reply, why: WAITING.has(which) ? (row) => in_short(row, providers.providers, pauses) : null };
  },
  render({ which, reply, why }, { query }) {
    return [
      h("nav", { class: "tabs", "aria-label": "Lists of requests" }, LISTS.map(([name, words, of]) => {
        const number = figure(reply, of);
        return h("a", { href: `#/requests/${name}`, "aria-current": name === which ? "true" : null }, words, number === null ? null : h("span", { class: "number" }, count(number)));
      })),
      h("p", { class: "note" }, NOTES[which]),
      reply.items.length ? rows(which, reply.items, `Requests: ${LISTS.find(([name]) => name === which)[1]}`, why) : empty(EMPTY[which]),
      h("p", { class: "pages" }, query.get("cursor") ? link(`#/requests/${which}`, "Back to the first") : null, reply.cursor ? link(`#/requests/${which}?cursor=${encodeURIComponent(reply.cursor)}`, "The next hundred") : null),
    ];
  },
};

// -- one request ---------------------------------------------------------------------------------------------------

const WAITING = new Set(["ready", "waiting"]);

const FINAL = new Set(["completed", "failed", "cancelled", "blocked", "expired"]);

export const one = {
  title: ({ rest }) => `Request ${cut(rest[0] ?? "", 60)}`,
  on: /^(completion|conversation|queue|provider|injection):/,
  every: 5,
  async load({ rest, state: kept, signal, again }) {
    const request = await ask("completion:get", { request_id: rest[0], content: true }, signal);
    const waiting = !FINAL.has(request.status) && request.status !== "running";
    const [providers, pauses, lock] = waiting ? await Promise.all([
      ask("completion:provider_status", {}, signal),
      ask("queue:pauses", {}, signal),
      request.holder ? ask("conversation:lock_status", { session_id: request.session_id }, signal) : null,
    ]) : [{ providers: {} }, { paused: [] }, null];
    if (request.status === "running") listen(request.request_id, kept, signal, again);
    return { request, why: waits(request, providers.providers, pauses.paused, lock) };
  },
  render({ request, why }, { state: kept }) {
    const over = FINAL.has(request.status);
    return [
      h("div", { class: "lead" },
        h("p", state(request.status), request.cancelling ? " is being cancelled" : null, " ", h("span", { class: "quiet" }, over ? ["ended ", ago(request.finished_at)] : request.status === "running" ? ["for ", since(request.started_at), ` at ${request.provider}`] : ["received ", ago(request.enqueued_at)])),
        h("div", { class: "buttons" }, over ? null : cancelRequest(request.request_id), ["failed", "cancelled", "expired", "blocked"].includes(request.status) ? requeue(request.request_id) : null)),
      decision(request),
      why ? reason(why) : null,
      request.error && !request.reason ? h("div", { class: "notice bad" }, h("p", h("strong", request.error.code), ": ", request.error.message)) : null,
      request.reason ? h("div", { class: "notice bad" }, h("p", h("strong", request.reason.code), ": ", request.reason.message), evidence(request.reason), request.chain_id ? h("p", "Its chain: ", chainLink(request.chain_id)) : null) : null,
      h("div", { class: "columns" },
        h("div",
          panel("Prompt", { key: "asked" }, asked(request.content)),
          panel("Answer", { key: "answer" }, answer(request, kept)),
          panel("Attempts", { key: "attempts", note: "Every call to a provider, in order." }, attempts(request, kept))),
        h("aside", panel("Facts", { key: "facts" }, facts([
          ["Conversation", conversationLink(request.session_id)],
          ["Agent", request.agent_id ? [request.agent_id, " ", pause("agent", request.agent_id)] : null],
          ["Model", request.requested_model],
          ["Answered by", request.model ? `${request.model} at ${request.provider}` : request.provider],
          ["Priority", request.priority],
          ["Received", at(request.enqueued_at)],
          ["Queue time", request.queued_ms === undefined ? null : span(request.queued_ms / 1000)],
          ["Duration", request.duration_ms === undefined ? null : span(request.duration_ms / 1000)],
          ["Tokens", request.usage ? `${count(request.usage.input_tokens)} in, ${count(request.usage.output_tokens)} out` : null],
          ["Cache reads", request.usage?.cache_read_tokens ? count(request.usage.cache_read_tokens) : null],
          ["Cost", request.cost_usd === undefined ? null : dollars(request.cost_usd)],
          ["Stop reason", request.stop_reason],
          ["Note", request.note],
          ["Interruptions", request.interruptions ? plural(request.interruptions, "time") : null],
          ["Interrupted by", request.interrupted_by ? requestLink(request.interrupted_by) : null],
          ["Requeued from", request.requeued_from ? requestLink(request.requeued_from) : null],
          ["Chain", request.chain_id ? [chainLink(request.chain_id), `, depth ${request.ideation_depth ?? 0}`] : null],
          ["Parent", request.parent_request_id ? requestLink(request.parent_request_id) : null],
          ["Delivery", request.injection_id ? deliveryLink(request.injection_id) : null],
          ["Machine", request.node],
        ])), request.metadata ? panel("Metadata", { key: "metadata" }, h("pre", JSON.stringify(request.metadata, null, 2))) : null)),
    ];
  },
};

export const evidence = (reason) => (reason.evidence?.length ? h("ul", { class: "evidence" }, reason.evidence.map((one) => h("li", one))) : null);

function asked(content) {
  return content ? dialogue(content, 12) : empty("No longer stored.");
}

/** What was sent: instructions, tools, messages. Of a long dialogue the last `most` messages are open. */
export function dialogue({ prompt, messages, system, native }, most) {
  const all = messages ?? native?.body?.messages ?? [];
  const instructions = textOf(system ?? native?.body?.system);
  const tools = (native?.body?.tools ?? []).map((tool) => tool.name ?? tool.function?.name ?? tool.type);
  const earlier = all.slice(0, Math.max(0, all.length - most));
  const shown = (some) => some.map((message) => said(message.role, textOf(message.content)));
  return [
    instructions ? h("details", h("summary", `Instructions, ${plural(instructions.length, "character")}`), said("system", instructions)) : null,
    tools.length ? h("details", h("summary", plural(tools.length, "tool")), h("p", tools.join(", "))) : null,
    earlier.length ? h("details", h("summary", plural(earlier.length, "earlier message")), shown(earlier)) : null,
    prompt !== undefined ? said("user", prompt) : null,
    shown(all.slice(earlier.length)),
    native && !all.length ? h("pre", { class: "text" }, JSON.stringify(native.body, null, 2)) : null,
  ];
}

/** One message of a dialogue. */
export const said = (role, text) => h("div", { class: `turn ${role}` }, h("p", { class: "who" }, role), h("pre", { class: "text", tabindex: text.length > 2000 ? "0" : null }, text));

function answer(request, kept) {
  if (request.result !== undefined) return [said("assistant", request.result || textOf(request.blocks)), request.truncated ? h("p", { class: "notice wait" }, "The answer was cut off at a token limit.") : null];
  if (request.status === "running") return [h("pre", { class: "text live", "data-own": "", id: "live", "aria-live": "off" }, kept.text ?? ""), h("p", { class: "note", id: "live-note", hidden: Boolean(kept.text) }, "No text yet. Answers that are not streamed arrive as a whole.")];
  return empty(FINAL.has(request.status) ? "There is no answer." : "No answer yet.");
}

function attempts(request, kept) {
  if (!request.attempts?.length) return empty(request.status === "running" ? "The first attempt is running." : "None yet.");
  return h("ol", { class: "trail" }, request.attempts.map((one) =>
    h("li", { class: one.outcome, "data-key": `attempt ${one.attempt} ${one.started_at}` },
      h("p", state(one.outcome), " ", h("strong", one.provider), one.model ? h("span", { class: "quiet" }, ` ${one.model}`) : null),
      h("p", { class: "quiet" }, at(one.started_at), `, ${span(one.duration_ms / 1000)}`, one.time_to_first_token_ms ? `, first token after ${span(one.time_to_first_token_ms / 1000)}` : "", one.usage === "unknown" ? ", tokens unknown" : `, ${count(one.usage.input_tokens ?? 0)} tokens in, ${count(one.usage.output_tokens ?? 0)} out`),
      one.error ? h("p", { class: "bad" }, h("strong", one.error), one.message ? `: ${one.message}` : "") : one.message ? h("p", { class: "quiet" }, one.message) : null,
      one.text ? h("details", h("summary", "Partial answer"), h("pre", { class: "text" }, one.text)) : null)));
}

const LIVE = 400; // milliseconds between two looks at a running answer

/** Follow a running answer, once per view. It asks for the new pieces only, and holds no connection meanwhile. */
async function listen(id, kept, signal, again) {
  if (kept.listening) return;
  kept.listening = true;
  try {
    while (!signal.aborted) {
      const request = await ask("completion:get", { request_id: id, after_seq: (kept.next ?? 0) - 1 }, signal);
      if (request.status !== "running") return again();
      const attempt = request.attempts?.length ?? 0;
      if (attempt !== (kept.attempt ?? attempt)) {
        // Another attempt began, which voids the text of the one before.
        Object.assign(kept, { text: "", next: 0, attempt });
        continue;
      }
      kept.attempt = attempt;
      kept.text = (kept.text ?? "") + (request.text_so_far ?? "");
      kept.next = request.next_seq ?? 0;
      show_live(kept.text);
      await new Promise((go) => setTimeout(go, document.hidden ? 5 * LIVE : LIVE));
    }
  } catch (error) {
    // The next refresh continues, and reports a lost daemon.
    if (error.name !== "AbortError" && !(error instanceof Away || error instanceof Refused)) throw error;
  } finally {
    kept.listening = false;
  }
}

function show_live(text) {
  const place = document.getElementById("live");
  if (!place) return;
  if (place.textContent === text) return;
  const at_end = place.scrollHeight - place.scrollTop - place.clientHeight < 40;
  place.textContent = text;
  document.getElementById("live-note").hidden = true;
  if (at_end) place.scrollTop = place.scrollHeight;
}
