"""The sums of budgets in memory, and the budgets that bind a call.

Calls of one agent, session, provider and model count alike in all budgets that bind them. So their reservations and
their usage are added up once for all of these (`Group.ahead`), and to each budget's own sums only when these are asked
for. A call needs none of them while what was taken since they were last measured leaves room in the tightest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ksi.budgets.account import Place
from ksi.budgets.rules import Amount, Ask, Cap, Caps, Hold, Share, Unit, Use

Amounts = Amount | Sequence[Amount]
"""The same for all budgets, or one for each."""


class Sums:
    """What calls used, and what is reserved for running ones."""

    __slots__ = ("calls", "held_calls", "held_nanos", "held_tokens", "nanos", "tokens")

    def __init__(self) -> None:
        self.calls = self.tokens = self.nanos = 0
        self.held_calls = self.held_tokens = self.held_nanos = 0

    def use(self, amount: Amount, sign: int) -> None:
        """Add what a call used, or take it away."""
        self.calls += sign * amount.calls
        self.tokens += sign * amount.tokens
        self.nanos += sign * amount.nanos

    def reserve(self, amount: Amount, sign: int) -> None:
        """Add a reservation, or take it away."""
        self.held_calls += sign * amount.calls
        self.held_tokens += sign * amount.tokens
        self.held_nanos += sign * amount.nanos

    def add(self, other: Sums) -> None:
        """Add other sums."""
        self.calls += other.calls
        self.tokens += other.tokens
        self.nanos += other.nanos
        self.held_calls += other.held_calls
        self.held_tokens += other.held_tokens
        self.held_nanos += other.held_nanos


class Tally(Sums):
    """The figures of a place; see `Use`."""

    __slots__ = ("place", "told", "told_of")

    def __init__(self, place: Place, use: Use) -> None:
        self.place = place
        self.calls, self.tokens, self.nanos = use.used.calls, use.used.tokens, use.used.nanos
        self.held_calls, self.held_tokens, self.held_nanos = use.held.calls, use.held.tokens, use.held.nanos
        self.told, self.told_of = use.told, use.told_of

    @property
    def use_now(self) -> Use:
        """The figures at this moment."""
        return Use(
            used=Amount(self.calls, self.tokens, self.nanos),
            held=Amount(self.held_calls, self.held_tokens, self.held_nanos),
            told=self.told,
            told_of=self.told_of,
        )


class Group:
    """Tallies that the same calls count in."""

    __slots__ = ("ahead", "tallies")

    def __init__(self, tallies: Sequence[Tally]) -> None:
        self.tallies = tallies
        self.ahead = Sums()
        """What is not added to them yet."""

    def catch_up(self) -> None:
        """Add to the tallies what is ahead of them."""
        ahead, self.ahead = self.ahead, Sums()
        for tally in self.tallies:
            tally.add(ahead)


class Taken:
    """All that was ever reserved, used or reserved again, and never what was returned.

    It only grows, and at least as much as the rest of any budget shrinks: so a budget that had room for an amount has
    room for it as long as no more was taken since.
    """

    __slots__ = ("calls", "nanos", "tokens")

    def __init__(self) -> None:
        self.calls = self.tokens = self.nanos = 0

    def add(self, amounts: Amounts) -> None:
        """Note what budgets lose."""
        for amount in (amounts,) if isinstance(amounts, Amount) else amounts:
            self.calls += amount.calls
            self.tokens += amount.tokens
            self.nanos += amount.nanos


class Limits:
    """The values of `Taken` until which something holds in each unit."""

    __slots__ = ("calls", "nanos", "tokens")

    def __init__(self) -> None:
        self.calls = self.tokens = self.nanos = -1.0


class Binding:
    """All budgets that bind the calls of one agent, session, provider and model."""

    __slots__ = ("bounds", "caps", "group", "number", "quiet", "room", "shares")

    def __init__(self, caps: Caps, bounds: Sequence[tuple[Cap, str]], tallies: Sequence[Tally]) -> None:
        self.caps = caps
        self.bounds = [
            (cap, cap.limit_of(subject), tally) for (cap, subject), tally in zip(bounds, tallies, strict=True)
        ]
        self.group = Group(tallies)
        self.number = 0
        """Of its shares, in the journal."""
        self.shares = tuple(Share(cap.name, subject, cap.start, cap.unpriced or 0.0) for cap, subject in bounds)
        self.room = Limits()
        """Until then there is room."""
        self.quiet = Limits()
        """Until then no threshold is reached."""

    def measure(self, taken: Taken) -> None:
        """Find how much may be taken from now on; the tallies have caught up."""
        self.room.calls = self.room.tokens = self.room.nanos = math.inf
        self.quiet.calls = self.quiet.tokens = self.quiet.nanos = math.inf
        for cap, limit, tally in self.bounds:
            notice_at = limit * (cap.warn_at[0] if cap.warn_at else 1)
            if cap.unit is Unit.USD:
                self.room.nanos = min(self.room.nanos, taken.nanos + limit - tally.nanos - tally.held_nanos)
                self.quiet.nanos = min(self.quiet.nanos, taken.nanos + notice_at - tally.nanos)
            elif cap.unit is Unit.TOKENS:
                self.room.tokens = min(self.room.tokens, taken.tokens + limit - tally.tokens - tally.held_tokens)
                self.quiet.tokens = min(self.quiet.tokens, taken.tokens + notice_at - tally.tokens)
            else:
                self.room.calls = min(self.room.calls, taken.calls + limit - tally.calls - tally.held_calls)
                self.quiet.calls = min(self.quiet.calls, taken.calls + notice_at - tally.calls)

    def is_quiet(self, taken: Taken) -> bool:
        """True if surely no budget has reached a threshold."""
        quiet = self.quiet
        return taken.calls < quiet.calls and taken.tokens < quiet.tokens and taken.nanos < quiet.nanos

    def hold(self, ask: Ask, context: int, taken: Taken) -> Hold | None:
        """The reservation of a call for which there is surely room in full; None if that has to be measured."""
        if ask.input_rate is None:
            return None
        room, size = self.room, ask.input + context
        nanos = math.ceil(size * ask.input_rate + ask.output * ask.output_rate) + ask.call
        if (
            taken.calls < room.calls
            and taken.tokens + size + ask.output < room.tokens
            and taken.nanos + nanos < room.nanos
        ):
            return Hold(size, ask.output, ask.input_rate, ask.output_rate, ask.call, self.shares)
        return None
