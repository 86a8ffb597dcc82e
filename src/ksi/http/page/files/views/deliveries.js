// Deliveries of results into conversations, dead letters first.

import { retryDelivery } from "../acts.js";
import { ask } from "../api.js";
import { h } from "../dom.js";
import { chainLink, conversationLink, empty, facts, link, panel, requestLink, shortChain, shortConversation, shortDelivery, table } from "../ui.js";
import { ago, at, cut, state } from "../words.js";
import { evidence } from "./requests.js";

const LISTS = [["dead", "Dead letters"], ["queued", "In flight"], ["delivered", "Delivered"], ["retried", "Retried"]];

export const list = {
  title: () => "Deliveries",
  on: /^(injection|completion):/,
  every: 5,
  async load({ rest, query, signal }) {
    const which = LISTS.some(([name]) => name === rest[0]) ? rest[0] : "dead";
    const cursor = query.get("cursor");
    const get = (one) => ask("injection:status", { state: one, limit: 100, ...(cursor ? { cursor } : {}) }, signal);
    const states = which === "dead" ? ["blocked", "failed"] : which === "queued" ? ["queued", "taken"] : [which];
    const pages = await Promise.all(states.map(get));
    return { which, found: pages.flatMap((page) => page.injections).sort((a, b) => b.created_at - a.created_at), cursor: pages.length === 1 ? pages[0].cursor : null, more: pages.length > 1 && pages.some((page) => page.cursor) };
  },
  render({ which, found, cursor, more }) {
    return [
      h("nav", { class: "tabs", "aria-label": "Lists of deliveries" }, LISTS.map(([name, words]) => h("a", { href: `#/deliveries/${name}`, "aria-current": name === which ? "true" : null }, words))),
      h("p", { class: "note" }, which === "dead" ? "Results that did not reach their conversation, because a limit of the chain blocked them or because the request failed." : "Results of requests that were delivered into other conversations."),
      found.length ? table("Deliveries", [
        ["Delivery", (one) => shortDelivery(one.injection_id), { main: true }],
        ["State", (one) => state(one.state)],
        ["To", (one) => shortConversation(one.target)],
        ["Chain", (one) => shortChain(one.chain_id)],
        ["Created", (one) => ago(one.created_at)],
        ["Reason", (one) => (one.reason ? h("span", { title: one.reason.message }, one.reason.code.replaceAll("_", " "), `: ${cut(one.reason.message, 110)}`) : ""), { quiet: true }],
        ["", (one) => (["blocked", "failed"].includes(one.state) ? retryDelivery(one.injection_id) : ""), { right: true }],
      ], found, (one) => one.injection_id) : empty(which === "dead" ? "There are no dead letters." : "There are none."),
      more ? h("p", { class: "note" }, "There are more; `ksi injections --all` lists all of them.") : null,
      cursor ? h("p", { class: "pages" }, link(`#/deliveries/${which}?cursor=${encodeURIComponent(cursor)}`, "The next hundred")) : null,
    ];
  },
};

export const one = {
  title: ({ rest }) => `Delivery ${cut(rest[0] ?? "", 60)}`,
  on: /^injection:/,
  every: 10,
  load: async ({ rest, signal }) => (await ask("injection:status", { injection_id: rest[0] }, signal)).injection,
  render(one) {
    return [
      h("div", { class: "lead" }, h("p", state(one.state), h("span", { class: "quiet" }, " created ", ago(one.created_at))), h("div", { class: "buttons" }, ["blocked", "failed"].includes(one.state) ? retryDelivery(one.injection_id) : null)),
      one.reason ? h("div", { class: "notice bad" }, h("p", h("strong", one.reason.code.replaceAll("_", " ")), `: ${one.reason.message}`), evidence(one.reason)) : null,
      h("div", { class: "columns" }, panel("Text", { key: "text" }, h("pre", { class: "text" }, one.text ?? "")),
        h("aside", panel("Facts", { key: "facts" }, facts([["Result of", requestLink(one.parent_request_id)], ["To", conversationLink(one.target)], ["Chain", chainLink(one.chain_id)], ["Carried by", one.request_id ? requestLink(one.request_id) : null], ["Mode", one.mode], ["Template", one.trigger_type], ["Ended", one.finished_at ? at(one.finished_at) : null]])))),
    ];
  },
};
