"""The room on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from ksi.completion.upkeep.disk_space import LOOK_EVERY, LOW_SPACE, MIB, DiskSpace
from ksi.errors import DiskFull
from ksi.testing import SimulatedClock

HOME, DATABASE = Path("/home"), Path("/database")


class Disks:
    def __init__(self) -> None:
        self.free: dict[Path, int | None] = {HOME: 1_000 * MIB, DATABASE: 1_000 * MIB}
        self.looks = 0
        self.clock = SimulatedClock()

    def look(self, folder: Path) -> int | None:
        self.looks += 1
        return self.free[folder]

    def space(self, least: int = 8 * MIB) -> DiskSpace:
        return DiskSpace([HOME, DATABASE], least, self.clock, self.look)


@pytest.fixture
def disks() -> Disks:
    return Disks()


@pytest.mark.promise("O11")
@pytest.mark.parametrize("full", [HOME, DATABASE])
async def test_new_work_is_refused_while_one_of_the_disks_has_too_little_room(disks: Disks, full: Path) -> None:
    space = disks.space()
    space.check()
    assert space.problems() == []
    disks.free[full] = 8 * MIB - 1
    await disks.clock.advance(LOOK_EVERY)
    with pytest.raises(DiskFull) as refused:
        space.check()
    assert refused.value.details == {"free_bytes": 8 * MIB - 1, "needed_bytes": 8 * MIB}
    assert refused.value.retryable
    (problem,) = space.problems()
    assert "new work is refused with disk_full until 8 MiB are free" in problem
    disks.free[full] = 8 * MIB
    await disks.clock.advance(LOOK_EVERY)
    space.check()


@pytest.mark.promise("O11")
def test_a_disk_that_gets_full_is_reported_before_anything_is_refused(disks: Disks) -> None:
    disks.free[HOME] = LOW_SPACE - 1
    space = disks.space()
    space.check()
    assert space.problems() == ["only 63 MiB are free on the disk of /home"]


def test_nought_takes_work_as_long_as_the_store_does(disks: Disks) -> None:
    disks.free = {HOME: 0, DATABASE: 0}
    space = disks.space(least=0)
    space.check()
    assert space.problems() == ["only 0 KiB are free on the disk of /home"]


def test_a_disk_that_cannot_be_asked_refuses_nothing(disks: Disks) -> None:
    disks.free = {HOME: None, DATABASE: None}
    space = disks.space()
    space.check()
    assert space.free is None
    assert space.problems() == []


async def test_a_look_holds_for_a_moment(disks: Disks) -> None:
    space = disks.space()
    for _ in range(100):
        space.check()
    assert disks.looks == 2
    await disks.clock.advance(LOOK_EVERY)
    space.check()
    assert disks.looks == 4
