"""Notices an agent that goes round in circles although every one of its requests succeeds.

A loop is many requests of which each was sent after an earlier one was answered, with no pause between them: the same
thing asked in ever new conversations, or one conversation that never comes to its end. Work that was sent at once is
none, however much it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from typing import Literal

import msgspec
import structlog

from ksi.clock import MICROSECONDS, Moment, microseconds
from ksi.completion.usage.prices import Prices
from ksi.config.schema import Loops
from ksi.content.blocks import text_of
from ksi.events.bus import EventBus
from ksi.events.completions import LoopPush
from ksi.injection.fingerprint import SAMPLE, said_digest
from ksi.request import BATCH, Attempt, RequestBody
from ksi.store.values import Claimed

Also = Callable[[str, str, int, float | None, Callable[[], str]], None]

ROUNDS = 10
"""Minimum number of a loop's requests that were sent one after the other's answer: concurrent requests have few rounds,
even if a provider is so fast that it answers some before the last is read."""
SEEN = 16_384
"""Agents, conversations and texts that are remembered; the least recent are forgotten first."""
TOLD_FOR = microseconds(600.0)
"""`system:health` reports a loop for this time after its last answer, in microseconds."""
UNNAMED = ""
"""Stands for all requests that name no agent."""


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """A request that completed. Times in microseconds of wall time."""

    request_id: str
    agent_id: str
    conversation: str
    goes_on: bool
    """True if its conversation had an answer before it."""
    sent_at: int
    ended_at: int
    tokens: int | None
    cost_usd: float | None


class Loop(msgspec.Struct, frozen=True, kw_only=True):
    """A loop as it stands. Times in microseconds of wall time."""

    kind: Literal["repeats", "turns"]
    agent_id: str
    session_id: str | None
    """The one conversation that it is in; None for one that begins conversation after conversation."""
    requests: int
    began_at: int
    last_at: int
    tokens: int
    cost_usd: float | None
    """None if a request of it has no known price."""
    request_id: str
    """The latest request."""

    def said(self) -> str:
        """One sentence, with advice."""
        who = f"agent {self.agent_id!r}" if self.agent_id != UNNAMED else "an unnamed agent"
        what = "asked the same" if self.kind == "repeats" else "sent a turn"
        where = f"in conversation {self.session_id!r}" if self.session_id is not None else "in new conversations"
        minutes = max((self.last_at - self.began_at) // (60 * MICROSECONDS), 1)
        cost = "" if not self.cost_usd else f" and ${self.cost_usd:.2f}"
        return (
            f"{who} {what} {self.requests} times {where} within {minutes} min, each time after an answer: "
            f"{self.tokens:,} tokens{cost}; `ksi show {self.request_id}` shows the latest request"
        )


class _Streak(msgspec.Struct):
    """Requests without a pause between them."""

    sent_at: int
    ended_at: int
    first_end: int
    """The first end of the present round: a request sent after it begins the next one."""
    count: int = 0
    rounds: int = 1
    tokens: int = 0
    cost: float | None = 0.0
    tell_at: int = 0
    """The count at which it is reported next."""
    told: Loop | None = None

    def add(self, answered: Answered) -> None:
        if answered.sent_at >= self.first_end and self.count:
            self.rounds += 1
            self.first_end = answered.ended_at
        self.count += 1
        self.ended_at = max(self.ended_at, answered.ended_at)
        self.tokens += answered.tokens or 0
        if self.cost is not None:
            self.cost = None if answered.cost_usd is None else self.cost + answered.cost_usd


_Key = tuple[str, str, str]
"""Kind, whose it is, and a text's digest or nothing."""


class LoopWatch:
    """Judges answered requests as they come. It reads no clock: every time is the requests' own."""

    def __init__(self, rules: Loops) -> None:
        self._rules = rules
        self._pause = microseconds(rules.pause)
        self._streaks: OrderedDict[_Key, _Streak] = OrderedDict()

    def answered(self, answered: Answered, text: Callable[[], str]) -> list[Loop]:
        """Take a completed request; returns the loops to report now: at their bound, and at each doubling.

        `text` returns its prompt, if that is compared.
        """
        if answered.goes_on:
            turns = self._add(("turns", answered.conversation, ""), answered)
            return [
                *self._judge(turns, answered, "turns", self._rules.turns),
                *self._repeats(turns, answered.conversation, answered, text),
            ]
        begun = self._add(("begun", answered.agent_id, ""), answered)
        return self._repeats(begun, answered.agent_id, answered, text)

    def _repeats(self, around: _Streak, whose: str, answered: Answered, text: Callable[[], str]) -> list[Loop]:
        """Texts are only compared of who asks much: they cost time, and a repeat needs many."""
        if not self._rules.repeats or around.count < self._rules.repeats // 2:
            return []
        kind = "said" if answered.goes_on else "asked"
        same = self._add((kind, whose, digest(text())), answered)
        return self._judge(same, answered, "repeats", self._rules.repeats)

    def _add(self, key: _Key, answered: Answered) -> _Streak:
        streak = self._streaks.get(key)
        if streak is None or answered.sent_at > streak.ended_at + self._pause:
            streak = self._streaks[key] = _Streak(answered.sent_at, answered.ended_at, answered.ended_at)
            if len(self._streaks) > SEEN:
                self._streaks.popitem(last=False)
        self._streaks.move_to_end(key)
        streak.add(answered)
        return streak

    def _judge(self, streak: _Streak, answered: Answered, kind: Literal["repeats", "turns"], bound: int) -> list[Loop]:
        long = streak.rounds if kind == "turns" else streak.count
        if not bound or streak.rounds < ROUNDS or long < max(bound, streak.tell_at):
            return []
        streak.tell_at = 2 * long
        streak.told = Loop(
            kind=kind,
            agent_id=answered.agent_id,
            session_id=answered.conversation if answered.goes_on else None,
            requests=streak.count,
            began_at=streak.sent_at,
            last_at=streak.ended_at,
            tokens=streak.tokens,
            cost_usd=streak.cost,
            request_id=answered.request_id,
        )
        return [streak.told]

    def standing(self, wall: int) -> list[Loop]:
        """The present state of loops that were reported and have not been over for long."""
        return [
            msgspec.structs.replace(
                streak.told, requests=streak.count, last_at=streak.ended_at, tokens=streak.tokens, cost_usd=streak.cost
            )
            for streak in self._streaks.values()
            if streak.told is not None and streak.ended_at + TOLD_FOR >= wall
        ]


def digest(text: str) -> str:
    """Return a key that is the same for texts that differ only in changing values, such as times."""
    if len(text) <= SAMPLE:
        return said_digest(text).hex()
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


class LoopTeller:
    """Feeds the watch with completed requests, and reports loops: an event, a warning in the log, a problem in
    health."""

    def __init__(self, rules: Loops, prices: Prices, bus: EventBus, also: Also | None = None) -> None:
        """`also` is told of each completed request: its agent, its id, its end, its cost, and what gives its text."""
        self._also = also
        self._watch = LoopWatch(rules)
        self._prices = prices
        self._bus = bus
        self._log = structlog.get_logger("ksi.loops")

    def completed(self, claim: Claimed, body: RequestBody, attempt: Attempt) -> None:
        """A request completed. A batch is a file, which has an end, so that it is no loop."""
        if claim.request_id.startswith(BATCH):
            return
        usage = attempt.usage
        answered = Answered(
            request_id=claim.request_id,
            agent_id=claim.agent_id or UNNAMED,
            conversation=claim.conversation,
            goes_on=claim.head is not None,
            sent_at=claim.enqueued_at,
            ended_at=attempt.finished_at,
            tokens=None if usage is None else usage.input_tokens + usage.output_tokens,
            cost_usd=self._prices.cost(attempt),
        )
        text = partial(asked_text, body)
        if self._also is not None:
            self._also(answered.agent_id, answered.request_id, answered.ended_at, answered.cost_usd, text)
        for loop in self._watch.answered(answered, text):
            push = loop_push(loop)
            self._log.warning("an agent's requests go round in circles", **msgspec.to_builtins(push))
            self._bus.publish("completion:loop", push)

    def problems(self, now: Moment) -> list[str]:
        """The loops that continue, each in one sentence."""
        return [loop.said() for loop in self._watch.standing(now.wall)]


def asked_text(body: RequestBody) -> str:
    """All that a request says."""
    asked = "\n".join(text_of(message.content) for message in body.dialogue())
    return asked if body.system is None else f"{text_of(body.system)}\n{asked}"


def loop_push(loop: Loop) -> LoopPush:
    """A loop as it goes over the wire."""
    return LoopPush(
        kind=loop.kind,
        agent_id=loop.agent_id or None,
        session_id=loop.session_id,
        requests=loop.requests,
        since=loop.began_at / MICROSECONDS,
        last_at=loop.last_at / MICROSECONDS,
        total_tokens=loop.tokens,
        cost_usd=loop.cost_usd,
        request_id=loop.request_id,
        message=loop.said(),
    )
