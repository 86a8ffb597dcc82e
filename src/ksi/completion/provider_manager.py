"""The configured providers at work: who is asked next, how many calls may run, and how each one is doing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
import structlog

from ksi.clock import MICROSECONDS, Clock, Moment
from ksi.completion.login_watch import LoginWatch
from ksi.completion.provider_breaker import BreakerRecord, BreakerState, Change, ProviderBreaker
from ksi.completion.provider_limits import NEVER, Limit, LimitCause, Limits, hit_of, sentence
from ksi.completion.provider_member import Member, caller_of
from ksi.completion.provider_record import LONGEST_REASON, Seen
from ksi.completion.provider_team import Team, View
from ksi.completion.retry_manager import is_providers_fault
from ksi.completion.routes import Router, Step, parse_route, tried
from ksi.config import Config
from ksi.errors import FailureClass, NotFound, ProviderError
from ksi.event_bus import EventBus
from ksi.event_types import ProviderPush
from ksi.protocol import nearest
from ksi.providers.base import LoginProvider, Provider, ReportingProvider, bare_model
from ksi.request import Attempt, Outcome
from ksi.store.values import Claimed, Offer

_NEVER = 2**63

CLOCKS_DIFFER = MICROSECONDS
"""A time that moves by less was read off two clocks, and means the same."""


class CallEnd(msgspec.Struct, frozen=True):
    """What the end of a call means for its request."""

    away: bool = False
    """Whether the provider is limited or cannot be reached: the request waits, and uses no attempt."""
    probe: bool = False
    """Whether it was sent in vain to try a provider that failed, or was away, before. It is nobody's last attempt."""

    @property
    def uncounted(self) -> bool:
        """Whether it uses no attempt of its request."""
        return self.away or self.probe


def _nothing() -> None:
    """Stands for `on_change` until somebody wants to know."""


class ProviderManager:
    """Routes' offers, slots, breakers, limits and records. `on_change` is called when more may run, or less."""

    def __init__(
        self,
        config: Config,
        providers: Mapping[str, Provider],
        router: Router,
        bus: EventBus,
        clock: Clock,
        team: Team,
        *,
        shared: bool = False,
    ) -> None:
        """`shared`: other daemons ask the same providers."""
        now = clock.now()
        self._members = {
            name: Member(config.providers[name], provider, config.breaker, now, shared=shared)
            for name, provider in providers.items()
        }
        self._team = team
        team.on_view = self._see
        self._logins = LoginWatch(providers, config.breaker, clock, self._login_is_back)
        self._switched_off = frozenset(config.providers) - self._members.keys()
        self._router = router
        self._bus = bus
        self._clock = clock
        self._routes: dict[str, tuple[Step, ...]] = {}
        self._orphans: set[str] = set()
        self._offers: tuple[Offer, ...] | None = None
        self._offers_until = Moment(0, 0)
        self._timed = any(m.requests is not None or m.tokens is not None for m in self._members.values())
        self._lifted: set[str] = set()
        self._log = structlog.get_logger("ksi.providers")
        self.on_change: Callable[[], None] = _nothing

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start all providers.

        Raises:
            StoreError: what is known of them cannot be read.
        """
        await self._team.start()
        for name, member in self._members.items():
            await member.provider.start()
            problem = member.provider.problem()
            if problem:
                self._log.warning("provider has a problem", provider=name, problem=problem)

    async def stop(self) -> None:
        """Stop all providers, each whatever the others do."""
        await self._logins.stop()
        for name, member in self._members.items():
            try:
                await member.provider.stop()
            except Exception:  # noqa: BLE001 - the others must be stopped all the same
                self._log.exception("provider did not stop", provider=name)
        await self._team.stop()

    def tasks_alive(self) -> dict[str, bool]:
        """The long-lived tasks, and whether each runs."""
        return {"ksi-providers": self._team.alive}

    def __getitem__(self, name: str) -> Provider:
        """A provider by its name."""
        return self._members[name].provider

    # -- routes and offers ----------------------------------------------------------------------------------------

    def route(self, model: str, *, mcp: bool = False) -> str:
        """The route of a model, offered from now on; see `Router.route`.

        A provider that is known not to have the model is left out while another one may have it.

        Raises:
            UnknownModel: no provider serves it.
            InvalidData: none that serves it takes MCP servers, and `mcp` asks for one that does.
        """
        route = self._router.route(model, mcp=mcp)
        if any(member.limits for member in self._members.values()):
            route = self._without_gone(route, model)
        if route not in self._routes:
            self.know([route])
        return route

    def _without_gone(self, route: str, model: str) -> str:
        now = self._clock.now().wall
        there = [
            step
            for step in parse_route(route)
            if step.provider not in self._members
            or not self._members[step.provider].gone(bare_model(step.model or model), now)
        ]
        return ",".join(step.word for step in there) or route

    def know(self, routes: Iterable[str]) -> None:
        """Offer these routes from now on: those in the store, and each new one."""
        for route in routes:
            steps = parse_route(route)
            if any(step.provider in self._members for step in steps):
                self._routes[route] = steps
            else:
                self._orphans.add(route)
        self._offers = None

    def offers(self, now: Moment) -> tuple[Offer, ...]:
        """What may be claimed now: each route with the first of its providers that can be asked.

        One that is only being probed takes its probes and holds up nobody: the next one is offered with it.
        """
        until = self._offers_until
        if self._offers is None or self._timed or now.mono >= until.mono or now.wall >= until.wall:
            self._tick(now)
            wait = self.next_change(now)
            self._offers_until = now.after_us(_NEVER if wait is None else wait)
            self._offers = tuple(
                offer for route, steps in self._routes.items() for offer in self._offers_of(route, steps, now)
            )
        return self._offers

    def _offers_of(self, route: str, steps: Sequence[Step], now: Moment) -> Iterator[Offer]:
        offered: set[str] = set()
        for step in steps:
            member = self._members.get(step.provider)
            if member is None or step.provider in offered or not member.usable(now):
                continue
            by_node = member.provider.capabilities.process
            yield Offer(route, step.provider, member.limit(now), by_node, member.terms)
            offered.add(step.provider)
            if member.healthy:
                return

    def others(self, route: str, provider: str, asked: str, now: Moment, *, other_model: bool = False) -> str | None:
        """A route whose `provider` failed for the model `asked`, where one that was not tried since the last wait can
        be asked; with `other_model`, one of a fallback model alone."""
        if other_model:
            rest = _without_model(route, provider)
        else:
            rest = tried(route, provider)
        if rest is None or not any(self._can_serve(step, asked, now) for step in parse_route(rest) if not step.tried):
            return None
        if rest not in self._routes:
            self.know([rest])
        return rest

    def _can_serve(self, step: Step, asked: str, now: Moment) -> bool:
        member = self._members.get(step.provider)
        model = bare_model(step.model or asked)
        return member is not None and member.usable(now) and member.away(model, now) is None

    def back(self, route: str, asked: str, now: Moment) -> int | None:
        """When the first provider of a route can be asked again, as wall time; None where no time is known."""
        times = []
        for step in parse_route(route):
            member = self._members.get(step.provider)
            if member is not None and member.enabled:
                times.append(member.back(bare_model(step.model or asked), now))
        return min(times, default=None)

    def routes_of(self, provider: str) -> list[str]:
        """The known routes that a provider is in."""
        return [route for route, steps in self._routes.items() if any(step.provider == provider for step in steps)]

    def orphans(self, waiting: Mapping[str, int]) -> list[str]:
        """Routes with waiting requests that no configured provider serves any more."""
        return sorted(route for route in self._orphans if waiting.get(route))

    def take_lifted(self) -> list[str]:
        """The routes of providers whose limits were lifted since the last look: what is parked for them is due."""
        lifted, self._lifted = self._lifted, set()
        return list(dict.fromkeys(route for name in sorted(lifted) for route in self.routes_of(name)))

    # -- calls ----------------------------------------------------------------------------------------------------

    def away(self, provider: str, model: str, now: Moment) -> ProviderError | None:
        """Why a claimed request must not be sent now: the model that it asks for is limited at its provider."""
        limit = self._members[provider].away(bare_model(model), now)
        if limit is None:
            return None
        failure = _FAILURES.get(limit.cause, FailureClass.RATE_LIMITED)
        return ProviderError(failure, f"not asked: {sentence(limit, now.wall, _zone())}", provider=provider)

    def began(self, claim: Claimed, model: str) -> None:
        """A call goes out; `model` is its full name."""
        self._members[claim.provider].began(claim, bare_model(model), self._clock.now())

    def ended(
        self, claim: Claimed, attempt: Attempt, error: ProviderError | None, now: Moment, *, own_limit: bool = False
    ) -> CallEnd:
        """A call is over: count it, and let what it said judge the provider.

        Faults of the request are none of the provider's. `own_limit`: the caller's own time limit ended it.
        """
        name, member = claim.provider, self._members[claim.provider]
        used = None if attempt.usage is None else attempt.usage.input_tokens + attempt.usage.output_tokens
        worked = member.health.answered > 0
        call = member.ended(claim, used, now)
        member.health.ended(attempt)
        seen = Seen(now.wall, call.era, call.began, caller=caller_of(claim), model=call.model)
        hit = None
        if attempt.outcome is Outcome.COMPLETED:
            self._team.saw(name, seen)
        elif error is not None:
            hit = hit_of(error, call.model, now, login_may_return=self._login_may_return(member, worked=worked))
            reason = error.message[:LONGEST_REASON]
            if hit is not None:
                self._team.saw(name, msgspec.structs.replace(seen, hit=msgspec.structs.replace(hit, reason=reason)))
            elif not is_providers_fault(error):
                self._team.saw(name, msgspec.structs.replace(seen, neutral=True))
            elif not own_limit and (not member.failed_before(claim.request_id) or call.probe):
                self._team.saw(name, msgspec.structs.replace(seen, failed=True, reason=reason))
        away = hit is not None and hit.cause is not LimitCause.MODEL_GONE
        return CallEnd(away, call.probe and not away and error is not None and _in_vain(error))

    def _login_may_return(self, member: Member, *, worked: bool) -> bool:
        """Whether requests wait for a login: a program's can come back at any time, a key that never worked cannot."""
        provider = member.provider
        return isinstance(provider, LoginProvider) and (provider.capabilities.process or worked)

    # -- what is known --------------------------------------------------------------------------------------------

    def _see(self, name: str, view: View) -> None:
        """Go by what is known of a provider, by all daemons together, and say what changed for this one."""
        member, now = self._members[name], self._clock.now()
        state, era, limits = member.breaker.state, member.breaker.era, member.limits
        member.version = view.version
        member.breaker.adopt(_ahead_of(view.place.breaker, member.breaker))
        member.limits = view.place.limits
        member.breaker.tick(now.wall)
        self._offers = None
        if member.breaker.state is not state:
            self._stepped(name, Change(state, member.breaker.state, view.place.breaker.reason))
        self._compare(name, limits, member.limits, now, reset=member.breaker.era != era)
        self._switch(name, view.enabled)
        self.on_change()

    def _compare(self, name: str, before: Limits, after: Limits, now: Moment, *, reset: bool) -> None:
        """Tell of limits that are new or gone, and note what waited for them; a reset begins a new era."""
        member = self._members[name]
        old = {limit.key: limit for limit in before}
        new = {limit.key: limit for limit in after}
        state = member.breaker.state.value
        for key, limit in new.items():
            was = old.get(key)
            if was is None or was.cause is not limit.cause:
                self._changed(name, state, "parked", sentence(limit, now.wall, _zone()), _back(limit))
            elif limit.until < was.until - CLOCKS_DIFFER or limit.answers > was.answers:
                self._lifted.add(name)
        for key, limit in old.items():
            if key not in new:
                self._lifted.add(name)
                self._changed(name, "parked", state, "reset by an operator" if reset else _ENDED[limit.cause], None)
        lapsed = (limit.strikes for limit in after if limit.cause is LimitCause.LOGIN and limit.active(now.wall))
        self._logins.watch(name, max(lapsed, default=0))

    async def _login_is_back(self, name: str) -> None:
        await self._team.lift(name, LimitCause.LOGIN)

    def waits(self, provider_waits: Mapping[str, int], now: Moment) -> None:
        """The store let no call begin at these providers: so many microseconds until it lets one."""
        for name, wait in provider_waits.items():
            self._members[name].waits_until = now.mono + wait

    def _tick(self, now: Moment) -> None:
        """Let breakers whose time is over become half-open."""
        for name, member in self._members.items():
            change = member.breaker.tick(now.wall)
            if change is not None:
                self._stepped(name, change)

    def next_change(self, now: Moment) -> int | None:
        """In how many microseconds time alone lets more run; None where it never does."""
        waits = (member.wait(now) for member in self._members.values())
        return min((wait for wait in waits if wait is not None), default=None)

    # -- the operator ---------------------------------------------------------------------------------------------

    async def set_enabled(self, name: str, enabled: bool) -> dict[str, Any]:
        """Ask a provider no more, or again, at all daemons and over restarts; what runs there goes on.

        Raises:
            NotFound: no provider of this name.
            StoreError: it cannot be kept, and nothing was changed.
        """
        self._member(name)
        await self._team.switch(name, enabled=enabled)
        return self._report(name)

    def _switch(self, name: str, enabled: bool) -> None:
        member = self._members[name]
        if member.enabled != enabled:
            member.enabled = enabled
            words = ("disabled", "enabled") if enabled else ("enabled", "disabled")
            self._changed(name, *words, "by an operator", None)

    async def reset(self, name: str) -> dict[str, Any]:
        """Forget a provider's failures and limits, and ask it again at once. Raises as `set_enabled`."""
        self._member(name)
        await self._team.reset(name)
        return self._report(name)

    def _member(self, name: str) -> Member:
        member = self._members.get(name)
        if name in self._switched_off:
            raise NotFound(
                f"provider {name!r} is switched off by `enabled = false` in ksi.toml; change that, then `ksi restart`",
                provider=name,
            )
        if member is None:
            guess = nearest(name, self._members)
            hint = f"; did you mean {guess!r}?" if guess else f"; there are: {', '.join(self._members)}"
            raise NotFound(f"no provider {name!r}{hint}", provider=name)
        return member

    # -- reports --------------------------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """What keeps providers from working, in sentences."""
        now = self._clock.now()
        found = []
        for name, member in self._members.items():
            problem = member.provider.problem()
            if problem:
                found.append(f"provider {name}: {problem}")
            if not member.enabled:
                found.append(f"provider {name}: an operator disabled it; `ksi providers enable {name}` asks it again")
            if member.breaker.state is BreakerState.OPEN:
                found.append(f"provider {name}: it failed too often; `ksi providers reset {name}` tries it now")
            found += [f"provider {name}: {sentence(limit, now.wall, _zone())}" for limit in member.limits]
        return found

    def report(self) -> dict[str, Any]:
        """Each provider as `completion:provider_status` shows it."""
        return {name: self._report(name) for name in self._members}

    def _report(self, name: str) -> dict[str, Any]:
        member, now = self._members[name], self._clock.now()
        until = member.breaker.open_until
        away = member.away_until(now)
        return {
            "kind": member.config.kind,
            "models": list(member.config.models),
            "priority": member.config.priority,
            "enabled": member.enabled,
            "max_concurrency": member.config.max_concurrency,
            "breaker": member.breaker.state.value,
            "open_until": None if until is None else until / MICROSECONDS,
            "parked_until": None if away is None or away >= NEVER else away / MICROSECONDS,
            "limits": [_limit_reply(limit, now) for limit in member.limits],
            "problem": member.provider.problem(),
            "own": member.provider.report() if isinstance(member.provider, ReportingProvider) else None,
            **member.health.report(),
        }

    def _stepped(self, name: str, change: Change) -> None:
        until = self._members[name].breaker.open_until
        shown = None if until is None else until / MICROSECONDS
        self._changed(name, change.before.value, change.after.value, change.reason, shown)

    def _changed(self, name: str, before: str, after: str, reason: str, until: float | None) -> None:
        self._offers = None
        self._log.warning("provider changed", provider=name, before=before, after=after, reason=reason)
        self._bus.publish(
            "provider:state_changed",
            ProviderPush(provider=name, before=before, after=after, reason=reason, until=until),
        )


def _in_vain(error: ProviderError) -> bool:
    """Whether a failed call leaves open whether its provider is healthy."""
    return error.retryable and is_providers_fault(error)


_FAILURES = {
    LimitCause.OUTAGE: FailureClass.NETWORK_ERROR,
    LimitCause.LOGIN: FailureClass.AUTHENTICATION,
    LimitCause.MODEL_GONE: FailureClass.MODEL_NOT_FOUND,
}

_ENDED = {
    LimitCause.QUOTA: "its quota is back",
    LimitCause.THROTTLE: "it takes calls as before",
    LimitCause.OUTAGE: "it can be reached",
    LimitCause.LOGIN: "somebody logged in",
    LimitCause.MODEL_GONE: "it has the model",
}


def _without_model(route: str, provider: str) -> str | None:
    """The steps of a route that ask another model than its step at `provider` does; None where there is none."""
    steps = parse_route(route)
    asked = next((step.model for step in steps if step.provider == provider), None)
    rest = [step.word for step in steps if step.model != asked]
    return ",".join(rest) or None


def _ahead_of(record: BreakerRecord, own: ProviderBreaker) -> BreakerRecord:
    """A record that was written before its breaker became half-open, where this daemon has seen that it did."""
    passed = record.era == own.era and own.state is BreakerState.HALF_OPEN and record.state is BreakerState.OPEN
    return msgspec.structs.replace(record, state=BreakerState.HALF_OPEN) if passed else record


def _limit_reply(limit: Limit, now: Moment) -> dict[str, Any]:
    return {
        "cause": limit.cause.value,
        "models": limit.models or None,
        "window": limit.window,
        "since": limit.since / MICROSECONDS,
        "until": _back(limit),
        "told": limit.told,
        "strikes": limit.strikes,
        "probes": None if limit.active(now.wall) else limit.probes,
        "reason": limit.reason,
        "sentence": sentence(limit, now.wall, _zone()),
    }


def _back(limit: Limit) -> float | None:
    """When it can be asked again, as Unix time; None where only a login can tell."""
    return None if limit.until >= NEVER else limit.until / MICROSECONDS


def _zone() -> Any:
    """The zone in which this machine's people read the clock."""
    return datetime.now().astimezone().tzinfo
