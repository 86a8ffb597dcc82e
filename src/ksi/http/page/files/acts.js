// The actions of the page. Each asks for confirmation if it costs something, sends its event, and reports the result.

import { ask, Away } from "./api.js";
import { button, confirm, say } from "./ui.js";
import { count, cut } from "./words.js";

const BY = "the page";
const NEEDS_FIRST = { danger: true };
const WHY = [{ name: "why", label: "Reason, for others" }];

let refresh = () => {};
export const afterwards = (call) => { refresh = call; };

const name = (text) => `“${cut(text, 80)}”`;

/** A click handler: asks for confirmation if `sure` is given, acts, and reports. Its button is disabled meanwhile. */
function doing(sure, act) {
  return async (event) => {
    const pressed = event?.currentTarget;
    let given = {};
    if (sure) {
      given = await confirm(...sure);
      if (given === null) return;
    }
    if (pressed) pressed.disabled = true;
    try {
      say(await act(given));
    } catch (error) {
      say(error instanceof Away ? "The daemon does not answer. It is not known whether the action was carried out." : `Refused: ${error.message}`, true);
    } finally {
      if (pressed) pressed.disabled = false;
      refresh();
    }
  };
}

const act = (text, sure, call, given) => button(text, doing(sure, call), given);

const danger = (text, label) => ({ class: "quiet danger", "aria-label": label ?? text });
const quiet = (label) => ({ class: "quiet", "aria-label": label });

// -- requests ------------------------------------------------------------------------------------------------------

export const cancelRequest = (id) =>
  act("Cancel", [`Cancel ${name(id)}?`, "It ends without an answer. The provider may still bill what it did so far.", "Cancel request", NEEDS_FIRST],
    async () => {
      const reply = await ask("completion:cancel", { request_id: id });
      return reply.status === "cancelled" ? `${cut(id, 40)} is cancelled.` : `${cut(id, 40)} had already ended: ${reply.state}.`;
    }, danger("Cancel", `Cancel ${id}`));

export const requeue = (id) =>
  act("Requeue", [`Requeue ${name(id)}?`, "A new request with the same content enters the queue. It costs as much as any request.", "Requeue"],
    async () => `Requeued as ${(await ask("completion:requeue", { request_id: id })).request_id}.`, quiet(`Requeue ${id}`));

// -- locks ---------------------------------------------------------------------------------------------------------

export const releaseLock = (holder, fence, conversation) =>
  act("Release lock", [`Release the lock of ${name(conversation)}?`, `Its external holder ${cut(holder, 80)} may still be working. The next in the queue gets the lock at once.`, "Release lock", NEEDS_FIRST],
    async () => {
      const reply = await ask("conversation:release_lock", { request_id: holder, fence });
      return reply.next_request ? `Released; ${cut(reply.next_request, 40)} is next.` : "Released; the queue was empty.";
    }, danger("Release lock", `Release the lock of ${holder}`));

export const withdraw = (id) =>
  act("Remove", [`Remove ${name(id)} from the queue?`, "It stops waiting for the lock.", "Remove", NEEDS_FIRST],
    async () => {
      await ask("completion:cancel", { request_id: id });
      return `${cut(id, 40)} no longer waits.`;
    }, danger("Remove", `Remove ${id} from the queue`));

// -- chains --------------------------------------------------------------------------------------------------------

export const cancelChain = (id, unfinished) =>
  act("Cancel chain", [`Cancel the chain ${name(id)}?`, `Its ${count(unfinished)} unfinished requests are cancelled, and it accepts no new ones.`, "Cancel chain", NEEDS_FIRST],
    async () => `The chain is closed; cancelled requests: ${count((await ask("completion:cancel", { chain_id: id })).cancelled ?? 0)}.`, danger("Cancel chain"));

export const resetChain = (id) =>
  act("Reset chain", [`Reset the chain ${name(id)}?`, "Its token budget and its time window start over, and the reason why it stopped is cleared. It can spend its whole budget again.", "Reset chain"],
    async () => {
      await ask("circuit_breaker:reset", { chain_id: id });
      return "The chain is open again.";
    }, { class: "primary" });

export const retryDelivery = (id) =>
  act("Retry", ["Retry this delivery?", "It is sent as a new delivery, and its conversation answers it. That costs as much as any request.", "Retry delivery"],
    async () => `Retried as ${(await ask("injection:retry", { injection_id: id })).injection.injection_id}.`, quiet(`Retry the delivery ${id}`));

// -- providers -----------------------------------------------------------------------------------------------------

export const resetProvider = (provider) =>
  act("Reset", null, async () => {
    await ask("provider:reset", { provider });
    return `${provider}: its failures and limits are cleared; it is asked at once.`;
  }, { class: "primary", "aria-label": `Reset ${provider}` });

export const enableProvider = (provider) =>
  act("Enable", null, async () => {
    await ask("provider:enable", { provider, by: BY });
    return `${provider} is enabled.`;
  }, { class: "primary", "aria-label": `Enable ${provider}` });

export const disableProvider = (provider) =>
  act("Disable", [`Disable the provider ${name(provider)}?`, "It gets no new calls, also after a restart. Running calls continue.", "Disable provider", { danger: true, fields: WHY }],
    async ({ why }) => {
      await ask("provider:disable", { provider, by: BY, why });
      return `${provider} is disabled.`;
    }, quiet(`Disable ${provider}`));

// -- pauses --------------------------------------------------------------------------------------------------------

const KEYS = { provider: "provider", agent: "agent_id", session: "session_id", priority: "priority" };
const scoped = (scope, named) => (scope === "all" ? {} : { [KEYS[scope]]: named });
const scopeWords = (scope, named) => (scope === "all" ? "everything" : `${scope === "session" ? "conversation" : scope} ${cut(named, 60)}`);

export const resume = ({ scope, name: named = "" }) =>
  act("Resume", null, async () => {
    await ask("queue:resume", scoped(scope, named));
    return `Resumed: ${scopeWords(scope, named)}.`;
  }, { class: "primary", "aria-label": `Resume ${scopeWords(scope, named)}` });

const LENGTHS = [["", "Until resumed"], ["900", "15 minutes"], ["3600", "1 hour"], ["14400", "4 hours"], ["86400", "1 day"]];

export const pause = (scope, named = "", text = "Pause") =>
  act(text, [`Pause ${scopeWords(scope, named)}?`, "Running requests continue, waiting ones keep their place, and new ones are accepted and wait.", "Pause", {
    fields: [{ name: "seconds", label: "For how long", options: LENGTHS, value: "" }, ...WHY],
  }], async ({ seconds, why }) => {
    await ask("queue:pause", { ...scoped(scope, named), by: BY, why, ...(seconds ? { seconds: Number(seconds) } : {}) });
    return `Paused: ${scopeWords(scope, named)}.`;
  }, quiet(`Pause ${scopeWords(scope, named)}`));

export const drain = () =>
  act("Drain", ["Drain this daemon?", "It accepts no new work and starts nothing. Running requests finish; waiting ones are kept.", "Drain", NEEDS_FIRST],
    async () => {
      const reply = await ask("queue:drain", { timeout: 0.2 });
      return reply.running ? `The daemon drains; still running: ${count(reply.running)}.` : "The daemon drains; nothing runs.";
    }, danger("Drain"));

export const undrain = () =>
  act("End drain", null, async () => {
    await ask("queue:undrain");
    return "The daemon accepts work again.";
  }, { class: "primary" });

export const stop = () =>
  act("Stop daemon", ["Stop the daemon?", "Running requests get their grace period and then go back to the queue; nothing is lost. This page cannot start the daemon again; `ksi start` does.", "Stop daemon", NEEDS_FIRST],
    async () => {
      const reply = await ask("system:shutdown");
      return `The daemon stops; ${count(reply.running)} running requests get ${reply.grace_seconds} s.`;
    }, danger("Stop daemon"));

export const revokeToken = (token) =>
  act("Revoke", [`Revoke the token ${name(token)}?`, "It becomes invalid at once, and every connection that uses it is closed.", "Revoke token", NEEDS_FIRST],
    async () => {
      await ask("token:revoke", { name: token });
      return `The token ${token} is revoked.`;
    }, danger("Revoke", `Revoke the token ${token}`));

// -- decisions -----------------------------------------------------------------------------------------------------

export const approve = (id) =>
  act("Approve", [`Approve ${name(id)}?`, "It continues, at the cost that the question is about.", "Approve", { fields: WHY }],
    async ({ why }) => `Approved ${cut(id, 40)}; it is ${(await ask("completion:approve", { request_id: id, by: BY, why })).status}.`, { class: "primary", "aria-label": `Approve ${id}` });

export const release = (id) =>
  act("Release", [`Release ${name(id)}?`, "It enters the queue and runs in its turn.", "Release"],
    async () => `Released ${cut(id, 40)}; it is ${(await ask("completion:release", { request_id: id, by: BY })).status}.`, { class: "primary", "aria-label": `Release ${id}` });

export const reject = (id) =>
  act("Reject", [`Reject ${name(id)}?`, "It ends without an answer, and its agent is told the reason.", "Reject", { danger: true, fields: WHY }],
    async ({ why }) => `Rejected ${cut(id, 40)}; it is ${(await ask("completion:reject", { request_id: id, by: BY, why })).status}.`, danger("Reject", `Reject ${id}`));

// -- budgets -------------------------------------------------------------------------------------------------------

export const raiseBudget = (budget, unit, scope) =>
  act("Raise", [`Raise the budget ${name(budget)}${scope ? ` for ${cut(scope, 60)}` : ""}?`, "Requests that wait for it continue.", "Raise budget", {
    fields: [{ name: "amount", label: `How much more, in ${unit === "usd" ? "US dollars" : unit}`, kind: "number", min: 0, step: "any", required: true }, { name: "seconds", label: "For how long", options: [["", "Until its period ends"], ...LENGTHS.slice(1)], value: "" }, ...WHY],
  }], async ({ amount, seconds, why }) => {
    await ask("budget:raise", { budget, amount: Number(amount), by: BY, why, ...(scope ? { scope } : {}), ...(seconds ? { seconds: Number(seconds) } : {}) });
    return `The budget ${budget} is raised.`;
  }, quiet(`Raise the budget ${budget}${scope ? ` for ${scope}` : ""}`));

export const dropBudget = (budget) =>
  act("Drop", [`Drop the budget ${name(budget)}?`, "It no longer limits anything.", "Drop budget", NEEDS_FIRST],
    async () => {
      await ask("budget:drop", { budget });
      return `The budget ${budget} is dropped.`;
    }, danger("Drop", `Drop the budget ${budget}`));

// -- conversations -------------------------------------------------------------------------------------------------

export const renameConversation = (session_id) =>
  act("Rename", [`Rename ${name(session_id)}?`, "The old name stays valid.", "Rename", { fields: [{ name: "name", label: "New name", required: true }] }],
    async ({ name: given }) => {
      const reply = await ask("conversation:rename", { session_id, name: given });
      location.hash = `#/conversation/${encodeURIComponent(reply.session_id)}`;
      return `Renamed to ${cut(reply.session_id, 60)}.`;
    }, quiet(`Rename ${session_id}`));

export const deleteConversation = (session_id) =>
  act("Delete", [`Delete ${name(session_id)} permanently?`, "Its prompts, answers and response files are deleted and cannot be restored. Its usage stays in the account.", "Delete permanently", NEEDS_FIRST],
    async () => {
      const reply = await ask("conversation:delete", { session_id });
      location.hash = "#/conversations";
      const remains = reply.remains ?? [];
      return `Deleted: ${count(reply.turns ?? 0)} turns.${remains.length ? ` Not reached: ${remains.map((one) => `${one.what} (${one.where}): ${one.how}`).join("; ")}` : ""}`;
    }, danger("Delete", `Delete ${session_id}`));
