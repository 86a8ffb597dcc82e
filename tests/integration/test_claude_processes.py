"""Providers' processes on both event loops: pipes, ends, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from ksi.clock import SystemClock
from ksi.host.marks import MARK
from ksi.providers.process import (
    LAUNCHER,
    ChildProcess,
    ProcessRegistry,
    ProcessStartError,
    memory_of,
)
from tests.claude import living, until

Scenario = Callable[[], Awaitable[None]]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Scenario], None]:
    """Runs a scenario on a loop."""

    def on_loop(scenario: Scenario) -> None:
        async def limited() -> None:
            async with asyncio.timeout(30):
                await scenario()

        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(limited())

    return on_loop


class Place:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries = folder / "run" / "processes"
        self.registry = ProcessRegistry(self.entries)

    async def start(self, code: str, *arguments: str, **fields: Any) -> ChildProcess:
        return await self.program([sys.executable, "-I", "-u", "-c", code, *arguments], **fields)

    async def program(self, command: list[str], folder: Path | None = None) -> ChildProcess:
        return await ChildProcess.start(
            self.registry,
            command,
            name="a name",
            environment={"PATH": os.environ["PATH"]},
            folder=folder or self.folder,
        )

    def entry(self) -> Any:
        (path,) = self.entries.iterdir()
        return json.loads(path.read_text())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def line(child: ChildProcess) -> str:
    """Its first line: an unbuffered `print` writes in pieces."""
    data = b""
    while not data.endswith(b"\n"):
        piece = await child.read()
        assert piece, child.ending
        data += piece
    return data.decode()


async def everything(child: ChildProcess) -> bytes:
    data = bytearray()
    while piece := await child.read():
        data += piece
    return bytes(data)


def test_input_comes_out_unchanged_whatever_its_size(place: Place, run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        child = await place.start("import sys, shutil; shutil.copyfileobj(sys.stdin.buffer, sys.stdout.buffer)")
        data = os.urandom(20_000_000)

        async def send() -> None:
            await child.write(data)
            await child.finish(10)

        sending = asyncio.create_task(send())
        assert await everything(child) == data
        await sending
        assert child.ending == "exit code 0"

    run(scenario)


def test_a_process_that_writes_much_waits_for_its_reader(place: Place, run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        child = await place.start("import sys\nfor _ in range(64): sys.stdout.buffer.write(b'x' * (1 << 20))")
        begin = await child.read()
        assert not await child.ends_within(0.3), "64 MiB are more than is read ahead"
        assert (memory_of(child.pid) or 0) > 1 << 20
        assert len(begin + await everything(child)) == 64 << 20
        await child.kill()

    run(scenario)


def test_a_process_that_does_not_read_makes_the_writer_wait(place: Place, run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        child = await place.start("import time; time.sleep(600)")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await child.write(b"x" * 10_000_000)
        await child.kill()
        await child.write(b"to nobody")
        assert await child.read() == b""

    run(scenario)


def test_an_end_tells_its_code_and_its_last_words(place: Place, run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        child = await place.start("import sys; print('x' * 20000 + 'the end', file=sys.stderr); sys.exit(7)")
        assert await child.ends_within(10)
        assert child.ending.startswith("exit code 7: x")
        assert child.ending.endswith("the end")
        assert len(child.ending) < 600
        await child.kill()
        killed = await place.start("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
        await killed.ends_within(10)
        assert killed.ending == "signal SIGSEGV"
        await killed.kill()

    run(scenario)


def test_it_leads_a_session_and_is_registered_while_it_lives(place: Place, run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        child = await place.start(f"import os; print(os.getsid(0), os.getpgid(0), os.environ['{MARK}'])")
        session, group, mark = (await line(child)).split()
        assert int(session) == int(group) == child.pid
        entry = json.loads(Path(mark).read_text())
        assert (entry["pid"], entry["name"]) == (child.pid, "a name")
        await child.kill()
        assert not Path(mark).exists()

    run(scenario)


def test_a_program_that_is_not_there_ends_at_once_and_says_so(place: Place, run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        child = await place.program(["/no/such/program"])
        assert await everything(child) == b""
        assert await child.ends_within(10)
        assert child.ending == "exit code 126: /no/such/program cannot be run: No such file or directory"
        await child.kill()
        with pytest.raises(ProcessStartError, match="No such file"):
            await place.start("", folder=place.folder / "no-folder")
        assert list(place.entries.iterdir()) == []

    run(scenario)


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
same = subprocess.Popen(["sleep", "600"])
polite = subprocess.Popen([sys.executable, "-c", '''
import signal, time, os
def end(*_):
    open("ended", "w").close()
    os._exit(0)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(600)
'''], stdout=subprocess.PIPE)
polite.stdout.readline()
away = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(same.pid, polite.pid, away.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.promise("F7")
def test_a_stop_ends_the_process_and_all_that_it_started(place: Place, run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        child = await place.start(STUBBORN)
        pids = [child.pid, *map(int, (await line(child)).split())]
        assert living(pids) == pids
        async with asyncio.timeout(4):
            await child.stop(2.0)
        assert living(pids) == []
        assert (place.folder / "ended").exists(), "what can end in order gets its time"

    run(scenario)


def test_an_end_is_seen_though_an_offspring_holds_the_pipes(place: Place, run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        child = await place.start(
            "import subprocess; print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid)"
        )
        async with asyncio.timeout(5):
            pid = int(await everything(child))
            await child.stop(0.1)
        assert living([pid]) == []

    run(scenario)


@pytest.mark.promise("F7")
def test_a_cancelled_start_leaves_nothing(place: Place, run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        for turns in range(12):
            task = asyncio.create_task(place.start("import time; time.sleep(600)"))
            for _ in range(turns):
                await asyncio.sleep(0)
            if task.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:  # it was quicker
                await (await task).kill()
            assert await place.registry.reap(SystemClock()) == []

    run(scenario)


# -- remains of a killed daemon ---------------------------------------------------------------------------------------

DAEMON = """
import asyncio, os, sys
from pathlib import Path
from ksi.providers.process import ChildProcess, ProcessRegistry
async def main():
    registry = ProcessRegistry(Path(sys.argv[1]))
    child = await ChildProcess.start(
        registry, [sys.executable, "-u", "-c", sys.argv[2]], name="left", environment=dict(os.environ), folder=Path("/")
    )
    litter = b""
    while not litter.endswith(b"\\n"):
        litter += await child.read()
    print(child.pid, litter.decode().strip(), flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
LITTERING = """
import subprocess, time
print(subprocess.Popen(["sleep", "600"], start_new_session=True).pid, flush=True)
time.sleep(600)
"""


def killed_daemon(place: Place) -> list[int]:
    """Start a daemon whose process starts another one; kill the daemon; both pids."""
    with subprocess.Popen(
        [sys.executable, "-c", DAEMON, str(place.entries), LITTERING], stdout=subprocess.PIPE
    ) as daemon:
        assert daemon.stdout is not None
        pids = [int(word) for word in daemon.stdout.readline().split()]
        assert living(pids) == pids
        daemon.send_signal(signal.SIGKILL)
    return pids


@pytest.mark.promise("F7")
def test_a_process_dies_with_its_daemon_and_the_next_one_reaps_the_rest(
    place: Place, run: Callable[[Scenario], None]
) -> None:
    process, litter = killed_daemon(place)

    async def scenario() -> None:
        await until(lambda: not living([process]), patience=5)
        assert living([litter]) == [litter], "it has a session of its own, and no parent that the system knows"
        (entry,) = await place.registry.reap(SystemClock())
        assert (entry.pid, entry.name) == (process, "left")
        assert living([litter]) == []
        assert list(place.entries.iterdir()) == []

    run(scenario)


MACOS_LAUNCHER = """
import runpy, sys
sys.platform = "darwin"
runpy.run_path({launcher!r}, run_name="__main__")
"""
SAME_SESSION = """
import os, subprocess, time
os.set_blocking(0, True)
print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
time.sleep(600)
"""


@pytest.mark.promise("F7", "O12")
@pytest.mark.parametrize("hidden", [False, True], ids=["environments are shown", "environments are hidden"])
def test_without_notice_of_a_parent_s_death_the_next_daemon_reaps_all(
    place: Place, run: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch, hidden: bool
) -> None:
    script = place.folder / "launcher.py"
    script.write_text(MACOS_LAUNCHER.format(launcher=str(LAUNCHER)))
    code = f"import ksi.providers.process as p; from pathlib import Path; p.LAUNCHER = Path({str(script)!r})\n{DAEMON}"
    command = [sys.executable, "-c", code, str(place.entries), SAME_SESSION]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as one:
        assert one.stdout is not None
        pids = [int(word) for word in one.stdout.readline().split()]
        one.send_signal(signal.SIGKILL)
    assert living(pids) == pids, "nothing told them of the end"
    monkeypatch.setattr("ksi.providers.process.sys.platform", "darwin")
    if hidden:
        monkeypatch.setattr(psutil.Process, "environ", lambda self: {})

    async def scenario() -> None:
        assert len(await place.registry.reap(SystemClock())) == 1
        assert living(pids) == []

    run(scenario)


@pytest.mark.promise("F7")
def test_a_process_that_took_the_number_of_ours_is_not_touched(place: Place, run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        assert await place.registry.reap(SystemClock()) == []

    with subprocess.Popen(["sleep", "600"]) as other:
        place.entries.mkdir(parents=True)
        entry = {"pid": other.pid, "started": 1, "name": "was ours"}
        (place.entries / "1-1").write_text(json.dumps(entry))
        (place.entries / "1-2").write_text('{"pid": 12')
        run(scenario)
        assert list(place.entries.iterdir()) == []
        assert living([other.pid]) == [other.pid]
        other.kill()


def test_a_process_whose_daemon_is_gone_already_does_not_begin(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", str(LAUNCHER), "1", str(tmp_path / "entry"), "name", "touch", "begun"]
    assert subprocess.run(command, cwd=tmp_path, timeout=10).returncode == 125
    assert list(tmp_path.iterdir()) == []
