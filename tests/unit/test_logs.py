"""The daemon's log."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog

from ksi.errors import ConfigError
from ksi.logs import _FileLoggers, open_log

LEVELS = ("debug", "info", "warning", "error")


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """What `open_log` sets holds for the whole process."""
    yield
    factory = structlog.get_config()["logger_factory"]
    structlog.reset_defaults()
    if isinstance(factory, _FileLoggers):
        with contextlib.suppress(OSError):
            factory._file.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "var" / "logs" / "daemon.log"


def lines(path: Path) -> list[dict[str, Any]]:
    return [msgspec.json.decode(line) for line in path.read_text("utf-8").splitlines()]


def test_an_entry_is_one_line_of_json_with_time_level_and_facts(path: Path) -> None:
    open_log(path, "info")
    structlog.get_logger("ksi.test").info("it happened", request_id="r", text="two\nlines “é”")
    (entry,) = lines(path)
    assert entry["event"] == "it happened"
    assert entry["level"] == "info"
    assert entry["timestamp"].endswith("Z")
    assert (entry["request_id"], entry["text"]) == ("r", "two\nlines “é”")


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_below_the_level_is_not_written(path: Path, level: str) -> None:
    open_log(path, level)
    log = structlog.get_logger("ksi.test")
    for name in LEVELS:
        getattr(log, name)(name)
    assert [entry["event"] for entry in lines(path)] == list(LEVELS[LEVELS.index(level) :])


def test_a_defect_is_written_with_its_trace_on_the_same_line(path: Path) -> None:
    open_log(path, "info")
    try:
        raise ValueError("broken")
    except ValueError:
        structlog.get_logger("ksi.test").exception("failed")
    (entry,) = lines(path)
    assert entry["level"] == "error"
    assert "Traceback" in entry["exception"]
    assert "ValueError: broken" in entry["exception"]


def test_what_is_no_json_is_written_all_the_same(path: Path) -> None:
    open_log(path, "info")
    structlog.get_logger("ksi.test").info("odd", value=object(), data=b"\xff")
    (entry,) = lines(path)
    assert "object" in entry["value"]


@pytest.mark.promise("S3")
def test_the_log_is_for_this_user_only(path: Path) -> None:
    mask = os.umask(0)
    try:
        open_log(path, "info")
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_log_that_is_there_is_gone_on_with(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_text('{"event": "before"}\n')
    open_log(path, "info")
    structlog.get_logger("ksi.test").info("after")
    assert [entry["event"] for entry in lines(path)] == ["before", "after"]


def test_a_log_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        open_log(tmp_path / "file" / "daemon.log", "info")
    assert caught.value.place == str(tmp_path / "file" / "daemon.log")
    assert "choose another home" in caught.value.message


def test_an_entry_that_cannot_be_written_stops_nothing_and_goes_to_stderr(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_log(path, "info")
    log = structlog.get_logger("ksi.test")
    log.info("before")
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, structlog.get_config()["logger_factory"]._file.fileno())
    os.close(writer)
    log.info("not lost")
    told = capsys.readouterr().err
    assert told.startswith("ksi: log not written")
    assert "not lost" in told
    assert [entry["event"] for entry in lines(path)] == ["before"]
