"""The `ksi` command as a person or a script runs it, against real daemons."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ksi.cli.settings import Exit
from tests.daemon_process import CONFIG, DaemonProcess, clean_environ, make_home

Done = subprocess.CompletedProcess[str]


def command(home: Path, *args: str) -> list[str]:
    return [sys.executable, "-m", "ksi.cli", "--home", str(home), *args]


def ksi(home: Path, *args: str, stdin: str = "", **environ: str) -> Done:
    return subprocess.run(
        command(home, *args),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        env={**clean_environ(), **environ},
    )


def rows(done: Done) -> list[Any]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


Spawn = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts commands that continue by themselves; the remaining ones are killed at the end."""
    with ExitStack() as stack:

        def start(home: Path, *args: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
            process = stack.enter_context(
                subprocess.Popen(
                    command(home, *args),
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=clean_environ(),
                )
            )
            stack.callback(process.kill)
            return process

        yield start


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with DaemonProcess(make_home(tmp_path_factory.mktemp("home"))) as daemon:
        yield daemon.home


@pytest.fixture
def own_home(tmp_path: Path) -> Iterator[Path]:
    """A home without a daemon at first, and without one at last."""
    yield make_home(tmp_path)
    ksi(tmp_path, "stop")


# The daemon's life


@pytest.mark.promise("R6")
def test_start_says_when_it_is_ready_and_stop_when_it_is_gone(own_home: Path) -> None:
    started = ksi(own_home, "start")
    assert started.returncode == 0
    assert "ready" in started.stdout
    assert len(started.stdout.splitlines()) == 1
    assert f"home {own_home}" in started.stdout
    again = ksi(own_home, "start")
    assert (again.returncode, "runs already" in again.stdout) == (0, True)
    pid = rows(ksi(own_home, "health", "--json"))[0]["pid"]
    restarted = ksi(own_home, "restart")
    assert restarted.stdout.splitlines()[0] == f"ksi has stopped (pid {pid}, home {own_home})"
    assert rows(ksi(own_home, "health", "--json"))[0]["pid"] != pid
    assert ksi(own_home, "stop").returncode == 0
    assert "did not run" in ksi(own_home, "stop").stdout
    assert ksi(own_home, "status").returncode == Exit.UNREACHABLE


def test_daemons_that_are_started_at_once_are_one(own_home: Path, spawn: Spawn) -> None:
    starting = [spawn(own_home, "start") for _ in range(4)]
    said = [process.communicate(timeout=60)[0] for process in starting]
    assert [process.returncode for process in starting] == [0] * 4
    assert sum("is ready" in line for line in said) == 1
    assert sum("runs already" in line for line in said) == 3


def test_a_daemon_that_cannot_start_shows_its_output(own_home: Path) -> None:
    make_home(own_home, '[store]\nurl = "oracle://db"\n[providers.stub]\nkind = "stub"\n')
    failed = ksi(own_home, "start")
    assert failed.returncode == Exit.USAGE
    assert ksi(own_home, "start", "--foreground").returncode == Exit.USAGE
    assert "did not start" in failed.stderr
    assert "oracle://db" in failed.stderr


def test_a_home_that_cannot_be_written_is_reported(own_home: Path) -> None:
    (own_home / "var").write_text("a file in the way")
    failed = ksi(own_home, "start")
    assert failed.returncode == Exit.USAGE
    assert "choose another home" in failed.stderr


MISTAKES = {
    "[queue]\nleese = 1\n": "queue.lease",
    "[queue\n": "not TOML",
    '[providers.stub]\nkind = "stubb"\n': "no provider kind 'stubb'",
    '[providers.stub]\nkind = "stub"\npeices = 3\n': "pieces",
    '[providers.team]\nkind = "openai"\nbase_url = "team.example"\n': "base_url",
    '[store]\nurl = "oracle://db"\n': "oracle://db",
    '[store]\nurl = "redis://valkey.example:port/0"\n': "store.url",
    '[store]\nurl = "sqlite:////dev/null/ksi.db"\n': "/dev/null",
}


@pytest.mark.promise("U4")
def test_restart_and_config_check_all_that_a_start_checks_and_a_mistake_stops_nothing(own_home: Path) -> None:
    ksi(own_home, "start")
    (before,) = rows(ksi(own_home, "health", "--json"))
    for text, words in MISTAKES.items():
        make_home(own_home, text)
        for name in ("restart", "config"):
            refused = ksi(own_home, name)
            assert (refused.returncode, words in refused.stderr) == (Exit.USAGE, True), (name, text, refused)
    make_home(own_home, '[store]\nurl = "redis://user:SECRET@127.0.0.1:1/0"\n')
    unreachable = ksi(own_home, "restart")
    assert unreachable.returncode == Exit.LATER
    assert "cannot be reached" in unreachable.stderr
    shown = ksi(own_home, "config")
    assert (shown.returncode, "cannot be reached" in shown.stderr) == (0, True)
    assert "SECRET" not in unreachable.stderr + shown.stdout + shown.stderr
    make_home(own_home)
    (after,) = rows(ksi(own_home, "health", "--json"))
    assert after["pid"] == before["pid"]


@pytest.mark.promise("U4")
def test_with_a_broken_configuration_a_running_daemon_is_reached_and_stopped(own_home: Path) -> None:
    make_home(own_home, CONFIG + '[socket]\npath = "run/own.sock"\n')
    ksi(own_home, "start")
    ksi(own_home, "send", "completion:async", '{"request_id": "x", "prompt": "x", "model": "slow/x"}')
    broken = CONFIG.replace("[providers.stub]", "[providers.stub") + '[socket]\npath = "run/own.sock"\n'
    make_home(own_home, broken)
    for words in (["status"], ["cancel", "x"], ["logs"], ["health"], ["queue"], ["config", "--daemon"], ["ask", "Hi"]):
        done = ksi(own_home, *words)
        assert done.returncode == 0, (words, done.stderr)
        if words != ["config", "--daemon"]:
            assert done.stderr.count("not TOML") == 1, words
    assert ksi(own_home, "restart").returncode == Exit.USAGE
    stopped = ksi(own_home, "stop")
    assert (stopped.returncode, "has stopped" in stopped.stdout) == (0, True)
    assert ksi(own_home, "start").returncode == Exit.USAGE


@pytest.mark.promise("U4", "S3")
def test_config_of_the_daemon_shows_its_values_and_those_that_have_changed(own_home: Path) -> None:
    make_home(own_home, CONFIG + '[providers.team]\nkind = "openai"\nheaders = {X = "SECRET"}\n')
    ksi(own_home, "start")
    make_home(own_home, CONFIG + "[queue]\nlease = 20.0\n")
    shown = ksi(own_home, "config", "--daemon", "--json")
    held = {row["key"]: row for row in rows(shown)}
    assert held["queue.lease"] == {"key": "queue.lease", "value": 30.0, "next_start": 20.0}
    assert held["providers.team.kind"]["next_start"] == "(gone)"
    assert held["providers.team.headers.X"]["value"] == "(hidden)"
    assert held["service.default_model"] == {"key": "service.default_model", "value": "stub/echo"}
    text = ksi(own_home, "config", "--daemon")
    assert "ksi restart" in text.stderr
    assert "SECRET" not in shown.stdout + text.stdout
    assert "SECRET" not in ksi(own_home, "send", "system:config").stdout


def test_a_second_daemon_in_the_foreground_fails_and_says_who_runs(home: Path) -> None:
    second = ksi(home, "start", "--foreground")
    assert second.returncode == Exit.FAILED
    assert "runs here already" in second.stderr


def test_a_daemon_that_hangs_is_not_waited_for_without_end(own_home: Path) -> None:
    ksi(own_home, "start")
    pid = rows(ksi(own_home, "health", "--json"))[0]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        stopped = ksi(own_home, "stop", "--timeout", "0.2")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert stopped.returncode == Exit.LATER
    assert f"pid {pid}" in stopped.stderr


@pytest.mark.promise("R7")
def test_a_daemon_starts_over_the_files_of_a_killed_one(own_home: Path) -> None:
    ksi(own_home, "start")
    os.kill(rows(ksi(own_home, "health", "--json"))[0]["pid"], signal.SIGKILL)
    assert "is ready" in ksi(own_home, "start").stdout
    assert ksi(own_home, "health").returncode == 0


# Ask


def test_ask_starts_the_daemon_and_prints_the_answer_alone(own_home: Path) -> None:
    asked = ksi(own_home, "ask", "Name", "three colours")
    assert asked.returncode == 0
    assert asked.stdout == "echo: Name three colours\n"
    assert "starting the daemon" in asked.stderr


def test_ask_joins_the_command_line_and_stdin(home: Path) -> None:
    assert ksi(home, "ask", "Summarise this", stdin="A report.\n").stdout == "echo: Summarise this\n\nA report.\n"
    assert ksi(home, "ask", stdin="A report.").stdout == "echo: A report.\n"


def test_ask_goes_on_in_a_session(home: Path) -> None:
    for turn in ("one", "two"):
        ksi(home, "ask", "--session", "talk", turn)
    (session,) = rows(ksi(home, "sessions", "talk", "--json"))
    assert session["turns"] == 2


def test_ask_as_json_is_the_whole_request(home: Path) -> None:
    options = ("--priority", "HIGH", "--system", "Be brief.", "--max-tokens", "9", "--model", "stub/other")
    (reply,) = rows(ksi(home, "ask", "--json", *options, "Hello"))
    assert reply["result"] == "echo: Hello"
    assert reply["priority"] == "high"
    assert reply["requested_model"] == "stub/other"
    assert reply["usage"]["output_tokens"] > 0


def test_ask_prints_text_as_it_comes(home: Path, spawn: Spawn) -> None:
    asking = spawn(home, "ask", "--model", "drip/x", "Name three colours")
    assert asking.stdout is not None
    first = os.read(asking.stdout.fileno(), 3)
    assert asking.poll() is None
    rest, _ = asking.communicate(timeout=30)
    assert first.decode() + rest == "echo: Name three colours\n"
    assert ksi(home, "ask", "--no-stream", "--model", "drip/x", "Hello").stdout == "echo: Hello\n"


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [("nobody/x", Exit.USAGE, "no provider serves"), ("broken/x", Exit.FAILED, "invalid")],
)
def test_ask_says_why_there_is_no_answer(home: Path, model: str, code: Exit, words: str) -> None:
    asked = ksi(home, "ask", "--model", model, "Hello")
    assert asked.returncode == code
    assert asked.stdout == ""
    assert words in asked.stderr
    assert "error" in json.loads(ksi(home, "ask", "--json", "--model", model, "Hello").stdout)


@pytest.mark.promise("F8")
def test_ctrl_c_cancels_the_request(home: Path, spawn: Spawn) -> None:
    asking = spawn(home, "ask", "--model", "slow/x", "--session", "interrupted", "Hello")
    while not (
        held := [lock for lock in rows(ksi(home, "locks", "--json")) if lock["conversation_id"] == "interrupted"]
    ):
        assert asking.poll() is None
    asking.send_signal(signal.SIGINT)
    _, said = asking.communicate(timeout=30)
    assert asking.returncode == Exit.INTERRUPTED
    assert "cancelled" in said
    (request,) = rows(ksi(home, "show", held[0]["holder"], "--json"))
    assert request["status"] == "cancelled"


@pytest.mark.promise("Q3", "Q4")
def test_ask_gets_its_answer_over_a_restart_of_the_daemon(own_home: Path, spawn: Spawn) -> None:
    config = '[service]\nshutdown_grace = 0.0\n[providers.stub]\nkind = "stub"\ndelay = 1\n'
    with DaemonProcess(make_home(own_home, config)) as daemon:
        asking = spawn(own_home, "ask", "--model", "stub/x", "Hello")
        while rows(ksi(own_home, "status", "--json"))[0]["active"] != 1:
            assert asking.poll() is None
        daemon.end(signal.SIGTERM)
        daemon.start()
        text, said = asking.communicate(timeout=60)
    assert (asking.returncode, text) == (0, "echo: Hello\n"), said


# Looking at it


@pytest.mark.promise("R4")
def test_status_and_queue_show_running_requests(home: Path) -> None:
    (reply,) = rows(
        ksi(home, "send", "completion:async", '{"prompt": "Hello", "model": "slow/x", "session_id": "busy"}')
    )
    (waiting,) = rows(ksi(home, "send", "completion:async", '{"prompt": "Hello", "session_id": "busy"}'))
    (status,) = rows(ksi(home, "status", "--json"))
    assert reply["request_id"] in [run["request_id"] for run in status["running"]]
    assert reply["request_id"] in ksi(home, "status").stdout
    (figures,) = rows(ksi(home, "queue", "--json"))
    assert figures["active"] >= 1
    assert figures["queued"] >= 1
    assert figures["locked_conversations"] >= 1
    listed = rows(ksi(home, "queue", "--list", "waiting", "--all", "--json"))
    assert waiting["request_id"] in [row["request_id"] for row in listed]
    shown = ksi(home, "locks", "busy").stdout
    assert reply["request_id"] in shown
    assert waiting["request_id"] in shown
    cancelled = ksi(home, "cancel", waiting["request_id"], reply["request_id"])
    assert cancelled.returncode == 0
    assert cancelled.stdout.count("cancelled") == 2
    assert "had ended cancelled" in ksi(home, "cancel", reply["request_id"]).stdout


@pytest.mark.promise("U1")
def test_ids_may_be_shortened_wherever_they_are_asked_for(home: Path) -> None:
    data = '{"prompt": "Hello", "injection_config": {"target_sessions": ["short"]}, "circuit_breaker_config": {}}'
    (sent,) = rows(ksi(home, "send", "completion:async", data))
    (ended,) = rows(ksi(home, "wait", sent["request_id"], "--json"))
    short, talk = ended["request_id"][:20], ended["session_id"][:21]
    assert rows(ksi(home, "usage", "--chain", short, "--json"))[0]["totals"]["requests"] == 2
    for words in (["show", short], ["wait", short], ["chain", short]):
        assert ended["request_id"] in ksi(home, *words, "--json").stdout, words
    for words in (["sessions", talk], ["log", talk], ["locks", talk], ["usage", "--session", talk]):
        assert ended["session_id"] in ksi(home, *words, "--json").stdout, words
    delivery = rows(ksi(home, "injections", "--json"))[0]["injection_id"]
    assert delivery in ksi(home, "injections", delivery[:20] + delivery[-2:], "--json").stdout
    assert "had ended completed" in ksi(home, "cancel", short).stdout
    assert "only a request that ended without an answer" in ksi(home, "requeue", short).stderr
    ksi(home, "ask", "Hello")
    several = ksi(home, "show", "req_")
    assert several.returncode == Exit.USAGE
    assert "is the beginning of several requests" in several.stderr


@pytest.mark.promise("U1")
def test_a_chosen_name_must_be_whole_to_be_cancelled(home: Path) -> None:
    ksi(home, "send", "completion:async", '{"request_id": "job-10", "prompt": "x", "model": "slow/x"}')
    refused = ksi(home, "cancel", "job-1")
    assert refused.returncode == Exit.NOT_FOUND
    assert "if you mean 'job-10', give its whole name" in refused.stderr
    assert "running" in ksi(home, "show", "job-1").stdout
    assert ksi(home, "cancel", "job-10").returncode == 0


@pytest.mark.promise("U3")
def test_prompts_and_answers_can_be_read_back(home: Path) -> None:
    for turn in ("Where in May?", "And by train?", "How long?"):
        ksi(home, "ask", "--session", "read back", "--system", "Be brief.", "--agent", "ann", turn)
    told = ksi(home, "log", "read back").stdout
    at = [told.index(text) for text in ("Where in May?", "echo: Where in May?", "And by train?", "echo: How long?")]
    assert at == sorted(at)
    assert told.count("system:\nBe brief.") == 3
    last = ksi(home, "log", "read back", "--limit", "1")
    assert ("How long?" in last.stdout, "train" in last.stdout, "--all" in last.stderr) == (True, False, True)
    turns = rows(ksi(home, "log", "read back", "--all", "--json"))
    assert [turn["content"]["prompt"] for turn in turns] == ["Where in May?", "And by train?", "How long?"]
    assert turns[0]["agent_id"] == "ann"
    assert ksi(home, "log", "nobody").returncode == Exit.NOT_FOUND
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}] * 1
    data = {"request_id": "with messages", "messages": [*messages, {"role": "user", "content": "three"}]}
    ksi(home, "send", "completion:request", json.dumps(data))
    shown = ksi(home, "show", "with messages").stdout
    assert all(text in shown for text in ("1 user", "2 assistant", "3 user", "three"))


@pytest.mark.promise("U3")
def test_a_long_conversation_is_read_back_page_by_page(home: Path) -> None:
    for turn in range(5):
        ksi(home, "send", "completion:request", json.dumps({"session_id": "long", "prompt": f"turn {turn}"}))
    seen: list[str] = []
    cursor: str | None = None
    while True:
        wish = {"session_id": "long", "limit": 2, **({} if cursor is None else {"cursor": cursor})}
        (page,) = rows(ksi(home, "send", "completion:history", json.dumps(wish)))
        seen += [turn["content"]["prompt"] for turn in page["turns"]]
        cursor = page.get("cursor")
        if cursor is None:
            break
    assert seen == [f"turn {n}" for n in reversed(range(5))]
    for wrong in ({"session_id": "long", "cursor": "x"}, {}, {"session_id": "none"}):
        assert ksi(home, "send", "completion:history", json.dumps(wrong)).returncode in (Exit.USAGE, Exit.NOT_FOUND)


@pytest.mark.promise("Q8")
def test_long_lists_are_followed_to_their_end_when_asked(home: Path) -> None:
    for number in range(3):
        ksi(home, "ask", str(number))
    page = ksi(home, "queue", "--list", "finished", "--limit", "2", "--json")
    assert len(rows(page)) == 2
    assert "--all" in page.stderr
    everything = ksi(home, "queue", "--list", "finished", "--limit", "2", "--all", "--json")
    assert len({row["request_id"] for row in rows(everything)}) == len(rows(everything)) >= 3
    assert len(rows(ksi(home, "sessions", "--limit", "1", "--all", "--json"))) >= 3


@pytest.mark.promise("T1")
def test_show_has_the_trail_and_the_usage(home: Path) -> None:
    (reply,) = rows(ksi(home, "ask", "--json", "Hello"))
    text = ksi(home, "show", reply["request_id"]).stdout
    assert "echo: Hello" in text
    assert "1 in, 2 out" in text
    assert "attempts" in text


@pytest.mark.parametrize("args", [("show", "nobody"), ("cancel", "nobody"), ("sessions", "nobody")])
def test_an_unknown_name_has_its_exit_code(home: Path, args: tuple[str, ...]) -> None:
    assert ksi(home, *args).returncode == Exit.NOT_FOUND
    assert ksi(home, *args, "--json").returncode == Exit.NOT_FOUND


def test_cancel_goes_on_after_an_unknown_request(home: Path) -> None:
    (reply,) = rows(ksi(home, "send", "completion:async", '{"prompt": "Hello", "model": "slow/x"}'))
    done = ksi(home, "cancel", "nobody", reply["request_id"], "--json")
    assert done.returncode == Exit.NOT_FOUND
    assert [json.loads(line).get("status") for line in done.stdout.splitlines()] == [None, "cancelled"]


def test_health_tells_by_its_exit_code(home: Path) -> None:
    healthy = ksi(home, "health")
    assert healthy.returncode == 0
    assert "healthy" in healthy.stdout


def test_logs_show_the_end_and_follow(home: Path, spawn: Spawn) -> None:
    assert '"event": "ready"' in ksi(home, "logs").stdout
    following = spawn(home, "logs", "-f", "-n", "1")
    assert following.stdout is not None
    following.stdout.readline()
    log = home / "var" / "logs" / "daemon.log"
    with log.open("a") as written:
        written.write("added\n")
    assert following.stdout.readline() == "added\n"
    log.rename(log.with_suffix(".1"))
    log.write_text("in a new file\n")
    assert following.stdout.readline() == "in a new file\n"
    following.send_signal(signal.SIGINT)
    following.communicate(timeout=30)
    assert following.returncode == Exit.INTERRUPTED


# The wire


def test_send_prints_the_reply_or_the_error_as_json(home: Path) -> None:
    (reply,) = rows(ksi(home, "send", "system:ready"))
    assert reply["ready"] is True
    failed = ksi(home, "send", "completion:get", "-", stdin='{"request_id": "nobody"}')
    assert failed.returncode == Exit.NOT_FOUND
    assert json.loads(failed.stdout)["error"]["code"] == "not_found"
    assert ksi(home, "send", "completion:nope").returncode == Exit.USAGE


@pytest.mark.promise("R1", "R2")
def test_send_follows_a_request_to_its_result(home: Path) -> None:
    data = '{"prompt": "Name three colours", "model": "drip/x", "stream": true}'
    submitted, *pushed = rows(ksi(home, "send", "completion:async", data, "--follow"))
    assert [push["event"] for push in pushed] == ["completion:chunk"] * 4 + ["completion:result"]
    assert {push["data"]["request_id"] for push in pushed} == {submitted["request_id"]}


def test_watch_prints_events_until_ctrl_c(home: Path, spawn: Spawn) -> None:
    watching = spawn(home, "watch", "--json", "completion:result")
    people = spawn(home, "watch", "completion:res*", "conversation:forked")
    assert watching.stdout is not None
    assert people.stdout is not None
    while (rows(ksi(home, "health", "--json"))[0]["connections"]) < 3:
        assert watching.poll() is None
        assert people.poll() is None
    (reply,) = rows(ksi(home, "ask", "--json", "Hello"))
    assert json.loads(watching.stdout.readline())["data"]["request_id"] == reply["request_id"]
    line = people.stdout.readline()
    assert "completion:result" in line
    assert "result=echo: Hello" in line
    for process in (watching, people):
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode == Exit.INTERRUPTED


# Terminals and pipes


def test_a_person_at_a_terminal_gets_a_table(home: Path, spawn: Spawn) -> None:
    ksi(home, "ask", "--session", "seen", "Hello")
    master, slave = pty.openpty()
    looking = spawn(home, "sessions", stdout=slave)
    os.close(slave)
    shown = b""
    try:
        while piece := os.read(master, 65_536):
            shown += piece
    except OSError:
        pass  # the end, as terminals say it
    finally:
        os.close(master)
    looking.communicate(timeout=30)
    assert looking.returncode == 0
    assert "─" in shown.decode()
    assert b"seen" in shown


def on_terminal(home: Path, *args: str, columns: int = 80) -> str:
    """The output of a command at a terminal of this many columns."""
    master, slave = pty.openpty()
    environ = {**clean_environ(), "COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1"}
    process = subprocess.Popen(command(home, *args), stdin=slave, stdout=slave, stderr=slave, env=environ)
    os.close(slave)
    shown = b""
    try:
        while piece := os.read(master, 65_536):
            shown += piece
    except OSError:
        pass  # the end, as terminals say it
    finally:
        os.close(master)
    assert process.wait(60) == 0, shown
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.promise("U1")
def test_lists_fit_80_columns_and_every_id_stands_on_one_line(home: Path) -> None:
    data = {"prompt": "Hello", "agent_id": "planner", "injection_config": {"target_sessions": ["t"]}}
    for _ in range(2):
        ksi(home, "send", "completion:request", json.dumps(data))
    ksi(home, "ask", "--model", "broken/x", "Hello")
    lists = {
        ("queue", "--list", "finished"): "request_id",
        ("queue", "--list", "failed"): "request_id",
        ("sessions",): "session_id",
        ("chain",): "chain_id",
        ("injections",): "injection_id",
        ("locks",): "conversation_id",
    }
    for words, name in lists.items():
        text = on_terminal(home, *words)
        assert max(map(len, text.splitlines())) <= 80, (words, text)
        for row in rows(ksi(home, *words, "--json")):
            assert any(row[name] in line for line in text.splitlines()), (words, row[name], text)
    assert max(map(len, on_terminal(home, "providers").splitlines())) <= 80


@pytest.mark.promise("U1")
def test_a_log_s_controls_do_not_reach_a_terminal(own_home: Path) -> None:
    (own_home / "var" / "logs").mkdir(parents=True)
    (own_home / "var" / "logs" / "daemon.log").write_bytes(b"evil \x1b]52;c;ZXZpbA==\x07 \xc2\x9b31m\n")
    assert on_terminal(own_home, "logs") == "evil \\x1b]52;c;ZXZpbA==\\x07 \\x9b31m\n"
    assert ksi(own_home, "logs").stdout == "evil \x1b]52;c;ZXZpbA==\x07 \x9b31m\n"


COMPLETE = """
eval "$({ksi} completion bash)"
try() {{ COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _ksi_completion ksi; echo "${{COMPREPLY[*]}}"; }}
ksi() {{ {ksi} "$@"; }}
cd "{home}"
try ksi stat
try ksi show completed-
try ksi log completed-talk
try ksi providers enable dr
try ksi --home /nowhere show ""
"""


@pytest.mark.promise("U1")
def test_a_shell_completes_commands_and_live_names(home: Path, tmp_path: Path) -> None:
    ksi(home, "ask", "--id", "completed-1", "--session", "completed-talk", "Hello")
    ksi(home, "ask", "--id", "completed-; rm -rf x", "Hello")
    launcher = tmp_path / "ksi"
    code = "import sys; sys.argv[0] = 'ksi'; from ksi.cli import main; main()"
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n')
    launcher.chmod(0o755)
    script = COMPLETE.format(ksi=launcher, home=home)
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env={**clean_environ(), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert done.stdout.splitlines() == ["status", "completed-1", "completed-talk", "drip", ""], done.stderr
    for shell in ("zsh", "fish"):
        assert "_KSI_COMPLETE" in ksi(home, "completion", shell).stdout


def test_a_reader_that_leaves_early_is_no_error(home: Path) -> None:
    shell = f"{' '.join(command(home, 'events', '--json'))} | head -1"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=30, env=clean_environ())
    assert json.loads(done.stdout)["name"]
    assert done.stderr == ""


def test_help_loads_no_more_than_it_needs(home: Path) -> None:
    code = "import sys\ntry:\n import ksi.cli; ksi.cli.main(['--help'])\nfinally:\n print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    heavy = {"rich", "asyncio", "aiohttp", "uvloop", "apsw", "structlog", "msgspec", "ksi.client", "ksi.daemon"}
    assert heavy.isdisjoint(done.stdout.split())
    assert "Commands:" in done.stdout
