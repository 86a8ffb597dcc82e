"""A daemon in this process for each test, and connections to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest_asyncio

from ksi.daemon import Daemon
from ksi.testing import running_daemon
from tests.integration.wire import Wire

Connect = Callable[[], Awaitable[Wire]]


@pytest_asyncio.fixture
async def served() -> AsyncIterator[Daemon]:
    """A daemon with the stub provider, which does not wait for what runs at the end."""
    async with running_daemon(settings={"service": {"shutdown_grace": 0.0}}) as daemon:
        yield daemon


@pytest_asyncio.fixture
async def connect(served: Daemon) -> AsyncIterator[Connect]:
    """Opens connections, and closes them at the end."""
    async with AsyncExitStack() as open_wires:

        async def make() -> Wire:
            return await open_wires.enter_async_context(await Wire.open(served.config.socket_path))

        yield make


@pytest_asyncio.fixture
async def wire(connect: Connect) -> Wire:
    """A connection."""
    return await connect()
