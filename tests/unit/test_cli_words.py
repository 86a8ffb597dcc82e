"""The command's decisions: which id is meant, what a request waits for, and what a prompt is made of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
import pytest

from ksi.cli.completing import _fitting
from ksi.cli.ids import Kind, choose
from ksi.cli.last import last_session, remember
from ksi.cli.prompt import quoted, utf8
from ksi.cli.schema import check_json, read_schema
from ksi.cli.settings import Exit
from ksi.cli.waiting import waits_for
from ksi.errors import AmbiguousId, NotFound

MADE = f"req_{'1a' * 13}"
NEXT = f"req_{'1a' * 12}2b"

# Ids


def chosen(word: str, *names: str, more: bool = False, kind: Kind = "request", changes: bool = False) -> str:
    return choose(word, names, more=more, kind=kind, changes=changes)


@pytest.mark.promise("U1")
def test_the_only_name_that_begins_so_is_meant() -> None:
    assert chosen("req_1a", MADE) == MADE
    assert chosen("req_1a", MADE, changes=True) == MADE
    assert chosen("job", "job-1") == "job-1"


@pytest.mark.promise("U1")
def test_a_whole_name_is_meant_itself_though_others_begin_with_it() -> None:
    assert chosen("job-1", "job-1", "job-10", more=True, changes=True) == "job-1"


@pytest.mark.promise("U1")
def test_a_request_is_meant_before_those_that_carry_its_deliveries() -> None:
    assert chosen("req_1a", MADE, f"{MADE}/1", f"{MADE}/2", f"{MADE}/1/1", changes=True) == MADE


@pytest.mark.promise("U1")
def test_an_unknown_name_stays_as_it_is_for_the_daemon_to_refuse() -> None:
    assert chosen("nobody") == "nobody"


@pytest.mark.promise("U1")
def test_several_candidates_are_listed() -> None:
    with pytest.raises(AmbiguousId, match="several requests") as caught:
        chosen("req_1a", NEXT, MADE)
    assert caught.value.details["candidates"] == [MADE, NEXT]
    assert MADE in caught.value.message and NEXT in caught.value.message
    with pytest.raises(AmbiguousId, match="and more"):
        chosen("j", *(f"j{n:02}" for n in range(20)), more=True)
    with pytest.raises(AmbiguousId, match="and 10; give more of it"):
        chosen("j", *(f"j{n:02}" for n in range(20)))


@pytest.mark.promise("U1")
def test_a_name_that_somebody_chose_must_be_whole_where_it_changes_something() -> None:
    with pytest.raises(NotFound, match="if you mean 'job-10'"):
        chosen("job-1", "job-10", changes=True)


def test_a_shell_is_given_plain_words_alone() -> None:
    evil = ["; rm -rf ~", "$(id)", "a b", "-rf", "`x`", "a\nb", "", "a;b", "a|b", "a'b", "a*"]
    assert _fitting([*evil, "stub/echo", "conv_1a", "añ", "a:b@c,d+e=f%.g"], "") == [
        "stub/echo",
        "conv_1a",
        "añ",
        "a:b@c,d+e=f%.g",
    ]


# What it waits for

STUB = {"models": ["stub/*"], "enabled": True, "running": 0, "max_concurrency": 4}


def told(providers: dict[str, Any] | None = None, **reply: Any) -> str | None:
    return waits_for({"requested_model": "stub/x", **reply}, providers or {})


@pytest.mark.promise("U2")
def test_what_a_request_waits_for_is_said_in_a_sentence() -> None:
    assert told(status="running") is None
    assert told(status="completed") is None
    assert told(status="queued", position=3, holder="job-1") == (
        "waits for its conversation, 3 in line before it; job-1 has it now"
    )
    assert told(status="queued", position=0, holder="job-1") == "waits for its conversation; job-1 has it now"
    assert told(status="queued", node="lab") == "waits for the machine lab, where its dialogue lives"
    assert told(status="queued") == "waits for its turn"
    assert str(told(status="scheduled", due_at=0.0)).startswith("is to run at ")
    failed = {"error": "overloaded", "message": "come back later"}
    assert str(told(status="retrying", due_at=0.0, attempts=[failed])).startswith(
        "failed (overloaded: come back later) and is tried again at "
    )
    assert str(told(status="parked", due_at=0.0, attempts=[failed])).startswith("is parked until ")


@pytest.mark.promise("U2")
@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ({"enabled": False}, "provider stub is disabled, see `ksi providers enable stub`"),
        ({"limits": [{"sentence": "its quota is spent until 18:00"}]}, "provider stub: its quota is spent until 18:00"),
        (
            {"limits": [{"models": "x*", "sentence": "x rests"}, {"models": "y", "sentence": "y"}]},
            "provider stub: x rests",
        ),
        ({"open_until": 0.0}, "provider stub has failed and is left alone until "),
        ({"problem": "no key is set"}, "provider stub: no key is set"),
        ({"running": 4}, "provider stub has no free slot, 4 requests run there"),
    ],
)
def test_a_providers_trouble_is_why_its_requests_wait(trouble: dict[str, Any], words: str) -> None:
    other = {**STUB, "models": ["other/*"], "enabled": False}
    sentence = told({"other": other, "stub": {**STUB, **trouble}}, status="queued")
    assert sentence is not None
    assert sentence.startswith("waits: " + words)
    assert "other" not in sentence


# Prompts


@pytest.mark.promise("U2")
def test_an_attached_file_stands_between_fences_longer_than_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("one\n```sh\nls\n```\n")
    assert quoted(tmp_path / "a.md") == "a.md:\n````\none\n```sh\nls\n```\n````"


@pytest.mark.promise("U2")
def test_what_is_no_text_cannot_be_attached(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    with pytest.raises(click.UsageError, match="not UTF-8 text; only text files"):
        quoted(tmp_path / "photo.png")
    with pytest.raises(click.UsageError, match="cannot be read: No such file"):
        quoted(tmp_path / "none")


@pytest.mark.promise("U2")
def test_bytes_of_the_command_line_are_utf_8_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert utf8("café ☃", "the prompt") == "café ☃"
    # As a locale without these characters hands them on.
    assert utf8("caf\udcc3\udca9", "the prompt") == "café"
    with pytest.raises(click.UsageError, match="the prompt is not UTF-8 text: byte 0xe9 at 3"):
        utf8(os.fsdecode(b"caf\xe9"), "the prompt")


def test_a_schema_is_a_json_object(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"type": "object"}')
    assert read_schema(tmp_path / "s.json") == {"type": "object"}
    (tmp_path / "bad.json").write_text("[1]")
    for name in ("bad.json", "none.json"):
        with pytest.raises(click.UsageError, match="--schema: "):
            read_schema(tmp_path / name)


def test_an_answer_by_a_schema_is_json_or_said_to_be_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_json('{"a": 1}', "r") is Exit.DONE
    assert check_json("Sure! Here it is: {}", "r") is Exit.FAILED
    assert "passed over the schema" in capsys.readouterr().err


# The last conversation


@pytest.mark.promise("U2")
def test_each_agent_goes_on_with_its_own_last_conversation(tmp_path: Path) -> None:
    with pytest.raises(click.UsageError, match="nothing was asked in"):
        last_session(tmp_path, None)
    remember(tmp_path, None, "mine")
    remember(tmp_path, "planner", "theirs")
    remember(tmp_path, "planner", None)
    assert (last_session(tmp_path, None), last_session(tmp_path, "planner")) == ("mine", "theirs")
    with pytest.raises(click.UsageError, match="of agent editor"):
        last_session(tmp_path, "editor")
    (file,) = (tmp_path / "var").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_text("no JSON")
    remember(tmp_path, None, "again")
    assert last_session(tmp_path, None) == "again"
