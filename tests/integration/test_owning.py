"""Conversations in their owners' hands: search, export, other names, and deletion of everything that can be reached."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.serving import daemon_and_wire
from tests.integration.wire import Wire, answer

pytestmark = pytest.mark.promise("V4")

SECRET = "halibut-in-the-harbour"


async def ask(wire: Wire, prompt: str, session: str = "trip", **fields: Any) -> dict[str, Any]:
    """A completion that is done."""
    return await answer(wire.post("completion:request", {"prompt": prompt, "session_id": session, **fields}))


def holders(folder: Path, words: str) -> list[str]:
    """The files of a folder in which words stand."""
    needle = words.encode()
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and needle in path.read_bytes()
    )


async def test_a_deletion_leaves_no_text_in_the_home(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path) as (_, wire):
        await ask(wire, f"keep this: {SECRET}", agent_id="ann")
        await ask(wire, "something else", "other")
        await wire.ask("conversation:search", query="halibut")
        assert holders(tmp_path, SECRET)
        assert (tmp_path / "var/logs/responses/trip.jsonl").exists()
        deleted = await wire.ask("conversation:delete", session_id="trip")
        assert (deleted["turns"], deleted["requests"], deleted["response_file"]) == (1, 1, True)
        error = await wire.refused("completion:history", session_id="trip")
        assert error.code == "not_found"
        assert (await wire.ask("conversation:search", query="halibut"))["matches"] == []
        usage = await wire.ask("completion:token_usage")
        assert usage["totals"]["requests"] == 2
    assert holders(tmp_path, SECRET) == []
    assert holders(tmp_path, "something else")


async def test_a_deletion_names_the_traces_that_it_cannot_reach(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path) as (_, wire):
        before = await wire.ask("checkpoint:collect")
        os.utime(before["path"], (time.time() - 1e6,) * 2)
        await ask(wire, f"keep this: {SECRET}")
        saved = await wire.ask("checkpoint:collect")
        deleted = await wire.ask("conversation:delete", session_id="trip")
        places = [left["where"] for left in deleted["remains"]]
        assert saved["path"] in places
        assert before["path"] not in places
        assert all(left["how"] for left in deleted["remains"])


async def test_deletions_and_renamings_are_sent_to_subscribers(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path) as (_, wire):
        await ask(wire, "hello")
        await wire.ask("monitor:subscribe", pattern="conversation:*")
        await wire.ask("conversation:rename", session_id="trip", name="journey")
        renamed = await wire.pushed("conversation:renamed")
        assert renamed == {"session_id": "journey", "before": "trip"}
        assert (tmp_path / "var/logs/responses/journey.jsonl").exists()
        await ask(wire, "and on", "trip")
        history = await wire.ask("completion:history", session_id="trip")
        assert (history["session_id"], len(history["turns"])) == ("journey", 2)
        await wire.ask("conversation:delete", session_id="trip")
        assert await wire.pushed("conversation:deleted") == {"session_id": "journey"}
        assert list((tmp_path / "var/logs/responses").iterdir()) == []


async def test_a_file_that_a_dead_daemon_left_behind_goes_with_a_second_deletion(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path) as (_, wire):
        await ask(wire, "hello")
        left = tmp_path / "var/logs/responses/gone.jsonl"
        left.write_text("{}\n")
        reply = await wire.ask("conversation:delete", session_id="gone")
        assert (reply["response_file"], left.exists()) == (True, False)
        assert (await wire.refused("conversation:delete", session_id="gone")).code == "not_found"


async def test_a_running_request_is_not_deleted(tmp_path: Path) -> None:
    stub = {"kind": "stub", "delay": 600}
    async with daemon_and_wire(tmp_path, providers={"stub": stub}) as (_, wire):
        await wire.ask("completion:async", prompt="hello", session_id="trip", request_id="r")
        refused = await wire.refused("conversation:delete", session_id="trip")
        assert (refused.code, refused.details["holder"]) == ("conversation_busy", "r")
        await wire.ask("completion:cancel", request_id="r")
        assert (await wire.ask("conversation:delete", session_id="trip"))["requests"] == 1
