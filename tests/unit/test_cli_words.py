"""The command's decisions: which id is meant, what a request waits for, and what a prompt is made of."""

from __future__ import annotations

import base64
import os
import pwd
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import click
import pytest

from ksi.cli.completing import _fitting
from ksi.cli.ids import Kind, choose
from ksi.cli.last import last_session, remember
from ksi.cli.pauses import time_meant
from ksi.cli.prompt import attachments, utf8
from ksi.cli.schema import check_json, read_schema
from ksi.cli.settings import Exit, own_name
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
def test_a_chosen_name_must_be_whole_if_it_changes_something() -> None:
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


@pytest.mark.promise("U2", "B3")
def test_a_request_that_waits_for_a_person_says_what_is_asked_and_where_to_answer() -> None:
    held = told(status="held", request_id="r1", question={"text": "its sender holds it back"})
    assert held == "waits for a person's answer: its sender holds it back; see `ksi approvals r1`"
    asks = told(status="waiting_input", request_id="r1", question={"text": "may it use Bash?", "expires_at": 1.0})
    assert asks is not None
    assert asks.startswith("waits until ")
    assert "may it use Bash?" in asks


@pytest.mark.promise("U2")
def test_the_reason_of_a_wait_is_a_sentence() -> None:
    assert told(status="running") is None
    assert told(status="completed") is None
    assert told(status="queued", position=3, holder="job-1") == (
        "waits for its conversation, 3 in the queue before it; job-1 holds it now"
    )
    assert told(status="queued", position=0, holder="job-1") == "waits for its conversation; job-1 holds it now"
    assert told(status="queued", node="lab") == "waits for the machine lab, which has its dialogue"
    assert told(status="queued") == "waits for its turn"
    held = "agent nightly is paused since 10:04:00 by ann: it burns"
    assert told(status="queued", paused=held, position=0) == f"waits: {held}"
    assert str(told(status="scheduled", due_at=0.0)).startswith("is to run at ")
    failed = {"error": "overloaded", "message": "come back later"}
    assert str(told(status="retrying", due_at=0.0, attempts=[failed])).startswith(
        "failed (overloaded: come back later) and is retried at "
    )
    assert str(told(status="parked", due_at=0.0, attempts=[failed])).startswith("is parked until ")


@pytest.mark.promise("U2")
@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ({"enabled": False}, "provider stub is disabled; see `ksi providers enable stub`"),
        (
            {"enabled": False, "disabled": "provider stub is disabled since 10:04:00 by ann: the bill"},
            "provider stub is disabled since 10:04:00 by ann: the bill; see `ksi providers enable stub`",
        ),
        ({"paused": "provider stub is paused since 10:04:00"}, "provider stub is paused since 10:04:00"),
        ({"limits": [{"sentence": "its quota is spent until 18:00"}]}, "provider stub: its quota is spent until 18:00"),
        (
            {"limits": [{"models": "x*", "sentence": "x rests"}, {"models": "y", "sentence": "y"}]},
            "provider stub: x rests",
        ),
        ({"open_until": 0.0}, "provider stub has failed, and its circuit is open until "),
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
    assert attachments([tmp_path / "a.md"])[1] == ["a.md:\n````\none\n```sh\nls\n```\n````"]


@pytest.mark.promise("U2")
def test_a_file_that_is_neither_text_nor_image_cannot_be_attached(tmp_path: Path) -> None:
    (tmp_path / "sound.wav").write_bytes(b"RIFF\xff\xff\xff\xffWAVE")
    with pytest.raises(click.UsageError, match="neither UTF-8 text nor an image"):
        attachments([tmp_path / "sound.wav"])
    with pytest.raises(click.UsageError, match="cannot be read: No such file"):
        attachments([tmp_path / "none"])


@pytest.mark.promise("A1", "U2")
@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"\x89PNG\r\n\x1a\n", "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"GIF89a", "image/gif"),
        (b"RIFF\x00\x00\x00\x00WEBP", "image/webp"),
        (b"%PDF-1.7", "application/pdf"),
    ],
)
def test_an_image_or_a_pdf_is_attached_as_a_block(tmp_path: Path, start: bytes, kind: str) -> None:
    (tmp_path / "it").write_bytes(start + b"\xff")
    (block,), texts = attachments([tmp_path / "it"])
    assert texts == []
    assert block["source"]["media_type"] == kind
    assert base64.b64decode(block["source"]["data"]) == start + b"\xff"
    assert (block["type"], block.get("title")) == (("document", "it") if kind.endswith("pdf") else ("image", None))


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
    assert "ignored the schema" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("18:00", "2026-11-29T18:00:00+01:00"),
        ("07:30", "2026-11-30T07:30:00+01:00"),
        ("10:04", "2026-11-30T10:04:00+01:00"),
        ("10:04:01", "2026-11-29T10:04:01+01:00"),
        ("2026-12-01", "2026-12-01T00:00:00+01:00"),
        ("2026-12-01T18:00", "2026-12-01T18:00:00+01:00"),
        ("2026-12-01 18:00+00:00", "2026-12-01T18:00:00+00:00"),
    ],
)
def test_a_time_of_day_is_the_next_one_and_a_date_is_in_the_own_zone(text: str, meant: str) -> None:
    now = datetime(2026, 11, 29, 10, 4, tzinfo=timezone(timedelta(hours=1)))
    assert time_meant(text, now).isoformat() == meant


@pytest.mark.parametrize("text", ["", "tomorrow", "25:00", "2026-13-01", "in an hour"])
def test_an_invalid_time_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        time_meant(text, datetime.now().astimezone())


def test_a_user_without_a_name_on_this_machine_is_shown_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user often has none."""
    monkeypatch.setattr("getpass.getuser", lambda: pwd.getpwuid(2**31 - 2).pw_name)
    assert own_name() == f"uid {os.getuid()}"
