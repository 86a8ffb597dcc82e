"""The checks of a start that can be made before it opens the store."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryFile

from ksi.clock import Chance, SystemClock
from ksi.config.schema import Config
from ksi.daemon.daemon import build_daemon
from ksi.daemon.parts import sqlite_path
from ksi.errors import ConfigError, StoreUnavailable


def check_config(config: Config) -> None:
    """Check everything that a start checks before it opens the store, without starting anything.

    Raises:
        ConfigError: the configuration cannot be used.
    """
    build_daemon(config, SystemClock(), Chance(), dict(os.environ))
    path = sqlite_path(config)
    if path is not None:
        _check_writable(path)


async def reach_store(config: Config) -> None:
    """Connect to the server of a shared store, once, as a start does; any other store is not looked at.

    Raises:
        StoreUnavailable: it does not take the connection.
    """
    if not config.store.shared:
        return
    from redis.exceptions import RedisError

    from ksi.store.redis.address import Address

    try:
        connection = await Address(config.store.url).connect()
    except (RedisError, OSError) as error:
        raise StoreUnavailable(f"store.url: {config.store.shown_url} cannot be reached: {error}") from None
    await connection.disconnect(nowait=True)


def _check_writable(path: Path) -> None:
    """Raise ConfigError if a database cannot be made or written at `path`; nothing stays behind."""
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        if there == path:
            with path.open("r+b"):
                return
        with TemporaryFile(dir=there):
            return
    except OSError as error:
        reason = f"{there} cannot be written ({error.strerror})"
        raise ConfigError(f"store.url: {reason}; choose another place for {path.name}", place="store.url") from None
