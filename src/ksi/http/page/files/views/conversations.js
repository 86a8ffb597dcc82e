// Conversations: turns, lock, wait queue, and the tree of forks.

import { cancelRequest, deleteConversation, pause, releaseLock, renameConversation, withdraw } from "../acts.js";
import { ask } from "../api.js";
import { h } from "../dom.js";
import { button, conversationLink, empty, facts, link, panel, requestLink, shortConversation, table } from "../ui.js";
import { ago, at, count, cut, plural, since, state, textOf, until } from "../words.js";
import { dialogue, said } from "./requests.js";

const TURNS = 20;

export const list = {
  title: () => "Conversations",
  on: /^(completion|conversation):/,
  every: 5,
  async load({ rest, query, signal }) {
    const held = rest[0] === "held";
    const page = { limit: 100, ...(query.get("cursor") ? { cursor: query.get("cursor") } : {}) };
    const agent = query.get("agent");
    const [locks, sessions] = await Promise.all([
      ask("conversation:lock_status", held ? page : { limit: 1 }, signal),
      held ? null : ask("completion:session_status", { ...page, ...(agent ? { agent_id: agent } : {}) }, signal),
    ]);
    return { held, locks, sessions, agent };
  },
  render({ held, locks, sessions, agent }, { query }) {
    const cursor = held ? locks.cursor : sessions.cursor;
    const here = held ? "#/conversations/held" : "#/conversations";
    return [
      h("nav", { class: "tabs", "aria-label": "Lists of conversations" },
        h("a", { href: "#/conversations", "aria-current": held ? null : "true" }, "All"),
        h("a", { href: "#/conversations/held", "aria-current": held ? "true" : null }, "Locked", h("span", { class: "number" }, count(locks.locked_conversations)))),
      agent ? h("p", { class: "note" }, `Only those of the agent ${agent}. `, link("#/conversations", "Show all")) : null,
      held ? held_table(locks.locks) : session_table(sessions.sessions),
      h("p", { class: "pages" }, query.get("cursor") ? link(here, "Back to the first") : null, cursor ? link(`${here}?cursor=${encodeURIComponent(cursor)}`, "The next hundred") : null),
    ];
  },
};

const session_table = (sessions) => sessions.length ? table("Conversations", [
  ["Conversation", (one) => shortConversation(one.session_id), { main: true }],
  ["State", (one) => [state(one.state), one.locked ? h("span", { class: "state run" }, "locked") : null]],
  ["Turns", (one) => count(one.turns), { right: true }],
  ["Agents", (one) => one.agents.slice(0, 3).join(", ") + (one.agents.length > 3 ? ` and ${one.agents.length - 3} more` : "") || "–"],
  ["Answered by", (one) => one.provider ?? "–"],
  ["Last active", (one) => ago(one.active_at)],
  ["Forked from", (one) => (one.forked_from ? shortConversation(one.forked_from) : ""), { quiet: true }],
], sessions, (one) => one.session_id) : empty("There are no conversations yet.");

const held_table = (locks) => locks.length ? table("Locked conversations", [
  ["Conversation", (one) => shortConversation(one.conversation_id), { main: true }],
  ["Holder", (one) => holder(one)],
  ["State", (one) => state(one.state)],
  ["Since", (one) => since(one.since)],
  ["Waiting", (one) => count(one.waiting ?? 0), { right: true }],
  ["", (one) => free(one), { right: true }],
], locks, (one) => one.conversation_id) : empty("No conversation is locked.");

const holder = (one) => (one.holder_kind === "external" ? [h("span", { class: "id" }, one.holder), " ", h("span", { class: "quiet" }, "external")] : requestLink(one.holder));
const free = (one) => (one.holder_kind === "external" ? releaseLock(one.holder, one.fence, one.conversation_id) : cancelRequest(one.holder));

export const one = {
  title: ({ rest }) => `Conversation ${cut(rest[0] ?? "", 60)}`,
  on: /^(completion|conversation):/,
  every: 10,
  async load({ rest, signal, state: kept }) {
    const session_id = rest[0];
    const [session, lock, history] = await Promise.all([
      ask("completion:session_status", { session_id }, signal),
      ask("conversation:lock_status", { session_id }, signal),
      ask("completion:history", { session_id, limit: TURNS }, signal),
    ]);
    const earlier = kept.earlier ?? [];
    return { session, lock, turns: [...history.turns, ...earlier].reverse(), cursor: kept.earlier ? kept.cursor : history.cursor };
  },
  render({ session, lock, turns, cursor }, { rest, signal, state: kept, again, known }) {
    const earlier = async () => {
      const page = await ask("completion:history", { session_id: rest[0], limit: TURNS, cursor }, signal);
      kept.earlier = [...(kept.earlier ?? []), ...page.turns];
      kept.cursor = page.cursor;
      again();
    };
    return [
      h("div", { class: "lead" }, h("p", state(session.state), " ", h("span", { class: "quiet" }, plural(session.turns, "turn"), ", last active ", ago(session.active_at))), h("div", { class: "buttons" }, pause("session", session.session_id), known.has("conversation:rename") ? renameConversation(session.session_id) : null, known.has("conversation:delete") ? deleteConversation(session.session_id) : null)),
      h("div", { class: "columns" },
        panel("Turns", { key: "turns" }, cursor ? h("p", { class: "more" }, button("Show earlier turns", earlier)) : null,
          turns.length ? h("ol", { class: "turns" }, turns.map((turn) => turn_of(turn, session.session_id))) : empty("No turn has completed yet.")),
        h("aside",
          panel("Lock", { key: "lock", side: lock.holder ? [free(lock)] : [] }, lock.holder
            ? facts([["Holder", holder(lock)], ["State", state(lock.state)], ["Held for", since(lock.since)], ["Expires", lock.expires_at ? until(lock.expires_at) : null], ["Fence", lock.fence]])
            : empty("Free.")),
          lock.queue?.length ? panel("Wait queue", { key: "line" }, h("ol", { class: "line" }, lock.queue.map((waiter) => h("li", { "data-key": waiter.request_id },
            h("p", waiter.kind === "external" ? h("span", { class: "id" }, waiter.request_id) : requestLink(waiter.request_id), h("span", { class: "quiet" }, ` ${waiter.priority}, for `), since(waiter.enqueued_at)),
            waiter.kind === "external" ? withdraw(waiter.request_id) : cancelRequest(waiter.request_id))))) : null,
          lock.forks.length ? panel("Forks", { key: "forks" }, forks(lock.forks, session.session_id)) : null,
          panel("Facts", { key: "facts" }, facts([
            ["Created", at(session.created_at)],
            ["Answered by", session.provider],
            ["Provider session", session.provider_session_id],
            ["Agents", session.agents.length ? session.agents.map((agent, place) => [place ? ", " : "", link(`#/conversations?agent=${encodeURIComponent(agent)}`, agent)]) : null],
            ["Machine", session.node],
          ])))),
    ];
  },
};

function turn_of(turn, here) {
  return h("li", { "data-key": `turn ${turn.finished_at}` },
    turn.session_id === here ? null : h("p", { class: "note" }, "From ", conversationLink(turn.session_id)),
    (turn.reminders ?? []).map((text) => said("delivery", text)),
    dialogue(turn.content, 1),
    said("assistant", turn.result || textOf(turn.blocks)),
    h("p", { class: "quiet when" }, turn.agent_id ? `${cut(turn.agent_id, 60)}, ` : "", turn.provider, ", ", at(turn.finished_at)));
}

/** The tree of forks that a conversation belongs to. */
function forks(list, here) {
  const children = new Map();
  const born = new Set();
  for (const fork of list) {
    if (fork.parent === fork.child) continue;
    children.set(fork.parent, [...(children.get(fork.parent) ?? []), fork]);
    born.add(fork.child);
  }
  const drawn = new Set();
  function node(name, fork) {
    if (drawn.has(name)) return null;
    drawn.add(name);
    return h("li", { "data-key": name },
      h("p", name === here ? h("strong", { class: "id", "aria-current": "true" }, name) : conversationLink(name), fork ? h("span", { class: "quiet" }, ` ${fork.kind.replaceAll("_", " ")}, `, at(fork.at)) : null),
      children.has(name) ? h("ul", { class: "tree" }, children.get(name).map((one) => node(one.child, one))) : null);
  }
  const roots = [...children.keys()].filter((name) => !born.has(name));
  return h("ul", { class: "tree" }, (roots.length ? roots : [list[0].parent]).map((name) => node(name, null)));
}
