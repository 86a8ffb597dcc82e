"""What an HTTP provider reads of a body that breaks."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from aiohttp.base_protocol import BaseProtocol

from ksi.providers.http.endpoint import _arriving

CUT = aiohttp.ClientPayloadError("cut")


@pytest.fixture
async def content() -> aiohttp.StreamReader:
    loop = asyncio.get_running_loop()
    protocol = BaseProtocol(loop)
    protocol.transport = asyncio.Transport()
    return aiohttp.StreamReader(protocol, 2**16, loop=loop)


@pytest.mark.promise("F1", "R2")
@pytest.mark.parametrize("fault", [CUT, aiohttp.SocketTimeoutError(), ConnectionResetError(), None], ids=str)
async def test_pieces_before_a_fault_come_before_it(content: aiohttp.StreamReader, fault: Exception | None) -> None:
    content.feed_data(b"one ")
    content.feed_data(b"two")
    if fault is None:
        content.feed_eof()
    else:
        content.set_exception(fault)
    assert await _arriving(content) == (b"one two", fault)
    assert content.exception() is fault, "it stays broken for who reads on"
    if fault is not None:
        assert await _arriving(content) == (b"", fault)


@pytest.mark.promise("F1")
async def test_a_fault_with_nothing_before_it_is_reported_alone(content: aiohttp.StreamReader) -> None:
    content.feed_data(b"one")
    assert await _arriving(content) == (b"one", None)
    waiting = asyncio.create_task(_arriving(content))
    await asyncio.sleep(0)
    content.set_exception(CUT)
    assert await waiting == (b"", CUT)
