"""What budgets should have counted, written to be read: every call is kept, and every sum is made anew.

It shares no code with the rules: whom a budget binds, what a call may use, and what it counts are said here again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from ksi.budgets.rules import Amount, Ask, Cap, Caps, Unit
from ksi.request import Attempt, Outcome
from ksi.store.values import Claimed

Place = tuple[str, str, int]
"""A budget's name, a subject, and the beginning of a window."""

INPUT_RATE, OUTPUT_RATE = 10, 30
"""Nanodollars for a token at the provider `one`; nobody knows a price at `two`."""

UNASKED = "unasked"
"""The error of an attempt whose provider was never asked."""


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """A request, as it was sent."""

    name: str
    conversation: str
    agent: str | None
    provider: str
    input: int
    output: int
    fixed: bool

    @property
    def ask(self) -> Ask:
        """What it may use."""
        priced = self.provider == "one"
        given, made = (float(INPUT_RATE), float(OUTPUT_RATE)) if priced else (None, 0.0)
        return Ask(self.provider, f"{self.provider}/m", self.input, self.output, self.fixed, given, made, 0)


class Call:
    """A call that began, and how it ended."""

    def __init__(self, wish: Wish, claim: Claimed, context: int, binding: list[tuple[Cap, str]], machine: int) -> None:
        self.wish, self.claim, self.machine = wish, claim, machine
        self.input = wish.input + context
        self.output = wish.output if claim.output_cap is None else claim.output_cap
        self.shares: dict[Place, float] = {
            (cap.name, subject, cap.start): cap.unpriced or 0.0 for cap, subject in binding
        }
        self.ended = False
        self.attempt: Attempt | None = None
        """None if its daemon died."""

    def held(self, place: Place) -> Amount:
        """Its reservation."""
        return self._amount(place, self.input, self.output)

    def counted(self, place: Place) -> Amount:
        """What counts of it after its end."""
        ended = self.attempt
        if ended is None:
            return self.held(place)
        if ended.error == UNASKED:
            return Amount()
        if ended.usage is not None:
            return self._amount(place, ended.usage.input_tokens, ended.usage.output_tokens)
        if ended.outcome is Outcome.COMPLETED or ended.text or ended.error == "timeout":
            return self._amount(place, self.input, math.ceil(len(ended.text or "") / 4))
        return Amount()

    @property
    def guessed(self) -> bool:
        """True if no report came."""
        return self.attempt is None or self.attempt.usage is None

    def _amount(self, place: Place, given: int, made: int) -> Amount:
        if self.wish.provider == "one":
            return Amount(1, given + made, given * INPUT_RATE + made * OUTPUT_RATE)
        return Amount(1, given + made, math.ceil((given + made) * self.shares[place]))


class Book:
    """All calls of a store."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def running(self, machine: int | None = None) -> list[Call]:
        """The calls that have not ended."""
        return [call for call in self.calls if not call.ended and machine in (None, call.machine)]

    def lost(self) -> list[Call]:
        """Those whose daemons died under them, and that reported nothing."""
        return [call for call in self.calls if call.ended and call.attempt is None]

    def die(self, machine: int) -> None:
        """A daemon dies."""
        for call in self.running(machine):
            call.ended = True

    def figures(self, names: Collection[str]) -> dict[Place, tuple[Amount, Amount]]:
        """The used and the reserved part of every place of these budgets, as far as there is any."""
        used: Counter[tuple[Place, str]] = Counter()
        held: Counter[tuple[Place, str]] = Counter()
        for call in self.calls:
            for place in call.shares:
                amount, sums = (call.counted(place), used) if call.ended else (call.held(place), held)
                for field in Amount.__struct_fields__:
                    sums[place, field] += getattr(amount, field)
        places = {place for call in self.calls for place in call.shares if place[0] in names}
        return {place: (_sum(used, place), _sum(held, place)) for place in places}

    def guessed_tokens(self, name: str) -> Mapping[str, int]:
        """By subject of one budget, the tokens that count though nobody reported them."""
        found: Counter[str] = Counter()
        for call in self.calls:
            for place in call.shares:
                if place[0] == name and call.ended and call.guessed:
                    found[place[1]] += call.counted(place).tokens
        return found


def _sum(sums: Mapping[tuple[Place, str], int], place: Place) -> Amount:
    return Amount(**{field: sums.get((place, field), 0) for field in Amount.__struct_fields__})


def binding(caps: Caps, wish: Wish) -> list[tuple[Cap, str]]:
    """The budgets that bind a request, and the subject for which it counts."""
    found: list[tuple[Cap, str]] = []
    for cap in caps:
        agent = wish.agent or ""
        names: dict[Any, str] = {
            "agent": agent,
            "session": wish.conversation,
            "provider": wish.provider,
            "model": f"{wish.provider}/m",
        }
        if cap.kind == "all":
            found.append((cap, "all"))
        elif cap.named in ("*", names[cap.kind]):
            found.append((cap, f"{cap.kind}:{names[cap.kind]}"))
        elif cap.named[-1] == "*" and names[cap.kind].startswith(cap.named[:-1]):
            found.append((cap, f"{cap.kind}:{cap.named}"))
    return found


def least(cap: Cap, wish: Wish, context: int) -> int:
    """The least that a request takes of a budget, in its unit."""
    output = wish.output if wish.fixed else min(wish.output, 1_024)
    given = wish.input + context
    if cap.unit is Unit.REQUESTS:
        return 1
    if cap.unit is Unit.TOKENS:
        return given + output
    if wish.provider == "one":
        return given * INPUT_RATE + output * OUTPUT_RATE
    return math.ceil((given + output) * (cap.unpriced or 0.0))
