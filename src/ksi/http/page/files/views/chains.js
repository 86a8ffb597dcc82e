// Chains: trees of requests with their tokens, their cost, and the reason if they were stopped.

import { cancelChain, cancelRequest, resetChain } from "../acts.js";
import { ask, now } from "../api.js";
import { h } from "../dom.js";
import { bar, empty, facts, link, panel, requestLink, shortChain, shortConversation, table } from "../ui.js";
import { ago, compact, count, cut, dollars, plural, span, state } from "../words.js";
import { evidence } from "./requests.js";

const PAGE = 100;
const MOST = 2000; // requests of a chain that are drawn

export const list = {
  title: () => "Chains",
  on: /^(completion|injection):/,
  every: 5,
  load: ({ query, signal }) => ask("circuit_breaker:status", { limit: PAGE, ...(query.get("cursor") ? { cursor: query.get("cursor") } : {}) }, signal),
  render({ chains, cursor }, { query }) {
    return [
      h("p", { class: "note" }, "A chain is a request and everything that followed from it, the newest first."),
      chains.length ? table("Chains", [
        ["Chain", (one) => shortChain(one.chain_id), { main: true }],
        ["State", chain_state],
        ["Requests", (one) => `${count(one.members)}${one.unfinished ? `, ${count(one.unfinished)} unfinished` : ""}`],
        ["Depth", (one) => `${one.ideation_depth} of ${one.max_depth}`, { right: true }],
        ["Tokens", (one) => [h("span", { class: "figure-in-row" }, `${compact(one.tokens_used)} of ${compact(one.token_budget)}`), budget(one)]],
        ["Started", (one) => ago(one.created_at)],
        ["Stopped by", (one) => stopped(one), { quiet: true }],
        ["", (one) => [needs_somebody(one) && can_go_on(one) ? resetChain(one.chain_id) : null, one.unfinished ? cancelChain(one.chain_id, one.unfinished) : null], { right: true }],
      ], chains, (one) => one.chain_id) : empty("There are no chains. A request with a parent starts one."),
      h("p", { class: "pages" }, query.get("cursor") ? link("#/chains", "Back to the first") : null, cursor ? link(`#/chains?cursor=${encodeURIComponent(cursor)}`, "The next hundred") : null),
    ];
  },
};

const budget = (one) => bar(one.tokens_used + one.tokens_reserved, one.token_budget, `${count(one.tokens_used)} of ${count(one.token_budget)} tokens are used`, one.tokens_used >= one.token_budget ? "bad" : one.tokens_used > 0.8 * one.token_budget ? "wait" : "");

/** Its time window has passed and nothing of it is unfinished: that is a normal end. */
const ended = (one) => one.state === "exhausted" && one.reason?.code === "time_window" && !one.unfinished;

/** Stopped by a limit or by the pattern checks, within the last day. */
export const needs_somebody = (one) => (one.state === "tripped" || one.state === "exhausted") && !ended(one) && (one.unfinished > 0 || one.created_at > now() - 86_400);

const chain_state = (one) => state(ended(one) ? "ended" : one.state);

/** True if a reset would open it again. */
const can_go_on = (one) => one.state !== "open" && one.reason?.code !== "max_depth";

const stopped = (one) => (one.reason && !ended(one) ? h("span", { title: one.reason.message }, one.reason.code.replaceAll("_", " "), `: ${cut(one.reason.message, 90)}`) : "");

export const one = {
  title: ({ rest }) => `Chain ${cut(rest[0] ?? "", 60)}`,
  on: /^(completion|injection):/,
  every: 5,
  async load({ rest, signal, state: kept }) {
    const request_id = rest[0];
    const [first, usage] = await Promise.all([
      ask("circuit_breaker:status", { request_id, members: true, limit: 1000 }, signal),
      spent(request_id, signal, kept),
    ]);
    const members = first.requests;
    for (let cursor = first.cursor; cursor && members.length < MOST; ) {
      const page = await ask("circuit_breaker:status", { request_id, members: true, limit: 1000, cursor }, signal);
      members.push(...page.requests);
      cursor = page.cursor;
    }
    return { chain: first.chain, members, usage, cut_off: first.chain.members - members.length };
  },
  render({ chain, members, usage, cut_off }) {
    return [
      h("div", { class: "lead" },
        h("p", chain_state(chain), h("span", { class: "quiet" }, " started ", ago(chain.created_at))),
        h("div", { class: "buttons" }, can_go_on(chain) ? resetChain(chain.chain_id) : null, chain.state !== "closed" || chain.unfinished ? cancelChain(chain.chain_id, chain.unfinished) : null)),
      chain.reason && !ended(chain) ? h("div", { class: chain.state === "closed" ? "notice" : "notice bad" }, h("p", h("strong", chain.reason.code.replaceAll("_", " ")), `: ${chain.reason.message}`), evidence(chain.reason)) : null,
      h("div", { class: "columns" },
        panel("Requests", { key: "tree", note: cut_off > 0 ? `The first ${count(members.length)} requests; ${count(cut_off)} more are not shown.` : null }, tree(members)),
        h("aside", panel("Figures", { key: "figures" }, facts([
          ["Tokens", [`${count(chain.tokens_used)} of ${count(chain.token_budget)}`, budget(chain)]],
          ["Reserved", chain.tokens_reserved ? count(chain.tokens_reserved) : null],
          ["Estimated", chain.tokens_estimated ? count(chain.tokens_estimated) : null],
          ["Cost", usage ? `${dollars(usage.totals.cost_usd)}${usage.totals.unpriced_attempts ? `, ${plural(usage.totals.unpriced_attempts, "call")} without a price` : ""}` : null],
          ["Depth", `${chain.ideation_depth} of ${chain.max_depth}`],
          ["Age", `${span(chain.age)} of ${span(chain.time_window)}`],
          ["Requests", `${count(chain.members)}, ${count(chain.unfinished)} unfinished`],
          ["Resets", chain.resets ? plural(chain.resets, "time") : null],
          ["Guard messages", chain.guard_messages ? count(chain.guard_messages) : null],
        ])))),
    ];
  },
};

/** The usage of a chain, asked for at most every ten seconds. */
async function spent(chain, signal, kept) {
  if (kept.spent && performance.now() < kept.spent.until) return kept.spent.usage;
  const { chain: found } = await ask("circuit_breaker:status", { request_id: chain }, signal);
  const usage = await ask("completion:token_usage", { chain_id: found.chain_id, hours: 100_000, group_by: "model", limit: 1 }, signal);
  kept.spent = { usage, until: performance.now() + 10_000 };
  return usage;
}

/** The tree of requests, in the order of arrival. */
function tree(members) {
  const children = new Map();
  const ids = new Set(members.map((one) => one.request_id));
  const roots = [];
  for (const member of members) {
    if (member.parent_request_id && ids.has(member.parent_request_id)) {
      if (!children.has(member.parent_request_id)) children.set(member.parent_request_id, []);
      children.get(member.parent_request_id).push(member);
    } else roots.push(member);
  }
  const most = Math.max(1, ...members.map((one) => one.tokens));
  // Most chains are one long line: an only child stands below its parent, without indentation.
  const branch = (some) => h("ul", { class: "tree" }, some.flatMap((one) => line(one)));
  function line(first) {
    const found = [];
    for (let member = first; member; ) {
      const below = children.get(member.request_id) ?? [];
      found.push(h("li", { class: member === first ? null : "next", "data-key": member.request_id }, node(member, most), below.length > 1 ? branch(below) : null));
      member = below.length === 1 ? below[0] : null;
    }
    return found;
  }
  return branch(roots);
}

const OVER = new Set(["completed", "failed", "cancelled", "blocked", "expired"]);

function node(member, most) {
  return h("div", { class: "node" },
    h("p", h("span", { class: "depth", title: "Depth" }, `${member.depth}`), " ", state(member.status), " ", requestLink(member.request_id), OVER.has(member.status) ? null : cancelRequest(member.request_id)),
    h("p", { class: "quiet" }, member.agent_id ? `${cut(member.agent_id, 40)} in ` : "in ", shortConversation(member.session_id), `, ${member.estimated ? "about " : ""}${count(member.tokens)} tokens `, bar(member.tokens, most, `${count(member.tokens)} tokens`)),
    member.reason ? h("p", { class: "bad" }, h("strong", member.reason.code.replaceAll("_", " ")), `: ${member.reason.message}`) : null);
}
