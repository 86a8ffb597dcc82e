// The daemon's state and configuration, pauses, tokens and switches.

import { drain, pause, resume, revokeToken, stop, undrain } from "../acts.js";
import { ask, Refused, signOut } from "../api.js";
import { h } from "../dom.js";
import { button, empty, facts, panel, table } from "../ui.js";
import { ago, compact, count, plural, span } from "../words.js";

export const settings = {
  title: () => "Settings",
  on: /^queue:/,
  every: 10,
  async load({ signal }) {
    const [health, context, startup, config, status, tokens] = await Promise.all([
      ask("system:health", {}, signal), ask("system:context", {}, signal), ask("system:startup", {}, signal), ask("system:config", {}, signal), ask("completion:status", {}, signal), tokens_if_allowed(signal),
    ]);
    return { health, context, startup, config, status, tokens };
  },
  render({ health, context, startup, config, status, tokens }) {
    const sections = new Map();
    for (const [key, value] of Object.entries(config.values)) {
      const section = key.split(".").slice(0, key.startsWith("providers.") ? 2 : 1).join(".");
      sections.set(section, [...(sections.get(section) ?? []), [key, value]]);
    }
    return [
      h("div", { class: "columns even" },
        panel("The daemon", { key: "daemon", side: [h("span", { class: `state ${health.status === "healthy" ? "good" : "bad"}` }, health.status)] }, facts([
          ["Version", health.version], ["Home", context.home], ["Process", String(startup.pid)], ["Started", ago(startup.started_at)], ["Store", `${context.store}, durability ${context.durability}`],
          ["Database", health.store.database_bytes === undefined ? null : bytes(health.store.database_bytes)], ["Memory", health.memory_bytes === null ? null : bytes(health.memory_bytes)], ["Free disk", health.disk ? bytes(health.disk.free_bytes) : null],
          ["Log", `${health.log.folder}${health.log.bytes === undefined ? "" : `, ${bytes(health.log.bytes)}`}`], ["Connections", count(health.connections)], ["Default model", context.default_model],
          ["Event loop", health.loop.stalls ? `${plural(health.loop.stalls, "stall")}, the longest ${span(health.loop.longest_stall)}` : "no stalls"], ["Clock", Math.abs(health.clock.apart_seconds) > 1 ? `${health.clock.apart_seconds.toFixed(1)} s off` : "correct"],
        ]), health.problems.length ? h("ul", { class: "wrong" }, health.problems.map((one) => h("li", { class: "bad" }, one))) : null),
        panel("Switches", { key: "switches" },
          status.paused.length ? h("ul", { class: "wrong" }, status.paused.map((one) => h("li", { class: "wait" }, one.sentence, " ", resume(one)))) : h("p", "Nothing is paused."),
          h("div", { class: "buttons" }, pause("all", "", "Pause all"), ...["critical", "high", "normal", "low", "background"].map((one) => pause("priority", one, `Pause ${one}`))),
          h("div", { class: "buttons" }, status.draining ? undrain() : drain(), stop()),
          h("div", { class: "buttons" }, button("Sign out", () => { signOut(); location.reload(); }, { class: "quiet" })))),
      tokens === null ? null : panel("Tokens", { key: "tokens", note: "Access by HTTP, besides the owner's. `ksi token create` makes a token." }, tokens.length ? table("Tokens", [
        ["Name", (one) => one.name, { main: true }], ["Scope", (one) => one.scope], ["Priority", (one) => one.priority ?? "–"], ["Created", (one) => ago(one.created_at)], ["", (one) => revokeToken(one.name), { right: true }],
      ], tokens, (one) => one.name) : empty("There are no tokens.")),
      panel("Configuration", { key: "configuration", note: "As read at the start, without secrets. Changes in ksi.toml take effect at the next start." },
        [...sections].map(([section, values]) => h("details", { "data-key": `section ${section}` }, h("summary", section, h("span", { class: "quiet" }, `, ${plural(values.length, "key")}`)),
          table(section, [["Key", ([key]) => h("code", key), { main: true }], ["Value", ([, value]) => h("code", shown(value))]], values, ([key]) => key)))),
    ];
  },
};

async function tokens_if_allowed(signal) {
  try {
    return (await ask("token:list", {}, signal)).tokens;
  } catch (error) {
    if (error instanceof Refused && error.code === "forbidden") return null;
    throw error;
  }
}

const shown = (value) => (typeof value === "string" ? value : JSON.stringify(value));
const bytes = (number) => (number < 1e6 ? `${compact(Math.round(number / 1e3))} kB` : number < 1e9 ? `${(number / 1e6).toFixed(1)} MB` : `${(number / 1e9).toFixed(1)} GB`);

