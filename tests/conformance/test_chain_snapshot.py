"""Chains and deliveries in a snapshot: the same as after a crash, on every kind of store (R5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from ksi.clock import microseconds
from ksi.errors import CheckpointInvalid
from ksi.request import State
from ksi.store.chains import InjectionState
from ksi.store.snapshot.records import Record, SavedChain, SavedInjection, SavedRequest
from tests.conformance.chain_parts import (
    LOOP,
    after,
    begin,
    born,
    claims,
    complete,
    deliveries,
    direct,
    fail,
    limits,
    member,
    reminder,
    run_first,
)
from tests.conformance.test_snapshot import KINDS, home, opened, saved
from tests.conformance.world import Home, World, items


@pytest.fixture(params=KINDS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Home:
    """The place of the saved store."""
    return home(request.param, tmp_path / "source", request)


@pytest.fixture(params=KINDS)
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Home:
    """The place of the loading store."""
    return home(request.param, tmp_path / "target", request)


async def a_life(world: World) -> None:
    """Chains of every kind, at work."""
    claim = await begin(world, "root", "talk", injects=True, mark=b"\xff prompt", limits=limits(2, 5_000))
    follow_ups = (
        direct("root/1", "one", injects=True, mark=b"p1"),
        direct("root/2", "two", injects=True),
        direct("root/3", "three"),
        direct("root/4", "four", block=LOOP),
        reminder("root/5", "reminded"),
        reminder("root/6", "reminded"),
        reminder("root/7", "later"),
        direct("root/8", "eight"),
    )
    await complete(world, claim, after(*follow_ups, mark=b"\xfe result"), tokens=321)
    await complete(world, await run_first(world, "used", "reminded"))
    claim = await run_first(world, "second", "talk", chain=member(injects=True))
    await complete(world, claim, after(reminder("second/1", "reminded"), reminder("second/2", "reminded")))
    claim = await run_first(world, "third", "talk", chain=member(injects=True))
    await complete(world, claim, after(reminder("third/1", "reminded"), trip=LOOP))
    running = await claims(world)
    assert [claim.request_id for claim in running.started] == ["root/1", "root/2", "root/3", "root/8"]
    await run_first(world, "takes", "reminded")
    await world.cancel("root/2")
    await complete(world, running.started[2])
    await fail(world, running.started[3])
    await born(world, "waits", "root/1")
    await born(world, "too deep", "waits")
    await world.store.redeliver("root/4", direct("root/4/again", "four"), world.clock.now())
    await world.enqueue("unrouted", "silent", chain=member(injects=True, block=LOOP))
    await world.store.close_chain("second", world.clock.now())
    await world.store.reset_chain("unrouted", world.clock.now())
    world.clock.forward(3)


async def everything(world: World) -> dict[str, Any]:
    """All that can be asked about chains and deliveries."""
    store = world.store
    chains = [view async for view in items(lambda cursor: store.chains(2, cursor))]
    rows = {view.chain: (await store.members(view.chain, 100)).items for view in chains}
    names = [row.request_id for members in rows.values() for row in members]
    listed = await deliveries(store)
    session = await store.session("reminded")
    assert session is not None
    assert session.head is not None
    return {
        "chains": chains,
        "members": rows,
        "views": {name: await store.get(name) for name in names},
        "trails": {name: await store.trail(name, 10) for name in names},
        "deliveries": [await store.injection(one.injection_id) for one in listed],
        "by state": [one.injection_id for one in await deliveries(store, InjectionState.QUEUED)],
        "unrouted": await store.unrouted(),
        "history": [(turn.body, turn.reminders) for turn in await store.history(session.head, 10_000)],
    }


@pytest.mark.promise("R5", "C3", "C8")
async def test_a_loaded_store_has_the_chains_and_deliveries_that_a_crash_would_have_left(
    source: Home, target: Home
) -> None:
    world = await opened(source)
    await a_life(world)
    copy = await opened(target, world)
    loaded = await copy.store.load(await saved(world), world.clock.now())
    assert sorted(loaded.interrupted) == ["root/1", "takes"]
    await world.crash()
    assert await everything(copy) == await everything(world)
    states = {one.injection_id: one.state for one in await deliveries(copy.store)}
    assert (states["root/2"], states["second/1"], states["root/5"]) == ("failed", "queued", "delivered")
    assert await copy.store.unrouted() == await world.store.unrouted()
    await _go_on_alike(world, copy)
    assert await everything(copy) == await everything(world)
    await world.store.close()
    await copy.store.close()


async def _go_on_alike(*worlds: World) -> None:
    """The rest is done."""
    for world in worlds:
        took = await claims(world)
        for claim in sorted(took.started, key=lambda claim: claim.request_id):
            if claim.request_id == "takes":
                assert [one.injection_id for one in claim.reminders] == ["second/1", "second/2"]
            own = claim.chain is not None and claim.chain.injects
            follow_ups = after(direct(f"{claim.request_id}/1", "further")) if own else None
            await complete(world, claim, follow_ups, tokens=100)
        for name in await world.store.unrouted():
            await world.store.deliver(name, after(reminder(f"{name}/1", "later")), world.clock.now())
        await world.claim()
        reminded = await world.run("last", "later")
        assert reminded.reminders[0].injection_id == "root/7"


@pytest.mark.promise("R5", "Q3")
async def test_a_carrier_that_fails_at_the_loading_makes_its_delivery_a_dead_letter(source: Home, target: Home) -> None:
    world = await opened(source, fail_interrupted=True)
    await complete(world, await begin(world, injects=True), after(direct("root/1", "other", injects=True)))
    await world.claim_one()
    copy = await opened(target, world, fail_interrupted=True)
    loaded = await copy.store.load(await saved(world), world.clock.now())
    assert loaded.failed == ("root/1",)
    await world.crash()
    for one in (world, copy):
        view = await one.store.injection("root/1")
        assert view is not None
        assert (view.state, view.reason and view.reason.code) == ("failed", "daemon_restart")
        assert await one.store.unrouted() == ("root/1",)
        chain = await one.store.chain("root")
        assert chain is not None
        assert (chain.spending.used, chain.spending.reserved, chain.unfinished) == (25, 0, 0)
    await world.store.close()
    await copy.store.close()


@pytest.mark.promise("R5", "R7")
async def test_a_turn_s_reminders_are_saved_when_its_request_is_gone(source: Home, target: Home) -> None:
    world = await opened(source, keep_finished=microseconds(60))
    claim = await begin(world, injects=True)
    await complete(world, claim, after(reminder("root/1", "other")))
    await complete(world, await world.run("asks", "other"))
    await world.store.set_log_watermark(2**40)
    world.clock.forward(61)
    await world.prune()
    assert await world.store.get("asks") is None
    copy = await opened(target, world)
    await copy.store.load(await saved(world), world.clock.now())
    session = await copy.store.session("other")
    assert session is not None
    assert session.head is not None
    assert [turn.reminders for turn in await copy.store.history(session.head, 1_000)] == [("text root/1",)]
    await world.store.close()
    await copy.store.close()


def _broken(records: list[Record], kind: type[Record], **fields: Any) -> list[Record]:
    """The same records with the first of a kind changed."""
    at = next(at for at, record in enumerate(records) if isinstance(record, kind))
    return [*records[:at], msgspec.structs.replace(records[at], **fields), *records[at + 1 :]]


@pytest.mark.promise("R5")
async def test_records_that_do_not_fit_together_are_refused(source: Home, target: Home) -> None:
    world = await opened(source)
    claim = await begin(world, injects=True)
    await complete(world, claim, after(direct("root/1", "other"), reminder("root/2", "other")))
    records = await saved(world)
    without: list[Record] = [record for record in records if not isinstance(record, SavedChain)]
    twice = [*records, next(record for record in records if isinstance(record, SavedInjection))]
    damaged: dict[str, list[Record]] = {
        "no chain": without,
        "twice": twice,
        "two chains": [records[0], *[record for record in records if isinstance(record, SavedChain)], *records[1:]],
        "taken": _broken(records, SavedInjection, state=InjectionState.TAKEN),
        "no carrier": _broken(records, SavedInjection, injection_id="root/9"),
        "no target": [
            msgspec.structs.replace(record, target="nowhere")
            if isinstance(record, SavedInjection) and not record.direct
            else record
            for record in records
        ],
    }
    for what, broken in damaged.items():
        copy = await opened(target, world)
        with pytest.raises(CheckpointInvalid):
            await copy.store.load(broken, world.clock.now())
        assert (await copy.store.chains(5)).items == (), what
        assert await deliveries(copy.store) == [], what
        await copy.store.close()
    assert any(isinstance(record, SavedRequest) and record.state is State.QUEUED for record in records)
    await world.store.close()


@pytest.mark.promise("R5")
async def test_a_record_of_format_1_is_read(target: Home) -> None:
    plain = b'{"record":"request","key":1,"request_id":"a","conversation":"talk","state":"queued","priority":2,'
    plain += b'"rank":5,"route":"stub","model":"m","enqueued_at":7,"body":"{}"}'
    lines = [
        b'{"record":"figures","ended":{},"fence":0,"logged":0,"routes":["stub"]}',
        b'{"record":"conversation","name":"talk","created_at":1,"active_at":1}',
        plain,
    ]
    world = await opened(target)
    await world.store.load([msgspec.json.decode(line, type=Record) for line in lines], world.clock.now())
    assert await world.claim_ids() == ["a"]
    await world.store.close()
