"""Budgets, the caps of calls, and the decision if a call fits. Pure: stores keep the figures.

Money is counted in nanodollars and whole, so that sums are exact. Times are microseconds of wall time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Literal

import msgspec

from ksi.budgets.windows import Period, window, zone_named

NANO = 1_000_000_000
"""Nanodollars in a dollar."""

LEAST_OUTPUT = 1_024
"""Output tokens without which a request that names no `max_tokens` is not begun: less would be cut too short."""

Kind = Literal["all", "agent", "token", "model", "provider", "session"]
KINDS: tuple[Kind, ...] = ("all", "agent", "token", "model", "provider", "session")

EXCEEDED = 1
"""The bit of `Use.told` for `budget:exceeded`; those above it are for the thresholds, in order."""


class Unit(StrEnum):
    """The unit of a budget."""

    USD = "usd"
    TOKENS = "tokens"
    REQUESTS = "requests"


class Budget(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One bound, as it was configured or set."""

    name: str
    kind: Kind
    named: str = ""
    """A name, a beginning with `*` behind it (all of these together), or `*` (each one by itself)."""
    unit: Unit
    limit: int
    """In nanodollars, tokens or calls."""
    per: Period
    time_zone: str = ""
    refuse: bool = False
    """A request that would exceed it is refused; without it, it waits."""
    warn_at: tuple[float, ...] = ()
    """Shares of the limit at which a warning is sent."""
    unpriced: float | None = None
    """Nanodollars for a token of a model without a price; None refuses such models."""

    @property
    def scope(self) -> str:
        """The scope as it is written."""
        return self.kind if self.kind == "all" else f"{self.kind}:{self.named}"


class Raise(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """More for a budget, by an operator, until a time."""

    budget: str
    subject: str = ""
    """The one whose limit it raises, as in `agent:nightly`; empty: that of all whom the budget binds."""
    amount: int
    """In the budget's unit."""
    until: int
    at: int
    by: str = ""
    why: str = ""


class Cap(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A budget at one moment: its window, and its limits including raises."""

    name: str
    kind: Kind
    named: str
    unit: Unit
    limit: int
    start: int
    end: int
    refuse: bool = False
    warn_at: tuple[float, ...] = ()
    unpriced: float | None = None
    raised: Mapping[str, int] = {}
    """The additional limits of single subjects."""

    def subject(self, facts: Facts, provider: str, model: str) -> str | None:
        """The subject that a call counts for; None if the budget does not bind it."""
        if self.kind == "all":
            return "all"
        name = facts.agent or ""
        if self.kind == "token":
            name = name.partition("/")[0]
        elif self.kind != "agent":
            name = facts.session if self.kind == "session" else provider if self.kind == "provider" else model
        if self.named == "*" or self.named == name:
            return f"{self.kind}:{name}"
        if self.named.endswith("*") and name.startswith(self.named[:-1]):
            return f"{self.kind}:{self.named}"
        return None

    def limit_of(self, subject: str) -> int:
        """The subject's limit."""
        return self.limit + self.raised.get(subject, 0) if self.raised else self.limit


Caps = tuple[Cap, ...]
NO_CAPS: Caps = ()


def caps_at(budgets: Iterable[Budget], raises: Iterable[Raise], now: int) -> Caps:
    """All budgets as they are now."""
    active = [one for one in raises if one.until > now]
    return tuple(_cap(budget, [one for one in active if one.budget == budget.name], now) for budget in budgets)


def _cap(budget: Budget, raises: Iterable[Raise], now: int) -> Cap:
    span = window(budget.per, zone_named(budget.time_zone), now)
    for_all = sum(one.amount for one in raises if not one.subject)
    raised: dict[str, int] = {}
    for one in raises:
        if one.subject:
            raised[one.subject] = raised.get(one.subject, 0) + one.amount
    return Cap(
        name=budget.name,
        kind=budget.kind,
        named=budget.named,
        unit=budget.unit,
        limit=budget.limit + for_all,
        start=span.start,
        end=span.end,
        refuse=budget.refuse,
        warn_at=budget.warn_at,
        unpriced=budget.unpriced,
        raised=raised,
    )


class Facts(msgspec.Struct, frozen=True):
    """The agent that asks."""

    agent: str | None
    session: str


class Ask(msgspec.Struct, frozen=True, array_like=True):
    """The maximum usage of a call at one provider."""

    provider: str
    model: str
    """The full name of the model that is asked for there."""
    input: int
    """Tokens of the request itself, estimated."""
    output: int
    """Tokens: its `max_tokens`, or the model's maximum."""
    fixed: bool
    """Its `max_tokens` was set by the client, and is not cut to the rest of a budget."""
    input_rate: float | None
    """Nanodollars for a token; None without a known price."""
    output_rate: float
    call: int
    """Nanodollars for the call itself."""


Demand = tuple[Ask, ...]
"""The caps of a request, at each provider of its route."""


class Share(msgspec.Struct, frozen=True, array_like=True):
    """The figures that a call counts in: a budget's, of a subject, in a window."""

    name: str
    subject: str
    start: int
    unpriced: float


class Hold(msgspec.Struct, frozen=True, array_like=True):
    """The reservation of a running call."""

    input: int
    output: int
    input_rate: float | None
    output_rate: float
    call: int
    shares: tuple[Share, ...]

    def amounts(self) -> list[Amount]:
        """The reservation for each share."""
        if self.input_rate is not None and self.shares:
            # At a known price it is the same for all.
            return [self.used(self.shares[0], self.input, self.output)] * len(self.shares)
        return [self.used(share, self.input, self.output) for share in self.shares]

    def used(self, share: Share, input_tokens: int, output_tokens: int) -> Amount:
        """This many tokens as an amount."""
        if self.input_rate is None:
            nanos = math.ceil((input_tokens + output_tokens) * share.unpriced)
        else:
            nanos = math.ceil(input_tokens * self.input_rate + output_tokens * self.output_rate) + self.call
        return Amount(1, input_tokens + output_tokens, nanos)


class Amount(msgspec.Struct, frozen=True, array_like=True):
    """Calls, tokens and nanodollars."""

    calls: int = 0
    tokens: int = 0
    nanos: int = 0

    def plus(self, other: Amount) -> Amount:
        """The sum."""
        return Amount(self.calls + other.calls, self.tokens + other.tokens, self.nanos + other.nanos)

    def minus(self, other: Amount) -> Amount:
        """The difference."""
        return Amount(self.calls - other.calls, self.tokens - other.tokens, self.nanos - other.nanos)

    def of(self, unit: Unit) -> int:
        """The figure that a budget goes by."""
        return self.nanos if unit is Unit.USD else self.tokens if unit is Unit.TOKENS else self.calls


NOTHING = Amount()


class Use(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A subject's figures in one window of a budget."""

    used: Amount = NOTHING
    held: Amount = NOTHING
    """Reserved for running calls."""
    told: int = 0
    """Bits of the sent notices: see `EXCEEDED`."""
    told_of: int = 0
    """The limit for which they were sent: after a raise they are sent again."""


UNUSED = Use()


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """What an ended call used. Where none comes with an end, all that was set aside is given back."""

    tokens: int | None = None
    """As reported, cached ones included; None: no report came though the model was at work."""
    nanos: int | None = None
    """The cost; None if it is unknown."""
    output: int = 0
    """Estimated tokens of the answer so far; read only without a report."""


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """Something to tell once: a threshold was reached, or the budget was used up."""

    name: str
    subject: str
    unit: Unit
    used: int
    limit: int
    start: int
    end: int
    threshold: float | None = None
    """None: it is exceeded."""


class Over(msgspec.Struct, frozen=True, kw_only=True):
    """Why a call does not fit."""

    cap: Cap
    subject: str
    limit: int
    used: int
    held: int
    need: int
    unpriced: str = ""
    """The model whose price is not known, if that is the reason."""

    @property
    def spent(self) -> bool:
        """True if it is used up until its window ends; otherwise it is only reserved for running calls."""
        return self.used + self.need > self.limit

    @property
    def never(self) -> bool:
        """True if no window has room for it."""
        return bool(self.unpriced) or self.need > self.limit


Rows = Mapping[tuple[str, str, int], Use]


def bound(caps: Caps, facts: Facts, ask: Ask) -> list[tuple[Cap, str]]:
    """The budgets that bind a call, each with whom it counts for."""
    return [(cap, subject) for cap in caps if (subject := cap.subject(facts, ask.provider, ask.model)) is not None]


def fit(ask: Ask, context: int, binding: list[tuple[Cap, str]], uses: Rows) -> Hold | Over:
    """Whether a call fits into all budgets that bind it, and what is set aside for it.

    `context` are the tokens of its conversation so far. Without a `max_tokens` of the client's the answer is cut to
    what the tightest budget leaves.
    """
    size = ask.input + context
    output = ask.output
    least = least_output(ask)
    over: Over | None = None
    for cap, subject in binding:
        use = uses.get((cap.name, subject, cap.start), UNUSED)
        limit, used, held = cap.limit_of(subject), use.used.of(cap.unit), use.held.of(cap.unit)
        if cap.unit is Unit.USD and ask.input_rate is None and cap.unpriced is None:
            return Over(cap=cap, subject=subject, limit=limit, used=used, held=held, need=0, unpriced=ask.model)
        wanted = need(ask, cap, size, least)
        if wanted and used + held + wanted > limit:
            found = Over(cap=cap, subject=subject, limit=limit, used=used, held=held, need=wanted)
            over = found if over is None else _worse(over, found)
        elif cap.unit is not Unit.REQUESTS and over is None:
            output = max(least, min(output, output_within(ask, cap, size, limit - used - held)))
    if over is not None:
        return over
    shares = tuple(Share(cap.name, subject, cap.start, cap.unpriced or 0.0) for cap, subject in binding)
    return Hold(size, output, ask.input_rate, ask.output_rate, ask.call, shares)


def need(ask: Ask, cap: Cap, size: int, output: int) -> int:
    """The minimum that a call takes of a budget."""
    if cap.unit is Unit.REQUESTS:
        return 1
    if cap.unit is Unit.TOKENS:
        return size + output
    if ask.input_rate is None:
        return math.ceil((size + output) * (cap.unpriced or 0.0))
    return math.ceil(size * ask.input_rate + output * ask.output_rate) + ask.call


def least_output(ask: Ask) -> int:
    """The output tokens without which a call is not begun."""
    return ask.output if ask.fixed else min(ask.output, LEAST_OUTPUT)


def output_within(ask: Ask, cap: Cap, size: int, left: int) -> int:
    """The output tokens that the rest of a budget pays for."""
    if cap.unit is Unit.TOKENS:
        return left - size
    if ask.input_rate is None:
        rate = cap.unpriced or 0.0
        return ask.output if rate <= 0 else math.floor(left / rate) - size
    if ask.output_rate <= 0:
        return ask.output
    return math.floor((left - ask.call - 1 - size * ask.input_rate) / ask.output_rate)


def _worse(one: Over, other: Over) -> Over:
    """The one that holds a call up for longer."""
    return max(one, other, key=lambda over: (over.never, over.spent, over.cap.refuse, over.cap.end))


def settled(hold: Hold, share: Share, spent: Spent | None) -> Amount:
    """The counted usage of an ended call in these figures."""
    if spent is None:
        return NOTHING
    if spent.tokens is None:
        return hold.used(share, hold.input, spent.output)
    nanos = spent.nanos
    if nanos is None:
        nanos = math.ceil(spent.tokens * share.unpriced)
    return Amount(1, spent.tokens, nanos)


def told(cap: Cap, subject: str, use: Use) -> tuple[Use, list[Notice]]:
    """The notices about these figures, and the figures after they are sent."""
    limit, used = cap.limit_of(subject), use.used.of(cap.unit)
    if used < limit * (cap.warn_at[0] if cap.warn_at else 1):
        return use, []
    before = use.told if use.told_of == limit else 0
    after = before
    thresholds: list[float | None] = []
    for place, share in enumerate(cap.warn_at, 1):
        if used >= share * limit:
            if not before >> place & 1:
                thresholds.append(share)
            after |= 1 << place
    if used >= limit:
        if not before & EXCEEDED:
            thresholds.append(None)
        after |= EXCEEDED
    if after == before:
        return use, []
    notices = [_notice(cap, subject, limit, used, threshold) for threshold in thresholds]
    return msgspec.structs.replace(use, told=after, told_of=limit), notices


def told_over(over: Over, use: Use) -> tuple[Use, list[Notice]]:
    """The same if a call found a budget used up."""
    if use.told_of == over.limit and use.told & EXCEEDED:
        return use, []
    before = use.told if use.told_of == over.limit else 0
    notice = _notice(over.cap, over.subject, over.limit, over.used, None)
    return msgspec.structs.replace(use, told=before | EXCEEDED, told_of=over.limit), [notice]


def _notice(cap: Cap, subject: str, limit: int, used: int, threshold: float | None) -> Notice:
    return Notice(
        name=cap.name,
        subject=subject,
        unit=cap.unit,
        used=used,
        limit=limit,
        start=cap.start,
        end=cap.end,
        threshold=threshold,
    )


encode_demand = msgspec.msgpack.Encoder().encode
decode_demand = msgspec.msgpack.Decoder(Demand).decode
encode_hold = msgspec.msgpack.Encoder().encode
decode_hold = msgspec.msgpack.Decoder(Hold).decode
