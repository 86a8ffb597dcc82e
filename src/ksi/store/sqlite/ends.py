"""Settle and cancel in SQL: each decides, then writes, in a transaction that its caller holds."""

from __future__ import annotations

import msgspec

from ksi.budgets.rules import Caps, Spent
from ksi.clock import Moment
from ksi.errors import FailureClass, InternalError
from ksi.request import Attempt, Outcome, State
from ksi.store.binding import SESSION_FORKS
from ksi.store.chains import Aftermath, Block, InjectionView
from ksi.store.questions import Question, is_asking, read_question, write_question
from ksi.store.rules import refusals
from ksi.store.rules.budgets import CODE
from ksi.store.sqlite.budgets import Budgets
from ksi.store.sqlite.chains import Chains
from ksi.store.sqlite.in_play import FreeConversation
from ksi.store.sqlite.injections import Injections
from ksi.store.sqlite.ledger import Ledger
from ksi.store.sqlite.rows import BESIDE, HOLDS, STATE_CODES, STATES, Row
from ksi.store.values import (
    Answered,
    Cancelled,
    CancelOutcome,
    Claimed,
    Finish,
    Fork,
    GiveBack,
    Retry,
    Settled,
    Verdict,
)

CANCELLED = Finish(state=State.CANCELLED, error=FailureClass.CANCELLED.value)


def blocked(block: Block) -> Finish:
    """The end of a request that its chain, or a budget, has no place for."""
    error = FailureClass.BUDGET_EXCEEDED if block.code == CODE else FailureClass.BLOCKED
    return Finish(state=State.BLOCKED, error=error.value, message=block.message)


class Ends:
    """How requests and their attempts end."""

    def __init__(self, ledger: Ledger, chains: Chains, injections: Injections, budgets: Budgets) -> None:
        self._ledger = ledger
        self._chains = chains
        self._injections = injections
        self._budgets = budgets

    def settle(
        self,
        claim: Claimed,
        attempt: Attempt,
        verdict: Verdict,
        now: Moment,
        aftermath: Aftermath | None,
        spent: Spent | None,
        caps: Caps,
    ) -> Settled:
        """See `Store.settle`."""
        run = self._ledger.in_play.run(claim.key)
        row = run if run is not None else self._ledger.one("to_settle", claim.key)
        if row is None or row[0] != claim.request_id:
            raise refusals.late_answer(claim.request_id)
        _, state_code, fence, token, conversation, _, _, _, earlier, *_ = row
        if STATES[state_code] is not State.RUNNING or fence != claim.fence or token != claim.token:
            self._keep_fenced(claim, attempt, conversation, earlier)
            return Settled(state=STATES[state_code], fenced=True)
        notices = self._budgets.settle(claim.key, spent, caps, final=isinstance(verdict, Finish))
        settled = self._settle(row, claim, attempt, verdict, now, aftermath, in_play=run is not None)
        return msgspec.structs.replace(settled, notices=tuple(notices)) if notices else settled

    def _settle(
        self,
        row: Row,
        claim: Claimed,
        attempt: Attempt,
        verdict: Verdict,
        now: Moment,
        aftermath: Aftermath | None,
        *,
        in_play: bool,
    ) -> Settled:
        """End an attempt that is its request's. `in_play`: it is known since it began."""
        _, _, _, _, conversation, hold, route, cancelling, earlier, head, chain, reminded = row
        if cancelling and not isinstance(verdict, Finish):
            verdict = CANCELLED
        if chain is not None:
            self._chains.attempt_ended(claim.key, attempt)
        elif aftermath is not None and isinstance(verdict, Finish):
            raise InternalError("an aftermath of a request in no chain", request_id=claim.request_id)
        completed = isinstance(verdict, Finish) and verdict.state is State.COMPLETED
        if reminded and not completed:
            self._chains.put_reminders_back(claim.key, conversation, reminded)
        if isinstance(verdict, Finish):
            used = self._chains.use_reminders(claim.key, now) if reminded and completed else ()
            settled = self._settle_finish(
                claim, attempt, verdict, conversation, earlier, head, now, None if chain is None else aftermath
            )
            if in_play and settled.passing is not None and settled.passing.next_request is None:
                # It was in play since it began, so nothing else happened to its conversation.
                head = settled.turn if completed else head
                self._ledger.in_play.is_free(FreeConversation(conversation, claim.conversation, head))
            if chain is None:
                return settled if not used else msgspec.structs.replace(settled, injections=used)
            carried = self._chains.leave(claim.key, claim.request_id, verdict, now, routed=aftermath is not None)
            return msgspec.structs.replace(settled, injections=(*carried, *used, *settled.injections))
        number = self._ledger.add_attempt(claim.key, conversation, claim.agent_id, attempt, earlier, None)
        self._ledger.load(claim.provider, -1)
        self._ledger.run("touch_conversation", conversation, now.wall)
        if isinstance(verdict, GiveBack):
            self._ledger.run("requeue", claim.key, number, 0)
            self._ledger.move(State.RUNNING, State.QUEUED)
            return Settled(state=State.QUEUED)
        return self._settle_retry(claim, verdict, number, conversation, bool(hold), route, now)

    def _keep_fenced(self, claim: Claimed, attempt: Attempt, conversation: int, earlier: int | None) -> None:
        """Keep a late answer on its attempt, once: a settle sent twice must not count its usage twice."""
        if earlier is not None and self._ledger.one("attempt_numbered", earlier, attempt.number) is not None:
            return
        fenced = msgspec.structs.replace(attempt, outcome=Outcome.FENCED)
        number = self._ledger.add_attempt(claim.key, conversation, claim.agent_id, fenced, earlier, None)
        self._ledger.run("note_attempt", claim.key, number)

    def _settle_finish(
        self,
        claim: Claimed,
        attempt: Attempt,
        verdict: Finish,
        conversation: int,
        earlier: int | None,
        head: int | None,
        now: Moment,
        aftermath: Aftermath | None,
    ) -> Settled:
        completed = verdict.state is State.COMPLETED
        fork = None
        if completed and attempt.provider_session is not None:
            attempt = self._bind(claim, attempt, conversation)
            fork = self._record_fork(claim, attempt, conversation, head, now)
        previous = head if completed else None
        number = self._ledger.add_attempt(claim.key, conversation, claim.agent_id, attempt, earlier, previous)
        self._ledger.load(claim.provider, -1)
        if completed:
            self._budgets.know_context(number, attempt)
            self._ledger.run("advance_conversation", conversation, number, now.wall)
        else:
            self._ledger.run("touch_conversation", conversation, now.wall)
        sent: tuple[InjectionView, ...] = ()
        if aftermath is not None:
            # Before the lock passes on: a follow-up may be the next in this line.
            sent = self._injections.write(claim.key, claim.request_id, aftermath, now)
        provider = attempt.provider if completed else None
        self._ledger.finish(claim.key, State.RUNNING, verdict, now, number, provider)
        return Settled(
            state=verdict.state,
            turn=number if completed else None,
            finished_at=now.wall,
            passing=self._ledger.release(conversation, claim.conversation, claim.request_id, now),
            fork=fork,
            injections=sent,
        )

    def _bind(self, claim: Claimed, attempt: Attempt, conversation: int) -> Attempt:
        """Make a provider session an alias of this conversation; one that is an alias of another loses that."""
        owner = self._ledger.one("conversation", attempt.provider_session)
        if owner is None:
            self._ledger.run("add_alias", attempt.provider_session, conversation)
        elif owner[0] != conversation:
            return msgspec.structs.replace(attempt, provider_session=None, last_message=None)
        return attempt

    def _record_fork(
        self, claim: Claimed, attempt: Attempt, conversation: int, head: int | None, now: Moment
    ) -> Fork | None:
        """Write a fork that the provider saw."""
        if attempt.fork is None or attempt.provider_session is None:
            return None
        before = self._ledger.scalar("session_at", head) if head is not None else None
        parent = before if attempt.fork in SESSION_FORKS and before is not None else claim.conversation
        fork = Fork(
            parent=parent,
            child=attempt.provider_session,
            request_id=claim.request_id,
            at=now.wall,
            kind=attempt.fork,
        )
        self._ledger.run(
            "add_fork", conversation, conversation, fork.parent, fork.child, fork.request_id, fork.at, fork.kind
        )
        return fork

    def _settle_retry(
        self, claim: Claimed, verdict: Retry, number: int, conversation: int, hold: bool, route: str, now: Moment
    ) -> Settled:
        state, question = State.PARKED if verdict.parked else State.RETRYING, verdict.question
        asks = is_asking(state, question)
        hold = hold or asks
        self._ledger.know_route(verdict.route or route)
        self._ledger.run(
            "delay", claim.key, STATE_CODES[state], HOLDS if hold else BESIDE, verdict.at, verdict.route or route,
            verdict.error, verdict.message, number, write_question(question), asks,
        )  # fmt: skip
        self._ledger.move(State.RUNNING, state)
        passing = None if hold else self._ledger.release(conversation, claim.conversation, claim.request_id, now)
        return Settled(state=state, passing=passing, due=verdict.at)

    # -- answers --------------------------------------------------------------------------------------------------

    def answer(
        self,
        request_id: str,
        asked: Question,
        answered: Question,
        now: Moment,
        end: Finish | None,
        due: int | None,
        expires: int | None,
    ) -> Answered:
        """See `Store.answer`."""
        row = self._ledger.one("asked", request_id)
        if row is None or row[2]:
            raise refusals.unknown_request(request_id)
        key, state_code, _, conversation, place, chain, question, asks = row
        state, name = STATES[state_code], self._ledger.conversation_name(conversation)
        if not asks or read_question(question) != asked:
            return Answered(taken=False, conversation=name, state=state)
        if end is None:
            self._ledger.run("note_answer", key, write_question(answered), due or now.wall, expires)
            return Answered(taken=True, conversation=name, state=state)
        self._ledger.run("note_answer", key, write_question(answered), None, expires)
        passing = self._ledger.end_waiting(key, request_id, conversation, state, place, end, now)
        injections = () if chain is None else self._chains.leave(key, request_id, end, now)
        return Answered(taken=True, conversation=name, state=end.state, passing=passing, injections=injections)

    # -- cancel ---------------------------------------------------------------------------------------------------

    def cancel(self, request_id: str, now: Moment, by: str | None) -> Cancelled:
        """See `Store.cancel`."""
        key, state_code, external, conversation, place, _, _, chain = self._ledger.named(request_id)
        state, outcome, passing = STATES[state_code], CancelOutcome.ALREADY_FINAL, None
        injections: tuple[InjectionView, ...] = ()
        name = self._ledger.conversation_name(conversation)
        if by is not None and not external and not state.final:
            self._ledger.run("mark_interrupted", key, by)
        if external:
            passing = self._ledger.drop_external(key, request_id, conversation, place, now)
            outcome, state = CancelOutcome.CANCELLED, State.CANCELLED
        elif state is State.RUNNING:
            self._ledger.run("mark_cancelling", key)
            outcome = CancelOutcome.STOPPING
        elif not state.final:
            passing = self._ledger.end_waiting(key, request_id, conversation, state, place, CANCELLED, now)
            outcome, state = CancelOutcome.CANCELLED, State.CANCELLED
            if chain is not None:
                injections = self._chains.leave(key, request_id, CANCELLED, now)
        return Cancelled(
            outcome=outcome,
            request_id=request_id,
            conversation=name,
            state=state,
            passing=passing,
            injections=injections,
        )
