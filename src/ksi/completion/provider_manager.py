"""The configured providers at work: who is asked next, how many calls may run, and how each one is doing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import structlog

from ksi.clock import MICROSECONDS, Clock, Moment
from ksi.completion.provider_breaker import BreakerState, Change, ProviderBreaker
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
from ksi.store.values import Claimed, Offer

KEPT_SAMPLES = 1_000
"""Calls whose times make up the percentiles."""

_NEVER = 2**63

BYTES_PER_TOKEN = 3.5
"""For the rate limit's first guess, put right when the call is over."""


class Health:
    """One provider's record since the daemon started (F6)."""

    def __init__(self) -> None:
        self.running = 0
        self._calls = 0
        self._outcomes: dict[str, int] = {}
        self._last_error: dict[str, Any] | None = None
        self._latencies: deque[int] = deque(maxlen=KEPT_SAMPLES)
        self._first_tokens: deque[int] = deque(maxlen=KEPT_SAMPLES)

    def ended(self, attempt: Attempt) -> None:
        """A call is over; what was stopped from outside says nothing about the provider."""
        if attempt.outcome is Outcome.COMPLETED:
            self._count("completed")
            self._latencies.append(attempt.finished_at - attempt.started_at)
            if attempt.first_token_us is not None:
                self._first_tokens.append(attempt.first_token_us)
        elif attempt.outcome in (Outcome.FAILED, Outcome.PARKED):
            self._count(attempt.error or "failed")
            self._last_error = {
                "code": attempt.error,
                "message": attempt.message,
                "at": attempt.finished_at / MICROSECONDS,
            }

    def _count(self, outcome: str) -> None:
        self._calls += 1
        self._outcomes[outcome] = self._outcomes.get(outcome, 0) + 1

    def report(self) -> dict[str, Any]:
        """The figures; times in milliseconds."""
        good = self._outcomes.get("completed", 0)
        return {
            "running": self.running,
            "calls": self._calls,
            "failures": self._calls - good,
            "outcomes": dict(self._outcomes),
            "success_rate": round(good / self._calls, 4) if self._calls else None,
            "latency_ms": _percentiles(self._latencies),
            "time_to_first_token_ms": _percentiles(self._first_tokens),
            "last_error": self._last_error,
        }


class _Member:
    """One provider with all that is kept about it."""

    def __init__(self, config: ProviderConfig, provider: Provider, breaker: BreakerConfig, now: int) -> None:
        self.config = config
        self.provider = provider
        self.health = Health()
        self.breaker = ProviderBreaker(breaker)
        self.parked = False
        """Whether it was told that it is away."""
        self.eras: dict[int, int] = {}
        """Of the calls that run, by fence: when each began, as the breaker counts time."""
        self.enabled = True
        self.requests = Bucket(config.requests_per_minute, now) if config.requests_per_minute else None
        self.tokens = Bucket(config.tokens_per_minute, now) if config.tokens_per_minute else None

    def usable(self, now: int) -> bool:
        """Whether it is asked at all, a slot or a rate limit aside."""
        return self.enabled and self.breaker.limit(now, 1) > 0

    def limit(self, now: int) -> int:
        """How many calls may run at once."""
        limit = self.breaker.limit(now, self.config.max_concurrency)
        if self.requests is not None:
            limit = min(limit, self.health.running + int(self.requests.level(now)))
        if self.tokens is not None and self.tokens.level(now) < 1:
            limit = min(limit, self.health.running)
        return limit

    def next_change(self, now: int) -> int | None:
        """When more may run than now, by time alone."""
        times = [self.breaker.next_change(now)]
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
    ) -> None:
        now = clock.now().mono
        self._members = {
            name: _Member(config.providers[name], provider, config.breaker, now) for name, provider in providers.items()
        }
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
        """Start all providers."""
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
            yield Offer(route, step.provider, member.limit(now), by_node)
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
        change = None
        if attempt.outcome is Outcome.COMPLETED:
            change = member.breaker.succeeded(now.mono, era)
        elif error is not None and is_providers_fault(error) and error.failure is not FailureClass.RATE_LIMITED:
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
        if member.breaker.park(now.mono, now.after(told_wait(error)).mono) and not member.parked:
            member.parked = True
            back = member.breaker.parked_until(now.mono)
            self._changed(name, member.breaker.state.value, "parked", error.message, _wall(back, now))

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

    def set_enabled(self, name: str, enabled: bool) -> dict[str, Any]:
        """Ask a provider no more, or again; what runs there goes on.

        Raises:
            NotFound: no provider of this name.
        """
        member = self._member(name)
        if member.enabled != enabled:
            member.enabled = enabled
            words = ("disabled", "enabled") if enabled else ("enabled", "disabled")
            self._changed(name, *words, "by an operator", None)
        return self._report(name)

    def reset(self, name: str) -> dict[str, Any]:
        """Forget a provider's failures, and ask it again at once.

        Raises:
            NotFound: no provider of this name.
        """
        member, now = self._member(name), self._clock.now()
        change = member.breaker.reset()
        self._offers = None
        if change is not None:
            self._stepped(name, change, now)
        if member.parked:
            member.parked = False
            self._changed(name, "parked", member.breaker.state.value, "reset by an operator", None)
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


def _percentiles(samples: deque[int]) -> dict[str, float] | None:
    if not samples:
        return None
    ordered = sorted(samples)
    return {f"p{share}": ordered[-(-len(ordered) * share // 100) - 1] / 1000 for share in (50, 95)}
