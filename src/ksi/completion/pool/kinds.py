"""Makes the configured providers; each kind is a module of `ksi.providers`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec

from ksi.clock import Clock
from ksi.config.reader import options_of
from ksi.config.schema import Config
from ksi.errors import ConfigError
from ksi.providers.base import Provider, Setting


def build_providers(config: Config, environ: Mapping[str, str], clock: Clock) -> dict[str, Provider]:
    """Make the enabled providers of a configuration.

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
            timeout=config.timeout_of(name),
            idle_timeout=entry.idle_timeout or config.limits.idle_timeout,
        )
        built[name] = kind.build(setting, options_of(entry, kind.Options, name, environ))
    return built
