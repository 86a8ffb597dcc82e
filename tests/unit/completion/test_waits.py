"""Waits that are over leave nothing behind: no timer, no row, no client."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from ksi.completion.notify.waits import Waits
from ksi.errors import KsiError, ShuttingDown, WaitTimeout
from ksi.events.bus import News
from ksi.events.completions import RequestReply


class Client:
    """A listener that nobody but the waits holds."""

    def push(self, line: bytes) -> None:
        raise AssertionError("nothing is pushed here")

    def news(self, news: News) -> None:
        raise AssertionError("nothing is pushed here")


class Asked:
    """What became of one wait. It holds its client, as an exchange does."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.replies: list[RequestReply] = []
        self.errors: list[Exception] = []
        self.refused = asyncio.Event()

    def answer(self, reply: RequestReply) -> None:
        self.replies.append(reply)

    def refuse(self, error: Exception) -> None:
        self.errors.append(error)
        self.refused.set()


def reply(request_id: str) -> RequestReply:
    return RequestReply(request_id=request_id, session_id="s", status="completed")


@pytest.fixture
def waits() -> Waits:
    return Waits()


@pytest.mark.promise("O9")
@pytest.mark.parametrize("end", ["answered", "taken back", "client gone", "refused at the stop"])
async def test_a_wait_that_is_over_holds_nothing_until_its_timeout(waits: Waits, end: str) -> None:
    client = Client()
    asked = Asked(client)
    wait = waits.add("r", asked.answer, asked.refuse, client)
    wait.limit(3_600.0)
    match end:
        case "answered":
            waits.answer("r", reply("r"))
            assert len(asked.replies) == 1
        case "taken back":
            assert wait.take_back()
        case "client gone":
            waits.forget(client)
        case _:
            waits.refuse_all()
            assert isinstance(asked.errors[0], ShuttingDown)
    left = weakref.ref(client)
    del asked, client, wait
    gc.collect()
    assert left() is None
    assert waits.request_ids() == []


async def test_a_wait_that_lasts_too_long_is_refused_once(waits: Waits) -> None:
    asked = Asked(Client())
    waits.add("r", asked.answer, asked.refuse, asked.client).limit(0.0)
    async with asyncio.timeout(10):
        await asked.refused.wait()
    waits.answer("r", reply("r"))
    (error,) = asked.errors
    assert isinstance(error, WaitTimeout)
    assert isinstance(error, KsiError)
    assert error.details == {"request_id": "r"}
    assert asked.replies == []


async def test_a_client_that_goes_takes_its_own_waits_along_and_no_others(waits: Waits) -> None:
    gone, stays = Asked(Client()), Asked(Client())
    for name in ("one", "two"):
        waits.add(name, gone.answer, gone.refuse, gone.client)
        waits.add(name, stays.answer, stays.refuse, stays.client)
    waits.forget(gone.client)
    waits.forget(gone.client)
    for name in ("one", "two"):
        waits.answer(name, reply(name))
    assert gone.replies == []
    assert [answer.request_id for answer in stays.replies] == ["one", "two"]


async def test_a_client_that_cannot_be_refused_waits_on_through_a_stop(waits: Waits) -> None:
    asked = Asked(Client())
    waits.add("r", asked.answer)
    waits.refuse_all()
    assert waits.awaited("r")
    waits.answer("r", reply("r"))
    assert len(asked.replies) == 1
