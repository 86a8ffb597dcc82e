"""The common parts of all commands: the home, the client, exit codes, and error messages."""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ksi.client import Client
    from ksi.client.ways import HttpWay
    from ksi.config.schema import Config
    from ksi.errors import KsiError

F = TypeVar("F", bound=Callable[..., Any])

PATIENCE = 60.0
"""Seconds that work in progress waits for a lost daemon: long enough for a restart."""


class Exit(IntEnum):
    """The meaning of the exit codes for scripts; listed in `ksi --help`."""

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
    "name_taken": Exit.USAGE,
    "has_forks": Exit.USAGE,
    "cancelled": Exit.CANCELLED,
    "queue_full": Exit.LATER,
    "budget_exceeded": Exit.LATER,
    "conversation_busy": Exit.LATER,
    "shutting_down": Exit.LATER,
    "draining": Exit.LATER,
    "disk_full": Exit.LATER,
    "wait_timeout": Exit.LATER,
    "store_unavailable": Exit.LATER,
    "store_full": Exit.LATER,
    "slow_consumer": Exit.LATER,
    "too_much_input": Exit.LATER,
    "too_many_connections": Exit.LATER,
}


def own_name() -> str:
    """The user who gives the command, for people to read; a container may have no name for its user."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def exit_code(error: KsiError) -> Exit:
    """The exit code of an error."""
    return _EXITS.get(error.code, Exit.FAILED)


def report(error: KsiError, *, as_json: bool) -> Exit:
    """Report an error: a sentence for people on stderr, with `--json` also an object on stdout; returns its exit
    code."""
    from ksi.cli.render import json_line, note
    from ksi.protocol import error_body

    if as_json:
        json_line({"error": error_body(error)})
    note(f"ksi: {error.message}", keep="\n")
    return exit_code(error)


class Settings:
    """The options before the command's name, and the settings that follow from them."""

    def __init__(self, home: str | None) -> None:
        self._home = home

    @cached_property
    def home(self) -> Path:
        """KSI's home."""
        from ksi.config.reader import find_home

        try:
            here = Path.cwd()
        except FileNotFoundError:  # the folder was removed
            here = Path("/")
        return find_home(self._home, os.environ, here)

    @cached_property
    def config(self) -> Config:
        """The configuration.

        Raises:
            ConfigError: it cannot be used.
        """
        from ksi.config.reader import load

        return load(self.home)

    @cached_property
    def checked(self) -> Config:
        """The configuration, after all checks that a start makes before it opens the store.

        Raises:
            ConfigError: a daemon could not start with it.
        """
        from ksi.daemon.preflight import check_config

        check_config(self.config)
        return self.config

    @cached_property
    def places(self) -> Config:
        """The address of this home's daemon, however broken its configuration is."""
        from ksi.cli.render import note
        from ksi.config.salvage import salvage
        from ksi.errors import ConfigError

        home = self.home
        try:
            return self.config
        except ConfigError as error:
            note(f"ksi: {error.message}")
            note("ksi: Correct it before the next start; a running daemon continues with the values it read.")
            return salvage(home)

    def quiet_client(self) -> Client:
        """A client that does not report a broken configuration and does not wait for a daemon, not yet open."""
        from ksi.client import Client
        from ksi.config.reader import load
        from ksi.config.salvage import salvage
        from ksi.errors import ConfigError

        try:
            config = load(self.home)
        except ConfigError:
            config = salvage(self.home)
        return Client(config.socket_path, patience=0.0)

    def client(self, *, patience: float = 5.0, on_lost: Callable[[], None] | None = None) -> Client:
        """A client of this home's daemon, not yet open; see `Client`."""
        from ksi.client import Client
        from ksi.client.ways import by_socket_or_http

        connect = by_socket_or_http(self.http_way)
        return Client(self.places.socket_path, patience=patience, connect=connect, on_lost=on_lost)

    def http_way(self) -> HttpWay | None:
        """The daemon's HTTP address: the one published by the home's daemon, or KSI_URL if no home was named."""
        from ksi.client.ways import named_way, told_way

        return told_way(self.places.run_dir) or (None if self._home else named_way())


pass_settings = click.make_pass_decorator(Settings)


def _remember(ctx: click.Context, option: click.Parameter, value: bool) -> bool:
    ctx.meta["ksi.json"] = value
    return value


def json_option(command: F) -> F:
    """`--json`, also known to the code that reports an error."""
    text = "Print JSON for programs, one object per line."
    return click.option("--json", "as_json", is_flag=True, callback=_remember, help=text)(command)
