"""`ksi providers`, `retries`, `requeue` and `checkpoint`, as a person or a script runs them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ksi.cli.settings import Exit
from tests.daemon_process import CONFIG, DaemonProcess, make_home
from tests.integration.test_cli import ksi, rows
from tests.integration.wire import Json

TROUBLE = """
[breaker]
failures = 2
open_for = 300

[providers.sick]
kind = "stub"
fail = "provider_error"

[providers.later]
kind = "stub"
fail = "provider_error"
retry_after = 500

[providers.spent]
kind = "stub"
fail = "rate_limited"
retry_after = 500
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A daemon whose providers are in all kinds of trouble."""
    with DaemonProcess(make_home(tmp_path_factory.mktemp("home"), CONFIG + TROUBLE)) as daemon:
        ask: dict[str, Json] = {
            "sick-1": {"model": "sick/x", "retry": {"max_attempts": 1}},
            "sick-2": {"model": "sick/x", "retry": {"max_attempts": 1}},
            "later-1": {"model": "later/x", "session_id": "talk"},
            "spent-1": {"model": "spent/x"},
            "broken-1": {"model": "broken/x"},
            "done-1": {"model": "stub/x"},
        }
        for request_id, data in ask.items():
            sent = json.dumps({"request_id": request_id, "prompt": "Hi", **data})
            assert ksi(daemon.home, "send", "completion:async", sent).returncode == 0
        for request_id in ("sick-1", "sick-2", "broken-1", "done-1"):
            ksi(daemon.home, "send", "completion:wait", json.dumps({"request_id": request_id}))
        yield daemon.home


@pytest.mark.promise("F3", "F5", "F6")
def test_providers_shows_healthy_open_and_parked_ones(home: Path) -> None:
    shown = ksi(home, "providers").stdout
    states = {line.split()[0]: line for line in shown.splitlines()[1:]}
    assert re.search(r"stub +healthy +0/8 +\d+ +100\.0%", states["stub"])
    assert re.search(r"circuit open until \d\d:\d\d:\d\d +0/4 +2 +0\.0%", states["sick"])
    assert "parked until" in states["spent"]
    assert states["sick"].endswith("provider_error")
    (reply,) = rows(ksi(home, "providers", "--json"))
    assert reply["providers"]["sick"]["breaker"] == "open"


@pytest.mark.promise("F3")
def test_providers_switches_one_and_tells_how_it_is_then(home: Path) -> None:
    assert re.fullmatch(r"drip +disabled\n", ksi(home, "providers", "disable", "drip").stdout)
    assert re.search(r"^drip +stub +disabled", ksi(home, "providers").stdout, re.MULTILINE)
    assert rows(ksi(home, "providers", "enable", "drip", "--json"))[0]["enabled"] is True
    assert re.fullmatch(r"drip +healthy\n", ksi(home, "providers", "reset", "drip").stdout)


def test_providers_refuses_an_unknown_one(home: Path) -> None:
    unknown = ksi(home, "providers", "disable", "stubb")
    assert unknown.returncode == Exit.NOT_FOUND
    assert "did you mean 'stub'" in unknown.stderr
    nameless = ksi(home, "providers", "disable")
    assert nameless.returncode == Exit.USAGE
    assert "which provider?" in nameless.stderr
    assert ksi(home, "providers", "stub").returncode == Exit.USAGE


@pytest.mark.promise("F2", "F5")
def test_retries_shows_waiting_requests_why_since_when_and_until_when(home: Path) -> None:
    head, *lines = ksi(home, "retries").stdout.splitlines()
    assert head.split() == [
        "request",
        "status",
        "conversation",
        "model",
        "attempt",
        "since",
        "until",
        "error",
        "message",
    ]
    clock = r"\d\d:\d\d:\d\d"
    by_id = {line.split()[0]: line for line in lines}
    assert re.search(
        rf"later-1 +retrying +talk +later/x +1 +{clock} +{clock} +provider_error +scripted", by_id["later-1"]
    )
    assert re.search(rf"spent-1 +parked .+ {clock} +{clock} +rate_limited", by_id["spent-1"])
    told = {row["request_id"]: row for row in rows(ksi(home, "retries", "--json"))}
    assert 499 < told["later-1"]["due_at"] - told["later-1"]["failed_at"] < 501


@pytest.mark.promise("F2")
def test_requeue_asks_again_for_failed_requests_and_names_impossible_ones(home: Path) -> None:
    done = ksi(home, "requeue", "broken-1", "done-1", "sick-1")
    assert done.returncode == Exit.USAGE
    assert re.search(r"^broken-1 +req_\w+$", done.stdout, re.MULTILINE)
    assert re.search(r"^sick-1 +req_\w+$", done.stdout, re.MULTILINE)
    assert "done-1" in done.stderr and "completed" in done.stderr
    unknown = ksi(home, "requeue", "nobody", "--json")
    assert unknown.returncode == Exit.NOT_FOUND
    assert json.loads(unknown.stdout)["error"]["code"] == "not_found"
    (again,) = rows(ksi(home, "requeue", "broken-1", "--json"))
    assert again["requeued_from"] == "broken-1"


@pytest.mark.promise("R5")
def test_a_checkpoint_is_saved_next_to_the_caller_and_restored_into_another_home(home: Path, tmp_path: Path) -> None:
    shown = ksi(home, "checkpoint", "save", str(tmp_path / "all.ksi"))
    assert shown.returncode == 0, shown.stderr
    assert re.search(rf"checkpoint +{tmp_path}/all\.ksi\n", shown.stdout)
    again = ksi(home, "checkpoint", "save", str(tmp_path / "all.ksi"))
    assert again.returncode == Exit.USAGE
    assert "choose another name" in again.stderr
    (named,) = rows(ksi(home, "checkpoint", "save", "--json"))
    assert Path(named["path"]).parent == home / "var" / "checkpoints"
    with DaemonProcess(make_home(tmp_path / "other", CONFIG + TROUBLE)) as other:
        missing = ksi(other.home, "checkpoint", "restore", str(tmp_path / "none.ksi"))
        assert missing.returncode == Exit.NOT_FOUND
        (tmp_path / "bad.ksi").write_text("Hello")
        bad = ksi(other.home, "checkpoint", "restore", str(tmp_path / "bad.ksi"))
        assert bad.returncode == Exit.USAGE
        assert "no checkpoint of KSI" in bad.stderr
        restored = ksi(other.home, "checkpoint", "restore", str(tmp_path / "all.ksi"))
        assert restored.returncode == 0, restored.stderr
        assert "run in both" in restored.stderr
        assert "done-1" in ksi(other.home, "queue", "--list", "finished").stdout
        filled = ksi(other.home, "checkpoint", "restore", str(tmp_path / "all.ksi"))
        assert filled.returncode == Exit.USAGE
        assert "empty" in filled.stderr


def test_a_relative_name_is_relative_to_the_caller(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (reply,) = rows(ksi(home, "checkpoint", "save", "here.ksi", "--json"))
    assert reply["path"] == str(tmp_path / "here.ksi")
    assert (tmp_path / "here.ksi").is_file()


def test_without_a_daemon_each_of_them_says_so(tmp_path: Path) -> None:
    make_home(tmp_path)
    for words in (["providers"], ["retries"], ["requeue", "x"], ["checkpoint", "save"], ["checkpoint", "restore", "x"]):
        assert ksi(tmp_path, *words).returncode == Exit.UNREACHABLE, words
