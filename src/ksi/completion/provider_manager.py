"""The configured providers at work: who is asked next, how many calls may run, and how each one is doing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import msgspec
import structlog

from ksi.clock import MICROSECONDS, Clock, Moment
from ksi.completion.provider_breaker import BreakerRecord, BreakerState, Change, ProviderBreaker
from ksi.completion.provider_health import Health
from ksi.completion.provider_record import LONGEST_REASON, Seen
from ksi.completion.provider_team import Team, View
from ksi.completion.rate_limit import Bucket
from ksi.completion.retry_manager import is_providers_fault, is_quota, told_wait
from ksi.completion.routes import Router, Step, parse_route, tried
from ksi.config import BreakerConfig, Config, ProviderConfig, options_of
from ksi.errors import ConfigError, FailureClass, NotFound, ProviderError
from ksi.event_bus import EventBus
from ksi.event_types import ProviderPush
from ksi.protocol import nearest
from ksi.providers.base import Provider, ReportingProvider, Setting
from ksi.request import Attempt, Outcome
from ksi.store.values import Claimed, Offer, Terms

_NEVER = 2**63

BYTES_PER_TOKEN = 3.5
"""For the rate limit's first guess, put right when the call is over."""


class _Member:
    """One provider with all that is kept about it."""

    def __init__(
        self, config: ProviderConfig, provider: Provider, breaker: BreakerConfig, now: int, *, shared: bool
    ) -> None:
        self.config = config
        self.shared = shared
        """Whether other daemons ask it too: then the store counts probes and what begins in a minute."""
        self.provider = provider
        self.health = Health()
        self.breaker = ProviderBreaker(breaker)
        self.parked = False
        """Whether it was told that it is away."""
        self.eras: dict[int, int] = {}
        """Of the calls that run, by fence: when each began, as the breaker counts time."""
        self.enabled = True
        per_minute = (None, None) if shared else (config.requests_per_minute, config.tokens_per_minute)
        self.requests, self.tokens = (Bucket(limit, now) if limit else None for limit in per_minute)
        self.version = 0
        """Of the record that all daemons share."""
        self.waits_until = 0
        """When the store lets a call begin again."""
        self._trying = Terms(breaker.probes, config.requests_per_minute, config.tokens_per_minute)
        limited = config.requests_per_minute or config.tokens_per_minute
        self._usual = msgspec.structs.replace(self._trying, probes=None) if limited else None

    @property
    def terms(self) -> Terms | None:
        """What the store is to keep of it for all daemons."""
        if not self.shared:
            return None
        if self.breaker.state is not BreakerState.HALF_OPEN:
            return self._usual
        # A machine's own breaker shares its record with those of other machines, whose changes are nothing to it.
        known = None if self.provider.capabilities.process else self.version
        return msgspec.structs.replace(self._trying, known=known)

    def usable(self, now: int) -> bool:
        """Whether it is asked at all, a slot or a rate limit aside."""
        return self.enabled and self.breaker.limit(now, 1) > 0

    def limit(self, now: int) -> int:
        """How many calls may run at once."""
        if self.shared:
            return self.config.max_concurrency if self.usable(now) else 0
        limit = self.breaker.limit(now, self.config.max_concurrency)
        if self.requests is not None:
            limit = min(limit, self.health.running + int(self.requests.level(now)))
        if self.tokens is not None and self.tokens.level(now) < 1:
            limit = min(limit, self.health.running)
        return limit

    def next_change(self, now: int) -> int | None:
        """When more may run than now, by time alone."""
        times = [self.breaker.next_change(now), self.waits_until if self.waits_until > now else None]
        if self.requests is not None and self.requests.level(now) < 1:
            times.append(self.requests.full_enough(1, now))
        if self.tokens is not None and self.tokens.level(now) < 1:
            times.append(self.tokens.full_enough(1, now))
        return max((t for t in times if t is not None), default=None)


class ProviderManager:
    """Routes' offers, slots, breakers and records."""

    def __init__(
        self,
        config: Config,
        providers: Mapping[str, Provider],
        router: Router,
        bus: EventBus,
        clock: Clock,
        team: Team | None = None,
    ) -> None:
        now = clock.now().mono
        shared = team is not None
        self._members = {
            name: _Member(config.providers[name], provider, config.breaker, now, shared=shared)
            for name, provider in providers.items()
        }
        self._team = team
        if team is not None:
            team.on_view = self._see
        self._switched_off = frozenset(config.providers) - self._members.keys()
        self._router = router
        self._bus = bus
        self._clock = clock
        self._routes: dict[str, tuple[Step, ...]] = {}
        self._orphans: set[str] = set()
        self._offers: tuple[Offer, ...] | None = None
        self._offers_until = 0
        self._timed = any(m.requests is not None or m.tokens is not None for m in self._members.values())
        self._log = structlog.get_logger("ksi.providers")

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start all providers.

        Raises:
            StoreError: what other daemons know of them cannot be read.
        """
        if self._team is not None:
            await self._team.start()
        for name, member in self._members.items():
            await member.provider.start()
            problem = member.provider.problem()
            if problem:
                self._log.warning("provider has a problem", provider=name, problem=problem)

    async def stop(self) -> None:
        """Stop all providers, each whatever the others do."""
        for name, member in self._members.items():
            try:
                await member.provider.stop()
            except Exception:  # noqa: BLE001 - the others must be stopped all the same
                self._log.exception("provider did not stop", provider=name)
        if self._team is not None:
            await self._team.stop()

    def tasks_alive(self) -> dict[str, bool]:
        """The long-lived tasks, and whether each runs."""
        return {} if self._team is None else {"ksi-providers": self._team.alive}

    def __getitem__(self, name: str) -> Provider:
        """A provider by its name."""
        return self._members[name].provider

    # -- routes and offers ----------------------------------------------------------------------------------------

    def route(self, model: str, *, mcp: bool = False) -> str:
        """The route of a model, offered from now on; see `Router.route`.

        Raises:
            UnknownModel: no provider serves it.
            InvalidData: none that serves it takes MCP servers, and `mcp` asks for one that does.
        """
        route = self._router.route(model, mcp=mcp)
        if route not in self._routes:
            self.know([route])
        return route

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

        One that is only being tried again takes its probes and holds up nobody: the next one is offered with it.
        """
        if self._offers is None or self._timed or now.mono >= self._offers_until:
            self._tick(now)
            self._offers_until = self.next_change(now) or _NEVER
            self._offers = tuple(
                offer for route, steps in self._routes.items() for offer in self._offers_of(route, steps, now.mono)
            )
        return self._offers

    def _offers_of(self, route: str, steps: Sequence[Step], now: int) -> Iterator[Offer]:
        offered: set[str] = set()
        for step in steps:
            member = self._members.get(step.provider)
            if member is None or step.provider in offered or not member.usable(now):
                continue
            by_node = member.provider.capabilities.process
            yield Offer(route, step.provider, member.limit(now), by_node, member.terms)
            offered.add(step.provider)
            if member.breaker.state is BreakerState.CLOSED:
                return

    def others(self, route: str, provider: str, now: Moment) -> str | None:
        """A route whose `provider` failed, where one that was not tried since the last wait can be asked."""
        rest = tried(route, provider)
        fresh = (self._members.get(step.provider) for step in parse_route(rest) if not step.tried)
        if not any(member is not None and member.usable(now.mono) for member in fresh):
            return None
        if rest not in self._routes:
            self.know([rest])
        return rest

    def back(self, route: str, now: Moment) -> int | None:
        """When the first provider of a route can be asked again, as wall time; None where no time is known."""
        times = []
        for step in parse_route(route):
            member = self._members.get(step.provider)
            if member is not None and member.enabled:
                times.append(member.breaker.next_change(now.mono) or now.mono)
        return now.wall + min(times) - now.mono if times else None

    def routes_of(self, provider: str) -> list[str]:
        """The known routes that a provider is in."""
        return [route for route, steps in self._routes.items() if any(step.provider == provider for step in steps)]

    def orphans(self, waiting: Mapping[str, int]) -> list[str]:
        """Routes with waiting requests that no configured provider serves any more."""
        return sorted(route for route in self._orphans if waiting.get(route))

    # -- calls ----------------------------------------------------------------------------------------------------

    def began(self, claim: Claimed) -> None:
        """A call goes out."""
        member = self._members[claim.provider]
        member.health.running += 1
        member.eras[claim.fence] = member.breaker.began()
        if member.requests is not None or member.tokens is not None:
            now = self._clock.now().mono
            if member.requests is not None:
                member.requests.take(1, now)
            if member.tokens is not None:
                member.tokens.take(_guess(claim), now)

    def ended(self, claim: Claimed, attempt: Attempt, error: ProviderError | None, now: Moment) -> None:
        """A call is over: count it, and let the breaker judge. Faults of the request are none of the provider's."""
        name, member = claim.provider, self._members[claim.provider]
        era = member.eras.pop(claim.fence)
        member.health.running -= 1
        member.health.ended(attempt)
        if member.tokens is not None and attempt.usage is not None:
            used = attempt.usage.input_tokens + attempt.usage.output_tokens
            member.tokens.take(used - _guess(claim), now.mono)
        if self._team is not None:
            member.breaker.dropped(era)
            self._tell(self._team, name, era, attempt, error, now)
            return
        change = None
        if attempt.outcome is Outcome.COMPLETED:
            change = member.breaker.succeeded(now.mono, era)
        elif error is not None and _counts(error):
            change = member.breaker.failed(now.mono, era, error.message)
        else:
            member.breaker.dropped(era)
        if error is not None and is_quota(error):
            self._park(name, error, now)
        if change is not None:
            self._stepped(name, change, now)

    def _park(self, name: str, error: ProviderError, now: Moment) -> None:
        """A provider said when its quota is back: it is not asked before (F5)."""
        member = self._members[name]
        self._offers = None
        if member.breaker.park(now.mono, now.after(told_wait(error)).mono, error.message):
            self._tell_parked(name, now)

    def _tell_parked(self, name: str, now: Moment) -> None:
        """Say that a provider is away by its own word, where that was not said yet."""
        member = self._members[name]
        if not member.parked:
            member.parked = True
            back = _wall(member.breaker.parked_until(now.mono), now)
            self._changed(name, member.breaker.state.value, "parked", member.breaker.parked_because, back)

    # -- other daemons --------------------------------------------------------------------------------------------

    def _tell(
        self, team: Team, name: str, era: int, attempt: Attempt, error: ProviderError | None, now: Moment
    ) -> None:
        """Have a call judged together with those of other daemons."""
        if attempt.outcome is Outcome.COMPLETED:
            team.saw(name, Seen(now.mono, era))
        elif error is not None:
            reason = error.message[:LONGEST_REASON]
            if _counts(error):
                team.saw(name, Seen(now.mono, era, failed=True, reason=reason))
            elif is_quota(error):
                team.saw(name, Seen(now.mono, era, reason=reason, quota=now.after(told_wait(error)).mono))

    def _see(self, name: str, view: View) -> None:
        """Go by what the daemons know together, and say what changed for this one."""
        member, now = self._members[name], self._clock.now()
        before = member.breaker.state
        member.version = view.version
        member.breaker.adopt(_ahead_of(view.breaker, member.breaker))
        member.breaker.tick(now.mono)
        self._offers = None
        if member.breaker.state is not before:
            self._stepped(name, Change(before, member.breaker.state, view.breaker.reason), now)
        if member.breaker.parked_until(now.mono) is not None:
            self._tell_parked(name, now)
        elif member.parked:
            member.parked = False
            self._changed(name, "parked", member.breaker.state.value, view.breaker.parked_because, None)
        self._switch(name, view.enabled)

    def waits(self, provider_waits: Mapping[str, int], now: Moment) -> None:
        """The store let no call begin at these providers: so many microseconds until it lets one."""
        for name, wait in provider_waits.items():
            self._members[name].waits_until = now.mono + wait

    def _tick(self, now: Moment) -> None:
        """Let breakers whose time alone is over try again, and ask those whose quota is back."""
        for name, member in self._members.items():
            change = member.breaker.tick(now.mono)
            if change is not None:
                self._stepped(name, change, now)
            if member.parked and member.breaker.parked_until(now.mono) is None:
                member.parked = False
                self._changed(name, "parked", member.breaker.state.value, "its quota should be back", None)

    def next_change(self, now: Moment) -> int | None:
        """When time alone lets more run, as a monotonic time."""
        times = (member.next_change(now.mono) for member in self._members.values())
        return min((t for t in times if t is not None), default=None)

    # -- the operator ---------------------------------------------------------------------------------------------

    async def set_enabled(self, name: str, enabled: bool) -> dict[str, Any]:
        """Ask a provider no more, or again, at all daemons; what runs there goes on.

        Raises:
            NotFound: no provider of this name.
            StoreError: the other daemons cannot be told, and nothing was changed.
        """
        self._member(name)
        if self._team is not None:
            await self._team.switch(name, enabled=enabled)
        else:
            self._switch(name, enabled)
        return self._report(name)

    def _switch(self, name: str, enabled: bool) -> None:
        member = self._members[name]
        if member.enabled != enabled:
            member.enabled = enabled
            words = ("disabled", "enabled") if enabled else ("enabled", "disabled")
            self._changed(name, *words, "by an operator", None)

    async def reset(self, name: str) -> dict[str, Any]:
        """Forget a provider's failures, and ask it again at once. Raises as `set_enabled`."""
        member, now = self._member(name), self._clock.now()
        if self._team is not None:
            await self._team.reset(name)
            return self._report(name)
        change = member.breaker.reset()
        self._offers = None
        if change is not None:
            self._stepped(name, change, now)
        if member.parked:
            member.parked = False
            self._changed(name, "parked", member.breaker.state.value, member.breaker.parked_because, None)
        return self._report(name)

    def _member(self, name: str) -> _Member:
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
        now = self._clock.now().mono
        found = []
        for name, member in self._members.items():
            problem = member.provider.problem()
            if problem:
                found.append(f"provider {name}: {problem}")
            if member.breaker.state is BreakerState.OPEN:
                found.append(
                    f"provider {name}: failed too often, left alone; `ksi providers reset {name}` tries it now"
                )
            if member.breaker.parked_until(now) is not None:
                found.append(f"provider {name}: its quota is spent, parked until it returns")
        return found

    def report(self) -> dict[str, Any]:
        """Each provider as `completion:provider_status` shows it."""
        return {name: self._report(name) for name in self._members}

    def _report(self, name: str) -> dict[str, Any]:
        member, now = self._members[name], self._clock.now()
        return {
            "kind": member.config.kind,
            "models": list(member.config.models),
            "priority": member.config.priority,
            "enabled": member.enabled,
            "max_concurrency": member.config.max_concurrency,
            "breaker": member.breaker.state.value,
            "open_until": self._open_until(member, now),
            "parked_until": _wall(member.breaker.parked_until(now.mono), now),
            "problem": member.provider.problem(),
            "own": member.provider.report() if isinstance(member.provider, ReportingProvider) else None,
            **member.health.report(),
        }

    def _open_until(self, member: _Member, now: Moment) -> float | None:
        is_open = member.breaker.state is BreakerState.OPEN
        return _wall(member.breaker.next_change(now.mono), now) if is_open else None

    def _stepped(self, name: str, change: Change, now: Moment) -> None:
        until = self._open_until(self._members[name], now)
        self._changed(name, change.before.value, change.after.value, change.reason, until)

    def _changed(self, name: str, before: str, after: str, reason: str, until: float | None) -> None:
        self._offers = None
        self._log.warning("provider changed", provider=name, before=before, after=after, reason=reason)
        self._bus.publish(
            "provider:state_changed",
            ProviderPush(provider=name, before=before, after=after, reason=reason, until=until),
        )


def _counts(error: ProviderError) -> bool:
    """Whether a failed call is one that the breaker judges the provider by."""
    return is_providers_fault(error) and error.failure is not FailureClass.RATE_LIMITED


def _ahead_of(record: BreakerRecord, own: ProviderBreaker) -> BreakerRecord:
    """A record that was written before its time alone was over, where this daemon has seen the end of it."""
    passed = record.era == own.era and own.state is BreakerState.HALF_OPEN and record.state is BreakerState.OPEN
    return msgspec.structs.replace(record, state=BreakerState.HALF_OPEN) if passed else record


def _guess(claim: Claimed) -> float:
    return len(claim.body) / BYTES_PER_TOKEN


def _wall(mono: int | None, now: Moment) -> float | None:
    """A monotonic time as seconds of wall time, for the eye."""
    return None if mono is None else (now.wall + mono - now.mono) / MICROSECONDS


def build_providers(config: Config, environ: Mapping[str, str], clock: Clock) -> dict[str, Provider]:
    """Make the enabled providers of a configuration; each kind is a module of `ksi.providers`.

    Raises:
        ConfigError: an unknown kind, or options that the kind does not take.
    """
    built: dict[str, Provider] = {}
    for name, entry in config.providers.items():
        if not entry.enabled:
            continue
        module = f"ksi.providers.{entry.kind.replace('-', '_')}"
        if not entry.kind.replace("-", "_").isidentifier() or find_spec(module) is None:
            raise ConfigError(f"providers.{name}: no provider kind {entry.kind!r}", place=f"providers.{name}.kind")
        kind = import_module(module)
        if not hasattr(kind, "build"):
            raise ConfigError(f"providers.{name}: no provider kind {entry.kind!r}", place=f"providers.{name}.kind")
        setting = Setting(
            name=name,
            clock=clock,
            home=config.home,
            log_dir=config.log_dir,
            environ=environ,
            max_concurrency=entry.max_concurrency,
            timeout=config.limits.timeout,
            idle_timeout=config.limits.idle_timeout,
        )
        built[name] = kind.build(setting, options_of(entry, kind.Options, name, environ))
    return built
