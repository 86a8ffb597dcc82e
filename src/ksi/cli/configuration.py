"""`ksi config`: the configuration of a home, and the one that its daemon holds."""

from __future__ import annotations

import asyncio
import os
import tomllib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from ksi.cli.render import figures, json_line, note, table
from ksi.cli.settings import Settings, json_option, pass_settings
from ksi.cli.status import ask_one

if TYPE_CHECKING:
    from ksi.config import Config

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
@click.option("--daemon", "held", is_flag=True, help="What the daemon holds, and where ksi.toml says otherwise.")
@json_option
@pass_settings
def config(settings: Settings, held: bool, as_json: bool) -> None:
    """Check the configuration, and show every value and where it comes from: default, ksi.toml, or a KSI_ variable.

    Everything is checked that a start checks. A value that may be secret is shown as (hidden).
    """
    if held:
        _show_held(settings, as_json=as_json)
        return
    from ksi.config_view import shown_values

    loaded = settings.checked
    in_file = _file_keys(loaded)
    rows = [(key, value, _origin(key, in_file)) for key, value in shown_values(loaded).items()]
    if as_json:
        for key, value, origin in rows:
            json_line({"key": key, "value": value, "origin": origin})
        return
    figures({"home": loaded.home, "socket": loaded.socket_path, "logs": loaded.log_dir})
    print()
    table(("key", "value", "from"), [(key, _toml_word(value), origin) for key, value, origin in rows])
    _note_unreachable(loaded)


def _note_unreachable(loaded: Config) -> None:
    """Say if the server of a shared store cannot be reached: a start would fail for no fault of the file."""
    from ksi.errors import StoreUnavailable
    from ksi.preflight import reach_store

    try:
        asyncio.run(reach_store(loaded))
    except StoreUnavailable as error:
        note(f"ksi: {error.message}")


def _show_held(settings: Settings, *, as_json: bool) -> None:
    """The running daemon's values, with what the next start would read beside those that differ."""
    from ksi.config_view import shown_values
    from ksi.errors import ConfigError

    reply = asyncio.run(ask_one(settings, "system:config"))
    held = reply.get("values", {})
    try:
        now: Json | None = shown_values(settings.config)
    except ConfigError:
        now = None  # the client has said so
    rows = [(key, held.get(key), _change(key, held, now)) for key in {**held, **(now or {})}]
    if as_json:
        for key, value, change in rows:
            json_line({"key": key, "value": value, **({} if change is None else {"next_start": change})})
        return
    figures({"home": reply.get("home"), "socket": settings.places.socket_path})
    print()
    shown = [(key, _toml_word(value), None if change is None else _toml_word(change)) for key, value, change in rows]
    table(("key", "value", "at the next start"), shown)
    if any(change is not None for *_, change in rows):
        note("ksi: some values have changed since the daemon's start; `ksi restart` takes them")


def _change(key: str, held: Json, now: Json | None) -> Any:
    """What the next start would read, where that is something else; a changed secret cannot be seen."""
    if now is None or _plain(now.get(key)) == _plain(held.get(key)):
        return None
    return now.get(key, "(gone)")


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def _file_keys(loaded: Config) -> frozenset[str]:
    from ksi.config import CONFIG_FILE

    path = loaded.home / CONFIG_FILE
    if not path.is_file():
        return frozenset()
    return frozenset(key for key, _ in _leaves("", tomllib.loads(path.read_text("utf-8"))))


def _leaves(prefix: str, tree: Json) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(f"{prefix}{name}.", value)
        else:
            yield prefix + name, value


def _origin(key: str, in_file: frozenset[str]) -> str:
    variable = "KSI_" + key.upper().replace("-", "_").replace(".", "__")
    if variable in os.environ:
        return variable
    # A table of a provider that is shown as one value, or whose own keys are tables, is in the file with its keys.
    return "ksi.toml" if key in in_file or any(name.startswith(f"{key}.") for name in in_file) else "default"


def _toml_word(value: Any) -> str:
    import msgspec

    return msgspec.json.encode(value).decode() if not isinstance(value, str) else value
