"""Claude Code's transcripts from behind: whose the last turns are, and where they go on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from ksi.providers.claude_cli import transcript as transcript_module
from ksi.providers.claude_cli.transcript import (
    Seal,
    TranscriptTail,
    find,
    is_uuid,
    last_answer,
    look_back,
    look_on,
    mend,
    point,
    projects_folder,
)

SEAL = Seal(b"k" * 32)


class Transcript:
    """A file that is written as Claude Code writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def add(self, kind: str, name: str | None = None, **fields: Any) -> str:
        name = name or str(uuid4())
        line = {"parentUuid": str(uuid4()), "type": kind, "uuid": name, **fields}
        with self.path.open("ab") as file:
            file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        return name

    def prompt(self, content: Any = "hi", *, ours: bool = True, **fields: Any) -> str:
        message = {"role": "user", "content": content}
        return self.add("user", SEAL.new() if ours else None, message=message, **fields)

    def answer(self, stop_reason: str | None = "end_turn", **fields: Any) -> str:
        return self.add("assistant", message={"role": "assistant", "stop_reason": stop_reason}, **fields)

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def back(self, message: str, **limit: int) -> TranscriptTail:
        return look_back(self.path, message, SEAL.is_ours, **limit)

    def on(self, start: int, message: str) -> TranscriptTail:
        return look_on(self.path, start, message, SEAL.is_ours)


@pytest.fixture
def transcript(tmp_path: Path) -> Transcript:
    return Transcript(tmp_path / "t.jsonl")


# -- seals ----------------------------------------------------------------------------------------------------------


def test_a_seal_knows_its_own_uuids_and_no_others() -> None:
    made = [SEAL.new() for _ in range(200)]
    assert len(set(made)) == 200
    for text in made:
        assert is_uuid(text)
        assert UUID(text).version == 4 and UUID(text).variant == "specified in RFC 4122"
        assert SEAL.is_ours(text)
        assert Seal(b"k" * 32).is_ours(text), "after a restart too"
        assert not Seal(b"other" * 6).is_ours(text)
        assert not SEAL.is_ours(text[:-1] + ("0" if text[-1] != "0" else "1"))
    assert not any(SEAL.is_ours(str(uuid4())) for _ in range(2000))
    assert not SEAL.is_ours("") and not SEAL.is_ours("no uuid")


# -- looking --------------------------------------------------------------------------------------------------------


@pytest.mark.promise("L7")
def test_only_others_messages_behind_our_last_one_are_foreign(transcript: Transcript) -> None:
    transcript.prompt("long ago", ours=False)
    transcript.answer()
    transcript.prompt()
    last = transcript.answer()
    assert transcript.back(last) == TranscriptTail(True, 0, transcript.size)
    transcript.prompt("ours, which failed")
    transcript.add("system", subtype="informational")
    transcript.add("attachment", attachment={"type": "date"})
    transcript.prompt([{"type": "tool_result", "tool_use_id": "t", "content": "x"}], ours=False)
    transcript.prompt([{"type": "text", "text": "[Request interrupted by user]"}], ours=False)
    transcript.prompt("Output token limit hit.", ours=False, isMeta=True)
    transcript.prompt("This session is being continued", ours=False, isCompactSummary=True)
    transcript.prompt("to a sub-agent", ours=False, isSidechain=True)
    assert transcript.back(last).foreign == 0
    transcript.prompt("theirs", ours=False)
    transcript.prompt([{"type": "text", "text": "theirs"}, {"type": "image"}], ours=False)
    assert transcript.back(last) == TranscriptTail(True, 2, transcript.size)


def test_a_message_is_found_by_its_own_line_and_not_by_its_mention(transcript: Transcript) -> None:
    gone = str(uuid4())
    transcript.add("last-prompt", leafUuid=gone)
    transcript.add("user", SEAL.new(), parentUuid=gone, message={"content": f'say "uuid":"{gone}"'})
    assert not transcript.back(gone).found
    here = transcript.add("assistant", parentUuid=gone)
    assert transcript.back(here).found


def test_a_long_transcript_is_read_from_its_end_only(transcript: Transcript) -> None:
    early = transcript.answer()
    for _ in range(300):
        transcript.prompt("x" * 1000)
    late = transcript.answer()
    transcript.prompt("theirs", ours=False)
    assert transcript.back(late, limit=4096) == TranscriptTail(True, 1, transcript.size)
    assert transcript.back(early) == TranscriptTail(True, 1, transcript.size)


def test_a_message_beyond_the_limit_counts_as_there_and_the_rest_as_foreign(transcript: Transcript) -> None:
    early = transcript.answer()
    for _ in range(300):
        transcript.prompt("x" * 1000)
    assert transcript.back(early, limit=100_000) == TranscriptTail(True, 1, transcript.size)


def test_a_warm_process_s_transcript_is_read_from_its_last_position(
    transcript: Transcript, monkeypatch: pytest.MonkeyPatch
) -> None:
    transcript.prompt("before", ours=False)
    start = transcript.size
    transcript.prompt()
    last = transcript.answer()
    assert transcript.on(start, last) == TranscriptTail(True, 0, transcript.size)
    assert transcript.on(transcript.size, last) == TranscriptTail(False, 0, transcript.size)
    transcript.prompt("theirs", ours=False)
    assert transcript.on(start, last) == TranscriptTail(True, 1, transcript.size)
    assert transcript.on(transcript.size + 1, last).found, "it was cut short: look from the end"
    monkeypatch.setattr(transcript_module, "LOOK_LIMIT", 10)
    assert transcript.on(0, last).foreign == 1


def test_a_line_that_is_being_written_is_not_judged(transcript: Transcript) -> None:
    last = transcript.answer()
    with transcript.path.open("ab") as file:
        file.write(b'{"type":"user","uuid":"half')
    assert transcript.back(last) == TranscriptTail(True, 0, transcript.size)
    mend(transcript.path)
    transcript.prompt("theirs", ours=False)
    assert transcript.back(last).foreign == 1


def test_mending_a_whole_or_empty_transcript_changes_nothing(transcript: Transcript) -> None:
    mend(transcript.path)
    assert transcript.size == 0
    transcript.answer()
    before = transcript.path.read_bytes()
    mend(transcript.path)
    assert transcript.path.read_bytes() == before


def test_an_adopted_session_continues_after_its_last_whole_answer(transcript: Transcript) -> None:
    assert last_answer(transcript.path) is None
    transcript.prompt(ours=False)
    assert last_answer(transcript.path) is None
    whole = transcript.answer()
    transcript.answer("tool_use")
    transcript.answer(None)
    transcript.answer(isSidechain=True)
    transcript.answer("stop_sequence", isApiErrorMessage=True)
    transcript.prompt()
    with transcript.path.open("ab") as file:
        file.write(b'{"type":"assistant","uu')
    assert last_answer(transcript.path) == whole


def test_a_branch_is_pointed_at_as_claude_code_does_it(transcript: Transcript) -> None:
    answer = transcript.answer()
    point(transcript.path, "s", answer)
    *_, line = transcript.path.read_text().splitlines()
    assert json.loads(line) == {"type": "last-prompt", "leafUuid": answer, "sessionId": "s"}


# -- finding --------------------------------------------------------------------------------------------------------


@pytest.mark.promise("S3")
def test_only_uuids_are_looked_for(tmp_path: Path) -> None:
    folder = tmp_path / "projects" / "-some-folder"
    folder.mkdir(parents=True)
    session = str(uuid4())
    path = folder / f"{session}.jsonl"
    path.touch()
    (tmp_path / "projects" / "a file").touch()
    assert find(tmp_path / "projects", session) == path
    assert find(tmp_path / "projects", str(uuid4())) is None
    for name in ("", "..", f"../-some-folder/{session}", session.upper(), f"{session}\n", "*"):
        assert find(tmp_path / "projects", name) is None
    assert find(tmp_path / "nowhere", session) is None
    assert find(None, session) is None


def test_the_newest_of_several_transcripts_counts(tmp_path: Path) -> None:
    session = str(uuid4())
    for number, folder in enumerate(("a", "b", "c")):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / f"{session}.jsonl"
        path.touch()
        os.utime(path, (0, 100 - abs(number - 1)))
    assert find(tmp_path, session) == tmp_path / "b" / f"{session}.jsonl"


def test_transcripts_are_in_the_place_of_claude_code_s_variables() -> None:
    assert projects_folder({"CLAUDE_CONFIG_DIR": "/c", "HOME": "/h"}) == Path("/c/projects")
    assert projects_folder({"HOME": "/h"}) == Path("/h/.claude/projects")
    assert projects_folder({}) is None
