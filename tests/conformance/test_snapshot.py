"""Saving a store and loading it into another one of any kind: exactly the state after a crash (R5)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ksi.clock import microseconds
from ksi.errors import CheckpointInvalid, StoreNotEmpty
from ksi.request import Attempt, OnBusy, Outcome, Priority, State, Usage
from ksi.store.chains import Block, ChainLimits, ChildRequest, Membership
from ksi.store.questions import Question, QuestionKind
from ksi.store.snapshot.records import (
    FENCE_LEAP,
    Base64,
    Figures,
    Record,
    SavedAttempt,
    SavedChain,
    SavedConversation,
    SavedFork,
    SavedInjection,
    SavedLock,
    SavedMember,
    SavedPassage,
    SavedRecord,
    SavedRequest,
    SavedSpare,
    pack,
    unpack,
)
from ksi.store.usage import Tariff, UsageBy, UsageQuery
from ksi.store.values import Listing, StoreRules
from tests.conformance.world import DAY, OFFER, Home, MemoryHome, RedisHome, SqliteHome, World, items

Make = Callable[..., Awaitable[World]]

KINDS = ("memory", "sqlite", "redis")
RULES: dict[str, int] = {"keep_finished": microseconds(DAY), "keep_sessions": microseconds(10 * DAY)}
TURN_FIELDS = {"head", "id", "previous", "turn"}


def home(kind: str, folder: Path, request: pytest.FixtureRequest) -> Home:
    folder.mkdir()
    if kind == "redis":
        return RedisHome(request.getfixturevalue("redis_server").url)
    return MemoryHome() if kind == "memory" else SqliteHome(folder)


@pytest.fixture(params=KINDS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Home:
    """The place of the saved store."""
    return home(request.param, tmp_path / "source", request)


@pytest.fixture(params=KINDS)
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Home:
    """The place of the loading store."""
    return home(request.param, tmp_path / "target", request)


async def opened(place: Home, like: World | None = None, **rules: Any) -> World:
    world = World(place, StoreRules(**(RULES | rules)))
    if like is not None:
        world.clock = like.clock
    await world.open()
    return world


async def saved(world: World) -> list[Record]:
    """A snapshot, through JSON and back."""
    records = [record async for piece in world.store.export(world.clock.now()) for record in piece]
    return [msgspec.json.decode(msgspec.json.encode(record), type=Record) for record in records]


async def a_life(world: World) -> None:
    """Something of everything that a store can hold."""
    clock = world.clock
    late = await world.run("twice", "fenced")
    await world.crash()
    (again,) = [claim for claim in await world.claim(limit=20) if claim.request_id == "twice"]
    await world.complete(late)
    await world.complete(again, usage=Usage(input_tokens=7, output_tokens=3, cost_usd=0.25))
    for number in range(3):
        talk = f"old {number}"
        await world.complete(await world.run(f"gone {number}", talk, agent_id="ann"), raw=b'{"raw":"\xff"}')
        await world.fail(await world.run(f"gone bad {number}", talk))
        clock.forward(1)
    await world.store.set_log_watermark((await world.store.log_after(0, 100))[-1].id)
    clock.forward(1.5 * DAY)
    await world.prune()
    world.pruned = True
    for number in range(4):
        talk = f"past {number}"
        await world.complete(await world.run(f"done {number}", talk, agent_id=f"agent {number % 2}"), raw=b"{}")
        await world.complete(
            await world.run(f"more {number}", "old 0"),
            usage=None,
            text=None,
            content=({"type": "tool_use", "id": "a", "name": "n", "input": {}},),
        )
        await world.fail(await world.run(f"bad {number}", talk))
        await world.retry(await world.run(f"again {number}", f"retry {number}"), after=50 - number)
        await world.retry(await world.run(f"beside {number}", f"lets go {number}", hold_on_retry=False), parked=True)
        clock.forward(0.5)
    await world.complete(await world.run("session", "told"), provider_session="uuid-1", last_message="m1")
    await world.complete(await world.run("moved", "told"), provider_session="uuid-2", fork="new_session")
    for number in range(4):
        talk = f"busy {number}"
        await world.run(f"run {number}", talk, agent_id="bob", priority=Priority.LOW)
        await world.enqueue(f"later {number}", talk, due=clock.wall + microseconds(30 + number))
        for priority in (Priority.LOW, Priority.HIGH, Priority.CRITICAL):
            await world.enqueue(f"line {number} {priority.word}", talk, priority=priority)
        await world.enqueue(f"ready {number}", f"free {number}", route="xy"[number % 2], priority=Priority(number))
        await world.enqueue(f"mortal {number}", f"free {number}", expires=clock.wall + microseconds(40))
        await world.enqueue(f"stopped {number}", f"free {number}")
        await world.cancel(f"stopped {number}", by="somebody")
        await world.acquire(f"lock {number}", f"held {number}", metadata=b'{"why":"\xfe"}')
        await world.acquire(f"waiter {number}", f"held {number}", timeout=100)
        await world.acquire(f"tied waiter {number}", f"held {number}", priority=Priority.HIGH)
        await world.enqueue(f"behind lock {number}", f"held {number}")
        await world.enqueue(
            f"fork {number}", f"child {number}", fork_of=f"past {number}", requeued_from="bad 0", route="x"
        )
        asked = Question(kind=QuestionKind.HOLD, asked_at=clock.wall, text=f"may {number} run?")
        await world.enqueue(f"asks {number}", f"busy {number}", question=asked)
        await world.enqueue(f"let {number}", f"free {number}", question=asked)
        told = msgspec.structs.replace(asked, answer="yes", by="ada")
        await world.store.answer(f"let {number}", asked, told, clock.now(), due=clock.wall + microseconds(50))
        clock.forward(0.1)
    await world.cancel("run 0")
    await world.enqueue("urgent", "busy 1", on_busy=OnBusy.INTERRUPT)
    await world.acquire("next to the cancelled", "busy 0", priority=Priority.CRITICAL, timeout=100)
    clock.forward(1)
    await world.expire()


REQUESTS = [
    *(f"{name} {n}" for n in range(4) for name in ("done", "more", "bad", "again", "beside", "run", "later", "ready")),
    *(f"{name} {n}" for n in range(4) for name in ("mortal", "stopped", "lock", "waiter", "tied waiter", "fork")),
    *(f"{name} {n}" for n in range(4) for name in ("behind lock", "gone", "gone bad", "asks", "let")),
    *(f"line {n} {word}" for n in range(4) for word in ("low", "high", "critical")),
    *("session", "moved", "urgent", "twice", "next to the cancelled", "nobody"),
]


async def everything(world: World) -> Any:
    """All that can be asked of a store, its own numbers apart."""
    store, clock = world.store, world.clock
    sessions = [session async for session in items(lambda cursor: store.sessions(3, cursor))]
    names = [session.conversation for session in sessions] + ["uuid-1", "uuid-2", "nobody"]
    heads = [session.head for session in sessions if session.head is not None]
    since = clock.wall - RULES["keep_sessions"]
    query = UsageQuery(since=since, until=clock.wall, groups=tuple(UsageBy), bucket=microseconds(3600))
    locks = [lock async for lock in items(lambda cursor: store.locks(3, cursor))]
    found = {
        "requests": {name: await store.get(name) for name in REQUESTS},
        "rows": {
            listing.value: [row async for row in items(lambda cursor, of=listing: store.requests(of, 7, cursor))]  # type: ignore[misc]
            for listing in Listing
            if listing is not Listing.WAITING
        },
        "waiting": sorted(
            [row async for row in items(lambda cursor: store.requests(Listing.WAITING, 7, cursor))],
            key=lambda row: row.conversation,
        ),
        "sessions": sessions,
        "of bob": [session async for session in items(lambda cursor: store.sessions(2, cursor, "bob"))],
        "session": {name: await store.session(name) for name in names},
        "locks": sorted(locks, key=lambda lock: lock.conversation),
        "lock": {name: await store.lock(name, 100) for name in names},
        "forks": [fork async for fork in items(lambda cursor: store.forks(2, cursor))],
        "trees": {
            name: [fork async for fork in items(lambda cursor, of=name: store.forks(2, cursor, of))]  # type: ignore[misc]
            for name in names
        },
        "totals": await store.totals(),
        "routes": dict(await store.waiting_by_route()),
        "history": [await store.history(head, size) for head in heads for size in (0, 10**6)],
        "unlogged": await store.log_after(await store.log_watermark(), 100),
        "logged": await store.log_after(0, 100),
        "usage": await store.usage(query, no_prices),
    }
    return plain(found)


def no_prices(*_: object) -> Tariff:
    return ()


def plain(found: Any) -> Any:
    """As data that can be compared; turns and fences by their order."""
    numbers: dict[str, set[int]] = {"turn": set(), "fence": set()}

    def walk(value: Any, field: str, use: Callable[[str, int], Any]) -> Any:
        if isinstance(value, msgspec.Struct):
            return {f: walk(getattr(value, f), f, use) for f in value.__struct_fields__}
        if isinstance(value, dict):
            return {key: walk(inner, "", use) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [walk(inner, "", use) for inner in value]
        if value is not None and field in TURN_FIELDS:
            return use("turn", value)
        return use("fence", value) if value is not None and field == "fence" else value

    walk(found, "", lambda kind, number: numbers[kind].add(number))
    order = {kind: {number: place for place, number in enumerate(sorted(all_))} for kind, all_ in numbers.items()}
    return walk(found, "", lambda kind, number: order[kind][number])


@pytest.mark.promise("R5", "Q3", "L8")
async def test_a_loaded_snapshot_equals_the_state_after_a_crash(source: Home, target: Home) -> None:
    world = await opened(source)
    await a_life(world)
    records = await saved(world)
    copy = await opened(target, world)
    loaded = await copy.store.load(records, world.clock.now())
    recovery = await world.crash()
    assert sorted(loaded.interrupted) == sorted(recovery.requeued)
    assert sorted(loaded.interrupted) == ["run 2", "run 3"]
    expected = await everything(world)
    assert await everything(copy) == expected
    await copy.restart()
    assert await everything(copy) == expected
    await world.store.close()
    await copy.store.close()


@pytest.mark.promise("R5", "Q2")
async def test_a_loaded_store_goes_on_as_the_original_would(source: Home, target: Home) -> None:
    world = await opened(source)
    await a_life(world)
    copy = await opened(target, world)
    await copy.store.load(await saved(world), world.clock.now())
    await world.crash()
    for _ in range(60):
        world.clock.forward(5)
        steps = []
        for one in (world, copy):
            expiry = await one.expire()
            claims = await one.claim(OFFER, limit=3)
            for claim in claims:
                await one.complete(claim)
            steps.append(
                (
                    [(claim.request_id, claim.conversation, claim.attempt) for claim in claims],
                    (
                        expiry.woken,
                        sorted(e.request_id for e in expiry.ended),
                        sorted(e.request_id for e in expiry.lapsed),
                    ),
                )
            )
        assert steps[0] == steps[1]
    expected = await everything(world)
    assert expected["totals"]["running"] == 0
    assert expected["totals"]["completed"] > 40
    assert await everything(copy) == expected
    world.clock.forward(20 * DAY)
    for one in (world, copy):
        await one.store.set_log_watermark((await one.store.log_after(0, 1000))[-1].id)
        await one.prune()
    assert await everything(copy) == await everything(world)
    await world.store.close()
    await copy.store.close()


@pytest.mark.promise("R5", "L1")
async def test_fences_never_go_back(source: Home, target: Home) -> None:
    world = await opened(source)
    for number in range(20):
        await world.complete(await world.run(f"r{number}"))
    records = await saved(world)
    for number in range(20, 40):
        await world.complete(await world.run(f"r{number}"))
    highest = (await world.run("last")).fence
    copy = await opened(target, world)
    await copy.store.load(records, world.clock.now())
    fence = (await copy.run("new")).fence
    assert fence > highest
    assert fence >= FENCE_LEAP
    acquired = await copy.acquire("lock", "other")
    assert acquired.grant is not None
    assert acquired.grant.fence > fence
    await copy.crash()
    assert (await copy.claim_one()).fence > acquired.grant.fence
    await world.store.close()
    await copy.store.close()


@pytest.mark.promise("R5", "Q3")
@pytest.mark.parametrize("rule", [{"fail_interrupted": True}, {"max_interruptions": 1}], ids=["fail", "too often"])
async def test_an_interrupted_request_fails_if_the_rules_say_so(
    source: Home, target: Home, rule: dict[str, Any]
) -> None:
    world = await opened(source)
    await world.run("a")
    await world.enqueue("b")
    copy = await opened(target, world, **rule)
    loaded = await copy.store.load(await saved(world), world.clock.now())
    assert (loaded.interrupted, loaded.failed) == ((), ("a",))
    view = await copy.view("a")
    assert (view.state, view.error, view.attempts[0].outcome) == (State.FAILED, "daemon_restart", Outcome.INTERRUPTED)
    assert await copy.claim_ids() == ["b"]
    totals = await copy.store.totals()
    assert (totals.failed, totals.running, totals.queued) == (1, 1, 0)
    await world.store.close()
    await copy.store.close()


@pytest.mark.promise("R5")
async def test_a_snapshot_is_one_moment_whatever_happens_while_it_is_read(source: Home, target: Home) -> None:
    world = await opened(source)
    for number in range(300):
        await world.enqueue(f"r{number}", f"talk {number}")
    records: list[Record] = []
    async with aclosing(world.store.export(world.clock.now())) as pieces:
        async for piece in pieces:
            records.extend(piece)
            if len(records) < 300:
                await world.complete((await world.claim(limit=1))[0])
                await world.enqueue(f"new {len(records)}", "talk 0")
    copy = await opened(target, world)
    await copy.store.load(records, world.clock.now())
    totals = await copy.store.totals()
    assert (totals.queued, totals.completed, totals.conversations) == (300, 0, 300)
    await world.store.close()
    await copy.store.close()


@pytest.mark.promise("R5")
async def test_a_reader_that_breaks_off_leaves_the_store_at_work(source: Home) -> None:
    world = await opened(source)
    for number in range(300):
        await world.enqueue(f"r{number}", f"talk {number}")
    async with aclosing(world.store.export(world.clock.now())) as pieces:
        async for _ in pieces:
            break
    await world.complete(await world.claim_one())
    assert (await world.store.totals()).completed == 1
    await world.store.close()


@pytest.mark.promise("R5")
@pytest.mark.parametrize("content", ["a request", "a lock"])
async def test_only_an_empty_store_takes_a_snapshot(source: Home, target: Home, content: str) -> None:
    world = await opened(source)
    await world.run("a")
    records = await saved(world)
    copy = await opened(target, world)
    if content == "a request":
        await copy.cancel((await copy.enqueue("own")).request_id)
    else:
        await copy.acquire("own")
    before = await everything(copy)
    with pytest.raises(StoreNotEmpty) as refused:
        await copy.store.load(records, world.clock.now())
    assert refused.value.details["conversations"] == 1
    assert await everything(copy) == before
    await copy.run("goes on", "elsewhere")
    await world.store.close()
    await copy.store.close()


FIGURES = Figures(ended={"completed": 3}, fence=7, logged=0, routes=("stub",))
TALK = SavedConversation(name="talk", created_at=1, active_at=1)
REQUEST = SavedRequest(
    key=1,
    request_id="a",
    conversation="talk",
    state=State.QUEUED,
    priority=Priority.NORMAL,
    rank=1,
    route="stub",
    model="stub/echo",
    enqueued_at=1,
    body="{}",
)
LOCK = SavedLock(
    key=2, request_id="b", conversation="talk", priority=Priority.NORMAL, rank=1, enqueued_at=1, holds=True, fence=3
)


def other(record: Any, **fields: Any) -> Any:
    return msgspec.structs.replace(record, **fields)


@pytest.mark.promise("R5")
@pytest.mark.parametrize(
    "records",
    [
        pytest.param([], id="nothing"),
        pytest.param([TALK, REQUEST], id="no figures"),
        pytest.param([FIGURES, TALK, FIGURES], id="figures twice"),
        pytest.param([FIGURES, REQUEST], id="a request without its conversation"),
        pytest.param([FIGURES, other(TALK, forked_from="gone")], id="a fork without its parent"),
        pytest.param([FIGURES, TALK, TALK], id="a conversation twice"),
        pytest.param([FIGURES, TALK, REQUEST, other(REQUEST, key=9)], id="an id twice"),
        pytest.param([FIGURES, TALK, REQUEST, other(REQUEST, request_id="z")], id="a key twice"),
        pytest.param([FIGURES, TALK, LOCK, other(REQUEST, holds=True)], id="two holders"),
        pytest.param([FIGURES, TALK, other(REQUEST, state=State.RUNNING, holds=True)], id="a running request"),
    ],
)
async def test_records_that_do_not_fit_together_are_refused_whole(target: Home, records: list[Record]) -> None:
    world = await opened(target)
    with pytest.raises(CheckpointInvalid) as refused:
        await world.store.load(records, world.clock.now())
    assert refused.value.details["reason"] == "damaged"
    totals = await world.store.totals()
    assert (totals.completed, totals.conversations) == (0, 0)
    assert (await world.run("a")).fence == 1
    await world.store.close()


@pytest.mark.promise("R5")
async def test_a_fault_on_the_way_leaves_the_store_as_it_was(source: Home, target: Home) -> None:
    world = await opened(source)
    await a_life(world)
    records = await saved(world)
    copy = await opened(target, world)

    def broken() -> Iterator[Record]:
        yield from records[: len(records) // 2]
        raise CheckpointInvalid("the file ends here", reason="damaged")

    with pytest.raises(CheckpointInvalid, match="ends here"):
        await copy.store.load(broken(), world.clock.now())
    assert (await copy.store.totals()).conversations == 0
    await copy.store.load(records, world.clock.now())
    await world.crash()
    assert await everything(copy) == await everything(world)
    await world.store.close()
    await copy.store.close()


@pytest.mark.promise("R5")
async def test_verbs_that_come_while_a_snapshot_is_taken_in_wait_for_it(source: Home, target: Home) -> None:
    world = await opened(source)
    await world.enqueue("a")
    copy = await opened(target, world)
    loading = copy.store.load(await saved(world), world.clock.now())
    loaded, enqueued = await asyncio.gather(loading, copy.enqueue("b"))
    assert loaded.interrupted == ()
    assert (enqueued.position, await copy.line()) == (1, ["a", "b"])
    await world.store.close()
    await copy.store.close()


@pytest.mark.promise("R5", "B2")
async def test_provider_records_and_pauses_go_with_a_snapshot(source: Home, target: Home) -> None:
    world = await opened(source)
    await world.store.put_provider_record(":pauses", 0, b"\x91\xff packed", world.clock.now(), tell=True)
    await world.store.put_provider_record("stub", 0, b"text", world.clock.now(), tell=False)
    copy = World(target, world.rules)
    await copy.open()
    await copy.store.put_provider_record("stub", 0, b"older", copy.clock.now(), tell=False)
    await copy.store.put_provider_record("own", 0, b"its own", copy.clock.now(), tell=False)
    await copy.store.load(await saved(world), world.clock.now())
    kept = (await copy.store.provider_records(copy.clock.now())).records
    assert {name: one.value for name, one in kept.items()} == {
        ":pauses": b"\x91\xff packed",
        "stub": b"text",
        "own": b"its own",
    }
    assert kept["stub"].version > 1, "who knows the older one sees that it changed"
    put = await copy.store.put_provider_record("stub", kept["stub"].version, b"next", copy.clock.now(), tell=False)
    assert put.written
    await world.store.close()
    await copy.store.close()


@pytest.mark.parametrize("data", [b"", b"text", "ümlaut 😀".encode(), b"\xff\xfe", b'{"a":"\xed\xa0\x80"}', bytes(256)])
def test_bytes_are_packed_as_text_if_they_are_text(data: bytes) -> None:
    packed = pack(data)
    read = msgspec.json.decode(msgspec.json.encode(packed), type=str | Base64)
    assert unpack(read) == data


def fields_of(*types: type[msgspec.Struct]) -> Iterable[tuple[str, tuple[str, ...]]]:
    return [(kind.__name__, kind.__struct_fields__) for kind in types]


def test_the_format_is_that_of_version_5() -> None:
    """A change here is another format: raise its version, and read the old one too."""
    types = (
        *(Figures, SavedConversation, SavedFork, SavedChain, SavedRequest, SavedMember, SavedLock, SavedSpare),
        *(
            SavedRecord,
            SavedPassage,
            SavedInjection,
            SavedAttempt,
            Attempt,
            Usage,
            ChainLimits,
            Block,
            ChildRequest,
            Membership,
            Question,
        ),
    )
    assert dict(fields_of(*types)) == {
        "Figures": ("ended", "fence", "logged", "routes"),
        "SavedConversation": (
            "name",
            "created_at",
            "active_at",
            "turns",
            "head",
            "forked_from",
            "agents",
            "aliases",
        ),
        "SavedFork": ("conversation", "parent", "child", "request_id", "at", "kind"),
        "SavedRequest": (
            *("key", "request_id", "conversation", "state", "holds", "priority", "rank", "route", "model", "agent_id"),
            *("hold_on_retry", "requeued_from", "enqueued_at", "due", "expires", "begun", "interruptions"),
            *("interrupted", "interrupted_by", "fence", "since", "provider", "started_at", "finished_at", "error"),
            *("message", "question", "body", "attempts", "member", "reminders", "passage", "place", "reminded_place"),
        ),
        "SavedRecord": ("name", "value"),
        "SavedLock": (
            *("key", "request_id", "conversation", "holds", "priority", "rank", "enqueued_at", "fence", "since"),
            *("patience", "metadata"),
        ),
        "SavedSpare": (
            *("key", "conversation", "agent_id", "body", "saved", "reminders", "passage", "place", "reminded_place"),
        ),
        "SavedPassage": ("id", "text"),
        "SavedChain": (
            *("name", "created_at", "started_at", "limits", "used", "estimated", "closed", "tripped", "guard_messages"),
            *("resets", "reset_key", "deepest"),
        ),
        "SavedMember": (
            *(
                "chain",
                "parent",
                "parent_key",
                "depth",
                "limits",
                "estimate",
                "output_cap",
                "guard",
                "injects",
                "routed",
            ),
            *("carries", "mark", "result", "block", "tokens", "estimated"),
        ),
        "SavedInjection": (
            *("injection_id", "chain", "parent", "parent_key", "target", "direct", "trigger", "state", "created_at"),
            *("finished_at", "request_id", "reason", "text", "child", "passage", "place", "child_place"),
        ),
        "ChainLimits": ("max_depth", "token_budget", "time_window"),
        "Block": ("code", "message", "risk_score", "evidence"),
        "ChildRequest": (
            *("body", "route", "rank", "model", "priority", "membership", "agent_id", "demand", "error", "question"),
        ),
        "Membership": (
            *("limits", "parent", "injects", "estimate", "output_cap", "block", "trips", "guard", "mark", "risk_score"),
        ),
        "Question": (
            *("kind", "asked_at", "text", "expires", "code", "tool", "input", "used", "answer", "answered_at", "by"),
            "why",
        ),
        "SavedAttempt": ("id", "attempt", "raw", "previous"),
        "Attempt": (
            *("number", "provider", "outcome", "started_at", "finished_at", "model", "asked", "mcp", "text", "content"),
            *("usage", "stop_reason", "provider_session", "node", "last_message", "fork", "error", "message"),
            *("first_token_us", "raw"),
        ),
        "Usage": (
            *("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens", "reasoning_tokens"),
            "cost_usd",
        ),
    }
