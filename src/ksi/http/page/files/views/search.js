// Search: names by their beginning, and turns by their words.

import { ask, Refused } from "../api.js";
import { h } from "../dom.js";
import { conversationLink, empty, link, panel, requestLink } from "../ui.js";
import { at, count, plural } from "../words.js";

export const results = {
  title: ({ query }) => `Search: ${query.get("q") ?? ""}`,
  every: 60,
  on: /^$/,
  async load({ query, signal, known }) {
    const beginning = (query.get("q") ?? "").trim();
    if (!beginning) return { requests: { names: [] }, conversations: { names: [] }, turns: null };
    const [requests, conversations, turns] = await Promise.all([
      ...["request", "conversation"].map((kind) => ask("completion:find", { beginning, kind, limit: 50 }, signal)),
      known.has("conversation:search") ? said(beginning, query.get("cursor"), signal) : null,
    ]);
    return { requests, conversations, turns };
  },
  render({ requests, conversations, turns }, { query, again }) {
    // Each search indexes some of what is new.
    if (turns?.behind) again();
    const both = requests.names.length + conversations.names.length + (turns?.matches.length ?? 0);
    const place = `#/search?q=${encodeURIComponent(query.get("q") ?? "")}`;
    return [
      h("p", { class: "note", role: "status" }, both ? `Found ${plural(requests.names.length + conversations.names.length, "name")}${turns ? ` and ${plural(turns.matches.length, "turn")}` : ""}.` : "Nothing found."),
      h("div", { class: "columns even" },
        panel("Requests", { key: "requests" }, names(requests, requestLink)),
        panel("Conversations", { key: "conversations" }, names(conversations, conversationLink))),
      turns ? panel("Turns", { key: "turns", note: turns.behind ? `Indexing, about ${count(turns.behind)} turns are left.` : turns.problem ?? null },
        turns.matches.length ? h("ul", { class: "matches" }, turns.matches.map((one) => h("li", { "data-key": `${one.session_id} ${one.finished_at}` }, h("p", excerpt(one)), h("p", { class: "quiet" }, conversationLink(one.session_id), one.agent_id ? `, ${one.agent_id}` : "", `, ${one.provider}, `, at(one.finished_at))))) : empty("None."),
        h("p", { class: "pages" }, query.get("cursor") ? link(place, "Back to the first") : null, turns.cursor ? link(`${place}&cursor=${encodeURIComponent(turns.cursor)}`, "Earlier turns") : null)) : null,
    ];
  },
};

async function said(query, cursor, signal) {
  try {
    return await ask("conversation:search", { query, limit: 50, ...(cursor ? { cursor } : {}) }, signal);
  } catch (error) {
    // Not every name is a valid query, and not every store has an index.
    if (error instanceof Refused && error.status === 400) return { matches: [], problem: error.message };
    throw error;
  }
}

/** An excerpt with its match marked. Positions count characters, not UTF-16 units. */
function excerpt({ excerpt: text, start, end }) {
  const letters = [...text];
  return [letters.slice(0, start).join(""), h("mark", letters.slice(start, end).join("")), letters.slice(end).join("")];
}

const names = (found, to) => (found.names.length ? [h("ul", { class: "names" }, found.names.map((name) => h("li", { "data-key": name }, to(name)))), found.more ? h("p", { class: "note" }, "There are more; enter more of the name.") : null] : empty("None."));
