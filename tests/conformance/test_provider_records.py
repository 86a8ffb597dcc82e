"""The daemons' shared knowledge of their providers: records by compare and set."""

from __future__ import annotations

import asyncio

import pytest

from ksi.store.provider_records import KeptRecord, PutRecord
from tests.conformance.world import World


async def put(world: World, name: str, version: int, value: bytes) -> PutRecord:
    """Put a record, and notify the others."""
    return await world.store.put_provider_record(name, version, value, world.clock.now(), tell=True)


@pytest.mark.promise("D1", "F3")
async def test_a_record_is_written_by_who_knows_its_version_and_its_version_grows(world: World) -> None:
    assert (await world.store.provider_records(world.clock.now())).records == {}
    first = await put(world, "a", 0, b"\x00one\xff")
    assert (first.written, first.kept) == (True, KeptRecord(1, b"\x00one\xff"))
    second = await put(world, "a", 1, b"two")
    assert (second.written, second.kept) == (True, KeptRecord(2, b"two"))
    await put(world, "b", 0, b"")
    found = await world.store.provider_records(world.clock.now())
    assert found.records == {"a": KeptRecord(2, b"two"), "b": KeptRecord(1, b"")}


@pytest.mark.promise("D1", "F3")
@pytest.mark.parametrize("version", [0, 1, 3])
async def test_a_writer_with_another_version_changes_nothing_and_gets_the_present_record(
    world: World, version: int
) -> None:
    await put(world, "a", 0, b"one")
    await put(world, "a", 1, b"two")
    late = await put(world, "a", version, b"late")
    assert (late.written, late.kept) == (False, KeptRecord(2, b"two"))
    assert (await world.store.provider_records(world.clock.now())).records["a"].value == b"two"


@pytest.mark.promise("D1", "F3")
async def test_who_believes_in_a_record_that_is_gone_learns_that_there_is_none(world: World) -> None:
    late = await put(world, "a", 7, b"late")
    assert (late.written, late.kept) == (False, KeptRecord())


@pytest.mark.promise("D1", "F3")
async def test_of_several_at_once_one_writes(world: World) -> None:
    answers = await asyncio.gather(*(put(world, "a", 0, b"%d" % number) for number in range(5)))
    written = [number for number, answer in enumerate(answers) if answer.written]
    assert len(written) == 1
    assert {answer.kept for answer in answers} == {KeptRecord(1, b"%d" % written[0])}


@pytest.mark.promise("D1", "F5")
async def test_records_are_dated_by_the_stores_own_time(world: World) -> None:
    before = (await world.store.provider_records(world.clock.now())).at
    world.clock.forward(10.0)
    assert (await put(world, "a", 0, b"one")).at == before + 10_000_000
    assert (await put(world, "a", 0, b"one")).at == before + 10_000_000
