"""Routes: the ordered providers that can serve a model, as one word that the store keeps.

A route is its steps joined by commas. A step is a provider's name, or `name=model` if a fallback model answers instead
of the requested one. `~` before a step says that it failed since the last wait: it stands behind the others and is
asked only while none of them can be.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Container, Mapping
from functools import lru_cache

import msgspec

from ksi.config.schema import ModelConfig, ProviderConfig
from ksi.errors import InvalidData, UnknownModel
from ksi.protocol import nearest

KEPT_MODELS = 10_000
"""Model names whose route is remembered."""

_TRIED = "~"


class Step(msgspec.Struct, frozen=True):
    """One provider of a route; `model` if it is not the requested one."""

    provider: str
    model: str | None = None
    tried: bool = False
    """It failed since the last wait."""

    @property
    def word(self) -> str:
        """The step in its written form."""
        name = self.provider if self.model is None else f"{self.provider}={self.model}"
        return _TRIED + name if self.tried else name


@lru_cache(maxsize=1_024)
def parse_route(route: str) -> tuple[Step, ...]:
    """A route's steps, in order."""
    steps = []
    for word in route.split(","):
        provider, _, model = word.removeprefix(_TRIED).partition("=")
        steps.append(Step(provider, model or None, word.startswith(_TRIED)))
    return tuple(steps)


def providers_of(route: str) -> Collection[str]:
    """The providers of a route, in order, each once."""
    return dict.fromkeys([step.provider for step in parse_route(route)])


def tried(route: str, provider: str) -> str:
    """A route whose first step at `provider` was tried in vain."""
    steps = list(parse_route(route))
    failed = next((step for step in steps if step.provider == provider), None)
    if failed is not None:
        steps.remove(failed)
        steps.append(Step(failed.provider, failed.model, tried=True))
    return ",".join(step.word for step in steps)


def model_at(route: str, provider: str, asked: str) -> str:
    """The model that a provider of a route is asked for."""
    if "=" not in route:
        return asked
    step = next((s for s in parse_route(route) if s.provider == provider), None)
    return step.model if step is not None and step.model is not None else asked


class Router:
    """Finds routes by the configured patterns, priorities and fallbacks."""

    def __init__(
        self,
        providers: Mapping[str, ProviderConfig],
        models: Mapping[str, ModelConfig],
        with_mcp: Container[str] = (),
        missing: Callable[[str], str | None] = lambda _: None,
    ) -> None:
        """Args:
        with_mcp: the providers that take MCP servers.
        missing: advice for getting the models of a kind that no provider serves.
        """
        self._missing = missing
        self._providers = providers
        self._models = models
        self._with_mcp = with_mcp
        self._known: dict[tuple[str, bool], str] = {}

    def route(self, model: str, *, mcp: bool = False) -> str:
        """The route of a model; with `mcp`, over providers that take MCP servers alone.

        Raises:
            UnknownModel: no provider serves it.
            InvalidData: providers serve it, and none of them takes MCP servers.
        """
        route = self._known.get((model, mcp))
        if route is None:
            route = self._find(model)
            if mcp:
                route = self._over_mcp(model, route)
            if len(self._known) >= KEPT_MODELS:
                self._known.clear()
            self._known[model, mcp] = route
        return route

    def _over_mcp(self, model: str, route: str) -> str:
        steps = parse_route(route)
        fitting = ",".join(step.word for step in steps if step.provider in self._with_mcp)
        if not fitting:
            asked = ", ".join(dict.fromkeys(step.provider for step in steps))
            able = ", ".join(name for name in self._providers if name in self._with_mcp) or "none is configured"
            raise InvalidData(
                f"mcp_config: {model[:100]!r} is served by {asked}, without MCP servers of requests; leave it away, or "
                f"ask a model of a provider that takes them ({able})",
                path="mcp_config",
            )
        return fitting

    def _find(self, model: str) -> str:
        steps = [Step(name) for name in self._serving(model)]
        settings = self._models.get(model)
        for fallback in settings.fallbacks if settings is not None else ():
            steps += [Step(name, fallback) for name in self._serving(fallback)]
        if not steps:
            raise self._unknown(model)
        return ",".join(dict.fromkeys(step.word for step in steps))

    def _serving(self, model: str) -> list[str]:
        serving = [
            (config.priority, number, name)
            for number, (name, config) in enumerate(self._providers.items())
            if any(fnmatch.fnmatchcase(model, pattern) for pattern in config.models)
        ]
        return [name for _, _, name in sorted(serving)]

    def _unknown(self, model: str) -> UnknownModel:
        patterns = sorted({p for config in self._providers.values() for p in config.models})
        family = model.partition("/")[0]
        missing = self._missing(family)
        if missing is not None and not any(pattern.startswith(f"{family}/") for pattern in patterns):
            return UnknownModel(f"no provider serves {model[:100]!r}: {missing}", model=model[:100])
        guess = nearest(model, patterns) or nearest(family, {p.partition("/")[0] for p in patterns})
        hint = f"; did you mean {guess!r}?" if guess and guess != family else ""
        return UnknownModel(
            f"no provider serves {model[:100]!r}{hint} (served: {', '.join(patterns) or 'nothing'}); "
            "add one under [providers] in ksi.toml",
            model=model[:100],
        )
