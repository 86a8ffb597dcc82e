"""The daemon's log."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pytest
import structlog

from ksi.errors import ConfigError
from ksi.host.logs import FOLD_WINDOW, WRITTEN_IN_FULL, Log, open_log
from ksi.testing import SimulatedClock

LEVELS = ("debug", "info", "warning", "error")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "var" / "logs" / "daemon.log"


@pytest.fixture
def clock() -> SimulatedClock:
    return SimulatedClock()


class Opening(Protocol):
    def __call__(self, path: Path, level: str = "info", *, max_bytes: int = 10**6, keep: int = 3) -> Log: ...


@pytest.fixture
def opened(clock: SimulatedClock) -> Iterator[Opening]:
    """Opens logs. What that sets holds for the whole process, so it is undone at the end."""
    logs: list[Log] = []

    def open_one(path: Path, level: str = "info", *, max_bytes: int = 10**6, keep: int = 3) -> Log:
        logs.append(open_log(path, level, clock, max_bytes=max_bytes, keep=keep))
        return logs[-1]

    yield open_one
    for log in logs:
        log.close()
    structlog.reset_defaults()


def lines(path: Path) -> list[dict[str, Any]]:
    return [msgspec.json.decode(line) for line in path.read_text("utf-8").splitlines()]


def test_an_entry_is_one_line_of_json_with_time_level_and_facts(opened: Opening, path: Path) -> None:
    opened(path)
    structlog.get_logger("ksi.test").info("it happened", request_id="r", text="two\nlines “é”")
    (entry,) = lines(path)
    assert entry["event"] == "it happened"
    assert entry["level"] == "info"
    assert entry["timestamp"].endswith("Z")
    assert (entry["request_id"], entry["text"]) == ("r", "two\nlines “é”")


@pytest.mark.parametrize("level", LEVELS)
def test_lines_below_the_level_are_not_written(opened: Opening, path: Path, level: str) -> None:
    opened(path, level)
    log = structlog.get_logger("ksi.test")
    for name in LEVELS:
        getattr(log, name)(name)
    assert [entry["event"] for entry in lines(path)] == list(LEVELS[LEVELS.index(level) :])


def test_a_defect_is_written_with_its_trace_on_the_same_line(opened: Opening, path: Path) -> None:
    opened(path)
    try:
        raise ValueError("broken")
    except ValueError:
        structlog.get_logger("ksi.test").exception("failed")
    (entry,) = lines(path)
    assert entry["level"] == "error"
    assert "Traceback" in entry["exception"]
    assert "ValueError: broken" in entry["exception"]


def test_values_that_are_no_json_are_written_all_the_same(opened: Opening, path: Path) -> None:
    opened(path)
    structlog.get_logger("ksi.test").info("odd", value=object(), data=b"\xff")
    (entry,) = lines(path)
    assert "object" in entry["value"]


@pytest.mark.promise("S3")
def test_the_log_is_for_this_user_only(opened: Opening, path: Path) -> None:
    mask = os.umask(0)
    try:
        opened(path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_log_that_is_there_is_gone_on_with(opened: Opening, path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_text('{"event": "before"}\n')
    opened(path)
    structlog.get_logger("ksi.test").info("after")
    assert [entry["event"] for entry in lines(path)] == ["before", "after"]


def test_a_log_that_cannot_be_opened_is_named(opened: Opening, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path / "file" / "daemon.log")
    assert caught.value.place == str(tmp_path / "file" / "daemon.log")
    assert "choose another home" in caught.value.message


# -- the bound --------------------------------------------------------------------------------------------------------


@pytest.mark.promise("O1")
def test_a_log_that_is_long_is_set_aside_and_only_so_many_stay(opened: Opening, path: Path) -> None:
    opened(path, max_bytes=2_000, keep=2)
    log = structlog.get_logger("ksi.test")
    for number in range(100):
        log.info("line", number=number, filling="x" * 100)
    names = sorted(file.name for file in path.parent.iterdir())
    assert names == ["daemon.log", "daemon.log.1", "daemon.log.2"]
    assert all(file.stat().st_size <= 2_000 for file in path.parent.iterdir())
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in path.parent.iterdir())
    numbers = [entry["number"] for name in reversed(names) for entry in lines(path.with_name(name))]
    assert numbers == list(range(numbers[0], 100)), "in order, without a gap"


@pytest.mark.promise("O1")
def test_a_log_with_nothing_kept_restarts(opened: Opening, path: Path) -> None:
    opened(path, max_bytes=500, keep=0)
    for number in range(20):
        structlog.get_logger("ksi.test").info("line", number=number, filling="x" * 100)
    assert [file.name for file in path.parent.iterdir()] == ["daemon.log"]
    assert path.stat().st_size <= 500
    assert lines(path)[-1]["number"] == 19


@pytest.mark.promise("O1")
def test_a_log_that_cannot_be_set_aside_is_cut_rather_than_to_grow(opened: Opening, path: Path) -> None:
    opened(path, max_bytes=500, keep=1)
    (path.parent / "daemon.log.1").mkdir()
    for number in range(20):
        structlog.get_logger("ksi.test").info("line", number=number, filling="x" * 100)
    assert path.stat().st_size <= 500
    assert lines(path)[-1]["number"] == 19


@pytest.mark.promise("O1")
def test_a_line_longer_than_the_bound_is_whole_in_a_file_of_its_own(opened: Opening, path: Path) -> None:
    opened(path, max_bytes=300, keep=3)
    log = structlog.get_logger("ksi.test")
    log.info("short")
    log.info("long", text="x" * 1_000)
    log.info("short again")
    assert [entry["event"] for entry in lines(path)] == ["short again"]
    assert [len(entry["text"]) for entry in lines(path.with_name("daemon.log.1"))] == [1_000]


@pytest.mark.promise("O1")
@pytest.mark.parametrize("how", ["moved", "removed", "folder removed"])
def test_a_log_that_was_removed_is_recreated(opened: Opening, path: Path, how: str) -> None:
    opened(path)
    log = structlog.get_logger("ksi.test")
    log.info("before")
    if how == "moved":
        path.rename(path.with_name("elsewhere"))
    elif how == "removed":
        path.unlink()
    else:
        shutil.rmtree(path.parent)
    log.info("after")
    assert [entry["event"] for entry in lines(path)] == ["after"]


@pytest.mark.promise("O1")
def test_a_log_that_was_copied_and_cut_goes_on_at_its_beginning(opened: Opening, path: Path) -> None:
    """As logrotate's `copytruncate` does it."""
    opened(path)
    structlog.get_logger("ksi.test").info("before")
    os.truncate(path, 0)
    structlog.get_logger("ksi.test").info("after")
    assert [entry["event"] for entry in lines(path)] == ["after"]


@pytest.mark.promise("O1")
def test_stderr_that_is_the_log_follows_to_the_next_file(path: Path) -> None:
    """As `ksi start` gives it to the daemon: else it would fill a file that nobody sees."""
    script = f"""
import os, sys
from pathlib import Path
from ksi.clock import SystemClock
from ksi.host.logs import open_log
path = Path({str(path)!r})
log = open_log(path, "info", SystemClock(), max_bytes=10**6, keep=1)
path.rename(path.with_name("daemon.log.1"))
log.reopen()
os.write(2, b"a word\\n")
"""
    path.parent.mkdir(parents=True)
    with path.open("ab") as file:
        subprocess.run([sys.executable, "-c", script], stderr=file, check=True)
    assert path.read_bytes() == b"a word\n"


# -- the log never fails ----------------------------------------------------------------------------------------------


@pytest.mark.promise("O1")
def test_a_line_that_cannot_be_written_is_dropped_and_counted_and_the_log_goes_on(
    opened: Opening, path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log_file = opened(path)
    log = structlog.get_logger("ksi.test")
    log.info("before")
    real = os.write

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    log.info("dropped")
    log.warning("dropped too")
    condition = log_file.condition()
    assert condition.dropped == 2
    assert condition.problem == f"{path} cannot be written: No space left on device"
    monkeypatch.setattr(os, "write", real)
    log.info("after")
    condition = log_file.condition()
    assert (condition.dropped, condition.problem, condition.size) == (2, None, path.stat().st_size)
    assert [entry["event"] for entry in lines(path)] == ["before", "log lines were dropped", "after"]
    assert lines(path)[1]["lines"] == 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.promise("O1")
def test_a_line_of_which_half_was_written_spoils_no_other(
    opened: Opening, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(path)
    log = structlog.get_logger("ksi.test")
    real = os.write
    room = 20

    def nearly_full(descriptor: int, data: bytes) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(descriptor, data[:room])
        room -= written
        return written

    monkeypatch.setattr(os, "write", nearly_full)
    log.info("torn")
    monkeypatch.setattr(os, "write", real)
    log.info("whole")
    torn, dropped, whole = path.read_text().splitlines()
    assert len(torn) == 20
    assert msgspec.json.decode(dropped)["event"] == "log lines were dropped"
    assert msgspec.json.decode(whole)["event"] == "whole"


@pytest.mark.promise("O1")
def test_values_that_cannot_be_made_json_are_written_in_another_way(opened: Opening, path: Path) -> None:
    opened(path)
    circle: list[Any] = []
    circle.append(circle)
    structlog.get_logger("ksi.test").info("odd", value=circle, text="\udcff")
    (entry,) = lines(path)
    assert "[[...]]" in entry["value"]


@pytest.mark.promise("O1")
def test_lines_of_libraries_are_in_the_log_and_not_on_stderr(
    opened: Opening, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    opened(path)
    library = logging.getLogger("a.library")
    library.warning("%s is odd", "this")
    library.info("not wanted")
    # Not through the library's logger: the test runner has a handler there that does not take it.
    odd = logging.LogRecord("a.library", logging.ERROR, "", 0, "%s %s", ("too few",), None)
    logging.getLogger().handlers[-1].handle(odd)
    first, second = lines(path)
    assert (first["event"], first["level"], first["logger"]) == ("this is odd", "warning", "a.library")
    assert "too few" in second["event"]
    assert capfd.readouterr().err == ""


# -- folding ----------------------------------------------------------------------------------------------------------


@pytest.mark.promise("O1")
async def test_equal_warnings_and_errors_of_a_minute_are_counted_in_one_line(
    opened: Opening, path: Path, clock: SimulatedClock
) -> None:
    opened(path)
    log = structlog.get_logger("ksi.test")
    for number in range(1_000):
        log.error("settle failed", request_id=f"r{number}", error="no disk")
    log.error("settle failed", request_id="other", error="another reason")
    assert len(lines(path)) == WRITTEN_IN_FULL + 1
    await clock.advance(FOLD_WINDOW)
    log.info("something else")
    *_, folded, other = lines(path)
    assert other["event"] == "something else"
    assert (folded["event"], folded["error"], folded["repeated"]) == ("settle failed", "no disk", 995)
    assert folded["request_id"] == "r999", "with what the last one said"
    log.error("settle failed", request_id="new", error="no disk")
    assert lines(path)[-1]["request_id"] == "new", "a new minute shows its first ones again"


@pytest.mark.promise("O1")
def test_a_line_that_is_no_warning_is_never_folded(opened: Opening, path: Path) -> None:
    opened(path, "debug")
    for _ in range(100):
        structlog.get_logger("ksi.test").info("done")
        structlog.get_logger("ksi.test").debug("done")
    assert len(lines(path)) == 200


@pytest.mark.promise("O1")
def test_the_count_of_folded_lines_is_written_when_the_log_is_reopened_or_closed(opened: Opening, path: Path) -> None:
    log_file = opened(path)
    for _ in range(10):
        structlog.get_logger("ksi.test").warning("again")
    log_file.reopen()
    assert lines(path)[-1]["repeated"] == 10 - WRITTEN_IN_FULL
    for _ in range(7):
        structlog.get_logger("ksi.test").warning("again")
    log_file.close()
    assert lines(path)[-1]["repeated"] == 7 - WRITTEN_IN_FULL
    structlog.get_logger("ksi.test").warning("too late")
    assert lines(path)[-1]["event"] == "again"


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")

    __repr__ = __str__


@pytest.mark.promise("O10")
@pytest.mark.parametrize("fact", [Unspeakable(), {"a": [Unspeakable()]}], ids=["plain", "nested"])
def test_a_value_that_cannot_be_formatted_makes_a_line_and_raises_nothing(
    opened: Opening, path: Path, fact: object
) -> None:
    opened(path)
    log = structlog.get_logger("ksi.test")
    log.error("it broke", error=fact)
    log.info("next")
    first, second = lines(path)
    assert (first["event"], first["level"], first["unsaid"]) == ("it broke", "error", "this line broke: ValueError")
    assert second["event"] == "next"
