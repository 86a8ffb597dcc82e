"""`ksi config`: the configuration of a home, and the one that its daemon holds."""

from __future__ import annotations

import asyncio
import os
import tomllib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from ksi.cli.render import figures, json_line, note, say, table
from ksi.cli.settings import Settings, json_option, pass_settings
from ksi.cli.status import ask_one

if TYPE_CHECKING:
    from ksi.config.schema import Config

Json = Mapping[str, Any]


@click.command(
    epilog="""\b
Examples:
  ksi config
  ksi config --json | jq 'select(.origin != "default")'
  ksi config --daemon
  KSI_QUEUE__LEASE=10 ksi config | grep lease
"""
)
@click.option("--daemon", "held", is_flag=True, help="Show the daemon's values, and how ksi.toml differs from them.")
@json_option
@pass_settings
def config(settings: Settings, held: bool, as_json: bool) -> None:
    """Check the configuration, and show every value and its origin: default, ksi.toml, or a KSI_ variable.

    The checks are those of a start. A value that may be secret is shown as (hidden).
    """
    if held:
        _show_held(settings, as_json=as_json)
        return
    from ksi.config.view import shown_values

    loaded = settings.checked
    in_file = _file_keys(loaded)
    rows = [(key, value, _origin(key, in_file)) for key, value in shown_values(loaded).items()]
    if as_json:
        for key, value, origin in rows:
            json_line({"key": key, "value": value, "origin": origin})
        return
    figures({"home": loaded.home, "socket": loaded.socket_path, "logs": loaded.log_dir})
    say()
    table(("key", "value", "from"), [(key, _toml_word(value), origin) for key, value, origin in rows])
    _note_unreachable(loaded)


def _note_unreachable(loaded: Config) -> None:
    """Report an unreachable server of a shared store: a start would fail although the file is correct."""
    from ksi.daemon.preflight import reach_store
    from ksi.errors import StoreUnavailable

    try:
        asyncio.run(reach_store(loaded))
    except StoreUnavailable as error:
        note(f"ksi: {error.message}")


def _show_held(settings: Settings, *, as_json: bool) -> None:
    """The running daemon's values, with those of the next start if they differ."""
    from ksi.config.view import shown_values
    from ksi.errors import ConfigError

    reply = asyncio.run(ask_one(settings, "system:config"))
    held = reply.get("values", {})
    try:
        now: Json | None = shown_values(settings.config)
    except ConfigError:
        now = None  # the client has already reported it
    rows = [(key, held.get(key), _change(key, held, now)) for key in {**held, **(now or {})}]
    if as_json:
        for key, value, change in rows:
            json_line({"key": key, "value": value, **({} if change is None else {"next_start": change})})
        return
    figures({"home": reply.get("home"), "socket": settings.places.socket_path})
    say()
    shown = [(key, _toml_word(value), None if change is None else _toml_word(change)) for key, value, change in rows]
    table(("key", "value", "at the next start"), shown)
    if any(change is not None for *_, change in rows):
        note("ksi: some values have changed since the daemon's start; `ksi restart` applies them")


def _change(key: str, held: Json, now: Json | None) -> Any:
    """The values of the next start that differ; a changed secret cannot be seen."""
    if now is None or _plain(now.get(key)) == _plain(held.get(key)):
        return None
    return now.get(key, "(gone)")


def _plain(value: Any) -> Any:
    """A value in JSON."""
    return list(value) if isinstance(value, tuple) else value


def _file_keys(loaded: Config) -> frozenset[str]:
    from ksi.config.schema import CONFIG_FILE
    from ksi.config.view import leaves

    path = loaded.home / CONFIG_FILE
    if not path.is_file():
        return frozenset()
    return frozenset(key for key, _ in leaves("", tomllib.loads(path.read_text("utf-8"))))


def _origin(key: str, in_file: frozenset[str]) -> str:
    variable = "KSI_" + key.upper().replace("-", "_").replace(".", "__")
    if variable in os.environ:
        return variable
    # A provider's table that is shown as one value, or that contains tables, is recorded in the file by its keys.
    return "ksi.toml" if key in in_file or any(name.startswith(f"{key}.") for name in in_file) else "default"


def _toml_word(value: Any) -> str:
    import msgspec

    return msgspec.json.encode(value).decode() if not isinstance(value, str) else value
