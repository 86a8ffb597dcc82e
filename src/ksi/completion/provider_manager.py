"""The configured providers at work: their order, their running calls, and their state."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Any

import msgspec
import structlog

from ksi.clock import MICROSECONDS, Clock, Moment
from ksi.completion.pause.pauses import Pause, Pauses, Scope
from ksi.completion.pool.abilities import Needs, unsupported
from ksi.completion.pool.breaker import BreakerRecord, BreakerState, Change, ProviderBreaker
from ksi.completion.pool.limits import NEVER, Hit, Limit, LimitCause, Limits, hit_of, sentence
from ksi.completion.pool.login_watch import LoginWatch
from ksi.completion.pool.member import Member, caller_of
from ksi.completion.pool.record import LONGEST_REASON, Seen
from ksi.completion.pool.routes import Router, Step, parse_route, tried
from ksi.completion.pool.team import Team, View
from ksi.completion.retry_manager import is_providers_fault
from ksi.config.schema import Config
from ksi.errors import FailureClass, NotFound, ProviderError
from ksi.events.bus import EventBus
from ksi.events.providers import ProviderPush
from ksi.events.reports import LimitReport, ProviderReport
from ksi.host.supervise import Supervised
from ksi.protocol import nearest
from ksi.providers.base import AskingProvider, LoginProvider, Provider, ReportingProvider, bare_model
from ksi.request import Attempt, Outcome, Priority
from ksi.store.values import Claimed, Offer, Paused

_NEVER = 2**63

CLOCKS_DIFFER = MICROSECONDS
"""A time that moves by less was read off two clocks, and means the same."""


class CallEnd(msgspec.Struct, frozen=True):
    """The consequence of a call's end for its request."""

    away: bool = False
    """True if the provider is limited or cannot be reached: the request waits, and uses no attempt."""
    probe: bool = False
    """True if it was sent in vain to try a provider that failed, or was away, before. It is never the last attempt."""

    @property
    def uncounted(self) -> bool:
        """Return whether it uses no attempt of its request."""
        return self.away or self.probe


def _nothing() -> None:
    """Stands for `on_change` until a listener is set."""


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
        self.pauses = Pauses()
        """The pauses that operators set; see `hold_back`."""
        self._offers: tuple[Offer, ...] | None = None
        self._offers_until = Moment(0, 0)
        self._timed = any(m.requests is not None or m.tokens is not None for m in self._members.values())
        self._lifted: set[str] = set()
        self._used_up: dict[str, int] = {}
        """Providers whose budget is used up, and the wall time at which it is reset."""
        self._log = structlog.get_logger("ksi.providers")
        self.on_change: Callable[[], None] = _nothing

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start all providers.

        Raises:
            StoreError: their state cannot be read.
        """
        await self._team.start()
        for name, member in self._members.items():
            await member.provider.start()
            problem = member.provider.problem()
            if problem:
                self._log.warning("provider has a problem", provider=name, problem=problem)

    async def refresh(self) -> None:
        """Go by the records as they are in the store now.

        Raises:
            StoreError: they cannot be read.
        """
        await self._team.refresh()

    async def stop(self) -> None:
        """Stop all providers, each whatever the others do."""
        await self._logins.stop()
        for name, member in self._members.items():
            try:
                await member.provider.stop()
            except Exception:  # noqa: BLE001 - the others must be stopped all the same
                self._log.exception("provider did not stop", provider=name)
        await self._team.stop()

    def tasks(self) -> list[Supervised]:
        """The supervised tasks."""
        return [self._team.task]

    def __getitem__(self, name: str) -> Provider:
        """A provider by its name."""
        return self._members[name].provider

    # -- routes and offers ----------------------------------------------------------------------------------------

    def route(self, model: str, *, mcp: bool = False, needs: Needs | None = None) -> str:
        """The route of a model, offered from now on; see `Router.route`.

        With `needs` it uses providers that support the request's features.

        A provider that is known not to have the model is left out while another one may have it.

        Raises:
            UnknownModel: no provider serves it.
            InvalidData: none that serves it takes MCP servers, and `mcp` asks for one that does.
            Unsupported: none of them supports the request's features.
        """
        route = self._router.route(model, mcp=mcp)
        if needs is not None:
            route = self._able(route, model, needs)
        if any(member.limits for member in self._members.values()):
            route = self._without_gone(route, model)
        if route not in self._routes:
            self.know([route])
        return route

    def _able(self, route: str, model: str, needs: Needs) -> str:
        """The steps whose providers support the needed features; all, if these may be left out."""
        steps = [step for step in parse_route(route) if step.provider in self._members]
        lacking = {step.provider: needs.missing(self[step.provider].capabilities) for step in steps}
        able = ",".join(step.word for step in steps if not lacking[step.provider])
        if not able and steps and not needs.droppable:
            raise unsupported(model, lacking)
        return able or route

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
        """Return the offers of claims now: each route with its first provider that can be asked.

        One that is only being probed takes its probes and delays no request: the next one is offered with it.
        """
        until = self._offers_until
        if self._offers is None or self._timed or now.mono >= until.mono or now.wall >= until.wall:
            self._tick(now)
            wait = self.next_change(now)
            self._offers_until = now.after_us(_NEVER if wait is None else wait)
            routes = () if self.pauses.find(Scope.ALL, "", now.wall) else self._routes.items()
            self._offers = tuple(offer for route, steps in routes for offer in self._offers_of(route, steps, now))
        return self._offers

    def _offers_of(self, route: str, steps: Sequence[Step], now: Moment) -> Iterator[Offer]:
        with_room = [step for step in steps if self._used_up.get(step.provider, 0) <= now.wall]
        offered: set[str] = set()
        # Without another that can be asked they wait for the budget.
        for step in [*with_room, *(step for step in steps if step not in with_room)]:
            member = self._members.get(step.provider)
            if member is None or step.provider in offered or not self._usable(step.provider, member, now):
                continue
            by_node = member.provider.capabilities.process
            yield Offer(route, step.provider, member.limit(now), by_node, member.terms)
            offered.add(step.provider)
            if member.healthy:
                return

    def use_up(self, named: str, until: int) -> bool:
        """A budget of this provider, or of all whose names begin so (`name*`), is used up until a wall time: another of
        a route is offered in its place. True if that is news."""
        names = [name for name in self._members if fnmatchcase(name, named)]
        news = [name for name in names if self._used_up.get(name, 0) < until]
        self._used_up.update(dict.fromkeys(news, until))
        self._offers = None if news else self._offers
        return bool(news)

    def refill(self) -> None:
        """Budgets were changed: no provider is known to have used up its own."""
        self._used_up.clear()
        self._offers = None

    async def let_go(self, conversation: str) -> None:
        """End the programs that wait for a person's answer in a conversation."""
        for member in self._members.values():
            if member.provider.capabilities.asks and isinstance(member.provider, AskingProvider):
                await member.provider.let_go(conversation)

    def slots(self, provider: str) -> int:
        """The number of calls that a provider takes at once."""
        return self._members[provider].config.max_concurrency

    def lend(self, provider: str, lent: int) -> None:
        """Offer this many slots in addition to a provider's own: runs that wait for other requests gave them back."""
        member = self._members[provider]
        if member.lent != lent:
            member.lent = lent
            self._offers = None
            self.on_change()

    def others(self, route: str, provider: str, asked: str, now: Moment, *, other_model: bool = False) -> str | None:
        """A route whose `provider` failed for the model `asked`, if one that was not tried since the last wait can be
        asked; with `other_model`, one of a fallback model alone."""
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
        return member is not None and self._usable(step.provider, member, now) and member.away(model, now) is None

    def _usable(self, name: str, member: Member, now: Moment) -> bool:
        """Return whether calls may begin at a provider now."""
        return member.usable(now) and self.pauses.find(Scope.PROVIDER, name, now.wall) is None

    def back(self, route: str, asked: str, now: Moment) -> int | None:
        """Return the wall time at which a route's first provider can be asked again; None if no time is known."""
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
        """The routes of providers whose limits were lifted since the last look: their parked requests are due."""
        lifted, self._lifted = self._lifted, set()
        return list(dict.fromkeys(route for name in sorted(lifted) for route in self.routes_of(name)))

    # -- pauses ---------------------------------------------------------------------------------------------------

    def hold_back(self, pauses: Pauses) -> None:
        """Go by these pauses."""
        self.pauses = pauses
        self._offers = None
        self.on_change()

    def paused(self, now: Moment) -> Paused:
        """The requests that must not be started at any provider."""
        return self.pauses.paused(now.wall)

    def why_paused(self, agent_id: str | None, conversation: str, priority: Priority) -> str | None:
        """Describe the pause that keeps such a request from starting; None if there is none."""
        pause = self.pauses.of(agent_id, conversation, priority, self._clock.now().wall)
        return None if pause is None else self._sentence(pause)

    def _sentence(self, pause: Pause) -> str:
        return pause.sentence(self._clock.now().wall, _zone())

    def check_name(self, name: str) -> None:
        """See that there is such a provider.

        Raises:
            NotFound: there is none.
        """
        self._member(name)

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
        """A call is over: count it, and apply its outcome to the provider's breaker.

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
            member.answered(call.model, now)
            self._team.saw(name, seen)
        elif error is not None:
            hit = hit_of(error, call.model, now, login_may_return=self._login_may_return(member, worked=worked))
            if hit is not None and _may_be_the_models(hit) and self._has_alternative(member, claim, call.model, now):
                hit = msgspec.structs.replace(hit, models=glob.escape(call.model))
            reason = error.message[:LONGEST_REASON]
            if hit is not None:
                self._team.saw(name, msgspec.structs.replace(seen, hit=msgspec.structs.replace(hit, reason=reason)))
            elif not is_providers_fault(error):
                self._team.saw(name, msgspec.structs.replace(seen, neutral=True))
            elif not own_limit and (not member.failed_before(claim.request_id) or call.probe):
                self._team.saw(name, msgspec.structs.replace(seen, failed=True, reason=reason))
        away = hit is not None and hit.cause is not LimitCause.MODEL_GONE
        return CallEnd(away, call.probe and not away and error is not None and _in_vain(error))

    def _has_alternative(self, member: Member, claim: Claimed, model: str, now: Moment) -> bool:
        """Return whether the provider serves other models, lately or by this request's route.

        If so, a limit that names nothing may hold for one model alone.
        """
        steps = parse_route(claim.route)
        routed = {step.model for step in steps if step.provider == claim.provider}
        return len(routed) > 1 or member.serves_others(model, now)

    def _login_may_return(self, member: Member, *, worked: bool) -> bool:
        """Return whether requests wait for a login.

        A program's login can come back at any time. A key that never worked cannot.
        """
        provider = member.provider
        return isinstance(provider, LoginProvider) and (provider.capabilities.process or worked)

    # -- state --------------------------------------------------------------------------------------------------------

    def _see(self, name: str, view: View) -> None:
        """Apply a provider's shared state, and report the changes for this daemon."""
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
        self._switch(name, view)
        self.on_change()

    def _compare(self, name: str, before: Limits, after: Limits, now: Moment, *, reset: bool) -> None:
        """Report new and lifted limits, and note the requests that waited for them; a reset begins a new era."""
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
        """The store let no call begin at these providers: the values are microseconds until it does."""
        for name, wait in provider_waits.items():
            self._members[name].waits_until = now.mono + wait

    def _tick(self, now: Moment) -> None:
        """Let breakers whose time is over become half-open."""
        for name, member in self._members.items():
            change = member.breaker.tick(now.wall)
            if change is not None:
                self._stepped(name, change)

    def next_change(self, now: Moment) -> int | None:
        """Return the microseconds until time alone lets more calls run; None if it never does."""
        waits = [wait for member in self._members.values() if (wait := member.wait(now)) is not None]
        end = self.pauses.ends_next(now.wall)
        waits += [until - now.wall for until in self._used_up.values() if until > now.wall]
        return min(waits if end is None else [*waits, end - now.wall], default=None)

    # -- the operator ---------------------------------------------------------------------------------------------

    async def set_enabled(self, name: str, enabled: bool, *, by: str = "", why: str = "") -> ProviderReport:
        """Disable or enable a provider at all daemons and across restarts; running requests continue. `by` and `why`
        are the operator and the reason.

        Raises:
            NotFound: no provider of this name.
            StoreError: it cannot be kept, and nothing was changed.
        """
        self._member(name)
        await self._team.switch(name, enabled=enabled, by=by, why=why)
        return self._report(name)

    def _switch(self, name: str, view: View) -> None:
        member = self._members[name]
        before, member.enabled, member.off = member.enabled, view.enabled, view.off
        if before != member.enabled:
            words = ("disabled", "enabled") if member.enabled else ("enabled", "disabled")
            reason = "by an operator" if member.off is None else member.off.reason
            self._changed(name, *words, reason, None)

    def _disabled(self, name: str) -> str | None:
        """Say who disabled a provider and why; None if it is enabled."""
        member = self._members[name]
        if member.enabled:
            return None
        off = member.off
        return f"provider {name} is disabled" if off is None else off.sentence(name, self._clock.now().wall, _zone())

    async def reset(self, name: str) -> ProviderReport:
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
        """Return the providers' problems as sentences."""
        now = self._clock.now()
        found = []
        for name, member in self._members.items():
            problem = member.provider.problem()
            if problem:
                found.append(f"provider {name}: {problem}")
            if (disabled := self._disabled(name)) is not None:
                found.append(f"{disabled}; `ksi providers enable {name}` asks it again")
            if member.breaker.state is BreakerState.OPEN:
                found.append(f"provider {name}: it failed too often; `ksi providers reset {name}` tries it now")
            found += [f"provider {name}: {sentence(limit, now.wall, _zone())}" for limit in member.limits]
        return found

    def report(self) -> dict[str, ProviderReport]:
        """Each provider as `completion:provider_status` shows it."""
        return {name: self._report(name) for name in self._members}

    def _report(self, name: str) -> ProviderReport:
        member, now = self._members[name], self._clock.now()
        until = member.breaker.open_until
        away = member.away_until(now)
        pause = self.pauses.find(Scope.ALL, "", now.wall) or self.pauses.find(Scope.PROVIDER, name, now.wall)
        return ProviderReport(
            kind=member.config.kind,
            models=list(member.config.models),
            priority=member.config.priority,
            enabled=member.enabled,
            disabled=self._disabled(name),
            paused=None if pause is None else self._sentence(pause),
            max_concurrency=member.config.max_concurrency,
            breaker=member.breaker.state.value,
            open_until=None if until is None else until / MICROSECONDS,
            parked_until=None if away is None or away >= NEVER else away / MICROSECONDS,
            limits=[_limit_reply(limit, now) for limit in member.limits],
            problem=member.provider.problem(),
            own=member.provider.report() if isinstance(member.provider, ReportingProvider) else None,
            **member.health.report(),
        )

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


def _may_be_the_models(hit: Hit) -> bool:
    """Return whether a limit that names nothing can hold for one model alone."""
    return hit.cause in (LimitCause.THROTTLE, LimitCause.QUOTA) and not hit.models and hit.window is None


def _in_vain(error: ProviderError) -> bool:
    """Return whether a failed call leaves open whether its provider is healthy."""
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
    LimitCause.LOGIN: "the login was renewed",
    LimitCause.MODEL_GONE: "it has the model",
}


def _without_model(route: str, provider: str) -> str | None:
    """The steps of a route that ask another model than its step at `provider`; None if there is none."""
    steps = parse_route(route)
    asked = next((step.model for step in steps if step.provider == provider), None)
    rest = [step.word for step in steps if step.model != asked]
    return ",".join(rest) or None


def _ahead_of(record: BreakerRecord, own: ProviderBreaker) -> BreakerRecord:
    """A record that was written before its breaker became half-open, if this daemon has seen that."""
    passed = record.era == own.era and own.state is BreakerState.HALF_OPEN and record.state is BreakerState.OPEN
    return msgspec.structs.replace(record, state=BreakerState.HALF_OPEN) if passed else record


def _limit_reply(limit: Limit, now: Moment) -> LimitReport:
    return LimitReport(
        cause=limit.cause.value,
        models=limit.models or None,
        window=limit.window,
        since=limit.since / MICROSECONDS,
        until=_back(limit),
        told=limit.told,
        strikes=limit.strikes,
        probes=None if limit.active(now.wall) else limit.probes,
        reason=limit.reason,
        sentence=sentence(limit, now.wall, _zone()),
    )


def _back(limit: Limit) -> float | None:
    """Return the Unix time at which it can be asked again; None if that depends on a login."""
    return None if limit.until >= NEVER else limit.until / MICROSECONDS


def _zone() -> Any:
    """The zone in which this machine's people read the clock."""
    return datetime.now().astimezone().tzinfo
