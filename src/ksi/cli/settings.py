"""What all commands share: the home, the client, exit codes, and how an error is told."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ksi.client import Client
    from ksi.config import Config
    from ksi.errors import KsiError

F = TypeVar("F", bound=Callable[..., Any])

PATIENCE = 60.0
"""Seconds for which work in progress waits for a daemon that was lost: long enough for a restart."""


class Exit(IntEnum):
    """What a script can tell from the exit code; listed in `ksi --help`."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_FOUND = 4
    CANCELLED = 5
    LATER = 6
    CUT = 7
    INTERRUPTED = 130


_EXITS = {
    "config": Exit.USAGE,
    "invalid_json": Exit.USAGE,
    "invalid_envelope": Exit.USAGE,
    "invalid_data": Exit.USAGE,
    "invalid_direction": Exit.USAGE,
    "payload_too_large": Exit.USAGE,
    "unknown_event": Exit.USAGE,
    "unknown_model": Exit.USAGE,
    "not_available_in_v1": Exit.USAGE,
    "connection_failed": Exit.UNREACHABLE,
    "checkpoint_invalid": Exit.USAGE,
    "store_not_empty": Exit.USAGE,
    "not_found": Exit.NOT_FOUND,
    "unknown_parent": Exit.NOT_FOUND,
    "ambiguous_id": Exit.USAGE,
    "request_id_conflict": Exit.USAGE,
    "cancelled": Exit.CANCELLED,
    "queue_full": Exit.LATER,
    "conversation_busy": Exit.LATER,
    "shutting_down": Exit.LATER,
    "wait_timeout": Exit.LATER,
    "store_unavailable": Exit.LATER,
    "store_full": Exit.LATER,
    "slow_consumer": Exit.LATER,
    "too_many_connections": Exit.LATER,
}


def exit_code(error: KsiError) -> Exit:
    """The exit code of an error."""
    return _EXITS.get(error.code, Exit.FAILED)


def report(error: KsiError, *, as_json: bool) -> Exit:
    """Tell an error: a sentence for people on stderr, with `--json` an object on stdout too; returns its exit code."""
    from ksi.cli.render import json_line, visible
    from ksi.protocol import error_body

    if as_json:
        json_line({"error": error_body(error)})
    message = visible(error.message, keep="\n")
    print(f"ksi: {message}", file=sys.stderr)
    return exit_code(error)


class Settings:
    """What was said before the command's name, and what follows from it."""

    def __init__(self, home: str | None) -> None:
        self._home = home

    @cached_property
    def home(self) -> Path:
        """KSI's home."""
        from ksi.config import find_home

        try:
            here = Path.cwd()
        except FileNotFoundError:  # the folder was taken away
            here = Path("/")
        return find_home(self._home, os.environ, here)

    @cached_property
    def config(self) -> Config:
        """The configuration.

        Raises:
            ConfigError: it cannot be used.
        """
        from ksi.config import load

        return load(self.home)

    @cached_property
    def checked(self) -> Config:
        """The configuration, after everything that a start checks before it opens the store.

        Raises:
            ConfigError: a daemon could not start with it.
        """
        from ksi.preflight import check_config

        check_config(self.config)
        return self.config

    @cached_property
    def places(self) -> Config:
        """Where the daemon of this home is to be found, however broken its configuration is."""
        from ksi.cli.render import note
        from ksi.errors import ConfigError
        from ksi.salvage import salvage

        try:
            return self.config
        except ConfigError as error:
            note(f"ksi: {error.message}")
            note("ksi: Mend it before the next start; a daemon that runs goes on with what it read.")
            return salvage(self.home)

    def quiet_client(self) -> Client:
        """A client that says nothing of a broken configuration and does not wait for a daemon, not yet open."""
        from ksi.client import Client
        from ksi.config import load
        from ksi.errors import ConfigError
        from ksi.salvage import salvage

        try:
            config = load(self.home)
        except ConfigError:
            config = salvage(self.home)
        return Client(config.socket_path, patience=0.0)

    def client(self, *, patience: float = 5.0, on_lost: Callable[[], None] | None = None) -> Client:
        """A client of this home's daemon, not yet open; see `Client`."""
        from ksi.client import Client

        return Client(self.places.socket_path, patience=patience, on_lost=on_lost)


pass_settings = click.make_pass_decorator(Settings)


def _remember(ctx: click.Context, option: click.Parameter, value: bool) -> bool:
    ctx.meta["ksi.json"] = value
    return value


def json_option(command: F) -> F:
    """`--json`, known to whoever reports an error too."""
    text = "Print JSON for programs, one object per line."
    return click.option("--json", "as_json", is_flag=True, callback=_remember, help=text)(command)
