"""Claude Code's stored login: when it is due, who may begin, and whether it came back."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from ksi.providers.claude_cli.login import LoginGate, StoredLogin, came_back, credentials_path, is_due, stored_login
from ksi.testing import SimulatedClock

NOW = 1_795_000_000.0
FRESH = StoredLogin(b"new", NOW + 8 * 3600, can_refresh=True)
LAPSED = StoredLogin(b"old", NOW - 60, can_refresh=True)


def write(home: Path, **fields: Any) -> dict[str, str]:
    """Store a login, and return the variables of a process that finds it."""
    tokens = {"accessToken": "sk-ant-oat01-a", "refreshToken": "sk-ant-ort01-b", "expiresAt": (NOW + 60) * 1000}
    home.joinpath(".credentials.json").write_text(json.dumps({"claudeAiOauth": {**tokens, **fields}, "other": 1}))
    return {"CLAUDE_CONFIG_DIR": str(home), "HOME": "/nowhere"}


def test_a_stored_login_is_found_in_claude_code_s_own_place(tmp_path: Path) -> None:
    assert credentials_path({"HOME": "/home/me"}) == Path("/home/me/.claude/.credentials.json")
    assert credentials_path({}) is None
    environment = write(tmp_path)
    found = stored_login(environment)
    assert found is not None
    assert (found.ends_at, found.can_refresh) == (NOW + 60, True)
    assert b"sk-ant" not in found.mark
    again = stored_login(write(tmp_path, accessToken="sk-ant-oat01-c"))
    assert again is not None and again.mark != found.mark


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"claudeAiOauth": null}', '{"claudeAiOauth": {"accessToken": "", "refreshToken": ""}}'],
)
def test_a_blanked_or_broken_file_is_no_login(tmp_path: Path, content: str) -> None:
    environment = write(tmp_path)
    tmp_path.joinpath(".credentials.json").write_text(content)
    assert stored_login(environment) is None
    assert stored_login({"HOME": str(tmp_path / "none")}) is None


@pytest.mark.parametrize("name", ["ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN", "CLAUDE_CODE_USE_BEDROCK"])
def test_a_login_of_the_environment_is_not_looked_for_in_files(tmp_path: Path, name: str) -> None:
    assert stored_login({**write(tmp_path), name: "x"}) is None


@pytest.mark.promise("F11")
@pytest.mark.parametrize(
    ("left", "can_refresh", "due"), [(-60, True, True), (300, True, True), (360, True, False), (-60, False, False)]
)
def test_a_login_is_due_before_the_program_refreshes_it(left: float, can_refresh: bool, due: bool) -> None:
    assert is_due(StoredLogin(b"x", NOW + left, can_refresh), NOW) is due
    assert not is_due(StoredLogin(b"x", None, can_refresh), NOW)
    assert not is_due(None, NOW)


@pytest.mark.promise("F11")
def test_a_login_came_back_if_another_one_is_stored() -> None:
    assert came_back(LAPSED, FRESH) is True
    assert came_back(None, FRESH) is True
    assert came_back(LAPSED, LAPSED) is None, "its refresh may succeed yet"
    assert came_back(LAPSED, None) is None


# -- the gate -------------------------------------------------------------------------------------------------------


class Stored:
    """The stored login, which a test changes."""

    def __init__(self, login: StoredLogin | None) -> None:
        self.login = login


def gate(stored: Stored) -> LoginGate:
    return LoginGate(lambda: stored.login, SimulatedClock(wall=NOW))


async def settled(tasks: list[asyncio.Task[Any]], ended: int) -> None:
    """Wait until so many tasks have ended."""
    async with asyncio.timeout(10):
        while sum(task.done() for task in tasks) < ended:  # noqa: ASYNC110 - several tasks, none of them first
            await asyncio.sleep(0)


async def all_wait(door: LoginGate, count: int) -> None:
    """Wait until so many turns wait at the gate."""
    async with asyncio.timeout(10):
        while len(door._lock._waiters or ()) < count:  # noqa: ASYNC110 - a lock tells nobody who waits
            await asyncio.sleep(0)


@pytest.mark.promise("F11")
async def test_turns_begin_at_once_while_the_login_is_good() -> None:
    for login in (FRESH, None):
        door = gate(Stored(login))
        async with asyncio.timeout(10):
            passages = [await door.enter() for _ in range(5)]
        assert not any(permit.refreshes for permit in passages)


@pytest.mark.promise("F11")
async def test_one_turn_at_a_time_begins_while_the_login_is_due_and_all_go_on_when_it_was_refreshed() -> None:
    stored = Stored(LAPSED)
    door = gate(stored)
    first = await door.enter()
    assert first.refreshes
    waiting = [asyncio.create_task(door.enter()) for _ in range(4)]
    await all_wait(door, 4)
    assert not any(task.done() for task in waiting)
    stored.login = FRESH
    first.close()
    await settled(waiting, 4)
    passages = [task.result() for task in waiting]
    assert not any(permit.refreshes for permit in passages)
    assert all(permit.login == FRESH for permit in passages)


@pytest.mark.promise("F11")
async def test_the_next_one_tries_if_the_refresh_failed() -> None:
    door = gate(Stored(LAPSED))
    first = await door.enter()
    waiting = [asyncio.create_task(door.enter()) for _ in range(2)]
    first.close()
    first.close()
    await settled(waiting, 1)
    (begun,) = [task for task in waiting if task.done()]
    assert begun.result().refreshes
    begun.result().close()
    await settled(waiting, 2)


@pytest.mark.promise("F11")
async def test_a_request_that_leaves_while_it_waits_blocks_none() -> None:
    door = gate(Stored(LAPSED))
    first = await door.enter()
    gone = asyncio.create_task(door.enter())
    await all_wait(door, 1)
    gone.cancel()
    first.close()
    await asyncio.wait([gone])
    async with asyncio.timeout(10):
        assert (await door.enter()).refreshes
