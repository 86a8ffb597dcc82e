"""The file of the kept time, the log's lines on leaps, and the words in `system:health`."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from ksi.clock import EARLIEST, KeptTime, SystemClock, microseconds
from ksi.completion.upkeep.clock_keeper import ClockKeeper, clock_problem, clock_report, machine_boot, start_clock
from ksi.testing import SimulatedClock, settle_down

HOUR = 3_600
DAY = 86_400


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "var" / "clock.json"


def read(path: Path) -> KeptTime:
    return msgspec.json.decode(path.read_bytes(), type=KeptTime)


@pytest.mark.promise("O4")
async def test_the_time_is_kept_at_the_start_every_minute_at_a_leap_and_at_the_end(path: Path) -> None:
    clock = SimulatedClock()
    keeper = ClockKeeper(clock, path)
    keeper.start()
    assert read(path) == clock.keep()
    await settle_down()
    await clock.advance(59)
    assert read(path).wall == clock.now().wall - microseconds(59)
    await clock.advance(1)
    assert read(path) == clock.keep()
    clock.step_wall(30 * DAY)
    await clock.advance(1)
    assert read(path) == clock.keep()
    await clock.advance(5)
    assert keeper.task.alive
    await keeper.stop()
    assert read(path) == clock.keep()
    assert not keeper.task.alive


@pytest.mark.promise("O4")
async def test_a_leap_and_its_end_stand_in_the_log(path: Path) -> None:
    clock = SimulatedClock()
    keeper = ClockKeeper(clock, path)
    with capture_logs() as logs:
        keeper.start()
        await settle_down()
        clock.step_wall(30 * DAY)
        await clock.advance(3)
        clock.step_wall(-30 * DAY)
        await clock.advance(3)
        await keeper.stop()
    leapt, agrees = logs
    assert (leapt["event"], leapt["log_level"]) == ("wall clock leapt", "warning")
    assert (leapt["leap_seconds"], leapt["apart_seconds"]) == (30 * DAY, 30 * DAY)
    assert (leapt["leap_at"], leapt["going_by"]) == ("2023-11-14T22:13:21Z", "2023-11-14T22:13:21Z")
    assert (agrees["event"], agrees["log_level"], agrees["apart_seconds"]) == ("wall clock agrees again", "info", 0)


@pytest.mark.promise("O4")
async def test_a_file_that_cannot_be_written_is_reported_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "var").write_text("no folder")
    clock = SimulatedClock()
    keeper = ClockKeeper(clock, tmp_path / "var" / "clock.json")
    with capture_logs() as logs:
        keeper.start()
        await settle_down()
        await clock.advance(61)
        assert keeper.task.alive
        await keeper.stop()
    assert [line["event"] for line in logs] == ["time is not kept"] * 3


@pytest.mark.promise("O4")
@pytest.mark.parametrize(
    ("leap", "words"),
    [
        (30 * DAY, "leapt by +30 d 0 h 0 min at 2023-11-14T22:13:20Z"),
        (30 * DAY, "if it is right now, stop KSI, remove /home/clock.json and start it"),
        (8 * HOUR, "KSI follows it if it stays so for an hour"),
        (-2 * HOUR, "leapt by -2 h 0 min at 2023-11-14T22:13:20Z"),
        (-2 * HOUR, "KSI approaches it by three minutes an hour"),
    ],
)
def test_a_large_leap_is_a_problem_with_advice(leap: int, words: str) -> None:
    clock = SimulatedClock()
    clock.step_wall(leap)
    problem = clock_problem(clock, Path("/home/clock.json"))
    assert problem is not None
    assert words in problem
    assert msgspec.to_builtins(clock_report(clock)) == {
        "apart_seconds": leap,
        "leap": {"at": 1_700_000_000.0, "seconds": leap, "standing": True},
    }


@pytest.mark.promise("O4")
def test_a_small_leap_and_one_that_is_over_are_no_problem() -> None:
    clock = SimulatedClock()
    assert msgspec.to_builtins(clock_report(clock)) == {"apart_seconds": 0.0, "leap": None}
    clock.step_wall(300)
    assert clock_problem(clock, Path("/home/clock.json")) is None
    assert msgspec.to_builtins(clock_report(clock))["leap"]["standing"]
    clock.step_wall(30 * DAY)
    assert clock_problem(clock, Path("/home/clock.json")) is not None
    clock.step_wall(-30 * DAY - 300)
    assert clock_problem(clock, Path("/home/clock.json")) is None
    assert not msgspec.to_builtins(clock_report(clock))["leap"]["standing"]


@pytest.mark.promise("O4")
def test_a_start_goes_on_from_the_kept_time(path: Path) -> None:
    path.parent.mkdir()
    now = SystemClock().keep()
    before = KeptTime(machine_boot(), now.boot, now.wall - microseconds(30 * DAY), followed=microseconds(DAY))
    path.write_bytes(msgspec.json.encode(before))
    clock = start_clock(path)
    assert 30 * DAY - 60 < clock.apart() < 30 * DAY + 60
    assert DAY - 60 < clock.now().unix - clock.aged().unix < DAY + 60


@pytest.mark.promise("O4")
def test_a_start_without_the_file_goes_by_the_system(path: Path) -> None:
    assert abs(start_clock(path).apart()) < 2
    assert start_clock(path).now().wall > EARLIEST


@pytest.mark.promise("O4")
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"machine_boot": 1}', b"\xff"])
def test_a_damaged_file_is_reported_and_the_start_uses_the_system_s_time(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with capture_logs() as logs:
        assert abs(start_clock(path).apart()) < 2
    assert [(line["event"], line["path"]) for line in logs] == [("kept time is unreadable", str(path))]


@pytest.mark.promise("O12")
def test_the_machines_boot_has_a_name_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert machine_boot() == machine_boot() != ""
    (tmp_path / "id").write_text("0b5c-1\n")
    monkeypatch.setattr("ksi.completion.upkeep.clock_keeper._BOOT_ID", tmp_path / "id")
    assert machine_boot("linux") == "0b5c-1"
    monkeypatch.setattr("ksi.completion.upkeep.clock_keeper._BOOT_ID", tmp_path / "gone")
    assert machine_boot("linux") == ""


@pytest.mark.promise("O12")
def test_on_a_mac_the_boot_is_named_by_sysctl(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    class Done:
        stdout = "A3F0-9\n"

    def run(command: list[str], **options: object) -> Done:
        asked.append(command)
        return Done()

    monkeypatch.setattr("ksi.completion.upkeep.clock_keeper.subprocess.run", run)
    assert machine_boot("darwin") == "A3F0-9"
    assert asked == [["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]]

    def missing(command: list[str], **options: object) -> Done:
        raise FileNotFoundError(command[0])

    monkeypatch.setattr("ksi.completion.upkeep.clock_keeper.subprocess.run", missing)
    assert machine_boot("darwin") == ""
