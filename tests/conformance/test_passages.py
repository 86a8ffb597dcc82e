"""A long result for many conversations is kept once, and everybody who asks gets the whole of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest

from ksi.clock import microseconds
from ksi.request import RequestBody, encode_body
from ksi.store.chains import Aftermath, FollowUp
from ksi.store.redis.store import RedisStore
from ksi.store.snapshot.records import SavedPassage
from tests.conformance.chain_parts import LOOP, after, begin, complete, deliveries, delivery, direct, reminder
from tests.conformance.test_snapshot import KINDS, home, opened, saved
from tests.conformance.world import DAY, Home, RedisHome, SqliteHome, World
from tests.redis_server import RedisServer

LONG = 'Ein "Ergebnis" «mit»\n\\ \x07 😀 und vielem mehr. ' * 500
TARGETS = 12


def text_for(name: str) -> str:
    return f'<system-reminder>\nFor "{name}":\n{LONG}\nünd so weiter\n</system-reminder>'


def body_for(name: str) -> bytes:
    return encode_body(RequestBody(prompt=text_for(name)))


def long_direct(name: str, target: str, **fields: Any) -> FollowUp:
    made = direct(name, target, **fields)
    assert made.child is not None
    child = msgspec.structs.replace(made.child, body=body_for(name))
    return msgspec.structs.replace(made, text=text_for(name), child=child)


def long_reminder(name: str, target: str, **fields: Any) -> FollowUp:
    return msgspec.structs.replace(reminder(name, target, **fields), text=text_for(name))


def aftermath(number: int = TARGETS) -> Aftermath:
    """Requests, dead letters and reminders by turns."""
    sent = []
    for one in range(number):
        name = f"root/{one}"
        if one % 3 == 2:
            sent.append(long_reminder(name, f"t{one}"))
        else:
            sent.append(long_direct(name, f"t{one}", **({"block": LOOP} if one % 3 else {})))
    return after(*sent, passage=LONG)


async def sent(world: World) -> None:
    await complete(world, await begin(world, injects=True), aftermath())


async def nothing_is_missing(world: World) -> None:
    """Everything that was sent is there, word for word."""
    for one in await deliveries(world.store):
        view = await delivery(world, one.injection_id)
        assert view.text == text_for(view.injection_id)
        assert view.state != "blocked" or (view.child is not None and view.child.body == body_for(view.injection_id))
    for number in range(0, TARGETS, 3):
        assert (await world.view(f"root/{number}")).body == body_for(f"root/{number}")


async def done(world: World) -> None:
    """All that waits is done, with the whole text."""
    while started := await world.claim():
        for claim in started:
            assert claim.body == body_for(claim.request_id)
            await complete(world, claim)
    for number in range(2, TARGETS, 3):
        claim = await world.run(f"plain {number}", f"t{number}")
        assert [one.text for one in claim.reminders] == [text_for(f"root/{number}")]
        settled = await complete(world, claim)
        assert settled.turn is not None
        (turn,) = await world.store.history(settled.turn, 10**6)
        assert turn.reminders == (text_for(f"root/{number}"),)


@pytest.mark.promise("C3", "O9")
async def test_a_long_result_is_whole_for_everybody(world: World) -> None:
    await sent(world)
    await nothing_is_missing(world)
    await world.crash()
    await nothing_is_missing(world)
    await done(world)
    await nothing_is_missing(world)


@pytest.mark.promise("C3")
async def test_a_long_dead_letter_is_sent_again_whole(world: World) -> None:
    await sent(world)
    again = long_direct("root/1+1", "t1")
    await world.store.reset_chain("root", world.clock.now())
    await world.store.redeliver("root/1", again, world.clock.now())
    assert (await delivery(world, "root/1+1")).text == text_for("root/1+1")
    assert (await world.view("root/1+1")).body == body_for("root/1+1")


@pytest.mark.promise("C2")
async def test_several_long_reminders_before_one_prompt_are_whole(world: World) -> None:
    for root in ("a", "b"):
        claim = await begin(world, root, f"talk {root}", injects=True)
        follow_ups = (long_reminder(f"{root}/1", "other"), long_reminder(f"{root}/2", "other"))
        await complete(world, claim, after(*follow_ups, passage=LONG + root if root == "b" else LONG))
    claim = await world.run("plain", "other")
    names = ["a/1", "a/2", "b/1", "b/2"]
    assert [one.text for one in claim.reminders] == list(map(text_for, names))
    settled = await complete(world, claim)
    assert settled.turn is not None
    (turn,) = await world.store.history(settled.turn, 10**6)
    assert turn.reminders == tuple(map(text_for, names))


@pytest.mark.promise("C2", "C3")
async def test_a_request_that_carries_one_result_is_reminded_of_another(world: World) -> None:
    one, two = [await begin(world, name, f"talk {name}", injects=True) for name in ("a", "b")]
    await complete(world, one, after(long_direct("a/1", "other"), passage=LONG))
    other = "Another result. " * 100
    told = msgspec.structs.replace(reminder("b/1", "other"), text=f"<{other}>")
    await complete(world, two, after(told, passage=other))
    (claim,) = await world.claim()
    settled = await complete(world, claim)
    assert settled.turn is not None
    (turn,) = await world.store.history(settled.turn, 10**6)
    assert (turn.body, turn.reminders) == (body_for("a/1"), (f"<{other}>",))


@pytest.fixture(params=KINDS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Home:
    return home(request.param, tmp_path / "source", request)


@pytest.fixture(params=KINDS)
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Home:
    return home(request.param, tmp_path / "target", request)


@pytest.mark.promise("R5")
async def test_a_snapshot_brings_a_long_result_whole_to_every_store(source: Home, target: Home) -> None:
    world = await opened(source)
    await sent(world)
    copy = await opened(target, world)
    await copy.store.load(await saved(world), world.clock.now())
    await nothing_is_missing(copy)
    await done(copy)
    for one in (world, copy):
        await one.store.close()


@pytest.mark.promise("C3", "R7")
async def test_redis_keeps_a_long_result_once_and_drops_it_with_the_last_that_needs_it(
    redis_server: RedisServer,
) -> None:
    house = RedisHome(redis_server.url)
    world = await opened(house, keep_finished=microseconds(60), keep_sessions=microseconds(DAY))
    store = world.store
    assert isinstance(store, RedisStore)
    calls = store._calls

    async def with_it(*kinds: str) -> int:
        """How many of these keys have the long text in them."""
        found = [name for kind in kinds for name in await calls.plain("KEYS", f"{calls.namespace}:{kind}:*")]
        return sum([await calls.plain("STRLEN", name) > len(LONG) for name in found])

    await sent(world)
    assert (await with_it("pt", "pd"), await with_it("b", "ix", "ic")) == (2, 0)
    await done(world)
    await world.store.set_log_watermark(2**40)
    world.clock.forward(61)
    await world.prune()
    assert await deliveries(world.store) == []
    assert await with_it("pt", "pd") == 2, "the conversations still have it in their history"
    world.clock.forward(2 * DAY)
    await world.prune()
    assert await calls.plain("KEYS", f"{calls.namespace}:p*:0*") == []
    await world.store.close()


@pytest.mark.promise("C3")
async def test_a_text_that_looks_like_one_that_was_cut_is_kept_as_it_is(world: World) -> None:
    text = "\0" + "0" * 15 + "1" + "0" * 12 + "no passage"
    told = msgspec.structs.replace(reminder("root/1", "other"), text=text)
    await complete(world, await begin(world, injects=True), after(told))
    assert (await delivery(world, "root/1")).text == text
    await world.crash()
    claim = await world.run("plain", "other")
    assert [one.text for one in claim.reminders] == [text]


# SQLite: how often it is there.


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def counted(path: Path) -> tuple[int, int]:
    """The number of passages in the database, and how often their text is in it besides them."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        passages: Any = connection.execute("SELECT count(*) FROM passage").fetchall()[0][0]
        beside: Any = connection.execute(
            "SELECT (SELECT count(*) FROM body WHERE length(data) + coalesce(length(reminders), 0) > 10000)"
            " + (SELECT count(*) FROM injection WHERE length(text) + coalesce(length(child), 0) > 10000)"
        ).fetchall()[0][0]
        return int(passages), int(beside)
    finally:
        connection.close()


@pytest.mark.promise("C3", "R7")
async def test_sqlite_keeps_a_long_result_once_and_drops_it_with_the_last_that_needs_it(tmp_path: Path) -> None:
    house = SqliteHome(tmp_path)
    world = await opened(house, keep_finished=microseconds(60), keep_sessions=microseconds(DAY))
    await sent(world)
    assert counted(house.path) == (1, 0)
    await done(world)
    assert counted(house.path) == (1, 0)
    await world.store.set_log_watermark(2**40)
    world.clock.forward(61)
    await world.prune()
    assert await deliveries(world.store) == []
    assert counted(house.path) == (1, 0), "the conversations still have it in their history"
    world.clock.forward(2 * DAY)
    await world.prune()
    assert counted(house.path) == (0, 0)
    await world.store.close()


@pytest.mark.promise("C3", "R5")
async def test_sqlite_s_snapshot_has_a_long_result_once_and_a_dead_letter_sent_again_shares_it(tmp_path: Path) -> None:
    world = await opened(SqliteHome(made(tmp_path / "a")))
    await sent(world)
    records = await saved(world)
    assert sum(isinstance(record, SavedPassage) for record in records) == 1
    assert len(msgspec.json.encode(records)) < 2 * len(msgspec.json.encode(LONG)) + 20_000
    house = SqliteHome(made(tmp_path / "b"))
    copy = await opened(house, world)
    await copy.store.load(records, world.clock.now())
    assert counted(house.path) == (1, 0)
    await copy.store.reset_chain("root", world.clock.now())
    await copy.store.redeliver("root/1", long_direct("root/1+1", "t1"), world.clock.now())
    assert counted(house.path) == (1, 0)
    for one in (world, copy):
        await one.store.close()


@pytest.mark.promise("C3")
async def test_sqlite_keeps_nothing_of_a_short_result_apart(tmp_path: Path) -> None:
    house = SqliteHome(tmp_path)
    world = await opened(house)
    await complete(world, await begin(world, injects=True), after(direct("root/1"), passage="text root"))
    assert counted(house.path) == (0, 0)
    await world.store.close()
