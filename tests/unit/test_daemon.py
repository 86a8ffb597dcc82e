"""What the daemon stands on: its pid file, the store that a configuration names, the service manager."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from ksi.clock import Chance
from ksi.config.reader import load
from ksi.config.schema import Config
from ksi.daemon import main_process as module
from ksi.daemon.daemon import Daemon
from ksi.daemon.main_process import run, tell_systemd
from ksi.daemon.parts import build_store, store_rules
from ksi.errors import ConfigError, StoreInUse
from ksi.host.pid_file import PidFile
from ksi.store.sqlite.store import SqliteStore
from ksi.store.values import StoreRules
from ksi.testing import SimulatedClock


def configured(home: Path, **sections: dict[str, Any]) -> Config:
    return load(home, {}, {"providers": {"local": {"enabled": False}}, **sections})


# -- the pid file -----------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "daemon.pid"


def test_a_pid_file_names_the_running_daemon_to_no_other_user_and_is_gone_afterwards(path: Path) -> None:
    mine = PidFile(path)
    mine.take()
    assert path.read_text() == f"{os.getpid()}\n"
    assert path.stat().st_mode & 0o777 == 0o600
    mine.release()
    assert not path.exists()
    mine.release()


def test_a_second_one_gets_the_holder_and_changes_nothing(path: Path) -> None:
    first = PidFile(path)
    first.take()
    second = PidFile(path)
    with pytest.raises(StoreInUse) as caught:
        second.take()
    assert caught.value.holder == str(os.getpid())  # type: ignore[attr-defined]
    assert str(os.getpid()) in caught.value.message
    second.release()
    assert path.read_text() == f"{os.getpid()}\n"
    first.release()
    second.take()
    second.release()


@pytest.mark.promise("R7")
def test_the_pid_file_of_a_killed_daemon_is_overwritten(path: Path) -> None:
    path.write_text("999999999999\nand more\n")
    mine = PidFile(path)
    mine.take()
    assert path.read_text() == f"{os.getpid()}\n"
    mine.release()


def test_a_file_that_its_holder_took_away_in_between_is_not_taken_for_the_one_that_others_see(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock
    removed: list[int] = []

    def flock(descriptor: int, operation: int) -> None:
        real(descriptor, operation)
        if not removed:
            removed.append(descriptor)
            path.unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    mine = PidFile(path)
    mine.take()
    assert path.read_text() == f"{os.getpid()}\n"
    with pytest.raises(StoreInUse):
        PidFile(path).take()
    mine.release()


def test_who_only_looks_whether_a_daemon_runs_keeps_none_from_starting(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.touch()
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    waited: list[float] = []

    def look_is_over(seconds: float) -> None:
        waited.append(seconds)
        fcntl.flock(descriptor, fcntl.LOCK_UN)

    monkeypatch.setattr(time, "sleep", look_is_over)
    mine = PidFile(path)
    mine.take()
    assert len(waited) == 1
    assert path.read_text() == f"{os.getpid()}\n"
    mine.release()
    os.close(descriptor)


def test_many_that_start_at_once_are_one_in_the_end(path: Path) -> None:
    files = [PidFile(path) for _ in range(8)]
    together, outcomes = threading.Barrier(len(files)), []

    def start(file: PidFile) -> None:
        together.wait()
        try:
            file.take()
        except StoreInUse:
            outcomes.append("in use")
        else:
            outcomes.append("runs")

    threads = [threading.Thread(target=start, args=(file,)) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("runs") == 1
    assert len(outcomes) == len(files)
    for file in files:
        file.release()


def test_a_pid_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        PidFile(tmp_path / "nowhere" / "daemon.pid").take()
    assert caught.value.place == str(tmp_path / "nowhere" / "daemon.pid")


# -- the store --------------------------------------------------------------------------------------------------------


def built(config: Config) -> Any:
    return build_store(config, Chance(random.Random(0)))


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///var/db/ksi.db", "{home}/var/db/ksi.db"),
        ("sqlite:///ksi.db", "{home}/ksi.db"),
        ("sqlite:////srv/ksi.db", "/srv/ksi.db"),
    ],
)
def test_an_sqlite_address_has_three_slashes_from_the_home_and_four_from_the_root(
    tmp_path: Path, url: str, path: str
) -> None:
    store = built(configured(tmp_path, store={"url": url}))
    assert isinstance(store, SqliteStore)
    assert store._path == Path(path.format(home=tmp_path))


@pytest.mark.parametrize("url", ["memory://", "memory:///x", "memory://name?x=1"])
def test_an_address_in_memory_is_refused_and_another_way_is_named(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match=r"there is no store in memory\. Use sqlite:///path") as caught:
        built(configured(tmp_path, store={"url": url}))
    assert caught.value.place == "store.url"


@pytest.mark.parametrize("durability", ["full", "normal"])
def test_the_store_gets_its_durability(tmp_path: Path, durability: str) -> None:
    assert built(configured(tmp_path, store={"durability": durability}))._durability == durability


@pytest.mark.parametrize(
    "url",
    [
        "",
        "sqlite",
        "sqlite://",
        "sqlite:///",
        "sqlite:////",
        "sqlite:///var/",
        "sqlite://var/db",
        "var/db/ksi.db",
        "postgres://x",
    ],
)
def test_an_address_of_no_known_kind_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        built(configured(tmp_path, store={"url": url}))
    assert caught.value.place == "store.url"
    assert repr(url) in caught.value.message


def test_seconds_of_the_configuration_reach_the_store_in_microseconds(tmp_path: Path) -> None:
    rules = store_rules(
        configured(
            tmp_path,
            queue={"max_queued": 7, "max_interruptions": 2, "on_interrupted": "fail"},
            lock={"expiry": 1.5},
            retention={"finished": 60, "sessions": 120},
        )
    )
    assert (rules.max_queued, rules.max_interruptions, rules.fail_interrupted) == (7, 2, True)
    assert (rules.lock_expiry, rules.keep_finished, rules.keep_sessions) == (1_500_000, 60_000_000, 120_000_000)


def test_the_store_s_own_defaults_are_those_of_the_configuration(tmp_path: Path) -> None:
    # A store by itself keeps the order of ranks, which is the simplest to test.
    assert store_rules(configured(tmp_path)) == StoreRules(fair=True)


# -- the service manager ----------------------------------------------------------------------------------------------


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listener


def test_systemd_is_notified_as_it_asked(manager: socket.socket) -> None:
    tell_systemd("READY=1")
    tell_systemd("STOPPING=1")
    assert [manager.recv(100) for _ in range(2)] == [b"READY=1", b"STOPPING=1"]


def test_an_address_that_begins_with_an_at_is_an_abstract_one(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"ksi-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name)
        listener.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        tell_systemd("READY=1")
        assert listener.recv(100) == b"READY=1"


@pytest.mark.parametrize("address", [None, ""])
def test_no_one_is_notified_unless_asked(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    tell_systemd("READY=1")


@pytest.mark.parametrize("address", ["nowhere", "@nobody-listens-here", "x" * 300])
def test_a_service_manager_that_does_not_listen_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address if address.startswith("@") else str(tmp_path / address))
    with capture_logs() as logs:
        tell_systemd("READY=1")
    assert [(entry["log_level"], entry["state"]) for entry in logs] == [("warning", "READY=1")]


# -- the whole, in short ----------------------------------------------------------------------------------------------


@pytest.mark.promise("R6")
async def test_a_start_that_fails_at_the_door_leaves_the_store_to_the_next_one(tmp_path: Path) -> None:
    config = configured(tmp_path, store={"url": "sqlite:///ksi.db"}, log={"responses": False})
    config.socket_path.parent.mkdir(parents=True)
    config.socket_path.write_text("something else")
    daemon = Daemon(config, SimulatedClock(), Chance(random.Random(0)), {})
    with pytest.raises(ConfigError, match="no socket"):
        await daemon.start()
    config.socket_path.unlink()
    again = Daemon(config, SimulatedClock(), Chance(random.Random(0)), {})
    await again.start()
    assert again.ready().ready
    await again.stop()
    assert not again.ready().ready


def test_a_home_that_cannot_be_used_is_an_error_code_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run(configured(tmp_path, socket={"path": "file/daemon.sock"})) == module.EXIT_CONFIG
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ksi: ")
    assert "choose another home" in line
