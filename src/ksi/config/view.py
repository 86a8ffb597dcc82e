"""The configuration as it may be printed: a value is shown if it is known to be harmless, else hidden."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

from ksi.config.addresses import shown_url
from ksi.config.schema import Config

HIDDEN = "(hidden)"

ADDRESSES = frozenset({"base_url", "proxy", "url"})
"""Options that are addresses: shown without user, password and parameters."""

HARMLESS_TEXTS = frozenset(
    {
        "cwd",
        "fail",
        "kind",
        "max_tokens_field",
        "model_path",
        "models",
        "pass_env",
        "permission_mode",
        "record",
        "request_options",
        "setting_sources",
        "streaming",
        "tools",
        "version",
    }
)
"""Options of providers whose texts hold no secret. All others are hidden."""

VARIABLE = re.compile(r"(?=.*_)[A-Z][A-Z0-9_]{0,63}")
"""The name of a variable, and not a key that was written in the place of its variable's name."""


def shown_values(config: Config) -> dict[str, Any]:
    """Give all keys with their sections, and their values; secrets are replaced by `(hidden)`.

    Texts of the known sections are harmless, `store.url` apart. A provider's options are shown if they are numbers,
    switches or known names; of free tables, such as `headers` and `env`, the keys alone.
    """
    tree: dict[str, Any] = msgspec.to_builtins(config, enc_hook=str)
    del tree["home"]
    tree["store"]["url"] = shown_url(tree["store"]["url"])
    tree["hooks"] |= {key: _shown_hook(value) for key, value in tree["hooks"].items() if key.startswith("on_")}
    providers = tree.pop("providers")
    values = dict(leaves("", tree))
    for name, provider in providers.items():
        options = provider.pop("options")
        values |= {f"providers.{name}.{key}": value for key, value in provider.items()}
        for key, value in options.items():
            values |= _shown_option(f"providers.{name}.{key}", key, value)
    return values


def _shown_hook(hook: Any) -> Any:
    """A hook: a command's program without its arguments, or a webhook's host without its path. Either may be a key."""
    if isinstance(hook, str):
        parts = urlsplit(hook)
        return f"{parts.scheme}://{parts.hostname or ''}/{HIDDEN}"
    return [hook[0], *([HIDDEN] if len(hook) > 1 else [])] if hook else hook


def _shown_option(place: str, key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {f"{place}.{name}": HIDDEN for name in value} or {place: {}}
    return {place: _shown(key, value)}


def _shown(key: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if key in HARMLESS_TEXTS:
        return value
    if key in ADDRESSES and isinstance(value, str):
        return shown_url(value)
    if key.endswith("_env") and isinstance(value, str) and VARIABLE.fullmatch(value):
        return value
    if key == "command" and isinstance(value, list | tuple) and value:
        # Arguments may carry keys; the program alone never does.
        return [value[0], *([HIDDEN] if len(value) > 1 else [])]
    return HIDDEN if value not in ("", [], ()) else value


def leaves(prefix: str, tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The values in nested tables, each with its key: the tables' names and its own, joined by dots."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(f"{prefix}{name}.", value)
        else:
            yield prefix + name, value
