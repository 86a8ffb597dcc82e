// The overview: problems with their remedies, figures, the queue, the providers, and the running requests.

import { cancelRequest, drain, pause, raiseBudget, resume, undrain } from "../acts.js";
import { ask, now } from "../api.js";
import { badge } from "../badges.js";
import { h } from "../dom.js";
import { bar, button, chainLink, chart, conversationLink, empty, figures, link, panel, path, requestLink, table } from "../ui.js";
import { clock, compact, count, cut, dollars, plural, since, state, until, within } from "../words.js";
import { troubles } from "../why.js";
import { NEEDS as APPROVALS } from "./approvals.js";
import { NEEDS as BUDGETS, share, spent_out, subject_name } from "./budgets.js";
import { needs_somebody } from "./chains.js";
import { lamp } from "./providers.js";

const TAILS = 6; // running answers whose text is shown
const PROBLEMS = 3; // of health, until a person wants to see all: they must not hide what stands below
const PRIORITIES = ["critical", "high", "normal", "low", "background"];

/** Ask for something at most once in so many seconds. */
async function kept(state, name, seconds, call) {
  const before = state[name];
  if (before && performance.now() < before.until) return before.value;
  const value = await call();
  state[name] = { value, until: performance.now() + seconds * 1000 };
  return value;
}

const midnight = () => {
  const date = new Date(now() * 1000);
  date.setHours(0, 0, 0, 0);
  return date / 1000;
};

export const overview = {
  title: () => "Overview",
  on: /./,
  every: 3,
  async load({ state: own, signal, known }) {
    const hours = Math.max(0.02, (now() - midnight()) / 3600);
    const [status, queue, health, providers, spent, dead, chains, asked, budgets, trend] = await Promise.all([
      ask("completion:status", {}, signal),
      kept(own, "queue", 2, () => ask("completion:queue_status", {}, signal)),
      ask("system:health", {}, signal),
      ask("completion:provider_status", {}, signal),
      kept(own, "spent", 20, () => ask("completion:token_usage", { hours, group_by: "model", limit: 5 }, signal)),
      kept(own, "dead", 5, () => Promise.all(["blocked", "failed"].map((one) => ask("injection:status", { state: one, limit: 100 }, signal)))),
      kept(own, "chains", 5, () => ask("circuit_breaker:status", { limit: 100 }, signal)),
      known.has(APPROVALS) ? kept(own, "asked", 2, () => ask(APPROVALS, { limit: 100 }, signal)) : null,
      known.has(BUDGETS) ? kept(own, "budgets", 5, () => ask(BUDGETS, {}, signal)) : null,
      known.has("queue:trend") ? kept(own, "trend", 10, () => ask("queue:trend", {}, signal)) : null,
    ]);
    const tails = await Promise.all(status.running.slice(0, TAILS).map((row) => tail(row.request_id, own, signal)));
    return { status, queue, health, providers: providers.providers, spent, dead: dead.map((one) => one.injections), chains: chains.chains, asked: asked?.approvals ?? [], budgets: budgets?.budgets ?? [], trend, tails };
  },
  render({ status, queue, health, providers, spent, dead, chains, asked, budgets, trend, tails }, { state: own, again }) {
    const letters = dead[0].length + dead[1].length;
    badge("deliveries", letters, "dead letters", "bad");
    badge("requests", status.active, "running");
    const later = status.scheduled + status.retrying + status.parked;
    return [
      attention({ status, health, providers, dead: letters, chains, asked, budgets }, own, again),
      figures([
        ["Running", compact(status.active), { href: "#/requests/active", tone: status.active ? "run" : "" }],
        ["Waiting", compact(status.queued), { href: "#/requests/waiting", note: status.queued > 1 ? `limit ${compact(queue.max_queued)}` : null }],
        ["Delayed", compact(later), { href: "#/requests/delayed", note: parts([[status.scheduled, "scheduled"], [status.retrying, "retrying"], [status.parked, "parked"]]) }],
        ["Failed", compact(status.failed), { href: "#/requests/failed", note: `${lately(trend, status)}${compact(status.completed)} completed` }],
        ["Spent today", dollars(spent.totals.cost_usd), { href: "#/spend", note: `${compact(spent.totals.total_tokens)} tokens${spent.totals.unpriced_attempts ? `, ${compact(spent.totals.unpriced_attempts)} unpriced calls` : ""}` }],
      ]),
      h("div", { class: "columns even" },
        panel("Queue", { wide: true, side: status.paused.some((one) => one.scope === "all") || status.draining ? [] : [pause("all", "", "Pause all"), drain()] }, queue_over_time(trend, own, again), routes(queue, providers, status.queued)),
        panel("Providers", { side: [link("#/providers", "Details")] }, short_providers(providers))),
      panel("Running", { side: status.active > 1 ? [link("#/requests/active", `Show all ${count(status.active)}`)] : [], note: status.active > tails.length && tails.length ? `With the live text of the first ${TAILS}.` : null },
        status.running.length ? running(status.running.slice(0, 12), tails) : empty("No request is running.")),
    ];
  },
};

/** Failures within the last hour, if the daemon runs for longer than some minutes. */
function lately(trend, status) {
  if (!trend || trend.samples.length < 5) return "";
  const before = trend.samples.at(-Math.min(61, trend.samples.length));
  return `${compact(Math.max(0, status.failed - before.failed))} ${trend.samples.length > 60 ? "in the last hour" : `since ${clock(before.at)}`}; `;
}

const parts = (list) => list.filter(([number]) => number).map(([number, words]) => `${compact(number)} ${words}`).join(", ") || null;

async function tail(id, own, signal) {
  try {
    return (await ask("completion:get", { request_id: id, after_seq: -1 }, signal)).text_so_far ?? "";
  } catch (error) {
    if (error.code === "not_found") return "";
    throw error;
  }
}

// -- problems ------- -------------------------------------------------------------------------------------------

/** Everything that is wrong or paused, with its remedy. */
function attention({ status, health, providers, dead, chains, asked, budgets }, own, again) {
  const found = [];
  const told = [];
  if (status.status === "stopping") found.push({ tone: "wait", text: "The daemon is stopping." });
  if (status.draining) found.push({ tone: "wait", text: "The daemon drains: it accepts no new work and starts nothing.", remedy: undrain() });
  for (const one of status.paused) {
    told.push(one.sentence);
    found.push({ tone: "wait", text: one.sentence, until: one.until, told: true, remedy: resume(one) });
  }
  for (const [name, provider] of Object.entries(providers)) found.push(...troubles(name, provider));
  const unknown = health.problems.filter((problem) => {
    const known = told.some((one) => problem.startsWith(one)) || /^provider \S+: /.test(problem) || Object.values(providers).some((one) => one.disabled && problem.startsWith(one.disabled)) || problem.startsWith("the daemon drains") || problem === "stopping";
    return !known;
  });
  for (const problem of own.problems ? unknown : unknown.slice(0, PROBLEMS)) found.push({ tone: "bad", text: with_link(problem) });
  if (!own.problems && unknown.length > PROBLEMS) found.push({ tone: "bad", text: `${plural(unknown.length - PROBLEMS, "more problem")}.`, remedy: button("Show all", () => { own.problems = true; again(); }, { class: "quiet", "aria-label": "Show all problems" }) });
  badge("approvals", asked.length, "waiting for a decision", "wait");
  for (const one of asked.slice(0, 3)) found.push({ tone: "wait", text: [requestLink(one.request_id), " waits for a decision: ", one.question.text], remedy: link("#/approvals", "Review") });
  if (asked.length > 3) found.push({ tone: "wait", text: `${count(asked.length - 3)} more requests wait for a decision.`, remedy: link("#/approvals", "Review") });
  for (const one of budgets) for (const subject of one.subjects.filter(spent_out)) found.push({ tone: "bad", text: `Budget ${one.budget} is used up for ${subject_name(subject)}: ${share(subject, one.unit)}${subject.waiting ? `, ${plural(subject.waiting, "request")} wait` : ""}.`, until: one.resets_at, remedy: raiseBudget(one.budget, one.unit, one.scope.includes("*") ? subject.scope : null) });
  const stopped = chains.filter(needs_somebody);
  badge("chains", stopped.length, "stopped", "bad");
  for (const one of stopped.slice(0, 3)) found.push({ tone: "bad", text: ["Chain stopped: ", chainLink(one.chain_id), `: ${one.reason?.message ?? ""}`], remedy: h("a", { href: path("chain", one.chain_id), "aria-label": `Show the chain ${one.chain_id}` }, "Show") });
  if (stopped.length > 3) found.push({ tone: "bad", text: `${count(stopped.length - 3)} more stopped chains.`, remedy: h("a", { href: "#/chains", "aria-label": "Show the chains" }, "Show") });
  if (dead) found.push({ tone: "bad", text: `Dead letters: ${dead >= 100 ? "at least 100" : count(dead)} ${dead === 1 ? "result" : "results"} did not reach ${dead === 1 ? "its conversation" : "their conversations"}.`, remedy: h("a", { href: "#/deliveries", "aria-label": "Show the dead letters" }, "Show") });
  if (!found.length) return h("p", { class: "notice good", "data-key": "attention" }, "No problems, and nothing is paused.");
  return h("section", { class: "attention", "aria-labelledby": "attention", "data-key": "attention" },
    h("h2", { id: "attention" }, "Needs attention"),
    h("ul", found.map((one) => h("li", { class: one.tone }, h("p", one.text, one.until ? h("span", { class: "quiet" }, one.told ? [" (", within(one.until), ")"] : [" Until ", until(one.until), "."]) : null), one.remedy ? h("div", { class: "buttons" }, one.remedy) : null))));
}

/** A problem; the request that it names for the terminal is a link here. */
function with_link(problem) {
  const [before, id, after] = problem.split(/`ksi show (\S+)`/);
  return id ? [before, requestLink(id), after] : problem;
}

// -- the queue -----------------------------------------------------------------------------------------------------

const MOST_ROUTES = 5;

/** The queue over the last day, by priority or by route. */
function queue_over_time(trend, own, again) {
  if (!trend) return null;
  const { samples } = trend;
  if (samples.length < 2) return empty("The chart starts two minutes after the daemon.");
  const by = own.by ?? "priority";
  const choose = (which) => () => {
    own.by = which;
    again();
  };
  const running = { name: "running", tone: "run", values: samples.map((one) => one.active) };
  return [
    h("div", { class: "choice", role: "group", "aria-label": "Show the queue by" }, ["priority", "route"].map((one) => button(`By ${one}`, choose(one), { class: "quiet", "aria-pressed": one === by ? "true" : "false" }))),
    chart("Waiting requests", samples.map((one) => clock(one.at)), [running, ...(by === "route" ? route_series(samples) : priority_series(samples))], compact, { ends: [clock(samples[0].at), "now"] }),
  ];
}

function priority_series(samples) {
  if (!samples.some((one) => one.by_priority)) return [{ name: "waiting", tone: "used", values: samples.map((one) => one.queued) }, { name: "delayed", tone: "calm", values: samples.map((one) => one.delayed) }];
  return PRIORITIES.map((name, place) => ({ name, tone: `p${place}`, values: samples.map((one) => one.by_priority?.[name] ?? 0) })).filter((one) => one.values.some(Boolean));
}

/** The routes with the most waiting requests; the others as one. */
function route_series(samples) {
  const sums = new Map();
  for (const { by_route } of samples) for (const [route, count] of Object.entries(by_route)) sums.set(route, (sums.get(route) ?? 0) + count);
  const names = [...sums.keys()].sort((a, b) => sums.get(b) - sums.get(a));
  const shown = names.slice(0, MOST_ROUTES).map((name, place) => ({ name, tone: `p${place}`, values: samples.map((one) => one.by_route[name] ?? 0) }));
  const rest = names.slice(MOST_ROUTES);
  return rest.length ? [...shown, { name: "others", tone: "calm", values: samples.map((one) => rest.reduce((sum, name) => sum + (one.by_route[name] ?? 0), 0)) }] : shown;
}

/** Requests that wait for a slot, by route, with the states of the providers. */
function routes(queue, providers, queued) {
  const found = Object.entries(queue.ready_by_route).sort((a, b) => b[1] - a[1]);
  if (!found.length) return empty("No request waits for a slot.");
  const most = Math.max(...found.map(([, number]) => number));
  const ready = found.reduce((sum, [, number]) => sum + number, 0);
  const behind = found.every(([, number]) => number < 1000) && queued > ready ? h("p", { class: "quiet" }, `${compact(queued - ready)} more wait behind an earlier request of their conversation.`) : null;
  return [table("Waiting for a slot, by route", [
    ["Route", ([name]) => name, { main: true }],
    ["Waiting", ([, number]) => [h("span", { class: "figure-in-row" }, number >= 1000 ? "1,000 or more" : count(number)), bar(number, most, `${count(number)} waiting`)]],
    ["", ([name]) => name.split(",").map((step) => step.split("=")[0]).filter((one) => providers[one]).map((one) => lamp(providers[one], troubles(one, providers[one]), providers[one].running >= providers[one].max_concurrency)), { right: true }],
  ], found.slice(0, 12), ([name]) => name), behind];
}

// -- providers and what runs ---------------------------------------------------------------------------------------

function short_providers(providers) {
  const found = Object.entries(providers).sort((a, b) => troubles(...b).length - troubles(...a).length);
  if (!found.length) return empty("No provider is configured.");
  return h("ul", { class: "providers" }, found.map(([name, one]) => {
    const wrong = troubles(name, one);
    return h("li", { "data-key": `provider ${name}` },
      h("p", lamp(one, wrong), " ", link("#/providers", name), h("span", { class: "quiet" }, ` ${one.running} of ${one.max_concurrency}`)),
      bar(one.running, one.max_concurrency, `${one.running} of ${one.max_concurrency} slots in use`, "run"),
      wrong[0]?.until ? h("p", { class: "quiet" }, "until ", until(wrong[0].until)) : null);
  }));
}

function running(rows, tails) {
  return h("ul", { class: "running" }, rows.map((row, place) =>
    h("li", { "data-key": `run ${row.request_id}` },
      h("div", { class: "row" },
        h("p", state(row.status), " ", requestLink(row.request_id), " ", h("span", { class: "quiet" }, row.model ?? "", row.agent_id ? ` for ${cut(row.agent_id, 40)}` : "", " in ", conversationLink(row.session_id))),
        h("p", { class: "right" }, since(row.started_at), " ", cancelRequest(row.request_id))),
      tails[place] ? h("p", { class: "tail" }, tails[place].slice(-240)) : null)));
}
