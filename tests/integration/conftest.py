"""A daemon in this process for each test, connections to it, and folders whose paths a socket can have."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Browser

from ksi.daemon.daemon import Daemon
from ksi.testing import running_daemon
from tests.browser import running_browser
from tests.integration.serving import AT_ONCE
from tests.integration.wire import Wire

Connect = Callable[[], Awaitable[Wire]]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder with a short path: a socket's has 107 bytes at most, and pytest's own has the test's name in it."""
    with tempfile.TemporaryDirectory(prefix="ksi-", ignore_cleanup_errors=True) as folder:
        yield Path(folder).resolve()


@pytest_asyncio.fixture
async def served() -> AsyncIterator[Daemon]:
    """A daemon with the stub provider, which does not wait for running requests at the end."""
    async with running_daemon(settings={"service": AT_ONCE}) as daemon:
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


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    """One browser for all tests of the page."""
    async with running_browser() as running:
        yield running
