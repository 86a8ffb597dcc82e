"""The budgets that hold now: the caps of requests, the usage of calls, and the notices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

import msgspec
import structlog

from ksi.budgets.rules import NANO, Ask, Budget, Caps, Demand, Notice, Raise, Spent, Unit, caps_at
from ksi.clock import MICROSECONDS, Clock
from ksi.completion.pool.routes import model_at, providers_of
from ksi.completion.usage.prices import Prices
from ksi.content.blocks import Content, Message, size_of, weight_of
from ksi.content.features import Features
from ksi.errors import BudgetExceeded, FailureClass, InvalidData
from ksi.events.budget import BudgetPush
from ksi.events.bus import EventBus
from ksi.providers.base import Capabilities
from ksi.request import Attempt, Outcome, RequestBody, Usage, said_chars
from ksi.store.chains import Aftermath, FollowUp
from ksi.store.rules.budgets import UNSAID_OUTPUT, amount, figure
from ksi.store.usage import PRICE_SLICE, Tariff, rates_for
from ksi.tokens import BYTES_PER_TOKEN, CHARACTERS_PER_TOKEN

PER_TOKEN = NANO // 1_000_000
"""Nanodollars for a token, of a price in US dollars for a million."""

KEPT_PLACES = 10_000
"""Pairs of a route and a model whose prices are remembered."""

NOTHING_SENT = frozenset(
    {
        FailureClass.RATE_LIMITED,
        FailureClass.OVERLOADED,
        FailureClass.AUTHENTICATION,
        FailureClass.BILLING,
        FailureClass.MODEL_NOT_FOUND,
        FailureClass.INVALID_REQUEST,
        FailureClass.CONTEXT_TOO_LONG,
        FailureClass.UNSUPPORTED,
    }
)
"""Failures of calls on which no model worked."""


class Kept(msgspec.Struct, frozen=True, omit_defaults=True):
    """The operators' settings, as stored."""

    budgets: tuple[Budget, ...] = ()
    raises: tuple[Raise, ...] = ()


class _Place(NamedTuple):
    """A provider that a request may be sent to."""

    provider: str
    model: str
    output: int
    """Tokens that the model may answer with if the request names no limit."""
    tariff: Tariff


class BudgetBook:
    """The configured budgets and those that operators set, as they are at any moment."""

    def __init__(
        self,
        configured: Iterable[Budget],
        prices: Prices,
        providers: Mapping[str, Capabilities],
        bus: EventBus,
        clock: Clock,
    ) -> None:
        self.configured = tuple(configured)
        self.kept = Kept()
        self._prices = prices
        self._providers = providers
        self._bus = bus
        self._clock = clock
        self.budgets: tuple[Budget, ...] = ()
        """All budgets. One that was set under a configured one's name replaces it."""
        self.take(self.kept)
        self._caps: Caps | None = None
        self._until = 0
        self._priced: dict[tuple[str, str], list[_Place]] = {}
        """By route and model, at the prices of `_priced_at`."""
        self._priced_at = 0
        self._told: dict[tuple[str, str, int], int] = {}
        """Budgets, subjects and limits that were reported as used up, and the ends of their windows."""
        self.on_notice: list[Callable[[Notice], None]] = []
        """Called with each notice."""
        self._log = structlog.get_logger("ksi.budgets")

    def take(self, kept: Kept) -> None:
        """Apply the operators' settings."""
        self.kept = kept
        taken = {budget.name for budget in kept.budgets}
        self.budgets = (*(one for one in self.configured if one.name not in taken), *kept.budgets)
        self._in_dollars = any(budget.unit is Unit.USD for budget in self.budgets)
        self._caps = None

    def caps(self, now: int) -> Caps:
        """The budgets as they are now; `now` is wall time in microseconds."""
        if not self.budgets:
            return ()
        if self._caps is None or not self._since <= now < self._until:
            self._caps = caps_at(self.budgets, self.kept.raises, now)
            ends = [cap.end for cap in self._caps] + [one.until for one in self.kept.raises if one.until > now]
            self._since, self._until = now, min(ends)
        return self._caps

    _since = 0

    # -- caps of a request --------------------------------------------------------------------------------------------

    async def demand(self, body: RequestBody, route: str, model: str) -> Demand:
        """The caps of a request at each provider of its route; empty without budgets."""
        if not self.budgets:
            return ()
        if self._in_dollars and self._prices.unread:
            await self._prices.ready(providers_of(route))
        return self.demand_now(body, route, model)

    def demand_now(self, body: RequestBody, route: str, model: str) -> Demand:
        """The same by the prices that are at hand."""
        if not self.budgets:
            return ()
        tokens, said = _asked(body)
        return tuple([_ask(place, tokens, said) for place in self._places(route, model)])

    def _places(self, route: str, model: str) -> Sequence[_Place]:
        """The providers of a route, with their present prices."""
        at = self._clock.now().wall // PRICE_SLICE * PRICE_SLICE
        if at != self._priced_at or len(self._priced) >= KEPT_PLACES:
            self._priced.clear()
            self._priced_at = at
        known = self._priced.get((route, model))
        if known is None:
            known = [self._place(name, model_at(route, name, model), at) for name in providers_of(route)]
            if not self._prices.unread:
                self._priced[route, model] = known
        return known

    def _place(self, provider: str, model: str, at: int) -> _Place:
        can = self._providers.get(provider)
        output = can.output_tokens if can is not None and can.output_tokens else UNSAID_OUTPUT
        return _Place(provider, model, output, self._prices.tariff(provider, None, model, at))

    def with_demands(self, aftermath: Aftermath, decode: Callable[[bytes], RequestBody]) -> Aftermath:
        """A request's follow-ups with their caps."""
        if not self.budgets or not any(follow_up.child is not None for follow_up in aftermath.follow_ups):
            return aftermath
        follow_ups = tuple(self._with_demand(follow_up, decode) for follow_up in aftermath.follow_ups)
        return msgspec.structs.replace(aftermath, follow_ups=follow_ups)

    def _with_demand(self, follow_up: FollowUp, decode: Callable[[bytes], RequestBody]) -> FollowUp:
        child = follow_up.child
        if child is None or not child.route:
            return follow_up
        demand = self.demand_now(decode(child.body), child.route, child.model)
        return msgspec.structs.replace(follow_up, child=msgspec.structs.replace(child, demand=demand))

    # -- usage of a call ----------------------------------------------------------------------------------------------

    def spent(self, attempt: Attempt, *, asked: bool) -> Spent | None:
        """The usage of an ended call; None if it used nothing. `asked`: its provider was asked at all."""
        if not asked or not self.budgets:
            return None
        usage = attempt.usage
        if usage is not None:
            cost = self._prices.cost(attempt)
            nanos = None if cost is None else math.ceil(round(cost * NANO, 3))
            return Spent(tokens=usage.input_tokens + usage.output_tokens, nanos=nanos)
        output = -(-said_chars(attempt) // CHARACTERS_PER_TOKEN)
        if attempt.outcome is Outcome.COMPLETED or output or attempt.first_token_us is not None:
            return Spent(output=output)
        if attempt.error == FailureClass.TIMEOUT:
            return Spent()
        return None

    # -- telling ------------------------------------------------------------------------------------------------------

    def tell(self, notices: Sequence[Notice]) -> None:
        """Publish the notices of budgets: an event and a line in the log."""
        for notice in notices:
            if notice.threshold is None:
                now = self._clock.now().wall
                self._told = {place: end for place, end in self._told.items() if end > now}
                self._told[notice.name, notice.subject, notice.limit] = notice.end
            push = notice_push(notice)
            name = "budget:exceeded" if notice.threshold is None else "budget:warning"
            self._log.warning(push.message, budget=push.budget, scope=push.scope)
            self._bus.publish(name, push)
            for listener in self.on_notice:
                listener(notice)

    def refused(self, error: BudgetExceeded) -> BudgetExceeded:
        """A refusal as the wire has it. An event is published if there was none of this budget, subject and window."""
        facts = dict(error.facts)
        now, since, resets_at = self._clock.now().wall, facts.pop("since"), facts.pop("resets_at")
        unit = Unit(facts["unit"])
        scale = NANO if unit is Unit.USD else 1
        limit = round(facts["limit"] * scale)
        if facts["used"] > 0 and self._told.get((facts["budget"], facts["scope"], limit), 0) <= now:
            self.tell(
                [
                    Notice(
                        name=facts["budget"],
                        subject=facts["scope"],
                        unit=unit,
                        used=round(facts["used"] * scale),
                        limit=limit,
                        start=since,
                        end=resets_at,
                    )
                ]
            )
        return BudgetExceeded(
            error.message,
            **facts,
            since=since / MICROSECONDS,
            resets_at=resets_at / MICROSECONDS,
            retry_after=max(0.0, (resets_at - now) / MICROSECONDS),
        )

    def why_waiting(self, line: str) -> str:
        """Why a request waits that a store says waits for a budget."""
        name, _, subject = line.partition("\n")
        caps = [cap for cap in self.caps(self._clock.now().wall) if cap.name == name]
        who = "" if subject == "all" else f" of {subject}"
        until = f"; it is reset at {shown(caps[0].end)}" if caps else ""
        return f"budget {name!r}{who} has no room{until}"


def notice_push(notice: Notice) -> BudgetPush:
    """A notice, as it goes over the wire."""
    who = "" if notice.subject == "all" else f" of {notice.subject}"
    used, limit = amount(notice.unit, notice.used), amount(notice.unit, notice.limit)
    how = "is used up" if notice.threshold is None else f"has reached {notice.threshold:.0%}"
    return BudgetPush(
        budget=notice.name,
        scope=notice.subject,
        unit=notice.unit.value,
        used=figure(notice.unit, notice.used),
        limit=figure(notice.unit, notice.limit),
        threshold=notice.threshold,
        since=notice.start / MICROSECONDS,
        resets_at=notice.end / MICROSECONDS,
        message=f"budget {notice.name!r}{who} {how}: {used} of {limit}; it is reset at {shown(notice.end)}",
    )


def shown(at: int) -> str:
    """A time for people, in this machine's zone."""
    return datetime.fromtimestamp(at / MICROSECONDS).astimezone().strftime("%Y-%m-%d %H:%M %Z")


def _ask(place: _Place, tokens: int, said: int | None) -> Ask:
    """What a call at a provider may use."""
    provider, model, output, tariff = place
    rates = rates_for(tariff, Usage(input_tokens=tokens))
    fixed = said is not None
    most = said or output
    if rates is None:
        return Ask(provider, model, tokens, most, fixed, None, 0.0, 0)
    given, made = max(rates.input, rates.cache_write), max(rates.output, rates.reasoning)
    return Ask(provider, model, tokens, most, fixed, given * PER_TOKEN, made * PER_TOKEN, math.ceil(rates.call * NANO))


def _asked(body: RequestBody) -> tuple[int, int | None]:
    """A request's input in tokens, its tools with it, and the `max_tokens` that it names."""
    if body.native is None:
        return _tokens(body.system, body.dialogue(), body.features), body.max_tokens
    try:
        asked = body.asked()
    except InvalidData:
        return int(weight_of(body.native.body) / BYTES_PER_TOKEN) + 1, None
    return _tokens(asked.system, asked.messages, asked.features), asked.max_tokens


def _tokens(system: Content | None, messages: Iterable[Message], features: Features) -> int:
    said = size_of(system or "") + sum([size_of(message.content) for message in messages])
    tools = sum(len(msgspec.json.encode(tool)) for tool in features.tools) if features.tools else 0
    return int((said + tools) / BYTES_PER_TOKEN) + 1
