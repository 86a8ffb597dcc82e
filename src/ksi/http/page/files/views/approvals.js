// Requests that wait for a person's decision: held ones, those of chains that ask, and tools that need permission.

import { approve, reject, release } from "../acts.js";
import { ask } from "../api.js";
import { badge } from "../badges.js";
import { h } from "../dom.js";
import { chainLink, conversationLink, empty, link, requestLink } from "../ui.js";
import { ago, until } from "../words.js";

export const NEEDS = "completion:approvals";

const KINDS = { hold: "Held", approval: "Chain needs approval", permission: "Tool needs permission" };

export const list = {
  title: () => "Approvals",
  on: /^completion:/,
  every: 5,
  load: ({ query, signal }) => ask(NEEDS, { limit: 100, ...(query.get("cursor") ? { cursor: query.get("cursor") } : {}) }, signal),
  render({ approvals, cursor }) {
    badge("approvals", approvals.length, "waiting for a decision", "wait");
    return [
      h("p", { class: "note" }, "Requests that wait for a decision. Meanwhile they use no slot of a provider."),
      approvals.length ? h("ul", { class: "questions" }, approvals.map(question)) : empty("No request waits for a decision."),
      cursor ? h("p", { class: "pages" }, link(`#/approvals?cursor=${encodeURIComponent(cursor)}`, "The next hundred")) : null,
    ];
  },
};

const question = (one) => h("li", { class: "panel", "data-key": one.request_id },
  h("header", h("h2", KINDS[one.question.kind]), h("div", { class: "buttons" }, buttons(one.request_id, one.question.kind))),
  asked(one.question),
  one.prompt ? h("pre", { class: "text" }, one.prompt) : null,
  h("p", { class: "quiet" }, requestLink(one.request_id), one.agent_id ? ` of ${one.agent_id}` : "", " in ", conversationLink(one.session_id), one.chain_id ? [", chain ", chainLink(one.chain_id), `, depth ${one.ideation_depth ?? 0}`] : "", one.model ? `, ${one.model}` : ""));

const asked = (one) => [
  h("p", one.text, h("span", { class: "quiet" }, " Asked ", ago(one.asked_at), one.expires_at ? [", expires ", until(one.expires_at)] : "")),
  one.input ? h("pre", { class: "text code" }, pretty(one.input)) : null,
];

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // it was cut
  }
}

const buttons = (id, kind) => (kind === "hold" ? [release(id), reject(id)] : [approve(id), reject(id)]);

/** The question of a request, with its buttons or its answer. */
export const decision = (request) => (request.question && !request.question.answer && ["held", "waiting_input"].includes(request.status)
  ? h("div", { class: "notice wait" }, asked(request.question), h("div", { class: "buttons" }, buttons(request.request_id, request.question.kind)))
  : request.question?.answer ? h("p", { class: "notice" }, `${KINDS[request.question.kind]}: ${request.question.answer}`, request.question.by ? ` by ${request.question.by}` : "", request.question.why ? `: ${request.question.why}` : "") : null);
