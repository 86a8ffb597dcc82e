"""A daemon with settings of its own in this process, and a connection to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ksi.clock import SystemClock
from ksi.daemon.daemon import Daemon
from ksi.testing import running_daemon
from tests.integration.wire import Wire

LONG = {"delay": 600}
"""Provider options of a run that ends when it is cancelled."""

AT_ONCE = {"shutdown_grace": 0.0}
"""A service that does not wait for running requests when it stops."""


@asynccontextmanager
async def daemon_and_wire(
    home: Path | None = None, clock: SystemClock | None = None, **settings: Mapping[str, Any]
) -> AsyncIterator[tuple[Daemon, Wire]]:
    """Serve with these sections of the configuration; running requests return to the queue at once at the end."""
    async with (
        running_daemon(home, settings={"service": AT_ONCE, **settings}, clock=clock) as daemon,
        await Wire.open(daemon.config.socket_path) as wire,
    ):
        yield daemon, wire
