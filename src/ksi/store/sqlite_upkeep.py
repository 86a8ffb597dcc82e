"""What time and restarts ask for, in SQL: due and late requests, lapsed locks, recovery, pruning."""

from __future__ import annotations

from ksi.clock import Moment
from ksi.errors import FailureClass
from ksi.request import Attempt, Outcome, State, decode_body
from ksi.store.sqlite_chains import Chains
from ksi.store.sqlite_ends import CANCELLED
from ksi.store.sqlite_ledger import Ledger
from ksi.store.sqlite_rows import HOLDS, STATES, Row
from ksi.store.values import Ended, Expiry, Finish, Lapsed, Pruned, Recovery

LOOKS = 5_000
"""Conversations that one step of pruning looks at again."""

_EXPIRED = Finish(state=State.EXPIRED)


class Upkeep:
    """The verbs that no client asks for."""

    def __init__(self, ledger: Ledger, chains: Chains) -> None:
        self._ledger = ledger
        self._chains = chains

    # -- time -----------------------------------------------------------------------------------------------------

    def expire(self, now: Moment, limit: int) -> Expiry:
        """See `Store.expire`. Waiters that gave up go first, so that none of them is granted a lock on the way."""
        lapsed = [self._lapse(row, now) for row in self._ledger.all("lapsed_waiters", now.mono, limit)]
        left = limit - len(lapsed)
        ended = [self._expire_request(row, now) for row in self._ledger.all("overdue_requests", now.wall, left)]
        left -= len(ended)
        due = self._ledger.all("due_requests", now.wall, left)
        for row in due:
            self._wake(row, now)
        left -= len(due)
        lapsed += [self._lapse(row, now) for row in self._ledger.all("lapsed_locks", now.mono, left)]
        walls = [t for t in (self._ledger.scalar("next_due"), self._ledger.scalar("next_expiry")) if t is not None]
        next_wall, next_mono = min(walls, default=None), self._ledger.scalar("next_deadline")
        more = (next_wall is not None and next_wall <= now.wall) or (next_mono is not None and next_mono <= now.mono)
        return Expiry(
            woken=len(due),
            ended=tuple(ended),
            lapsed=tuple(lapsed),
            next_wall=next_wall,
            next_mono=next_mono,
            more=more,
        )

    def _expire_request(self, row: Row, now: Moment) -> Ended:
        key, request_id, conversation, state, place, chain = row
        passing = self._ledger.end_waiting(key, request_id, conversation, STATES[state], place, _EXPIRED, now)
        injections = () if chain is None else self._chains.leave(key, request_id, _EXPIRED, now)
        return Ended(
            request_id=request_id,
            conversation=self._ledger.conversation_name(conversation),
            state=State.EXPIRED,
            passing=passing,
            injections=injections,
        )

    def _wake(self, row: Row, now: Moment) -> None:
        key, conversation, state, place = row
        self._ledger.move(STATES[state], State.QUEUED)
        if place == HOLDS:
            self._ledger.run("wake_kept", key)
        else:
            self._ledger.run("wake_into_line", key)
            self._ledger.refresh_line(conversation, now)

    def _lapse(self, row: Row, now: Moment) -> Lapsed:
        key, request_id, conversation, place = row
        return Lapsed(
            request_id=request_id,
            conversation=self._ledger.conversation_name(conversation),
            held=place == HOLDS,
            passing=self._ledger.drop_external(key, request_id, conversation, place, now),
        )

    def unpark(self, route: str, now: Moment, limit: int) -> int:
        """See `Store.unpark`."""
        return len(self._ledger.all("unpark", route, now.wall, limit))

    # -- recovery -------------------------------------------------------------------------------------------------

    def recover(self, now: Moment) -> Recovery:
        """End or requeue what a dead daemon left running; see `Store.open`."""
        for key, request_id, conversation, place, term in self._ledger.all("external_locks"):
            if place == HOLDS:
                self._ledger.renew_grant(key, now)
            elif term is not None:
                self._ledger.run("renew_waiter", key, now.mono + term)
            else:
                self._ledger.drop_external(key, request_id, conversation, place, now)
        requeued: list[str] = []
        ended: list[Ended] = []
        for row in self._ledger.all("left_running"):
            outcome = self._recover_run(row, now)
            if isinstance(outcome, Ended):
                ended.append(outcome)
            else:
                requeued.append(outcome)
        return Recovery(requeued=tuple(requeued), ended=tuple(ended))

    def _recover_run(self, row: Row, now: Moment) -> str | Ended:
        (
            key, request_id, conversation, provider, number, interruptions, started_at, cancelling, earlier, agent,
            model, body, chain, reminded,
        ) = row  # fmt: skip
        attempt = Attempt(
            number=number,
            provider=provider,
            outcome=Outcome.INTERRUPTED,
            started_at=started_at,
            finished_at=now.wall,
            asked=model,
            mcp=decode_body(body).mcp,
            error=FailureClass.DAEMON_RESTART.value,
        )
        last = self._ledger.add_attempt(key, conversation, agent, attempt, earlier, None)
        self._ledger.run("requeue", key, last, 1)
        if chain is not None:
            self._chains.attempt_ended(key, attempt)
        if reminded:
            self._chains.put_reminders_back(key, conversation, reminded)
        rules = self._ledger.rules
        if cancelling:
            verdict = CANCELLED
        elif rules.fail_interrupted or interruptions + 1 >= rules.max_interruptions:
            verdict = Finish(state=State.FAILED, error=FailureClass.DAEMON_RESTART.value)
        else:
            self._ledger.move(State.RUNNING, State.QUEUED)
            return str(request_id)
        self._ledger.finish(key, State.RUNNING, verdict, now, last)
        self._ledger.run("touch_conversation", conversation, now.wall)
        name = self._ledger.conversation_name(conversation)
        return Ended(
            request_id=request_id,
            conversation=name,
            state=verdict.state,
            error=verdict.error,
            passing=self._ledger.release(conversation, name, request_id, now),
            injections=() if chain is None else self._chains.leave(key, request_id, verdict, now),
        )

    # -- pruning --------------------------------------------------------------------------------------------------

    def prune(self, now: Moment, limit: int) -> Pruned:
        """See `Store.prune`."""
        rules, watermark = self._ledger.rules, self._ledger.totals.get("log_watermark", 0)
        requests = self._ledger.all("prunable_requests", now.wall - rules.keep_finished, watermark, limit)
        for key, state, chain in requests:
            self._ledger.run("drop_request", key)
            if chain is not None:
                self._chains.forget(key, chain)
            if STATES[state] is not State.COMPLETED:
                self._ledger.run("drop_body", key)
        deliveries = self._ledger.all("drop_injections", now.wall - rules.keep_finished, limit)
        left = limit - len(requests)
        oldest = now.wall - rules.keep_sessions
        looked = self._ledger.all("look_at_conversations", oldest, LOOKS)
        conversations = self._ledger.all("prunable_conversations", oldest, watermark, left)
        gone = sum(self._drop_conversation(identity, limit) for (identity,) in conversations)
        spare = self._ledger.all("spare_attempts", oldest, limit)
        for (identity,) in spare:
            self._ledger.run("drop_attempt", identity)
        return Pruned(
            requests=len(requests),
            conversations=gone,
            more=len(requests) + len(conversations) >= limit
            or len(spare) >= limit
            or len(deliveries) >= limit
            or len(looked) >= LOOKS,
        )

    def _drop_conversation(self, identity: int, limit: int) -> bool:
        """Take a conversation away with its own turns, at most `limit` of them in one step; whether it is gone."""
        turns = self._ledger.all("turns_to_drop", identity, limit)
        for attempt, request, _ in turns:
            self._ledger.run("drop_attempt", attempt)
            self._ledger.run("drop_body", request)
        if len(turns) >= limit and turns[-1][2] is not None:
            self._ledger.run("set_head", identity, turns[-1][2])
            return False
        for statement in ("drop_agents", "drop_aliases", "drop_forks", "drop_conversation"):
            self._ledger.run(statement, identity)
        self._ledger.count("conversations", -1)
        self._ledger.forget_conversation(identity)
        return True
