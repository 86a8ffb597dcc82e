"""The command's parts without a daemon: help, exit codes, tables, prompts, reference and configuration."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import ksi
from ksi.cli import COMMANDS, main
from ksi.cli import render as rendering
from ksi.cli.logs import last_lines
from ksi.cli.settings import Exit, exit_code, report
from ksi.errors import ConfigError, ConnectionFailed, KsiError, RemoteError
from ksi.host.printable import visible


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("KSI_HOME", "KSI_QUEUE__LEASE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(home: Path, *args: str, stdin: str | bytes = "") -> Result:
    return CliRunner().invoke(main, ["--home", str(home), *args], input=stdin)


def lines(result: Result) -> list[Any]:
    return [json.loads(line) for line in result.stdout.splitlines()]


# Start


def test_a_command_that_shows_a_report_loads_no_event_loop() -> None:
    loads = "import sys, ksi.cli.status, ksi.config, ksi.cli.render; sys.exit('asyncio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loads], check=False).returncode == 0


# Help


def commands() -> list[tuple[str, click.Command]]:
    with click.Context(main) as ctx:
        return [(name, main.get_command(ctx, name)) for name in main.list_commands(ctx)]  # type: ignore[misc]


@pytest.mark.parametrize(("name", "command"), commands())
def test_each_command_has_a_text_and_examples(name: str, command: click.Command) -> None:
    assert command.help
    assert f"ksi {name}" in (command.epilog or "")
    assert COMMANDS[name].help.endswith(".")


@pytest.mark.parametrize(("name", "command"), commands())
def test_the_reference_has_each_command_and_option(name: str, command: click.Command) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "cli.md").read_text("utf-8")
    assert f"\nksi {name} " in page
    for option in command.params:
        if isinstance(option, click.Option):
            assert set(option.opts) & set(re.findall(r"-+[\w-]+", page))


def test_the_help_lists_all_commands_and_exit_codes(home: Path) -> None:
    text = run(home, "--help").output
    with click.Context(main) as ctx:
        for name in main.list_commands(ctx):
            assert f"  {name} " in text
    for code in Exit:
        assert f"\n    {code.value} " in text


def test_an_unknown_command_is_wrong_usage(home: Path) -> None:
    result = run(home, "statsu")
    assert result.exit_code == Exit.USAGE
    assert "did you mean 'status'?" in result.stderr


# Errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KsiError("?"), Exit.FAILED),
        (RemoteError("rate_limited", "?", {}, retryable=True), Exit.FAILED),
        (RemoteError("invalid_data", "?", {}), Exit.USAGE),
        (RemoteError("unknown_event", "?", {}), Exit.USAGE),
        (ConfigError("?"), Exit.USAGE),
        (ConnectionFailed("?"), Exit.UNREACHABLE),
        (RemoteError("not_found", "?", {}), Exit.NOT_FOUND),
        (RemoteError("cancelled", "?", {}), Exit.CANCELLED),
        (RemoteError("queue_full", "?", {}), Exit.LATER),
        (RemoteError("conversation_busy", "?", {}), Exit.LATER),
    ],
)
def test_an_error_has_its_exit_code(error: KsiError, code: Exit) -> None:
    assert exit_code(error) is code


def test_an_error_is_a_sentence_for_people_and_an_object_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    error = RemoteError("not_found", "no request 'x\x1b[2J'", {"request_id": "x"})
    assert report(error, as_json=False) is Exit.NOT_FOUND
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "ksi: no request 'x\\x1b[2J'\n")
    report(error, as_json=True)
    body = {"code": "not_found", "message": "no request 'x\x1b[2J'", "retryable": False, "details": {"request_id": "x"}}
    assert json.loads(capsys.readouterr().out) == {"error": body}


@pytest.mark.parametrize(
    "args",
    [
        ["status"],
        ["health"],
        ["queue"],
        ["queue", "--list", "failed"],
        ["locks"],
        ["locks", "c"],
        ["sessions"],
        ["show", "r"],
        ["cancel", "r"],
        ["watch"],
        ["send", "completion:status"],
        ["ask", "--no-start", "Hello"],
    ],
)
def test_without_a_daemon_a_command_says_how_to_start_it(home: Path, args: list[str]) -> None:
    result = run(home, *args)
    assert result.exit_code == Exit.UNREACHABLE
    assert "ksi start" in result.stderr
    assert "Traceback" not in result.output


def test_a_configuration_that_cannot_be_used_is_reported_with_its_place(home: Path) -> None:
    (home / "ksi.toml").write_text("[queue]\nleese = 3\n")
    result = run(home, "config", "--json")
    assert result.exit_code == Exit.USAGE
    assert lines(result)[0]["error"]["code"] == "config"
    assert "queue.lease" in result.stderr


# Input


@pytest.mark.parametrize("args", [["ask"], ["ask", " "]])
def test_ask_without_a_prompt_is_wrong_usage(home: Path, args: list[str]) -> None:
    result = run(home, *args)
    assert result.exit_code == Exit.USAGE
    assert "give a prompt" in result.stderr


def test_ask_refuses_stdin_that_is_no_text(home: Path) -> None:
    result = run(home, "ask", stdin=b"\xff\xfe")
    assert result.exit_code == Exit.USAGE
    assert "not UTF-8" in result.stderr


@pytest.mark.parametrize("data", ["[1]", "{", "1e999", '"text"'])
def test_send_refuses_data_that_is_no_object(home: Path, data: str) -> None:
    result = run(home, "send", "completion:status", data)
    assert result.exit_code == Exit.USAGE
    assert "JSON object" in result.stderr


# Reference


@pytest.mark.promise("R4")
def test_events_lists_every_event_with_its_fields(home: Path) -> None:
    from ksi.events.specs import SPECS

    text = run(home, "events").stdout
    assert [line.split()[0] for line in text.splitlines()[1:]] == list(SPECS)
    assert "request_id*" in text


@pytest.mark.promise("R4")
def test_an_event_is_described_with_types_and_defaults(home: Path) -> None:
    text = run(home, "events", "completion:async").stdout
    words = {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines() if line}
    assert words["max_tokens"].startswith("integer ≥ 1")
    assert "'enqueue'" in words["on_busy"]
    assert words["on_busy"].endswith("come next.")
    assert words["session_id"].startswith("text yes")  # the reply's


def test_events_as_json_have_their_schema(home: Path) -> None:
    (event,) = lines(run(home, "events", "completion:get", "--json"))
    assert event["direction"] == "in"
    assert event["schema"]["request"]["$ref"].endswith("GetData")


def test_an_unknown_event_is_not_found_and_the_nearest_is_named(home: Path) -> None:
    result = run(home, "events", "completion:asink")
    assert result.exit_code == Exit.NOT_FOUND
    assert "did you mean 'completion:async'" in result.stderr


def test_config_shows_the_origin_of_each_value(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "ksi.toml").write_text(
        '[queue]\nmax_queued = 5\n[providers.team-a]\nkind = "openai"\nmodels = ["a/*"]\n'
        'headers = {"X-Team" = "sesame"}\n'
    )
    monkeypatch.setenv("KSI_QUEUE__LEASE", "20")
    monkeypatch.setenv("KSI_PROVIDERS__TEAM_A__PRIORITY", "3")
    shown = {row["key"]: (row["value"], row["origin"]) for row in lines(run(home, "config", "--json"))}
    assert shown["queue.max_queued"] == (5, "ksi.toml")
    assert shown["queue.lease"] == (20.0, "KSI_QUEUE__LEASE")
    assert shown["queue.head_start.high"] == (21600.0, "default")
    assert shown["providers.team-a.priority"] == (3, "KSI_PROVIDERS__TEAM_A__PRIORITY")
    assert shown["providers.team-a.models"] == (["a/*"], "ksi.toml")
    assert shown["providers.team-a.headers.X-Team"] == ("(hidden)", "ksi.toml")
    assert "sesame" not in run(home, "config").stdout


# Logs


def test_the_last_lines_of_a_log_are_found_across_blocks(tmp_path: Path) -> None:
    path = tmp_path / "daemon.log"
    text = b"".join(b"%06d\n" % number for number in range(50_000))
    assert last_lines(io.BytesIO(text), 3, path) == b"049997\n049998\n049999\n"
    assert last_lines(io.BytesIO(text), 30_000, path) == text[-30_000 * 7 :]
    assert last_lines(io.BytesIO(b"one\ntwo"), 5, path) == b"one\ntwo"
    assert last_lines(io.BytesIO(b"one\ntwo"), 1, path) == b"two"
    assert last_lines(io.BytesIO(text), 0, path) == b""


@pytest.mark.promise("O1")
def test_the_last_lines_go_back_into_the_logs_that_were_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "daemon.log"
    (tmp_path / "daemon.log.2").write_bytes(b"1\n2\n3\n")
    (tmp_path / "daemon.log.1").write_bytes(b"4\n5\n")
    log = io.BytesIO(b"6\n")
    assert last_lines(log, 4, path) == b"3\n4\n5\n6\n"
    assert last_lines(log, 2, path) == b"5\n6\n"
    assert last_lines(log, 100, path) == b"1\n2\n3\n4\n5\n6\n"
    assert log.read() == b"", "what is added later is read next"


def test_logs_shows_the_end_of_the_log(home: Path) -> None:
    (home / "var" / "logs").mkdir(parents=True)
    (home / "var" / "logs" / "daemon.log").write_text("one\ntwo\nthree\n")
    assert run(home, "logs", "-n", "2").stdout == "two\nthree\n"


def test_logs_without_a_log_names_its_future_path(home: Path) -> None:
    result = run(home, "logs")
    assert result.exit_code == Exit.NOT_FOUND
    assert "daemon.log" in result.stderr


# Rendering


def test_a_table_for_a_program_is_plain_and_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    rendering.table(("name", "n"), [("a", 12345), ("longer", None)], title="things")
    assert capsys.readouterr().out == "things\nname    n\na       12345\nlonger  -\n"


def test_a_table_without_rows_has_its_columns(capsys: pytest.CaptureFixture[str]) -> None:
    rendering.table(("name", "n"), [])
    assert capsys.readouterr().out == "name  n\n"


def test_a_table_for_a_person_is_drawn_and_takes_no_markup_from_its_cells(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    rendering.table(("name", "n"), [("[red]a[/red]", 1)])
    out = capsys.readouterr().out
    assert "[red]a[/red]" in out
    assert "─" in out


def test_control_characters_from_outside_do_not_reach_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    rendering.figures({"session": "a\x1b[2Jb\nc", "none": None, "ok": True, "ratio": 0.5, "map": {"a": 1}})
    assert capsys.readouterr().out == 'session  a\\x1b[2Jb\n         c\nok       yes\nratio    0.5\nmap      {"a":1}\n'
    assert visible("a\x9b2J\u202e") == "a\\x9b2J\\u202e"
    assert visible("añ☃") == "añ☃"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, None),
        (0.0123, "12 ms"),
        (5.25, "5.2 s"),
        (61, "1 min 1 s"),
        (7260, "2 h 1 min"),
        (200_000, "2 d 7 h"),
    ],
)
def test_a_duration_is_in_its_two_largest_units(seconds: float | None, words: str | None) -> None:
    assert rendering.duration(seconds) == words


def test_a_time_of_another_day_has_its_date() -> None:
    noon = time.mktime((2026, 3, 4, 12, 0, 0, 0, 0, -1))
    assert rendering.clock_time(noon, noon + 60) == "12:00:00"
    assert rendering.clock_time(noon, noon + 86_400) == "2026-03-04 12:00:00"
    assert rendering.clock_time(None) is None


# Public names


def test_the_package_s_public_names_are_there() -> None:
    for name in ksi.__all__:
        assert getattr(ksi, name).__name__ == name
    assert dir(ksi) == sorted(ksi.__all__)
    with pytest.raises(AttributeError, match="Cleint"):
        ksi.Cleint  # noqa: B018
