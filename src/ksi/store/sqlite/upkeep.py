"""Due work and recovery in SQL: due and late requests, expired locks, recovery, pruning."""

from __future__ import annotations

from ksi.clock import Moment
from ksi.errors import FailureClass
from ksi.request import Attempt, Outcome, State, decode_body
from ksi.store.rules.budgets import LONGEST_WINDOW
from ksi.store.sqlite.budgets import Budgets
from ksi.store.sqlite.chains import Chains
from ksi.store.sqlite.ends import CANCELLED
from ksi.store.sqlite.ledger import Ledger
from ksi.store.sqlite.rows import HOLDS, IN_LINE, STATE_CODES, STATES, Row, read_cursor, write_cursor
from ksi.store.values import Ended, Expiry, Finish, Lapsed, Paused, Pruned, Recovery

LOOKS = 200
"""Conversations that one step of pruning looks at again: a few milliseconds."""

LONG = 100_000
"""Bytes whose pages take as long to free as another row."""

_BEGINNING = ("", 0, 0)

_EXPIRED = Finish(state=State.EXPIRED)


class Upkeep:
    """The verbs that no client asks for."""

    def __init__(self, ledger: Ledger, chains: Chains, budgets: Budgets) -> None:
        self._ledger = ledger
        self._chains = chains
        self._budgets = budgets

    # -- time -----------------------------------------------------------------------------------------------------

    def expire(self, now: Moment, limit: int) -> Expiry:
        """See `Store.expire`. Waiters that gave up go first, so that none of them is granted a lock on the way."""
        lapsed = [self._lapse(row, now) for row in self._ledger.all("lapsed_waiters", now.mono, limit)]
        left = limit - len(lapsed)
        ended = [self._expire_request(row, now) for row in self._ledger.all("overdue_requests", now.wall, left)]
        left -= len(ended)
        woken = 0
        for key, request_id, conversation, state, place, chain, expires in self._ledger.all(
            "due_requests", now.wall, left
        ):
            if not left:
                break
            self._wake(key, conversation, STATES[state], place, now)
            woken, left = woken + 1, left - 1
            # A yes that came in its last moment: it is due, and late at once.
            if left and expires is not None and expires <= now.wall:
                in_line = place if place == HOLDS else IN_LINE
                late = (key, request_id, conversation, STATE_CODES[State.QUEUED], in_line, chain)
                ended.append(self._expire_request(late, now))
                left -= 1
        lapsed += [self._lapse(row, now) for row in self._ledger.all("lapsed_locks", now.mono, left)]
        again = self._budgets.bring_back_ended(now.wall, limit)
        times = (self._ledger.scalar("next_due"), self._ledger.scalar("next_expiry"), self._budgets.next_end())
        walls = [t for t in times if t is not None]
        next_wall, next_mono = min(walls, default=None), self._ledger.scalar("next_deadline")
        more = (next_wall is not None and next_wall <= now.wall) or (next_mono is not None and next_mono <= now.mono)
        return Expiry(
            woken=woken + again,
            ended=tuple(ended),
            lapsed=tuple(lapsed),
            next_wall=next_wall,
            next_mono=next_mono,
            more=more,
        )

    def bring_back(self, paused: Paused, after: str | None, limit: int) -> str | None:
        """See `Store.bring_back`."""
        rows = self._ledger.all("set_aside", *read_cursor("aside", after, _BEGINNING), limit)
        for _, _, key, *named in rows:
            if not paused.stops(*named):
                self._ledger.run("set_ready", key, 1)
        return write_cursor("aside", *rows[-1][:3]) if len(rows) == limit else None

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

    def _wake(self, key: int, conversation: int, state: State, place: int, now: Moment) -> None:
        self._ledger.move(state, State.QUEUED)
        if place == HOLDS:
            self._ledger.run("wake_kept", key)
        else:
            self._ledger.run("wake_into_line", key)
            flow = self._ledger.one("flow", key) if self._ledger.rules.fair else None
            if flow is not None and flow[1] is not None:
                self._ledger.take_turn(key, flow[0], flow[1], waits=True)
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
        """End or requeue the runs of a dead daemon; see `Store.open`."""
        if self._ledger.rules.fair:
            self._ledger.turns.restore(self._ledger.all("waiting_flows"))
        else:
            self._ledger.run("forget_turns")
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
        self._budgets.interrupted(key)
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
        """See `Store.prune`. The work of one step is bounded: turns of conversations and long texts count, too."""
        rules, watermark = self._ledger.rules, self._ledger.totals.get("log_watermark", 0)
        left, gone_requests, gone_conversations = limit, 0, 0
        for key, state, chain in self._ledger.all(
            "prunable_requests", now.wall - rules.keep_finished, watermark, limit
        ):
            if left <= 0:
                break
            self._ledger.run("drop_request", key)
            gone_requests += 1
            left -= 1
            if chain is not None:
                self._chains.forget(key, chain)
            if STATES[state] is not State.COMPLETED:
                left -= self._drop("prune_body", key)
        deliveries = self._ledger.all("drop_injections", now.wall - rules.keep_finished, limit)
        self._ledger.all("drop_budget_uses", now.wall - max(rules.keep_sessions, LONGEST_WINDOW), limit)
        oldest = now.wall - rules.keep_sessions
        looked = self._ledger.all("look_at_conversations", oldest, LOOKS)
        for (identity,) in self._ledger.all("prunable_conversations", oldest, watermark, max(0, left)):
            if left <= 0:
                break
            left, gone = self._drop_conversation(identity, left)
            gone_conversations += gone
        spare = self._ledger.all("spare_attempts", oldest, max(0, left))
        for (identity,) in spare:
            if left <= 0:
                break
            left -= 1 + self._drop("prune_attempt", identity)
        return Pruned(
            requests=gone_requests,
            conversations=gone_conversations,
            more=left <= 0 or len(deliveries) >= limit or len(looked) >= LOOKS,
        )

    def _drop(self, statement: str, key: int) -> int:
        """Delete a row; returns the weight of its length in addition to the row itself."""
        length: int | None = self._ledger.scalar(statement, key)
        return (length or 0) // LONG

    def _drop_conversation(self, identity: int, left: int) -> tuple[int, bool]:
        """Delete a conversation with its own turns, as many as fit in this step; returns the rest of the step, and True
        if it is gone."""
        for attempt, request, previous in self._ledger.all("turns_to_drop", identity, left):
            left -= 1 + self._drop("prune_attempt", attempt) + self._drop("prune_body", request)
            if left <= 0 and previous is not None:
                self._ledger.run("set_head", identity, previous)
                return left, False
        for statement in ("drop_agents", "drop_aliases", "drop_forks", "drop_conversation"):
            self._ledger.run(statement, identity)
        self._ledger.count("conversations", -1)
        self._ledger.forget_conversation(identity)
        return left - 1, True
