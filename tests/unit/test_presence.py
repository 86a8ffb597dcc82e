"""A daemon stays where clients look for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import cast

import pytest
import pytest_asyncio

from ksi.config.schema import Socket
from ksi.daemon.presence import LONGEST_PAUSE, LOOK_EVERY, Presence
from ksi.host.pid_file import PidFile
from ksi.testing import SimulatedClock, settle_down
from ksi.transports.dispatch import Dispatcher
from ksi.transports.unix_socket import SocketConnection, UnixSocket


class House:
    """A run folder with who lives in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.clock = SimulatedClock()
        self.pid_file = PidFile(folder / "daemon.pid")
        self.pid_file.take()
        self.socket_path = folder / "daemon.sock"

        async def on_gone(_: SocketConnection) -> None: ...

        self.socket = UnixSocket(
            self.socket_path,
            Socket(),
            cast(Dispatcher, None),
            self.clock,
            awaits=lambda _: False,
            on_gone=on_gone,
        )
        self.replaced = 0
        self.presence = Presence(self.socket, self.pid_file, self.clock, self._on_replaced)

    def _on_replaced(self) -> None:
        self.replaced += 1


@pytest_asyncio.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path / "run")
    await house.socket.start()
    house.presence.task.start()
    await settle_down()
    yield house
    await house.presence.task.stop()
    await house.socket.stop()
    house.pid_file.release()


NEXT_DAEMON = """
import socket, sys
from pathlib import Path
from ksi.host.pid_file import PidFile
folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
pid_file = PidFile(folder / "daemon.pid")
pid_file.take()
listener = socket.socket(socket.AF_UNIX)
listener.bind(str(folder / "daemon.sock"))
print("bound", flush=True)
sys.stdin.readline()
listener.listen()
print("serves", flush=True)
sys.stdin.readline()
"""


class NextDaemon:
    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", NEXT_DAEMON, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.says() == "bound"

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def serve(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert self.says() == "serves"

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def next_daemon(house: House) -> Iterator[NextDaemon]:
    shutil.rmtree(house.folder)
    daemon = NextDaemon(house.folder)
    yield daemon
    daemon.end()


@pytest.mark.promise("O2")
@pytest.mark.parametrize("what", ["folder", "pid file", "socket"])
async def test_a_removed_file_is_restored_within_a_second(house: House, what: str) -> None:
    if what == "folder":
        shutil.rmtree(house.folder)
    elif what == "pid file":
        (house.folder / "daemon.pid").unlink()
    else:
        house.socket_path.unlink()
    await house.clock.advance(LOOK_EVERY)
    assert (house.folder / "daemon.pid").read_text() == f"{os.getpid()}\n"
    assert house.socket_path.is_socket()
    assert house.folder.stat().st_mode & 0o777 == (0o700 if what == "folder" else 0o777 & ~umask())
    assert house.replaced == 0
    assert house.presence.task.problem is None


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.promise("O2")
async def test_if_another_daemon_serves_in_its_place_it_goes_and_touches_nothing(
    house: House, next_daemon: NextDaemon
) -> None:
    await house.clock.advance(3 * LOOK_EVERY)
    assert house.replaced == 0, "it may be sent away yet"
    theirs = house.socket_path.stat().st_ino
    next_daemon.serve()
    await house.clock.advance(LOOK_EVERY)
    assert house.replaced == 1
    await house.presence.task.stop()
    await house.socket.stop()
    house.pid_file.release()
    assert house.socket_path.stat().st_ino == theirs
    assert (house.folder / "daemon.pid").read_text() == f"{next_daemon.process.pid}\n"


@pytest.mark.promise("O2")
async def test_if_another_daemon_only_tried_it_comes_back(house: House, next_daemon: NextDaemon) -> None:
    await house.clock.advance(LOOK_EVERY)
    next_daemon.end()
    await house.clock.advance(LOOK_EVERY)
    assert house.replaced == 0
    assert (house.folder / "daemon.pid").read_text() == f"{os.getpid()}\n"
    assert not house.socket.is_served_by_another()
    assert await house.socket.restore() is False


@pytest.mark.promise("O2")
async def test_an_obstacle_in_its_place_is_a_problem_until_it_is_moved(house: House) -> None:
    house.socket_path.unlink()
    house.socket_path.write_text("precious")
    await house.clock.advance(10.0)
    assert house.presence.task.problem is not None
    assert "is no socket" in house.presence.task.problem
    house.socket_path.rename(house.folder / "moved")
    await house.clock.advance(LONGEST_PAUSE)
    assert house.presence.task.problem is None
    assert house.socket_path.is_socket()
