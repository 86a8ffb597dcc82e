// Budgets: limits, usage, forecasts.

import { dropBudget, raiseBudget } from "../acts.js";
import { ask } from "../api.js";
import { h } from "../dom.js";
import { bar, empty, panel, table } from "../ui.js";
import { at, compact, count, dollars, until } from "../words.js";

export const NEEDS = "budget:status";

/** An amount in a budget's unit. */
export const amount = (number, unit) => (unit === "usd" ? dollars(number) : `${compact(Math.round(number))} ${Math.round(number) === 1 ? unit.slice(0, -1) : unit}`);

/** The used part of a limit. */
export const share = ({ used, limit }, unit) => `${unit === "usd" ? dollars(used) : compact(Math.round(used))} of ${amount(limit, unit)}`;

export const subject_name = ({ scope }) => (scope.endsWith(":") ? `no ${scope.slice(0, -1)}` : scope);

export const list = {
  title: () => "Budgets",
  on: /^(budget|completion):/,
  every: 10,
  load: async ({ signal }) => (await ask(NEEDS, {}, signal)).budgets,
  render(budgets) {
    if (!budgets.length) return empty("There is no budget. A table [budgets.NAME] in ksi.toml makes one, or `ksi budgets set`.");
    return budgets.map(one_budget);
  },
};

function one_budget(one) {
  return panel(one.budget, { key: `budget ${one.budget}`, side: [raiseBudget(one.budget, one.unit), one.source === "set" ? dropBudget(one.budget) : null], note: `${amount(one.limit, one.unit)} per ${one.per} for ${one.scope}; requests beyond it ${one.on_exceed === "wait" ? "wait" : "are refused"}.` },
    h("p", "The current period began ", at(one.since), " and ends ", until(one.resets_at), "."),
    one.subjects.length ? table(one.budget, [
      ["For", subject_name, { main: true }],
      ["Used", (subject) => [h("span", { class: "figure-in-row" }, share(subject, one.unit)), bar(subject.used + (subject.reserved ?? 0), subject.limit, share(subject, one.unit), tone(subject, one))]],
      ["Reserved", (subject) => (subject.reserved ? amount(subject.reserved, one.unit) : "–"), { right: true }],
      ["Waiting", (subject) => (subject.waiting ? count(subject.waiting) : "–"), { right: true }],
      ["Forecast", (subject) => (subject.exhausted_at ? ["used up at ", until(subject.exhausted_at)] : subject.forecast !== undefined ? `${amount(subject.forecast, one.unit)} at the end` : ""), { quiet: true }],
      ["", (subject) => (one.scope.includes("*") ? raiseBudget(one.budget, one.unit, subject.scope) : ""), { right: true }],
    ], one.subjects, (subject) => `${one.budget} ${subject.scope}`) : empty("Nothing is used yet."),
    one.raises?.length ? h("ul", { class: "wrong" }, one.raises.map((raise) => h("li", { class: "wait" }, `${amount(raise.amount, one.unit)} more${raise.scope ? ` for ${raise.scope}` : ""}${raise.by ? ` by ${raise.by}` : ""}${raise.why ? `: ${raise.why}` : ""}, until `, until(raise.until)))) : null);
}

export const spent_out = (subject) => subject.used + (subject.reserved ?? 0) >= subject.limit || subject.waiting > 0;

const tone = (subject, one) => (spent_out(subject) ? "bad" : subject.used >= Math.min(1, ...(one.warn_at ?? [])) * subject.limit ? "wait" : "");
