"""Which provider serves what: routes by model, free slots, and how each provider is doing."""

from __future__ import annotations

import fnmatch
from collections import deque
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import structlog

from ksi.clock import MICROSECONDS, Clock
from ksi.config import Config, ProviderConfig, options_of
from ksi.errors import ConfigError, UnknownModel
from ksi.protocol import nearest
from ksi.providers.base import Provider, Setting
from ksi.request import Attempt, Outcome
from ksi.store.base import Offer

KEPT_SAMPLES = 1_000
"""Calls whose times make up the percentiles."""

KEPT_MODELS = 10_000
"""Model names whose route is remembered."""


class Health:
    """One provider's record since the daemon started (F6)."""

    def __init__(self) -> None:
        self.running = 0
        self.calls = 0
        self.failures = 0
        self.last_error: dict[str, Any] | None = None
        self._latencies: deque[int] = deque(maxlen=KEPT_SAMPLES)
        self._first_tokens: deque[int] = deque(maxlen=KEPT_SAMPLES)

    def began(self) -> None:
        """A call goes out."""
        self.running += 1

    def ended(self, attempt: Attempt) -> None:
        """A call is over."""
        self.running -= 1
        if attempt.outcome is Outcome.COMPLETED:
            self.calls += 1
            self._latencies.append(attempt.finished_at - attempt.started_at)
            if attempt.first_token_us is not None:
                self._first_tokens.append(attempt.first_token_us)
        elif attempt.outcome is Outcome.FAILED:
            self.calls += 1
            self.failures += 1
            self.last_error = {
                "code": attempt.error,
                "message": attempt.message,
                "at": attempt.finished_at / MICROSECONDS,
            }

    def report(self) -> dict[str, Any]:
        """The figures; times in milliseconds."""
        return {
            "running": self.running,
            "calls": self.calls,
            "failures": self.failures,
            "success_rate": round(1 - self.failures / self.calls, 4) if self.calls else None,
            "latency_ms": _percentiles(self._latencies),
            "time_to_first_token_ms": _percentiles(self._first_tokens),
            "last_error": self.last_error,
        }


class ProviderManager:
    """The configured providers, their routes and slots."""

    def __init__(self, configs: Mapping[str, ProviderConfig], providers: Mapping[str, Provider]) -> None:
        self._configs = {name: config for name, config in configs.items() if config.enabled}
        self._providers = dict(providers)
        self._health = {name: Health() for name in self._configs}
        self._by_model: dict[str, str] = {}
        self._offers: dict[str, Offer] = {}
        self._listed: tuple[Offer, ...] = ()
        self._orphans: set[str] = set()
        self._log = structlog.get_logger("ksi.providers")

    async def start(self) -> None:
        """Start all providers."""
        for name in self._configs:
            await self._providers[name].start()
            problem = self._providers[name].problem()
            if problem:
                self._log.warning("provider has a problem", provider=name, problem=problem)

    async def stop(self) -> None:
        """Stop all providers, each whatever the others do."""
        for name in self._configs:
            try:
                await self._providers[name].stop()
            except Exception:  # noqa: BLE001 - the others must be stopped all the same
                self._log.exception("provider did not stop", provider=name)

    def __getitem__(self, name: str) -> Provider:
        """A provider by its name."""
        return self._providers[name]

    def health(self, name: str) -> Health:
        """A provider's record."""
        return self._health[name]

    def route(self, model: str) -> str:
        """The providers that serve a model, in order, joined by commas.

        Raises:
            UnknownModel: none does.
        """
        route = self._by_model.get(model)
        if route is None:
            route = self._find_route(model)
            if len(self._by_model) >= KEPT_MODELS:
                self._by_model.clear()
            self._by_model[model] = route
            self.know([route])
        return route

    def know(self, routes: Iterable[str]) -> None:
        """Offer these routes from now on: those in the store, and each new one."""
        for route in routes:
            if route in self._offers or route in self._orphans:
                continue
            name = next((n for n in route.split(",") if n in self._configs), None)
            if name is None:
                self._orphans.add(route)
            else:
                self._offers[route] = Offer(route, name, self._configs[name].max_concurrency)
        self._listed = tuple(self._offers.values())

    def offers(self) -> tuple[Offer, ...]:
        """What may be claimed now, route by route."""
        return self._listed

    def orphans(self, waiting: Mapping[str, int]) -> list[str]:
        """Routes with waiting requests that no configured provider serves any more."""
        return sorted(route for route in self._orphans if waiting.get(route))

    def problems(self) -> list[str]:
        """What keeps providers from working, in sentences."""
        found = ((name, self._providers[name].problem()) for name in self._configs)
        return [f"provider {name}: {problem}" for name, problem in found if problem]

    def report(self) -> dict[str, Any]:
        """Each provider as `completion:provider_status` shows it."""
        return {
            name: {
                "kind": config.kind,
                "models": list(config.models),
                "priority": config.priority,
                "enabled": config.enabled,
                "max_concurrency": config.max_concurrency,
                "problem": self._providers[name].problem(),
                **self._health[name].report(),
            }
            for name, config in self._configs.items()
        }

    def _find_route(self, model: str) -> str:
        serving = [
            (config.priority, number, name)
            for number, (name, config) in enumerate(self._configs.items())
            if any(fnmatch.fnmatchcase(model, pattern) for pattern in config.models)
        ]
        if serving:
            return ",".join(name for _, _, name in sorted(serving))
        patterns = sorted({p for config in self._configs.values() for p in config.models})
        family = model.partition("/")[0]
        guess = nearest(family, {p.partition("/")[0] for p in patterns})
        hint = f"; did you mean {guess}/...?" if guess and guess != family else ""
        raise UnknownModel(
            f"no provider serves {model[:100]!r}{hint} (served: {', '.join(patterns) or 'nothing'}); "
            "add one under [providers] in ksi.toml",
            model=model[:100],
        )


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
        built[name] = kind.build(setting, options_of(entry, kind.Options, name))
    return built


def _percentiles(samples: deque[int]) -> dict[str, float] | None:
    if not samples:
        return None
    ordered = sorted(samples)
    return {f"p{share}": ordered[-(-len(ordered) * share // 100) - 1] / 1000 for share in (50, 95)}
