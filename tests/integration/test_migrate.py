"""From version 1 to version 2 and back: imported and untouched data, and the state after a fault or a kill."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from ksi.clock import SystemClock
from ksi.errors import ConfigError, MigrationError
from ksi.migration import backup, database, forward
from ksi.migration.backward import Backward
from ksi.migration.forward import Forward
from ksi.migration.records import NOT_KEPT
from ksi.migration.settings_file import with_settings
from ksi.testing import running_daemon
from tests.acceptance.old_clients import one_shot
from tests.acceptance.talk import until
from tests.acceptance.v1_home import (
    BEGAN,
    CONFIG,
    DAMAGED,
    NEXT_SESSION,
    OLD_SERVICE,
    SESSION,
    claude_line,
    make_v1_home,
    snapshot,
    write_log,
)
from tests.daemon_process import DaemonProcess, clean_environ
from tests.effort import effort
from tests.integration.wire import Json, Wire

STUB: dict[str, dict[str, Any]] = {
    "providers": {"local": {"kind": "local", "enabled": False}, "stub": {"kind": "stub"}},
    "service": {"version": 2},
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home of version 1."""
    return make_v1_home(tmp_path / "home")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Migrations that take version 2's working for granted: one test below does not."""
    monkeypatch.setattr(forward, "check_parts", lambda: None)
    monkeypatch.setattr(forward, "self_test", lambda: None)


def migrate(home: Path, *, dry_run: bool = False) -> list[str]:
    """The output of a migration."""
    said: list[str] = []
    assert Forward(home, SystemClock(), "test", said.append).run(dry_run=dry_run, agree=lambda: True)
    return said


def roll_back(home: Path, *, dry_run: bool = False) -> list[str]:
    """The output of a rollback."""
    said: list[str] = []
    Backward(home, SystemClock(), "test", said.append).run(dry_run=dry_run)
    return said


def command(home: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """`ksi migrate` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "ksi.cli", "--home", str(home), "migrate", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        env={**clean_environ(), **environ},
    )


async def ask(home: Path, *events: tuple[str, Json]) -> list[Json]:
    """The answers of a daemon of version 2 on this home."""
    async with running_daemon(home, settings=STUB) as daemon, await Wire.open(daemon.config.socket_path) as wire:
        return [await wire.ask(event, **data) for event, data in events]


def asked(home: Path, *events: tuple[str, Json]) -> list[Json]:
    return asyncio.run(ask(home, *events))


async def history(home: Path, session: str) -> list[tuple[str, str]]:
    """A conversation's turns as the store has them, prompt and answer, the oldest first."""
    async with running_daemon(home, settings=STUB) as daemon:
        view = await daemon.store.session(session)
        assert view is not None
        if view.head is None:
            return []
        turns = await daemon.store.history(view.head, 1 << 30)
        return [(json.loads(turn.body).get("prompt", ""), turn.text) for turn in reversed(turns)]


# -- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.promise("R3", "R4")
def test_the_command_checks_backs_up_brings_in_switches_and_verifies(home: Path) -> None:
    before = snapshot(home)
    done = command(home)
    assert (done.returncode, done.stderr) == (0, "")
    words = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert [word for word in words if word.islower() and not word.startswith(" ")] == [
        "home",
        "checked",
        "found",
        "damaged",
        "service.version is to be set to 2",
        "socket.replies is to be set to v1",
        "backed up",
        "imported",
        "set",
        "set",
        "verified",
        "done",
    ]
    assert "var/logs/responses/alpha.jsonl line 2: " in done.stdout
    after = snapshot(home, "var/backups", "var/db")
    settings = CONFIG.replace("version = 1 ", "version = 2 ")
    assert after.pop("ksi.toml").decode() == f'{settings}\n[socket]\nreplies = "v1"\n'
    assert f"--home {home} start; back again: ksi --home {home} migrate --rollback" in done.stdout
    assert after == {path: data for path, data in before.items() if path != "ksi.toml"}
    again = command(home)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout


@pytest.mark.usefixtures("quick")
def test_session_logs_become_conversations_with_history(home: Path) -> None:
    migrate(home)
    alpha = asyncio.run(history(home, "alpha"))
    assert alpha == [(NOT_KEPT, "First."), (NOT_KEPT, "Second.")]
    sessions, by_session, old, again = asked(
        home,
        ("completion:session_status", {}),
        ("completion:session_status", {"session_id": NEXT_SESSION}),
        ("completion:request", {"prompt": "And now?", "session_id": SESSION, "model": "stub/x"}),
        ("completion:session_status", {"session_id": "alpha"}),
    )
    found = {view["session_id"]: view for view in sessions["sessions"]}
    assert {name: view["turns"] for name, view in found.items()} == {"alpha": 2, "beta": 2, "gamma": 1}
    assert found["alpha"]["created_at"] == BEGAN
    assert found["alpha"]["agents"] == ["agent-1"]
    assert found["alpha"]["provider_session_id"] == NEXT_SESSION
    # A client that continues by the id that Claude gave continues the same conversation.
    assert by_session["session_id"] == "alpha"
    assert old["session_id"] == "alpha"
    assert again["turns"] == 3


@pytest.mark.promise("T2")
@pytest.mark.usefixtures("quick")
def test_usage_is_dated_as_it_was(home: Path) -> None:
    migrate(home)
    fields = {"hours": 100_000, "bucket_minutes": 6_000}
    recent, every = asked(home, ("completion:token_usage", {"hours": 24}), ("completion:token_usage", fields))
    assert recent["totals"]["attempts"] == 0
    totals = every["totals"]
    assert (totals["attempts"], totals["unknown_attempts"]) == (6, 0)
    assert totals["cost_usd"] == pytest.approx(1.0)
    assert (totals["input_tokens"], totals["output_tokens"]) == (4 * 3 + 2 * 20, 4 * 20 + 2 * 4)
    assert totals["cache_read_tokens"] == 4 * 1000 + 2 * 10
    by_model = {row["model"]: row["attempts"] for row in every["by_model"]}
    assert by_model == {"claude-cli/claude-haiku-4-5": 4, "gpt/gpt-5": 2}
    begins = {bucket["start"] for bucket in every["trend"] if bucket["attempts"]}
    assert begins == {BEGAN // 360_000 * 360_000}


@pytest.mark.usefixtures("quick")
def test_damaged_lines_are_kept_aside_counted_and_named(home: Path) -> None:
    said = "\n".join(migrate(home))
    assert f"damaged: {len(DAMAGED)} lines" in said
    for file, line in (("alpha", 2), ("alpha", 4), ("alpha", 5), ("gamma", 2)):
        assert f"  var/logs/responses/{file}.jsonl line {line}: " in said
    (folder,) = (home / "var" / "backups").glob("v1-*")
    aside = [json.loads(line) for line in (folder / forward.DAMAGED).read_bytes().splitlines()]
    kept = [entry["content"] for entry in aside]
    assert kept[:3] == [line.decode() for line in DAMAGED[:3]]
    assert kept[3] == {"base64": "//4="}


@pytest.mark.usefixtures("quick")
def test_a_recent_turn_can_be_asked_for_by_its_request_id(home: Path) -> None:
    write_log(home, "new", claude_line("Fresh.", SystemClock().unix() - 60, "req-new", client_id="a"))
    migrate(home)
    (reply,) = asked(home, ("completion:get", {"request_id": "req-new"}))
    assert (reply["status"], reply["result"], reply["agent_id"]) == ("completed", "Fresh.", "a")
    assert reply["cost_usd"] == 0.25


@pytest.mark.usefixtures("quick")
def test_the_same_line_twice_is_one_turn(home: Path) -> None:
    logs = home / "var" / "logs" / "responses"
    (logs / "copy").mkdir()
    shutil.copy(logs / "alpha.jsonl", logs / "copy")
    assert any("known already" in line for line in migrate(home))
    assert len(asyncio.run(history(home, "alpha"))) == 2


@pytest.mark.usefixtures("quick")
def test_a_dry_run_changes_nothing(home: Path) -> None:
    before = snapshot(home)
    said = migrate(home, dry_run=True)
    assert "found: 5 turns of 3 conversations in var/logs/responses, 1 answers that are errors" in said
    assert said[-1] == "nothing was changed"
    assert snapshot(home) == before
    assert not (home / "var" / "run").exists()


@pytest.mark.usefixtures("quick")
def test_a_second_run_changes_nothing(home: Path) -> None:
    migrate(home)
    asked(home, ("completion:request", {"prompt": "x", "session_id": "alpha", "model": "stub/x"}))
    before = snapshot(home)
    assert migrate(home)[-1].startswith("nothing to do")
    assert snapshot(home) == before


@pytest.mark.usefixtures("quick")
def test_without_agreement_nothing_is_changed(home: Path) -> None:
    before = snapshot(home)
    said: list[str] = []
    assert not Forward(home, SystemClock(), "test", said.append).run(dry_run=False, agree=lambda: False)
    assert said[-1] == "nothing was changed"
    assert snapshot(home) == before


@pytest.mark.usefixtures("quick")
def test_a_home_of_version_2_has_nothing_to_migrate(tmp_path: Path) -> None:
    home = make_v1_home(tmp_path, config='[service]\ndefault_model = "stub/echo"\n')
    shutil.rmtree(home / "var")
    asked(home, ("completion:request", {"prompt": "x", "session_id": "s"}))
    before = snapshot(home)
    assert migrate(home)[-1].startswith("nothing to do")
    assert snapshot(home) == before


@pytest.mark.promise("O8")
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("service", [OLD_SERVICE, "ksi_daemon/completion/completion_service.py"])
def test_an_old_tree_serves_the_same_clients_after_its_migration(tmp_path: Path, service: str) -> None:
    home = make_v1_home(tmp_path / "old", config=None)
    (home / service).parent.mkdir(parents=True)
    (home / service).write_text("# the old service\n")
    old_script = "#!/bin/sh\nexec python3 ksi-daemon.py\n"
    (home / "daemon_control.sh").write_text(old_script)
    before = snapshot(home)
    said = migrate(home)
    assert said[-1].startswith(f"done: start the daemon with {home}/daemon_control.sh start; ")
    assert (home / "ksi.toml").read_text() == (
        '[service]\ndefault_model = "claude-cli/sonnet"\nversion = 2\n\n[socket]\nreplies = "v1"\n'
    )
    assert (home / "daemon_control.sh.disabled").read_text() == old_script
    control = [str(home / "daemon_control.sh")]
    environ = {**clean_environ(), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    run = partial(subprocess.run, capture_output=True, text=True, timeout=100, env=environ)
    assert run([*control, "start"]).returncode == 0
    try:
        path = home / "var" / "run" / "daemon.sock"
        assert one_shot(path, "completion:status", {})["active_count"] == 0
        for data in ({"session_id": "alpha"}, {}):
            refused = one_shot(path, "completion:request", {"prompt": "And now?", **data})
            assert "Claude Code is not installed" in refused["error"]
        problems = one_shot(path, "system:health", {})["problems"]
        assert any("Claude Code is not installed" in problem for problem in problems)
    finally:
        assert run([*control, "stop"]).returncode == 0
    roll_back(home)
    after = snapshot(home, "var")
    assert after.pop("ksi.toml") == b"[service]\nversion = 1\n"
    assert after == {name: data for name, data in before.items() if not name.startswith("var")}


@pytest.mark.promise("R4")
def test_a_version_that_was_changed_by_hand_is_reported_with_the_missing_conversations(tmp_path: Path) -> None:
    home = make_v1_home(tmp_path / "home", config=CONFIG.replace("version = 1 ", "version = 2 "))
    (home / "var" / "logs" / "responses" / "alpha.jsonl").unlink()
    (home / "var" / "logs" / "responses" / "2025" / "beta.jsonl").unlink()
    write_log(home, "gamma", claude_line("Now.", time.time()))

    def problems() -> list[str]:
        return [one for one in one_shot(process.socket_path, "system:health", {})["data"]["problems"] if "gamma" in one]

    with DaemonProcess(home) as process:
        (told,) = until(problems, "a word about gamma")
    assert told.startswith("1 conversations of version 1 in var/logs/responses were not brought in")
    assert "imported: 1 turns" in command(home).stdout
    with DaemonProcess(home) as process:
        assert one_shot(process.socket_path, "completion:session_status", {"session_id": "gamma"})["data"]["turns"] == 1
        log = home / "var" / "logs" / "daemon.log"
        until(lambda: "ready" in log.read_text(), "the start")
        assert problems() == []


@pytest.mark.usefixtures("quick")
def test_an_old_tree_has_its_service_file_disabled_and_given_back(tmp_path: Path) -> None:
    home = make_v1_home(tmp_path / "old", config=None, old_tree=True)
    before = snapshot(home)
    migrate(home)
    assert not (home / OLD_SERVICE).exists()
    assert (home / f"{OLD_SERVICE}.disabled").read_bytes() == before[OLD_SERVICE]
    assert {view["session_id"] for view in asked(home, ("completion:session_status", {}))[0]["sessions"]} == {
        "alpha",
        "beta",
        "gamma",
    }
    assert migrate(home)[-1].startswith("nothing to do")
    roll_back(home)
    after = snapshot(home, "var/backups", "var/db")
    assert after.pop("ksi.toml") == b"[service]\nversion = 1\n"
    assert after == before


@pytest.mark.usefixtures("quick")
def test_the_records_that_version_2_has_already_stay_and_continue(home: Path) -> None:
    async def use() -> None:
        async with running_daemon(home, settings=STUB) as daemon, await Wire.open(daemon.config.socket_path) as wire:
            await wire.ask("completion:request", prompt="Mine", session_id="alpha", request_id="mine")
            await wire.ask("completion:async", prompt="Later", session_id="later", request_id="later", delay=3600)

    asyncio.run(use())
    migrate(home)
    turns = asyncio.run(history(home, "alpha"))
    assert [text for _, text in turns] == ["First.", "Second.", "echo: Mine"]
    mine, later, usage, queue = asked(
        home,
        ("completion:get", {"request_id": "mine"}),
        ("completion:get", {"request_id": "later"}),
        ("completion:token_usage", {"hours": 1}),
        ("completion:queue_status", {}),
    )
    assert mine["result"] == "echo: Mine"
    assert later["status"] == "scheduled"
    assert usage["totals"]["attempts"] == 1
    assert queue["completed"] == 6


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("--dry-run",), ("--rollback",)])
def test_it_refuses_while_a_daemon_runs(home: Path, arguments: tuple[str, ...]) -> None:
    with DaemonProcess(home):
        before = snapshot(home, "var/logs/daemon.log")
        done = command(home, *arguments)
        assert done.returncode == 1
        assert "stop it first: ./daemon_control.sh stop" in done.stderr
        assert snapshot(home, "var/logs/daemon.log") == before


@pytest.mark.usefixtures("quick")
def test_it_refuses_while_an_old_daemon_listens(home: Path) -> None:
    (home / "var" / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(home / "var" / "run" / "daemon.sock"))
        old.listen()
        with pytest.raises(MigrationError, match="stop it first"):
            migrate(home)


@pytest.mark.usefixtures("quick")
def test_no_daemon_starts_while_it_works(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    make = backup.make

    def look(*arguments: Any) -> backup.Manifest:
        start = [sys.executable, "-m", "ksi.cli", "--home", str(home), "start", "--foreground"]
        seen.append(subprocess.run(start, capture_output=True, text=True, env=clean_environ(), timeout=60).stderr)
        return make(*arguments)

    monkeypatch.setattr(backup, "make", look)
    migrate(home)
    assert "a daemon runs here already" in seen[0]


@pytest.mark.parametrize("variable", ["1", "2"])
def test_it_refuses_if_a_variable_sets_the_version(home: Path, variable: str) -> None:
    done = command(home, KSI_SERVICE__VERSION=variable)
    assert done.returncode == 1
    assert "KSI_SERVICE__VERSION" in done.stderr


@pytest.mark.usefixtures("quick")
def test_it_refuses_another_store_than_sqlite_and_says_the_way(home: Path) -> None:
    (home / "ksi.toml").write_text(CONFIG + '\n[store]\nurl = "redis://host"\n')
    with pytest.raises(MigrationError, match="checkpoint save"):
        migrate(home)


def test_it_refuses_if_a_part_of_version_2_is_missing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksi.migration.checks.PARTS", {"ksi.completion.nothing": ""})
    before = snapshot(home)
    with pytest.raises(MigrationError, match=r"ksi\.completion\.nothing cannot be imported.*nothing was changed"):
        migrate(home)
    assert snapshot(home) == before


def test_a_configuration_that_cannot_be_used_is_reported(home: Path) -> None:
    (home / "ksi.toml").write_text("[service]\nversion = 5\n")
    with pytest.raises(ConfigError):
        migrate(home)


# -- faults and kills -------------------------------------------------------------------------------------------------

FAULTS: list[tuple[Any, str, int]] = [
    (backup, "make", 1),
    (backup, "_copy", 2),
    (database, "make", 1),
    (database, "_verify", 1),
    (database, "put", 1),
    (backup, "write", 3),
    (forward, "with_settings", 1),
    (Forward, "_verify", 1),
]


@pytest.mark.parametrize(("where", "name", "time"), FAULTS, ids=str)
@pytest.mark.usefixtures("quick")
def test_a_step_that_fails_undoes_all_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, time: int
) -> None:
    home = make_v1_home(tmp_path / "home", old_tree=True)
    before = snapshot(home)
    real, calls = getattr(where, name), count(1)

    def fail(*arguments: Any, **keys: Any) -> Any:
        if next(calls) == time:
            raise OSError(28, "No space left on device")
        return real(*arguments, **keys)

    with monkeypatch.context() as patched:
        patched.setattr(where, name, fail)
        with pytest.raises(MigrationError, match=r"No space left on device.*; everything is as it was"):
            migrate(home)
    assert snapshot(home) == before
    assert not list((home / "var" / "backups").glob("*"))
    migrate(home)


@pytest.mark.usefixtures("quick")
def test_a_step_that_fails_leaves_version_2s_database_as_it_was(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked(home, ("completion:request", {"prompt": "Mine", "session_id": "mine", "request_id": "mine"}))

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(Forward, "_verify", fail)
        with pytest.raises(MigrationError, match="everything is as it was"):
            migrate(home)
    (sessions,) = asked(home, ("completion:session_status", {}))
    assert [view["session_id"] for view in sessions["sessions"]] == ["mine"]


KILLED = """\
import os, signal, sys
from pathlib import Path
from ksi.clock import SystemClock
from ksi.migration import forward
from ksi.migration.backward import Backward

home, at, way = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
seen = 0

def watch(event, arguments):
    # Everything that changes a file of the home by its name: a kill comes right before the given one.
    global seen
    if event == "open":
        changes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    else:
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
    if not changes or not str(arguments[0]).startswith(str(home)) or "/var/run" in str(arguments[0]):
        return
    seen += 1
    if seen == at:
        os.kill(os.getpid(), signal.SIGKILL)

forward.check_parts = forward.self_test = lambda: None
sys.addaudithook(watch)
if way == "forward":
    forward.Forward(home, SystemClock(), "test", print).run(dry_run=False, agree=lambda: True)
else:
    Backward(home, SystemClock(), "test", print).run(dry_run=False)
"""


def killed(home: Path, at: int, way: str) -> bool:
    """Migrate in a process that is killed right before its change number `at` to a file; returns True if it came to
    that."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(home), str(at), way], capture_output=True, text=True, env=clean_environ()
    )
    assert done.returncode in (0, -9), done.stderr
    return done.returncode == -9


def moments(begin: Callable[[Path], Path], tmp_path: Path, way: str, step: int) -> Iterator[Path]:
    """Homes on which a process was killed, each a few changes later than the one before."""
    for at in count(1, step):
        home = begin(tmp_path / f"{way}-{at}")
        if not killed(home, at, way):
            assert at > 20
            return
        yield home
        shutil.rmtree(home)


def turns_of(home: Path) -> dict[str, int]:
    (sessions,) = asked(home, ("completion:session_status", {}))
    return {view["session_id"]: view["turns"] for view in sessions["sessions"]}


@pytest.mark.usefixtures("quick")
@pytest.mark.timeout(300)
def test_a_migration_that_is_killed_at_any_moment_can_be_run_again_or_rolled_back(tmp_path: Path) -> None:
    def begin(folder: Path) -> Path:
        return make_v1_home(folder, old_tree=True)

    before = snapshot(begin(tmp_path / "first"))
    for number, home in enumerate(moments(begin, tmp_path, "forward", effort(11, 2))):
        if number % 2:
            migrate(home)
            assert turns_of(home) == {"alpha": 2, "beta": 2, "gamma": 1}
            assert (home / f"{OLD_SERVICE}.disabled").is_file()
            assert b"version = 2 " in (home / "ksi.toml").read_bytes()
            roll_back(home)
            assert snapshot(home, "var/backups", "var/db") == before
        else:
            with suppress(MigrationError):  # it may not have begun
                roll_back(home)
            assert snapshot(home, "var/backups", "var/db") == before
            assert not (home / "var" / "db" / "ksi.db").exists() or b"version = 1 " in (home / "ksi.toml").read_bytes()
            assert not list((home / "var" / "backups").glob("v1-*/ksi.toml.part"))


@pytest.mark.usefixtures("quick")
@pytest.mark.timeout(300)
def test_a_rollback_that_is_killed_at_any_moment_can_be_run_again(tmp_path: Path) -> None:
    origin = make_v1_home(tmp_path / "origin", old_tree=True)
    before = snapshot(origin)
    migrate(origin)
    asked(
        origin, ("completion:request", {"prompt": "Two", "session_id": "alpha", "request_id": "v2", "model": "stub/x"})
    )

    def begin(folder: Path) -> Path:
        shutil.copytree(origin, folder)
        return folder

    for home in moments(begin, tmp_path, "backward", effort(15, 3)):
        roll_back(home)
        after = snapshot(home, "var/backups", "var/db")
        alpha = "var/logs/responses/alpha.jsonl"
        added = after.pop(alpha).removeprefix(before[alpha])
        assert [json.loads(line)["ksi"]["request_id"] for line in added.splitlines()] == ["v2"]
        assert after == {path: data for path, data in before.items() if path != alpha}


# -- and back ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_a_rollback_gives_version_1_its_files_byte_for_byte_and_the_turns_that_version_2_added(home: Path) -> None:
    before = snapshot(home)
    migrate(home)
    asked(
        home,
        ("completion:request", {"prompt": "Two", "session_id": "alpha", "request_id": "v2-1", "model": "stub/x"}),
        ("completion:request", {"prompt": "Three", "session_id": "new/one", "request_id": "v2-2", "model": "stub/x"}),
    )
    said = roll_back(home)
    assert "restored: 3 log files, byte for byte; appended: 2 turns made under version 2" in said
    after = snapshot(home, "var/backups", "var/db")
    for path, data in before.items():
        assert after[path][: len(data)] == data, path
    assert after["ksi.toml"] == before["ksi.toml"]
    alpha = "var/logs/responses/alpha.jsonl"
    (line,) = after[alpha].removeprefix(before[alpha]).splitlines()
    added = json.loads(line)
    assert added["ksi"]["request"]["prompt"] == "Two"
    assert added["response"]["result"] == "echo: Two"
    (new,) = after.keys() - before.keys()
    assert json.loads(after[new])["ksi"]["request_id"] == "v2-2"


@pytest.mark.usefixtures("quick")
def test_there_and_back_and_there_again_loses_nothing_and_doubles_nothing(home: Path) -> None:
    fields = {"session_id": "alpha", "model": "stub/x"}
    migrate(home)
    asked(
        home,
        ("completion:request", {"prompt": "Under 2", **fields}),
        ("completion:async", {"prompt": "Later", "session_id": "later", "request_id": "later", "delay": 3600}),
    )
    assert any("1 requests of version 2 have not ended" in line for line in roll_back(home))
    with DaemonProcess(home) as daemon:
        asyncio.run(_ask_directly(daemon.socket_path, {"prompt": "Under 1 again", **fields}))
    migrate(home)
    assert asyncio.run(history(home, "alpha")) == [
        (NOT_KEPT, "First."),
        (NOT_KEPT, "Second."),
        ("Under 2", "echo: Under 2"),
        ("Under 1 again", "echo: Under 1 again"),
    ]
    (later,) = asked(home, ("completion:get", {"request_id": "later"}))
    assert later["status"] == "scheduled"
    assert turns_of(home) == {"alpha": 4, "beta": 2, "gamma": 1, "later": 0}


async def _ask_directly(path: Path, data: Json) -> None:
    async with await Wire.open(path) as wire:
        await wire.ask("completion:request", **data)


@pytest.mark.usefixtures("quick")
def test_lines_that_the_database_has_forgotten_are_not_lost_by_a_rollback(home: Path) -> None:
    migrate(home)
    asked(home, ("completion:request", {"prompt": "Two", "session_id": "s", "request_id": "v2", "model": "stub/x"}))
    database.remove(home / "var" / "db" / "ksi.db")
    roll_back(home)
    (line,) = (home / "var" / "logs" / "responses" / "s.jsonl").read_bytes().splitlines()
    assert json.loads(line)["ksi"]["request_id"] == "v2"


@pytest.mark.usefixtures("quick")
def test_a_damaged_backup_is_not_restored(home: Path) -> None:
    migrate(home)
    (copy,) = (home / "var" / "backups").glob("v1-*/var/logs/responses/alpha.jsonl")
    copy.write_bytes(copy.read_bytes()[:-1])
    before = snapshot(home)
    with pytest.raises(MigrationError, match=r"damaged: var/logs/responses/alpha\.jsonl"):
        roll_back(home)
    assert snapshot(home) == before


@pytest.mark.parametrize("time", range(1, 5))
@pytest.mark.usefixtures("quick")
def test_a_rollback_that_fails_leaves_all_as_version_2_had_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, time: int
) -> None:
    home = make_v1_home(tmp_path / "home", old_tree=True)
    migrate(home)
    asked(home, ("completion:request", {"prompt": "Two", "session_id": "s", "request_id": "v2", "model": "stub/x"}))
    without = ("var/backups", "var/db", "var/logs/responses.journal")
    before = snapshot(home, *without)
    real, calls = backup.restore, count(1)

    def fail(*arguments: Any) -> None:
        if next(calls) == time:
            raise OSError(28, "No space left on device")
        real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(backup, "restore", fail)
        with pytest.raises(MigrationError, match="version 2's files are unchanged"):
            roll_back(home)
    assert snapshot(home, *without) == before
    roll_back(home)


@pytest.mark.usefixtures("quick")
def test_without_a_migration_there_is_nothing_to_roll_back(home: Path) -> None:
    with pytest.raises(MigrationError, match="nothing to roll back"):
        roll_back(home)
    migrate(home)
    roll_back(home, dry_run=True)
    roll_back(home)
    with pytest.raises(MigrationError, match="nothing to roll back"):
        roll_back(home)


# -- the settings file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("", "[service]\nversion = 2\n"),
        ("# mine\n", "# mine\n\n[service]\nversion = 2\n"),
        ("[store]\nurl = 'redis://host'", "[store]\nurl = 'redis://host'\n\n[service]\nversion = 2\n"),
        ("[service]\nversion=1#x\n", "[service]\nversion=2#x\n"),
        ("[ service ] # a\n\t'version' = 1\r\n", "[ service ] # a\n\t'version' = 2\r\n"),
        ("[service]\n#version = 1\nx = 1\n", "[service]\nversion = 2\n#version = 1\nx = 1\n"),
        ("[service]", "[service]\nversion = 2\n"),
        ("[a]\nversion = 1\n[service]\nversion = 1\n", "[a]\nversion = 1\n[service]\nversion = 2\n"),
        ("[service]\n[a]\nversion = 1\n", "[service]\nversion = 2\n[a]\nversion = 1\n"),
        ("service.version = 1\n[a]\n", "service.version = 2\n[a]\n"),
    ],
)
def test_only_the_version_is_changed_in_a_settings_file(text: str, changed: str) -> None:
    assert with_settings(text, {("service", "version"): 2}) == changed
    assert with_settings(changed, {("service", "version"): 2}) == changed


@pytest.mark.parametrize("text", ["service = {version = 1}\n", 'a = """\n[service]\nversion = 1\n"""\n', "[service\n"])
def test_a_settings_file_that_is_not_understood_is_not_changed(text: str) -> None:
    with pytest.raises(MigrationError):
        with_settings(text, {("service", "version"): 2})
