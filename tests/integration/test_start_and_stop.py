"""A real daemon process and its findings at the start; requeueing by a stop; two daemons; bad homes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import pytest

from ksi import Client
from ksi.events.bus import News
from ksi.host.platforms import answers
from ksi.testing import settle_down
from tests.daemon_process import CONFIG, DaemonProcess, make_home, start_in_vain
from tests.endpoint import Answer, ScriptedEndpoint
from tests.integration.serving import LONG, daemon_and_wire
from tests.integration.wire import Json, Wire, in_state, until

DATABASE = Path("var/db/ksi.db")
PID_FILE = Path("var/run/daemon.pid")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_home(tmp_path)


@pytest.fixture
def process(home: Path) -> Iterator[DaemonProcess]:
    """A daemon to start; ended whatever becomes of the test."""
    process = DaemonProcess(home)
    yield process
    process.end(signal.SIGKILL)


def refused(home: Path, *words: str, environ: dict[str, str] | None = None) -> str:
    """The output of a daemon that must not start: one sentence, and no trace of the program."""
    outcome = start_in_vain(home, environ)
    assert outcome.returncode not in (0, -signal.SIGKILL), outcome.stdout
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr, outcome.stderr
    assert outcome.stderr.startswith("ksi: "), outcome.stderr
    assert outcome.stderr.count("\n") == 1, outcome.stderr
    for word in words:
        assert word in outcome.stderr, outcome.stderr
    return outcome.stderr


async def serves(process: DaemonProcess) -> None:
    async with await Wire.open(process.socket_path) as wire:
        assert (await wire.ask("completion:request", prompt="x"))["result"] == "echo: x"
        assert (await wire.ask("system:health"))["status"] == "healthy"


# Stopping


@pytest.mark.promise("R6", "Q3")
async def test_sigterm_gives_running_requests_a_grace_period_and_ends_with_zero(
    home: Path, process: DaemonProcess
) -> None:
    make_home(home, CONFIG.replace("shutdown_grace = 1.0", "shutdown_grace = 20.0"))
    process.start()
    async with await Wire.open(process.socket_path) as wire:
        script = {"delay": 0.3}
        asked = wire.post("completion:request", {"prompt": "x", "request_id": "r", "provider_options": script})
        await wire.ask("completion:async", prompt="x", request_id="r2", provider_options=script)
        os.kill(process.pid, signal.SIGTERM)

        async def stopping() -> bool:
            return not (await wire.ask("system:ready"))["ready"]

        await until(stopping)
        error = await wire.refused("completion:async", prompt="x", request_id="late")
        assert (error.code, error.retryable) == ("shutting_down", True)
        assert (await asked)["data"]["result"] == "echo: x"
        assert (await wire.pushed("completion:result"))["request_id"] == "r2"
        await wire.end()
    assert process.end(signal.SIGCONT) == 0
    assert not (home / PID_FILE).exists()
    assert not process.socket_path.exists()


@pytest.mark.promise("R6", "R1")
async def test_an_orderly_stop_tells_waiting_clients_that_the_request_continues(
    home: Path, process: DaemonProcess
) -> None:
    make_home(home, CONFIG.replace("shutdown_grace = 1.0", "shutdown_grace = 0.1"))
    with process:
        async with await Wire.open(process.socket_path) as wire:
            data = {"prompt": "x", "request_id": "r", "model": "slow/x"}
            waits = [wire.post("completion:request", data), wire.post("completion:wait", {"request_id": "r"})]
            await in_state(wire, "r", "running")
            assert process.end(signal.SIGTERM) == 0
            for reply in [await waiting for waiting in waits]:
                assert reply["error"]["code"] == "shutting_down"
                assert reply["error"]["details"] == {"request_id": "r", "goes_on": True}
                assert "completion:wait" in reply["error"]["message"]
        process.start()
        async with await Wire.open(process.socket_path) as wire:
            await in_state(wire, "r", "running")
            await wire.ask("completion:cancel", request_id="r")


@pytest.mark.promise("R6", "R1")
async def test_our_own_client_goes_on_waiting_over_an_orderly_restart(home: Path, process: DaemonProcess) -> None:
    make_home(home, CONFIG.replace("shutdown_grace = 1.0", "shutdown_grace = 0.1"))
    with process:
        async with Client(process.socket_path) as client, await Wire.open(process.socket_path) as wire:
            waits = asyncio.create_task(client.complete("x", request_id="r", model="slow/x"))
            await in_state(wire, "r", "running")
            assert process.end(signal.SIGTERM) == 0
            make_home(home, CONFIG.replace("delay = 600", "delay = 0"))
            process.start()
            assert (await waits).result == "echo: x"


@pytest.mark.promise("R6", "Q3")
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
async def test_a_run_that_exceeds_its_grace_period_returns_to_the_queue_and_counts_no_interruption(
    home: Path, process: DaemonProcess, by: signal.Signals
) -> None:
    make_home(home, CONFIG.replace("shutdown_grace = 1.0", "shutdown_grace = 0.1"))
    with process:
        for number in range(4):
            async with await Wire.open(process.socket_path) as wire:
                if number == 0:
                    script = {"pieces": 2, "piece_delay": 600, "text": "ab"}
                    await wire.ask(
                        "completion:async",
                        prompt="x",
                        request_id="r",
                        session_id="c",
                        stream=True,
                        provider_options=script,
                    )
                    await wire.ask("completion:async", prompt="x", request_id="w", session_id="c")
                    await wire.ask("completion:async", prompt="x", request_id="later", delay=600)
                reply = await in_state(wire, "r", "running")
                assert [attempt["outcome"] for attempt in reply.get("attempts", [])] == ["shutdown"] * number
                assert "interruptions" not in reply
                assert (await wire.ask("completion:get", request_id="w"))["holder"] == "r"
            assert process.end(by) == 0
            process.start()
        async with await Wire.open(process.socket_path) as wire:
            await in_state(wire, "r", "running")
            figures = await wire.ask("completion:queue_status")
            assert [figures[name] for name in ("active", "queued", "scheduled", "failed")] == [1, 1, 1, 0]
            await wire.ask("completion:cancel", request_id="r")
            assert (await wire.ask("completion:wait", request_id="w"))["status"] == "completed"


@pytest.mark.promise("R6")
async def test_a_stop_under_load_loses_nothing(home: Path, process: DaemonProcess) -> None:
    """Again and again, with runs that just begin, end, or are being claimed."""
    make_home(home, CONFIG.replace("shutdown_grace = 1.0", "shutdown_grace = 0.02"))
    asked: dict[str, Json] = {}
    for life in range(8):
        process.start()
        async with await Wire.open(process.socket_path) as wire:
            for number in range(40):
                script = {"delay": 0.005 * (number % 4)}
                name = f"r{life}-{number}"
                data = {"prompt": "x", "request_id": name, "session_id": f"c{number % 7}", "provider_options": script}
                try:
                    reply = await wire.post("completion:async", data)
                except ConnectionResetError:
                    asked[name] = data  # taken or not: asking again tells
                    break
                if "error" in reply:
                    assert reply["error"]["code"] == "shutting_down"
                    break
                asked[name] = data
                if number == 20:
                    os.kill(process.pid, signal.SIGTERM)
        assert process.end(signal.SIGCONT) == 0
    with process:
        async with await Wire.open(process.socket_path) as wire:
            for name, data in asked.items():
                await wire.ask("completion:async", **data)
                reply = await in_state(wire, name, "completed")
                assert "interruptions" not in reply, reply
                outcomes = [attempt["outcome"] for attempt in reply["attempts"]]
                assert outcomes == ["shutdown"] * (len(outcomes) - 1) + ["completed"]
            figures = await wire.ask("completion:queue_status")
            assert (figures["completed"], figures["locked_conversations"]) == (len(asked), 0)
    assert len(asked) > 8 * 20


class Unheard:
    """A connection that keeps nothing."""

    def push(self, line: bytes) -> None:
        pass

    def news(self, news: News) -> None:
        self.push(news.line())

    def answer(self, line: bytes) -> None:
        self.push(line)


@pytest.mark.promise("R6")
async def test_a_stop_at_any_moment_of_a_claim_counts_no_interruption(tmp_path: Path) -> None:
    """One slot, three requests: each end is the next one's claim, and the stop comes in at every turn of the loop."""
    providers = {"stub": {"kind": "stub", "max_concurrency": 1}}
    for turns in range(45):
        home = tmp_path / str(turns)
        home.mkdir()
        async with daemon_and_wire(home, providers=providers) as (daemon, _):
            for number in range(3):
                ask = b'{"event": "completion:async", "data": {"prompt": "x", "request_id": "r%d"}}' % number
                await daemon.socket.dispatcher.serve(ask, Unheard())
            await settle_down(turns)
        async with daemon_and_wire(home, providers=providers) as (_, wire):
            for number in range(3):
                reply = await wire.ask("completion:wait", request_id=f"r{number}")
                assert reply["status"] == "completed"
                outcomes = [attempt["outcome"] for attempt in reply["attempts"]]
                assert "interrupted" not in outcomes, f"after {turns} turns: {outcomes}"


@pytest.mark.promise("R6")
@pytest.mark.parametrize("moment", [0.05, 0.15, 0.25, 0.35, 0.45])
async def test_a_stop_in_the_middle_of_the_start_leaves_nothing_in_the_way(
    process: DaemonProcess, moment: float
) -> None:
    process.spawn()
    await asyncio.sleep(moment)  # wherever in the start that is
    assert process.end(signal.SIGTERM) in (0, -signal.SIGTERM)
    with process:
        await serves(process)


@pytest.mark.promise("R6")
async def test_a_client_s_word_stops_the_daemon_in_order(process: DaemonProcess) -> None:
    process.start()
    async with await Wire.open(process.socket_path) as wire:
        assert (await wire.ask("system:shutdown"))["stopping"] is True
        await wire.end()
    assert process.end(signal.SIGCONT) == 0


@pytest.mark.promise("Q3")
async def test_a_request_interrupted_by_kills_runs_again_three_times_and_then_fails(process: DaemonProcess) -> None:
    for life in range(3):
        process.start()
        async with await Wire.open(process.socket_path) as wire:
            if life == 0:
                await wire.ask("completion:async", prompt="x", request_id="r", session_id="c", provider_options=LONG)
                await wire.ask("completion:async", prompt="x", request_id="w", session_id="c")
            reply = await in_state(wire, "r", "running")
            assert reply.get("interruptions", 0) == life
            process.end(signal.SIGKILL)
    with process:
        async with await Wire.open(process.socket_path) as wire:
            reply = await wire.ask("completion:get", request_id="r")
            assert (reply["status"], reply["error"]["code"], reply["interruptions"]) == ("failed", "daemon_restart", 3)
            assert [attempt["outcome"] for attempt in reply["attempts"]] == ["interrupted"] * 3
            assert [attempt["usage"] for attempt in reply["attempts"]] == ["unknown"] * 3
            assert (await wire.ask("completion:wait", request_id="w"))["status"] == "completed"


@pytest.mark.promise("Q1", "Q2", "Q3")
async def test_places_in_the_queue_survive_a_kill(home: Path, process: DaemonProcess) -> None:
    make_home(home, CONFIG.replace("max_concurrency = 8", 'max_concurrency = 1\nrecord = "record.tsv"'))
    process.start()
    async with await Wire.open(process.socket_path) as wire:
        await wire.ask("completion:async", prompt="x", request_id="runs", provider_options={"delay": 1})
        for word in ("background", "low", "normal", "high", "critical"):
            await wire.ask("completion:async", prompt="x", request_id=word, priority=word)
    process.end(signal.SIGKILL)
    with process:
        async with await Wire.open(process.socket_path) as wire:
            assert (await wire.ask("completion:wait", request_id="background"))["status"] == "completed"
    lines = [line.split("\t") for line in (home / "record.tsv").read_text().splitlines()]
    begun = [request for word, _, _, request, _ in lines if word == "begin"]
    assert begun == ["runs", "critical", "high", "runs", "normal", "low", "background"], "it keeps its rank, as normal"


@pytest.mark.promise("Q3")
async def test_a_request_interrupted_by_a_kill_fails_at_once_if_configured(home: Path, process: DaemonProcess) -> None:
    make_home(home, '[queue]\non_interrupted = "fail"\n' + CONFIG)
    process.start()
    async with await Wire.open(process.socket_path) as wire:
        await wire.ask("completion:async", prompt="x", request_id="r", provider_options=LONG)
        await wire.ask("completion:async", prompt="x", request_id="waits", session_id="c", delay=0.1)
    process.end(signal.SIGKILL)
    with process:
        async with await Wire.open(process.socket_path) as wire:
            reply = await wire.ask("completion:get", request_id="r")
            assert (reply["status"], reply["error"]["code"]) == ("failed", "daemon_restart")
            assert (await wire.ask("completion:wait", request_id="waits"))["status"] == "completed"


@pytest.mark.promise("Q3", "F8")
async def test_a_cancel_that_a_kill_cut_short_is_not_forgotten(process: DaemonProcess) -> None:
    """The provider hangs on in its own end; the daemon is killed before the cancel is through."""
    process.start()
    async with await Wire.open(process.socket_path) as wire:
        await wire.ask("completion:async", prompt="x", request_id="r", provider_options=LONG)
        cancel = wire.post("completion:cancel", {"request_id": "r"})
        await wire.drain()
        process.end(signal.SIGKILL)
        await wire.end()
        answered = not cancel.exception()
    with process:
        async with await Wire.open(process.socket_path) as wire:
            reply = await wire.ask("completion:get", request_id="r")
            assert reply["status"] in (["cancelled"] if answered else ["cancelled", "running", "queued"])


# Obstacles at the start


@pytest.mark.promise("R7")
async def test_a_second_daemon_names_the_running_one_and_does_not_disturb_it(
    home: Path, process: DaemonProcess
) -> None:
    with process:
        refused(home, "runs here already", str(process.pid))
        assert (home / PID_FILE).read_text().strip() == str(process.pid)
        await serves(process)


@pytest.mark.promise("R7")
async def test_a_second_daemon_on_the_same_database_from_another_home_is_refused(tmp_path: Path) -> None:
    first = make_home(tmp_path / "first")
    second = make_home(tmp_path / "second", f'[store]\nurl = "sqlite:///{first / DATABASE}"\n' + CONFIG)
    with DaemonProcess(first) as process:
        refused(second, "belongs to a running daemon", str(process.pid))
        await serves(process)


@pytest.mark.promise("R7")
async def test_a_stale_socket_and_pid_file_are_taken_over(home: Path, process: DaemonProcess) -> None:
    process.start()
    process.end(signal.SIGKILL)
    assert process.socket_path.exists()
    (home / PID_FILE).write_text(f"{os.getpid()}\n")  # somebody else lives under that number now
    with process:
        assert (home / PID_FILE).read_text().strip() == str(process.pid)
        await serves(process)
    assert not process.socket_path.exists()


@pytest.mark.promise("R7")
@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff\x00", b"-1", b"9" * 100])
async def test_a_pid_file_of_nonsense_is_no_obstacle(home: Path, process: DaemonProcess, content: bytes) -> None:
    (home / PID_FILE).parent.mkdir(parents=True)
    (home / PID_FILE).write_bytes(content)
    with process:
        assert (home / PID_FILE).read_text().strip() == str(process.pid)
        await serves(process)


@pytest.mark.promise("R7")
def test_a_file_in_the_socket_s_place_is_not_touched(home: Path) -> None:
    place = home / "var" / "run" / "daemon.sock"
    place.parent.mkdir(parents=True)
    place.write_text("precious")
    refused(home, str(place), "no socket")
    assert place.read_text() == "precious"


@pytest.mark.promise("R7", "H1")
def test_a_token_that_cannot_be_read_or_written_is_refused_by_its_place(home: Path) -> None:
    place = home / "var" / "run" / "token"
    place.mkdir(parents=True)
    refused(home, str(place), "Is a directory")


@pytest.mark.promise("R7")
def test_a_folder_and_a_link_in_the_socket_s_place_are_not_touched(home: Path) -> None:
    place = home / "var" / "run" / "daemon.sock"
    place.mkdir(parents=True)
    refused(home, str(place), "no socket")
    place.rmdir()
    place.symlink_to(home / "ksi.toml")
    refused(home, str(place), "no socket")
    assert place.is_symlink()


@pytest.mark.promise("Q3", "R7")
async def test_a_start_that_fails_at_the_socket_runs_nothing(home: Path, process: DaemonProcess) -> None:
    make_home(home, CONFIG + '\n[providers.noted]\nkind = "stub"\nrecord = "record.tsv"\n')
    process.start()
    async with await Wire.open(process.socket_path) as wire:
        await wire.ask("completion:async", prompt="x", request_id="r", model="noted/x", provider_options={"delay": 1})
        await in_state(wire, "r", "running")
    process.end(signal.SIGKILL)
    place = process.socket_path
    place.unlink()
    place.write_text("in the way")
    refused(home, "no socket")
    words = [line.partition("\t")[0] for line in (home / "record.tsv").read_text().splitlines()]
    assert words in ([], ["begin"]), "a start that fails asks no provider"
    place.unlink()
    with process:
        async with await Wire.open(process.socket_path) as wire:
            reply = await wire.ask("completion:wait", request_id="r")
            assert [attempt["outcome"] for attempt in reply["attempts"]] == ["interrupted", "completed"]


@pytest.mark.promise("O12")
async def test_a_home_too_deep_for_a_socket_is_served_all_the_same(tmp_path: Path) -> None:
    home = make_home(tmp_path / ("long" * 30))
    with DaemonProcess(home) as daemon:
        async with Client(daemon.socket_path) as client:
            assert (await client.complete("x")).result == "echo: x"
        assert answers(daemon.socket_path)
        place = daemon.socket_path.readlink()
        daemon.end(signal.SIGKILL)
        daemon.start()
        assert answers(daemon.socket_path)
    assert not place.exists()
    assert not daemon.socket_path.is_symlink()


def fill(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.promise("Q3")
@pytest.mark.parametrize(
    "content",
    [b"this is no database " * 500, b"SQLite format 3\x00" + b"\xff" * 5_000, b"\x00" * 8192],
    ids=["text", "a header and garbage", "noughts"],
)
def test_a_database_of_garbage_is_refused_and_left_as_it_is(home: Path, content: bytes) -> None:
    fill(home / DATABASE, content)
    refused(home, str(DATABASE))
    assert (home / DATABASE).read_bytes() == content


def spoil_newer(database: apsw.Connection) -> None:
    database.execute("PRAGMA user_version = 999")


def spoil_tables(database: apsw.Connection) -> None:
    database.execute("DROP TABLE request")


@pytest.mark.promise("Q3")
@pytest.mark.parametrize(
    ("spoil", "words"), [(spoil_newer, ("newer", "999")), (spoil_tables, ())], ids=["newer", "a table is missing"]
)
async def test_a_database_that_cannot_be_understood_is_refused(
    home: Path, process: DaemonProcess, spoil: Callable[[apsw.Connection], None], words: tuple[str, ...]
) -> None:
    with process:
        await serves(process)
    database = apsw.Connection(str(home / DATABASE))
    spoil(database)
    database.close()
    refused(home, str(DATABASE), *words)


@pytest.mark.promise("Q3")
@pytest.mark.parametrize("version", [0, 1, 7])
def test_a_database_of_another_program_is_refused_and_left_as_it_is(home: Path, version: int) -> None:
    path = home / DATABASE
    path.parent.mkdir(parents=True)
    database = apsw.Connection(str(path))
    database.execute("CREATE TABLE their_own (a); INSERT INTO their_own VALUES ('precious')")
    database.execute(f"PRAGMA user_version = {version}")
    database.close()
    refused(home, str(DATABASE))
    database = apsw.Connection(str(path))
    assert database.execute("SELECT group_concat(name) FROM sqlite_schema").get == "their_own"
    database.close()


def spoil_page(path: Path) -> None:
    """Overwrite the middle of the file, as a bad disk does."""
    data = bytearray(path.read_bytes())
    for page in range(1, len(data) // 4096):
        data[page * 4096 : page * 4096 + 200] = b"\xa5" * 200
    path.write_bytes(data)


@pytest.mark.promise("Q3")
async def test_a_damaged_database_is_refused(home: Path, process: DaemonProcess) -> None:
    with process:
        await serves(process)
    spoil_page(home / DATABASE)
    refused(home, str(DATABASE))


@pytest.mark.parametrize("place", ["var", "var/run", "var/db", "var/logs", "var/logs/responses", "var/logs/daemon.log"])
def test_an_obstacle_in_the_place_of_a_folder_or_file_is_named(home: Path, place: str) -> None:
    """Root may write everywhere: a file in place of a folder, or the other way, stands for a place without write
    access."""
    (home / place).parent.mkdir(parents=True, exist_ok=True)
    if place.endswith(".log"):
        (home / place).mkdir()
    else:
        (home / place).write_text("in the way")
    refused(home, place.removesuffix("/responses"))


@pytest.mark.promise("S2")
async def test_a_shared_folder_is_not_closed_to_others_for_a_socket_s_sake(
    home: Path, process: DaemonProcess, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shared = tmp_path_factory.mktemp("shared")
    shared.chmod(0o1777)
    make_home(home, f'[socket]\npath = "{shared / "ksi.sock"}"\n' + CONFIG)
    process.spawn()
    process.wait_ready()
    mode = stat.S_IMODE(shared.stat().st_mode)
    process.end(signal.SIGTERM)
    assert mode == 0o1777


BAD_CONFIG = {
    "an unknown key": ("[queue]\nleese = 3\n", ("queue.leese", "queue.lease")),
    "an unknown section": ("[que]\nlease = 3\n", ("'que'", "'queue'")),
    "a wrong value": ('[queue]\nlease = "long"\n', ("queue.lease",)),
    "a value that cannot be": ("[lock]\nexpiry = 0\n", ("lock.expiry", "above zero")),
    "a word that is none of them": ('[store]\ndurability = "some"\n', ("store.durability",)),
    "a store of no kind": ('[store]\nurl = "mysql://x"\n', ("store.url", "mysql")),
    "no TOML": ("[queue\n", ("not TOML", "line 1")),
    "a provider of no kind": ('[providers.x]\nkind = "nonsense"\n', ("providers.x", "nonsense")),
    "a provider without a kind": ("[providers.x]\npriority = 1\n", ("providers.x", "kind")),
    "a provider's unknown key": ('[providers.x]\nkind = "stub"\ndely = 1\n', ("providers.x.dely", "delay")),
    "a table that is a value": ("queue = 5\n", ("queue",)),
    "bytes that are no text": ("\x00", ("ksi.toml",)),
}


@pytest.mark.parametrize(("text", "words"), BAD_CONFIG.values(), ids=BAD_CONFIG)
def test_a_configuration_that_cannot_be_used_stops_the_start_with_its_place(
    tmp_path: Path, text: str, words: tuple[str, ...]
) -> None:
    refused(make_home(tmp_path, text), *words)
    assert not (tmp_path / DATABASE).exists()


def test_a_wrong_variable_stops_the_start_too(home: Path) -> None:
    refused(home, "queue.leese", environ={"KSI_QUEUE__LEESE": "3"})
    refused(home, "queue.lease", environ={"KSI_QUEUE__LEASE": "long"})


# Being there


@pytest.mark.promise("R4")
async def test_a_daemon_reports_its_version_and_its_place(home: Path, process: DaemonProcess) -> None:
    with process:
        async with await Wire.open(process.socket_path) as wire:
            health: Json = await wire.ask("system:health")
            assert (health["status"], health["problems"], health["pid"]) == ("healthy", [], process.pid)
            assert health["home"] == str(home)
            assert health["connections"] == 1
            startup = await wire.ask("system:startup")
            assert (startup["pid"], startup["socket"]) == (process.pid, str(process.socket_path))
            context = await wire.ask("system:context")
            assert context["default_model"] == "stub/echo"
            assert "stub" in context["providers"]
            ready = await wire.ask("system:ready")
            assert ready["ready"] is True
            assert all(ready["tasks"].values())


async def test_the_service_manager_is_notified_when_it_serves_and_when_it_stops(home: Path) -> None:
    address = home / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(address))
        notify.settimeout(20)
        with DaemonProcess(home, {"NOTIFY_SOCKET": str(address)}):
            assert notify.recv(100) == b"READY=1"
        assert notify.recv(100) == b"STOPPING=1"


@pytest.mark.promise("S3")
async def test_the_log_is_json_lines_whatever_is_asked(home: Path, process: DaemonProcess) -> None:
    with process:
        async with await Wire.open(process.socket_path) as wire:
            await wire.ask("completion:request", prompt="a\nb", request_id="x\ny\x1b[2J", session_id="\n")
            await wire.refused("nonsense\n")
    lines = (home / "var" / "logs" / "daemon.log").read_text().splitlines()
    assert len(lines) > 1
    assert all(json.loads(line)["event"] for line in lines)


@pytest.mark.promise("S3")
async def test_a_key_reaches_neither_log_nor_reply_nor_store(home: Path) -> None:
    key = "sk-precious-0123456789abcdef"
    told = f"Incorrect API key provided: {key}. You can find your API key in your account."
    async with ScriptedEndpoint(Answer(status=401, error_message=told)) as endpoint:
        provider = (
            f'\n[providers.team]\nkind = "openai"\nbase_url = "{endpoint.openai_url}"\napi_key_env = "TEAM_KEY"\n'
        )
        make_home(home, '[log]\nlevel = "debug"\n' + CONFIG + provider)
        with DaemonProcess(home, {"TEAM_KEY": key}) as process:
            async with await Wire.open(process.socket_path) as wire:
                reply = await wire.ask("completion:request", prompt="x", model="team/m")
                assert reply["error"]["code"] == "authentication"
                said = [reply] + [
                    await wire.ask(event)
                    for event in ("system:health", "system:context", "completion:provider_status", "completion:status")
                ]
        assert endpoint.requests[0].headers["authorization"] == f"Bearer {key}"
    assert key not in json.dumps(said)
    for path in (home / "var").rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes(), path
