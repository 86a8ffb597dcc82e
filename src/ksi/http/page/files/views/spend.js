// Usage and cost: over time, and by agent, model, provider and conversation.

import { ask } from "../api.js";
import { h } from "../dom.js";
import { bar, chart, empty, figures, panel, shortConversation, table } from "../ui.js";
import { clock, compact, count, dollars, plural } from "../words.js";

const SPANS = [[1, "Hour"], [24, "Day"], [168, "Week"], [720, "30 days"]];

export const spend = {
  title: () => "Spend",
  on: /^completion:result$/,
  every: 30,
  load({ query, signal }) {
    const hours = SPANS.some(([one]) => String(one) === query.get("hours")) ? Number(query.get("hours")) : 24;
    return ask("completion:token_usage", { hours, limit: 20 }, signal).then((usage) => ({ usage, hours }));
  },
  render({ usage, hours }) {
    const { totals, trend } = usage;
    const priced = trend.some((one) => one.cost_usd);
    const value = (one) => (priced ? one.cost_usd ?? 0 : one.total_tokens);
    return [
      h("nav", { class: "tabs", "aria-label": "How far back" }, SPANS.map(([one, words]) => h("a", { href: `#/spend?hours=${one}`, "aria-current": one === hours ? "true" : null }, words))),
      figures([
        ["Cost", dollars(totals.cost_usd), { note: totals.unpriced_attempts ? `without ${plural(totals.unpriced_attempts, "unpriced call")}` : null }],
        ["Tokens in", compact(totals.input_tokens), { note: totals.cache_read_tokens ? `${compact(totals.cache_read_tokens)} from caches` : null }],
        ["Tokens out", compact(totals.output_tokens), { note: totals.reasoning_tokens ? `${compact(totals.reasoning_tokens)} reasoning` : null }],
        ["Requests", compact(totals.requests), { note: totals.attempts > totals.requests ? `${compact(totals.attempts)} calls` : null }],
        ["Cache savings", dollars(totals.cache_saved_usd ?? 0), {}],
      ]),
      totals.unknown_attempts ? h("p", { class: "notice wait" }, `${plural(totals.unknown_attempts, "call")} reported no usage; the sums do not include them.`) : null,
      panel(priced ? "Cost over time" : "Tokens over time", { key: "trend", wide: true }, trend.length ? chart(priced ? "Cost" : "Tokens", trend.map((one) => clock(one.start)), [{ name: priced ? "US dollars" : "tokens", tone: "used", values: trend.map(value) }], priced ? dollars : compact, { ends: [clock(trend[0].start), "now"] }) : empty("No usage.")),
      h("div", { class: "columns even" },
        group("By agent", usage.by_agent, (one) => one.agent_id ?? "no agent", priced),
        group("By model", usage.by_model, (one) => one.model ?? "unknown", priced),
        group("By provider", usage.by_provider, (one) => one.provider ?? "unknown", priced),
        group("By conversation", usage.by_session, (one) => (one.session_id ? shortConversation(one.session_id) : "unknown"), priced)),
    ];
  },
};

function group(title, rows, name, priced) {
  const value = (one) => (priced ? one.cost_usd ?? 0 : one.total_tokens);
  const most = Math.max(0, ...rows.map(value));
  const sorted = [...rows].sort((a, b) => value(b) - value(a));
  return panel(title, { key: title }, rows.length ? table(title, [
    [title.slice(3), (one) => name(one), { main: true }],
    ["Cost", (one) => [h("span", { class: "figure-in-row" }, one.cost_usd === null ? (one.total_tokens ? "unknown" : "–") : dollars(one.cost_usd)), most ? bar(value(one), most, priced ? dollars(value(one)) : `${count(value(one))} tokens`) : null]],
    ["Tokens", (one) => compact(one.total_tokens), { right: true }],
    ["Requests", (one) => compact(one.requests), { right: true }],
  ], sorted, (one) => `${title} ${one.agent_id ?? one.model ?? one.provider ?? one.session_id}`) : empty("No usage."));
}
