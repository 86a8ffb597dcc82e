"""What outside holders can ask of conversations' locks."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from ksi.clock import MICROSECONDS, Chance, Moment
from ksi.conversation.conversation_lock import ConversationLocks
from ksi.conversation.lock_events import LockEvents
from ksi.errors import InvalidData, KsiError, NotLockHolder, RequestIdConflict, StoreUnavailable
from ksi.events.bus import EventBus, News
from ksi.events.conversations import AcquireLockData, LockHolderData, LockReply, LockStatusData, ReleaseReply
from ksi.protocol import convert
from ksi.request import HeadStarts, RequestBody, encode_body
from ksi.store.values import Acquired, NewLock, NewRequest, Offer, Passing, StoreRules
from ksi.testing import SimulatedClock, settle_down
from tests.reference_store.store import MemoryStore

HOUR = 3_600 * MICROSECONDS
HEAD_STARTS = HeadStarts(high=6 * HOUR, normal=3 * HOUR, low=1 * HOUR, background=0)


class Client:
    """A connection that keeps what is pushed to it."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []

    def push(self, line: bytes) -> None:
        self.lines.append(line)

    def news(self, news: News) -> None:
        self.push(news.line())

    def heard(self) -> list[tuple[str, dict[str, Any]]]:
        """Names and data of what came since the last look."""
        events = [msgspec.json.decode(line) for line in self.lines]
        self.lines.clear()
        return [(event["event"], event["data"]) for event in events]


class GatedStore(MemoryStore):
    """A store whose commits can be held back, as a slow disk does."""

    def __init__(self) -> None:
        super().__init__(StoreRules(), Chance(random.Random(1)))
        self.gate = asyncio.Event()
        self.gate.set()
        self.fault: KsiError | None = None

    async def withdraw(self, request_id: str, now: Moment) -> Passing | None:
        if self.fault is not None:
            raise self.fault
        return await super().withdraw(request_id, now)

    async def acquire(self, lock: NewLock, now: Moment) -> Acquired:
        if self.fault is not None:
            raise self.fault
        acquired = await super().acquire(lock, now)
        await self.gate.wait()
        return acquired


BOUND: Any = {"while_connected": True}


class Desk:
    """The locks, with short words for what clients say."""

    def __init__(self) -> None:
        self.clock = SimulatedClock(wall=1_800_000_000.0)
        self.store = GatedStore()
        self.bus = EventBus(self.clock)
        self.events = LockEvents(self.bus)
        self.dues = 0
        self.locks = ConversationLocks(self.store, self.events, self.bus, HEAD_STARTS, self.clock, self._on_due, 300.0)

    def _on_due(self) -> None:
        self.dues += 1

    async def acquire(self, client: Client, request_id: str, conversation: str = "talk", **fields: Any) -> LockReply:
        data = {"request_id": request_id, "conversation_id": conversation, **fields}
        return await self.locks.acquire(convert(data, AcquireLockData), client)

    async def release(self, client: Client, request_id: str, **fields: Any) -> ReleaseReply:
        return await self.locks.release(convert({"request_id": request_id, **fields}, LockHolderData), client)

    async def status(self, **fields: Any) -> dict[str, Any]:
        plain: dict[str, Any] = msgspec.to_builtins(await self.locks.status(convert(fields, LockStatusData)))
        return plain

    async def gone(self, client: Client) -> None:
        """What the daemon does when a connection is lost."""
        self.bus.forget(client)
        await self.locks.forget(client)

    async def line(self, conversation: str = "talk") -> list[str]:
        """Who waits."""
        return [entry["request_id"] for entry in (await self.status(conversation_id=conversation))["queue"]]

    async def expire(self) -> None:
        """What the queue's clock does."""
        for lapsed in (await self.store.expire(self.clock.now())).lapsed:
            self.events.lapsed(lapsed)

    async def complete(self, request_id: str, conversation: str = "talk") -> None:
        """A completion in the conversation."""
        body = encode_body(RequestBody(prompt="x"))
        new = NewRequest(request_id=request_id, conversation=conversation, body=body, route="p", rank=1)
        await self.store.enqueue(new, [Offer("p", "p", 5)], self.clock.now())


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
def client() -> Client:
    return Client()


# -- acquire ----------------------------------------------------------------------------------------------------------


@pytest.mark.promise("L5")
async def test_a_free_conversation_is_had_at_once(desk: Desk, client: Client) -> None:
    reply = await desk.acquire(client, "a")
    assert (reply.acquired, reply.state, reply.conversation_id, reply.request_id) == (True, "locked", "talk", "a")
    assert (reply.fence, reply.expires_at, reply.renewed) == (1, 1_800_000_300.0, False)
    assert client.heard() == []
    assert not desk.bus.awaits(client)
    assert desk.dues == 1


@pytest.mark.promise("L5", "L4")
async def test_to_acquire_again_is_to_renew(desk: Desk, client: Client) -> None:
    watcher = Client()
    desk.bus.subscribe(watcher, ["conversation:*"])
    first = await desk.acquire(client, "a")
    await desk.clock.advance(100)
    again = await desk.acquire(client, "a")
    assert (again.acquired, again.renewed, again.fence) == (True, True, first.fence)
    assert again.expires_at == 1_800_000_400.0
    assert [name for name, _ in watcher.heard()] == ["conversation:locked"]


@pytest.mark.promise("L5")
async def test_a_waiter_gets_its_place_from_one_and_later_its_grant_once(desk: Desk, client: Client) -> None:
    holder, other = Client(), Client()
    await desk.acquire(holder, "h")
    first = await desk.acquire(client, "a")
    second = await desk.acquire(other, "b")
    assert (first.acquired, first.state, first.position, first.holder) == (False, "queued", 1, "h")
    assert second.position == 2
    assert (await desk.acquire(client, "a")).position == 1
    released = await desk.release(holder, "h")
    assert (released.released, released.conversation_id, released.next_request) == (True, "talk", "a")
    ((name, data),) = client.heard()
    assert name == "conversation:locked"
    assert (data["request_id"], data["conversation_id"], data["external"], data["fence"]) == ("a", "talk", True, 2)
    assert data["expires_at"] == 1_800_000_300.0
    assert other.heard() == []
    assert not desk.bus.awaits(client)


@pytest.mark.promise("L5")
async def test_a_holder_that_will_not_wait_gets_the_present_one_and_joins_no_queue(desk: Desk, client: Client) -> None:
    await desk.acquire(Client(), "h")
    reply = await desk.acquire(client, "a", wait=False)
    assert (reply.acquired, reply.state, reply.position, reply.holder) == (False, "busy", 1, "h")
    assert not desk.bus.awaits(client)
    assert await desk.line() == []


@pytest.mark.promise("L2")
async def test_external_waiters_stand_in_the_line_by_their_priority(desk: Desk) -> None:
    await desk.acquire(Client(), "h")
    for name, priority in (("low", "LOW"), ("normal", None), ("critical", "critical"), ("high", "high")):
        await desk.acquire(Client(), name, **({} if priority is None else {"priority": priority}))
    assert await desk.line() == ["critical", "high", "normal", "low"]


@pytest.mark.promise("L5")
async def test_a_waiter_with_a_timeout_is_notified_when_it_passed(desk: Desk, client: Client) -> None:
    await desk.acquire(Client(), "h")
    await desk.acquire(client, "a", timeout=10)
    await desk.clock.advance(10)
    await desk.expire()
    ((name, data),) = client.heard()
    assert (name, data["request_id"], data["waiting"]) == ("conversation:lock_expired", "a", True)
    assert not desk.bus.awaits(client)
    assert await desk.line() == []


@pytest.mark.promise("S1", "L5")
@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"conversation_id": None}, "conversation_id"),
        ({"conversation_id": "a", "session_id": "b"}, "conversation_id"),
        ({"priority": "urgent"}, "priority"),
    ],
)
async def test_an_invalid_field_is_refused_and_leaves_nothing(
    desk: Desk, client: Client, fields: dict[str, Any], path: str
) -> None:
    with pytest.raises(InvalidData) as caught:
        await desk.acquire(client, "a", **fields)
    assert caught.value.path == path
    assert not desk.bus.awaits(client)


async def test_metadata_that_is_nested_too_deeply_is_refused(desk: Desk, client: Client) -> None:
    value: dict[str, Any] = {}
    for _ in range(300):
        value = {"a": value}
    with pytest.raises(InvalidData) as caught:
        await desk.acquire(client, "a", metadata=value)
    assert caught.value.path == "metadata"


@pytest.mark.promise("L5", "Q4")
async def test_a_completion_s_id_is_no_lock_s_and_its_follower_still_hears_its_end(desk: Desk, client: Client) -> None:
    await desk.complete("r", "elsewhere")
    desk.bus.follow(client, "r")
    with pytest.raises(RequestIdConflict):
        await desk.acquire(client, "r")
    desk.bus.publish("completion:result", {}, "r")
    assert [name for name, _ in client.heard()] == ["completion:result"]


async def test_a_fault_of_the_store_leaves_nothing_to_follow(desk: Desk, client: Client) -> None:
    desk.store.fault = StoreUnavailable("no disk")
    with pytest.raises(StoreUnavailable):
        await desk.acquire(client, "a")
    assert not desk.bus.awaits(client)


@pytest.mark.promise("L5")
async def test_a_grant_that_comes_before_the_reply_is_not_missed(desk: Desk, client: Client) -> None:
    holder = Client()
    await desk.acquire(holder, "h")
    desk.store.gate.clear()
    waits = asyncio.create_task(desk.acquire(client, "a"))
    await settle_down()
    await desk.release(holder, "h")
    desk.store.gate.set()
    assert (await waits).state == "queued"
    assert [name for name, _ in client.heard()] == ["conversation:locked"]
    assert (await desk.status(conversation_id="talk"))["holder"] == "a"


# -- release and renew ------------------------------------------------------------------------------------------------


@pytest.mark.promise("L5")
@pytest.mark.parametrize("fields", [{}, {"fence": 99}])
async def test_without_holding_a_lock_one_can_neither_release_nor_renew_and_changes_nothing(
    desk: Desk, client: Client, fields: dict[str, Any]
) -> None:
    await desk.acquire(client, "h")
    name = "h" if fields else "a"
    if not fields:
        await desk.acquire(client, "a")
    before = await desk.status(conversation_id="talk")
    with pytest.raises(NotLockHolder):
        await desk.release(client, name, **fields)
    with pytest.raises(NotLockHolder):
        await desk.locks.renew(convert({"request_id": name, **fields}, LockHolderData))
    assert await desk.status(conversation_id="talk") == before


@pytest.mark.promise("L5")
async def test_a_waiter_that_tried_to_release_still_goes_with_its_connection(desk: Desk, client: Client) -> None:
    await desk.acquire(Client(), "h")
    await desk.acquire(client, "a", **BOUND)
    with pytest.raises(NotLockHolder):
        await desk.release(client, "a")
    await desk.gone(client)
    assert await desk.line() == []


@pytest.mark.promise("L4")
async def test_a_renewal_resets_the_expiry_and_keeps_the_fence(desk: Desk, client: Client) -> None:
    reply = await desk.acquire(client, "a")
    await desk.clock.advance(299)
    renewed = await desk.locks.renew(convert({"request_id": "a", "fence": reply.fence}, LockHolderData))
    assert (renewed.acquired, renewed.renewed, renewed.fence) == (True, True, reply.fence)
    assert renewed.expires_at == 1_800_000_599.0
    await desk.clock.advance(299)
    await desk.expire()
    assert (await desk.status(conversation_id="talk"))["holder"] == "a"
    await desk.clock.advance(1)
    await desk.expire()
    assert (await desk.status(conversation_id="talk"))["locked"] is False


@pytest.mark.promise("L5")
async def test_a_lock_can_be_released_from_another_connection(desk: Desk, client: Client) -> None:
    await desk.acquire(client, "a")
    assert (await desk.release(Client(), "a")).next_request is None
    assert (await desk.status(conversation_id="talk"))["locked"] is False


# -- connections that go ----------------------------------------------------------------------------------------------


@pytest.mark.promise("L5")
async def test_a_waiter_that_waits_while_it_is_connected_goes_and_others_stay(desk: Desk, client: Client) -> None:
    other = Client()
    await desk.acquire(client, "h")
    await desk.acquire(client, "w", "elsewhere")
    await desk.acquire(client, "a", timeout=60)
    await desk.acquire(other, "b", **BOUND)
    await desk.acquire(other, "x", "elsewhere", **BOUND)
    await desk.gone(client)
    assert (await desk.status(conversation_id="talk"))["holder"] == "h"
    assert (await desk.status(conversation_id="elsewhere"))["holder"] == "w"
    assert await desk.line() == ["a", "b"]
    await desk.gone(other)
    assert await desk.line() == ["a"]
    assert await desk.line("elsewhere") == []


@pytest.mark.promise("L5", "L4")
async def test_a_waiter_stays_when_its_connection_goes_and_waits_as_long_as_its_reply_said(
    desk: Desk, client: Client
) -> None:
    await desk.acquire(Client(), "h")
    reply = await desk.acquire(client, "a")
    assert (reply.state, reply.position, reply.timeout) == ("queued", 1, 300.0)
    await desk.gone(client)
    await desk.clock.advance(299)
    await desk.locks.renew(convert({"request_id": "h"}, LockHolderData))
    await desk.expire()
    assert await desk.line() == ["a"]
    await desk.clock.advance(1)
    with capture_logs() as logs:
        await desk.expire()
    assert await desk.line() == []
    assert [(entry["event"], entry["request_id"]) for entry in logs] == [("wait for a lock expired", "a")]


@pytest.mark.promise("L5")
async def test_a_waiter_on_two_connections_waits_until_both_are_gone(desk: Desk, client: Client) -> None:
    other = Client()
    await desk.acquire(Client(), "h")
    for one in (client, other):
        await desk.acquire(one, "a", **BOUND)
    await desk.gone(client)
    assert await desk.line() == ["a"]
    await desk.gone(other)
    assert await desk.line() == []


@pytest.mark.promise("L5")
async def test_a_waiter_whose_connection_went_before_its_reply_is_not_left_in_the_line(
    desk: Desk, client: Client
) -> None:
    holder, watcher = Client(), Client()
    desk.bus.subscribe(watcher, ["conversation:locked"])
    await desk.acquire(holder, "h")
    desk.store.gate.clear()
    waits = asyncio.create_task(desk.acquire(client, "a", **BOUND))
    await settle_down()
    await desk.gone(client)
    desk.store.gate.set()
    await waits
    assert await desk.line() == []
    await desk.release(holder, "h")
    assert (await desk.status(conversation_id="talk"))["locked"] is False
    assert [data["request_id"] for _, data in watcher.heard()] == ["h"]


@pytest.mark.promise("L5")
async def test_a_waiter_with_a_timeout_stays_though_its_connection_went_before_its_reply(
    desk: Desk, client: Client
) -> None:
    await desk.acquire(Client(), "h")
    desk.store.gate.clear()
    waits = asyncio.create_task(desk.acquire(client, "a", timeout=60))
    await settle_down()
    await desk.gone(client)
    desk.store.gate.set()
    await waits
    assert await desk.line() == ["a"]


@pytest.mark.promise("L5")
async def test_one_connection_that_went_early_takes_no_wait_from_another(desk: Desk, client: Client) -> None:
    other = Client()
    await desk.acquire(Client(), "h")
    await desk.acquire(other, "a", **BOUND)
    desk.store.gate.clear()
    waits = asyncio.create_task(desk.acquire(client, "a", **BOUND))
    await settle_down()
    await desk.gone(client)
    desk.store.gate.set()
    await waits
    assert await desk.line() == ["a"]


@pytest.mark.promise("L5")
async def test_a_waiter_that_goes_lets_the_line_close_up(desk: Desk, client: Client) -> None:
    other, holder = Client(), Client()
    await desk.acquire(holder, "h")
    await desk.acquire(client, "a", priority="high", **BOUND)
    await desk.acquire(other, "b", **BOUND)
    await desk.gone(client)
    assert (await desk.acquire(other, "b", **BOUND)).position == 1
    await desk.release(holder, "h")
    assert [data["request_id"] for _, data in other.heard()] == ["b"]


@pytest.mark.promise("L5")
async def test_a_fault_while_waiters_are_dropped_is_reported(desk: Desk, client: Client) -> None:
    await desk.acquire(Client(), "h")
    await desk.acquire(client, "a", **BOUND)
    desk.store.fault = StoreUnavailable("no disk")
    with pytest.raises(StoreUnavailable):
        await desk.gone(client)


# -- status -----------------------------------------------------------------------------------------------------------


@pytest.mark.promise("L6")
async def test_a_conversation_s_status_tells_holder_line_and_metadata(desk: Desk, client: Client) -> None:
    await desk.acquire(client, "h", metadata={"why": "edit"})
    await desk.acquire(client, "a", priority="high")
    await desk.complete("r")
    assert await desk.status(session_id="talk") == {
        "conversation_id": "talk",
        "locked": True,
        "state": "locked",
        "holder": "h",
        "holder_kind": "external",
        "since": 1_800_000_000.0,
        "expires_at": 1_800_000_300.0,
        "fence": 1,
        "metadata": {"why": "edit"},
        "waiting": 2,
        "queue": [
            {
                "request_id": "r",
                "position": 0,
                "priority": "normal",
                "kind": "request",
                "enqueued_at": 1_800_000_000.0,
            },
            {
                "request_id": "a",
                "position": 1,
                "priority": "high",
                "kind": "external",
                "enqueued_at": 1_800_000_000.0,
            },
        ],
        "forks": [],
    }


@pytest.mark.promise("L6")
async def test_a_request_holds_without_an_end(desk: Desk) -> None:
    await desk.complete("r")
    status = await desk.status(conversation_id="talk")
    assert (status["holder"], status["holder_kind"], status["state"]) == ("r", "request", "running")
    assert "expires_at" not in status


@pytest.mark.promise("L6")
async def test_an_unused_conversation_is_free(desk: Desk) -> None:
    status = await desk.status(conversation_id="new")
    assert status == {
        "conversation_id": "new",
        "locked": False,
        "state": "free",
        "waiting": 0,
        "queue": [],
        "forks": [],
    }


@pytest.mark.promise("L6", "Q8")
async def test_all_locks_come_in_pages_with_the_totals(desk: Desk, client: Client) -> None:
    for number in range(5):
        await desk.acquire(client, f"h{number}", f"c{number}")
    await desk.acquire(client, "w", "c0")
    await desk.complete("r", "c9")
    first = await desk.status(limit=4)
    assert (first["locked_conversations"], first["external_locks"], first["external_waiters"]) == (6, 5, 1)
    assert len(first["locks"]) == 4
    second = await desk.status(limit=4, cursor=first["cursor"])
    assert "cursor" not in second
    names = [lock["conversation_id"] for page in (first, second) for lock in page["locks"]]
    assert sorted(names) == ["c0", "c1", "c2", "c3", "c4", "c9"]
    with pytest.raises(InvalidData):
        await desk.status(cursor="?")


@pytest.mark.promise("L6", "L7")
async def test_forks_are_shown_with_the_tree_they_belong_to(desk: Desk) -> None:
    await desk.complete("r", "parent")
    await desk.complete("s", "other")
    body = encode_body(RequestBody(prompt="x", session_id="parent", fork=True))
    new = NewRequest(request_id="f", conversation="child", body=body, route="p", rank=1, fork_of="parent")
    await desk.store.enqueue(new, [], desk.clock.now())
    fork = {"parent": "parent", "child": "child", "request_id": "f", "at": 1_800_000_000.0, "kind": "requested"}
    for name in ("parent", "child"):
        assert (await desk.status(conversation_id=name))["forks"] == [fork]
    assert (await desk.status(conversation_id="other"))["forks"] == []
    assert (await desk.status())["forks"] == [fork]
