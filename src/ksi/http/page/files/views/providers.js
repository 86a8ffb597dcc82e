// Providers: models, state, limits with their end, and figures.

import { disableProvider, enableProvider, pause, resetProvider } from "../acts.js";
import { ask } from "../api.js";
import { h } from "../dom.js";
import { bar, empty, facts, panel } from "../ui.js";
import { ago, count, cut, span, until, within } from "../words.js";
import { troubles } from "../why.js";

/** A provider's state as a word with a colour. */
export function lamp(provider, wrong, waited_for = false) {
  const [tone, word] = !provider.enabled ? ["calm", "disabled"] : wrong.some((one) => one.tone === "bad") ? ["bad", provider.breaker === "open" ? "circuit open" : "problem"] : wrong.length ? ["wait", "limited"] : provider.paused ? ["wait", "paused"] : provider.breaker === "half_open" ? ["wait", "probing"] : waited_for ? ["run", "busy"] : ["good", "ready"];
  return h("span", { class: `state ${tone}` }, word);
}

export const list = {
  title: () => "Providers",
  on: /^(provider|queue|completion):/,
  every: 5,
  load: async ({ signal }) => (await ask("completion:provider_status", {}, signal)).providers,
  render(providers) {
    const found = Object.entries(providers);
    if (!found.length) return empty("No provider is configured. A table [providers.NAME] in ksi.toml makes one.");
    return h("div", { class: "cards" }, found.map(([name, one]) => card(name, one)));
  },
};

function card(name, one) {
  const wrong = troubles(name, one);
  return panel(name, { key: `provider ${name}`, side: [lamp(one, wrong)] },
    wrong.length ? h("ul", { class: "wrong" }, wrong.map((trouble) => h("li", { class: trouble.tone }, trouble.text, trouble.until ? h("span", { class: "quiet" }, trouble.told ? [" (", within(trouble.until), ")"] : [" Until ", until(trouble.until), "."]) : null))) : null,
    one.paused ? h("p", { class: "notice wait" }, one.paused) : null,
    h("p", `${count(one.running)} of ${count(one.max_concurrency)} slots in use`),
    bar(one.running, one.max_concurrency, `${one.running} of ${one.max_concurrency} slots in use`, "run"),
    facts([
      ["Models", one.models.join(", ")],
      ["Kind", one.kind],
      ["Source", one.source],
      ["Account", one.account],
      ["Calls", one.calls ? `${count(one.calls)}, ${count(one.failures)} failed` : "none since the start"],
      ["Outcomes", one.calls ? Object.entries(one.outcomes).filter(([, number]) => number).map(([what, number]) => `${what.replaceAll("_", " ")} ${count(number)}`).join(", ") : null],
      ["Latency", one.latency_ms ? `p50 ${span(one.latency_ms.p50 / 1000)}, p95 ${span(one.latency_ms.p95 / 1000)}` : null],
      ["First token", one.time_to_first_token_ms ? `p50 ${span(one.time_to_first_token_ms.p50 / 1000)}` : null],
      ["Last failure", one.last_error ? [h("strong", one.last_error.code ?? "unknown"), " ", ago(one.last_error.at), one.last_error.message ? `: ${cut(one.last_error.message, 300)}` : ""] : null],
    ]),
    h("div", { class: "buttons" },
      one.enabled ? null : enableProvider(name),
      one.breaker !== "closed" || one.limits.length ? resetProvider(name) : null,
      one.enabled ? [pause("provider", name), disableProvider(name)] : null));
}
