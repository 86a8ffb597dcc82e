"""The faults of a broken Claude Code: none of them hangs a call, is taken for an answer, or leaves a process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from ksi.errors import FailureClass, ProviderError
from ksi.providers.base import Chunk, ToolUsed
from ksi.testing import SimulatedClock
from tests.claude import House, Talk, living, scripted, until


@pytest_asyncio.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    made = House(tmp_path)
    yield made
    await made.close()


async def talk(house: House, word: str, **options: Any) -> Talk:
    return Talk(await house.provider(command=scripted(word), **options))


def pids(talk: Talk) -> list[int]:
    return [row["pid"] for row in talk.provider.report()["processes"]]


async def failed(talk: Talk, seconds: float = 15.0) -> ProviderError:
    """The error of a call that has to end in time, with nothing left of it."""
    with pytest.raises(ProviderError) as caught:
        async with asyncio.timeout(seconds):
            await talk.attempt(talk.call("hi"))
    assert talk.provider.report()["processes"] == []
    return caught.value


@pytest.mark.promise("F7")
@pytest.mark.parametrize("word", ["no-init", "deaf"])
async def test_one_that_hangs_before_it_begins_is_a_timeout(house: House, word: str) -> None:
    error = await failed(await talk(house, word, start_timeout=0.7))
    assert error.failure is FailureClass.TIMEOUT
    assert "said nothing for 0.7 s" in error.message


@pytest.mark.promise("F7")
async def test_one_that_hangs_in_mid_stream_is_a_timeout(house: House) -> None:
    led = await talk(house, "mid-stream", idle_timeout=0.7)
    error = await failed(led)
    assert error.failure is FailureClass.TIMEOUT
    assert led.pieces == ["Hello."]


@pytest.mark.promise("F7", "F13")
async def test_the_idle_timeout_counts_from_the_last_line_of_any_kind(house: House) -> None:
    led = await talk(house, "chatter", idle_timeout=1.0)
    assert (await led.say("work for two seconds, and say so")).text == "Hello."


@pytest.mark.promise("F13")
async def test_a_tool_that_says_nothing_for_too_long_is_a_timeout_that_names_it(house: House) -> None:
    led = await talk(house, "works", idle_timeout=0.7)
    error = await failed(led)
    assert error.failure is FailureClass.TIMEOUT
    assert error.tools_used == ("Bash",)
    assert led.tools == ["Bash"]


@pytest.mark.promise("F13")
async def test_a_tool_is_reported_before_a_turn_is_stopped_from_outside(house: House) -> None:
    led = await talk(house, "works")
    answer = led.provider.complete(led.call("hi"))
    async with asyncio.timeout(30):
        assert [await anext(answer), await anext(answer)] == [Chunk("Hello."), ToolUsed("Bash")]
    await answer.aclose()
    assert pids(led) == []


@pytest.mark.promise("F7")
async def test_one_that_hangs_after_its_result_has_answered_and_is_replaced(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ksi.providers.claude_cli.provider._TAKEN", 0.7)
    led = await talk(house, "after-result")
    assert (await led.say("one")).text == "Hello."
    (hung,) = pids(led)
    second = await led.say("two")
    assert second.text == "Hello."
    assert second.fork is None
    assert second.provider_session == led.session
    assert living([hung]) == []


@pytest.mark.promise("F7")
async def test_one_that_does_not_end_is_killed_at_the_stop(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksi.providers.claude_cli.process._GRACE", 0.3)
    led = await talk(house, "after-result")
    await led.say("one")
    processes = pids(led)
    assert living(processes) == processes
    await led.provider.stop()
    assert living(processes) == []


async def test_garbage_is_a_fault_and_is_quoted(house: House) -> None:
    error = await failed(await talk(house, "garbage"))
    assert error.failure is FailureClass.PROVIDER_ERROR
    assert "Segmentation fault?" in error.message


async def test_a_warning_among_the_lines_is_passed_over(house: House) -> None:
    assert (await (await talk(house, "noise")).say("hi")).text == "Hello."


@pytest.mark.promise("A8")
async def test_torn_characters_lose_no_answer(house: House) -> None:
    led = await talk(house, "torn")
    completion = await led.say("hi")
    assert completion.text == "".join(led.pieces) == "Hello.smile \U0001f600"


@pytest.mark.promise("A8")
async def test_any_number_of_lines_of_other_kinds_and_shapes_is_passed_over(house: House) -> None:
    assert (await (await talk(house, "odd")).say("hi")).text == "Hello."


async def test_a_line_of_five_megabytes_is_read(house: House) -> None:
    completion = await (await talk(house, "big-line")).say("hi")
    assert completion.text == "x" * 5_000_000


async def test_a_line_without_an_end_does_not_fill_the_memory(house: House) -> None:
    error = await failed(await talk(house, "endless-line"))
    assert error.failure is FailureClass.PROVIDER_ERROR
    assert "a line is longer than" in error.message


@pytest.mark.parametrize(("word", "said"), [("nothing", "exit code 0"), ("crash", "exit code 3: something terrible")])
async def test_an_end_without_a_result_is_a_fault(house: House, word: str, said: str) -> None:
    error = await failed(await talk(house, word))
    assert error.failure is FailureClass.PROVIDER_ERROR
    assert said in error.message


@pytest.mark.promise("S3")
@pytest.mark.parametrize(
    ("word", "said"),
    [("tells-stderr", "were given"), ("tells-stdout", "no stream-json"), ("tells-result", "are no good")],
)
async def test_no_message_repeats_confidential_values(house: House, word: str, said: str) -> None:
    own = {"ANTHROPIC_API_KEY": "sk-ant-KEYSECRET-1", "HTTPS_PROXY": "http://me:PROXYSECRET@127.0.0.1:9"}
    servers = {
        "x": {"command": "serve", "args": ["--key=ARGSECRET"], "env": {"GH": "ENVSECRET"}},
        "y": {
            "type": "http",
            "url": "https://mcp.example/s/URLSECRET?k=QUERYSECRET",
            "headers": {"A": "Bearer HDRSECRET"},
        },
    }
    variables = {**house.variables, **own}
    options: dict[str, Any] = {"env": variables, "mcp_config": servers, "extra_args": ["--api-key=MORESECRET"]}
    error = await failed(await talk(house, word, **options))
    assert said in error.message
    assert "***" in error.message
    assert "SECRET" not in error.message


@pytest.mark.promise("F1")
async def test_a_missing_program_is_refused_with_advice(house: House) -> None:
    led = Talk(await house.provider(command=["no-such-claude"]))
    error = await failed(led)
    assert error.failure is FailureClass.PROVIDER_ERROR
    problem = led.provider.problem()
    assert problem is not None and "not installed" in problem and "npm install" in problem
    assert problem in error.message


async def test_one_that_cannot_be_run_says_why(house: House) -> None:
    program = house.folder / "claude"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o700)
    error = await failed(Talk(await house.provider(command=[str(program)])))
    assert error.failure is FailureClass.PROVIDER_ERROR
    assert "cannot be run" in error.message


async def test_one_that_is_too_old_is_refused_with_advice(house: House) -> None:
    led = await talk(house, "old")
    error = await failed(led)
    assert "1.0.3 is too old" in error.message and "claude update" in error.message
    assert led.provider.problem() is not None


async def test_one_that_is_not_logged_in_is_said_before_the_first_call(house: House) -> None:
    led = await talk(house, "logged-out")
    assert "not logged in" in await until(led.provider.problem)
    await led.say("it works all the same")
    assert led.provider.problem() is None


async def test_a_working_folder_that_is_not_there_is_said(house: House) -> None:
    error = await failed(await talk(house, "answers", cwd="no/such/folder"))
    assert "no/such/folder" in error.message


async def test_an_unknown_option_of_a_request_is_refused(house: House) -> None:
    led = await talk(house, "answers", request_options=["tools"])
    for options, said in [({"colour": "red"}, "colour"), ({"cwd": "/"}, "not open to requests")]:
        with pytest.raises(ProviderError, match=said) as caught:
            await led.attempt(led.call("hi", options=options))
        assert caught.value.failure is FailureClass.INVALID_REQUEST


@pytest.mark.promise("L7")
async def test_another_session_than_the_resumed_one_is_a_fork_and_goes_on(house: House) -> None:
    led = await talk(house, "other-session")
    first = await led.say("one")
    await led.provider.stop()
    led.provider = await house.provider(command=scripted("other-session"))
    second = await led.say("two")
    assert second.fork == "new_session"
    assert second.provider_session != first.provider_session
    third = await led.say("three")
    assert third.fork == "new_session"


@pytest.mark.promise("T1")
async def test_costs_that_are_counted_over_turns_are_reported_by_turn(house: House) -> None:
    led = await talk(house, "answers")
    first = await led.say("one")
    assert first.usage is not None
    assert first.usage.cost_usd == 0.25
    second = await led.say("two")
    assert second.usage is not None
    assert second.usage.cost_usd is None  # it counted 0.25 again: nothing, which means unknown


@pytest.mark.promise("F7")
async def test_a_child_in_a_session_of_its_own_ends_with_its_process(house: House) -> None:
    note = house.folder / "litter"
    house.variables["LITTER"] = str(note)
    led = await talk(house, "litter")
    answer = await led.begin(led.call("hi"))
    litter = int(await until(lambda: note.exists() and note.read_text()))
    assert living([litter]) == [litter]
    await answer.aclose()
    await until(lambda: not living([litter]), patience=5)


@pytest.mark.promise("F7")
async def test_the_processes_of_a_killed_daemon_are_killed_at_the_next_start(house: House) -> None:
    note = house.folder / "litter"
    house.variables["LITTER"] = str(note)
    led = await talk(house, "litter")
    answer = await led.begin(led.call("hi"))
    left = [*pids(led), int(await until(lambda: note.exists() and note.read_text()))]
    assert living(left) == left
    await house.provider(command=scripted("answers"))
    assert living(left) == []
    await answer.aclose()


# -- the login ------------------------------------------------------------------------------------------------------


def expired_login(house: House) -> Path:
    """Store a login that is due for a refresh; the file in which its refreshes are counted."""
    for name in ("ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN"):
        house.variables.pop(name, None)
    folder = Path(house.variables["CLAUDE_CONFIG_DIR"])
    folder.mkdir(parents=True)
    login = {"accessToken": "old", "refreshToken": "refresh-0", "expiresAt": 1_700_000_000_000}
    folder.joinpath(".credentials.json").write_text(json.dumps({"claudeAiOauth": login}))
    refreshes = house.folder / "refreshes"
    house.variables["REFRESHES"] = str(refreshes)
    return refreshes


@pytest.mark.promise("F11")
async def test_one_process_refreshes_a_login_that_expired_and_all_go_on(house: House) -> None:
    refreshes = expired_login(house)
    provider = await house.provider(command=scripted("refreshes"))
    answers = await asyncio.gather(*(Talk(provider).say("hi") for _ in range(6)))
    assert [answer.text for answer in answers] == ["Hello."] * 6
    assert refreshes.read_text().split() == ["refresh-0"]


@pytest.mark.promise("F11")
async def test_a_cancelled_turn_s_refresh_is_brought_to_its_end(house: House) -> None:
    refreshes = expired_login(house)
    led = await talk(house, "refreshes")
    turn = asyncio.create_task(led.say("hi"))
    await until(refreshes.exists)
    turn.cancel()
    await asyncio.wait([turn])
    assert (await led.say("again")).text == "Hello."
    assert refreshes.read_text().split() == ["refresh-0"], "the new login was stored"


@pytest.mark.promise("F11")
async def test_a_login_s_return_is_seen_by_the_program_s_status_if_no_file_shows_it(house: House) -> None:
    for name in ("ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN"):
        house.variables.pop(name, None)
    login = house.folder / "login"
    house.variables["LOGIN"] = str(login)
    led = await talk(house, "logged-out")
    assert await led.provider.login_works() is False
    login.touch()
    assert await led.provider.login_works() is True
    assert led.provider.problem() is None


# -- the pool -------------------------------------------------------------------------------------------------------


async def test_no_more_processes_are_kept_warm_than_configured(house: House) -> None:
    provider = await house.provider(command=scripted("answers"), warm=2)
    talks = [Talk(provider) for _ in range(4)]
    for led in talks:
        await led.say("hi")
    report = provider.report()
    assert report["warm"] == 2
    assert [row["session"] for row in report["processes"]] == [led.session for led in talks[2:]]
    assert report["memory_bytes"] > 2 * 1024 * 1024
    await talks[0].say("again")
    assert provider.report()["warm"] == 2


async def test_no_more_memory_is_kept_than_configured(house: House) -> None:
    provider = await house.provider(command=scripted("answers"), warm_memory=20)  # one has some 10 MiB
    talks = [Talk(provider) for _ in range(4)]
    for led in talks:
        await led.say("hi")
        assert 0 < provider.report()["memory_bytes"] <= provider.report()["warm_memory"] == 20 * 2**20
    report = provider.report()
    assert 0 < report["warm"] < 4
    assert report["processes"][-1]["session"] == talks[-1].session
    narrow = await house.provider(command=scripted("answers"), warm_memory=1)
    await Talk(narrow).say("one that is too large by itself is not kept")
    assert narrow.report()["processes"] == []


async def test_none_is_kept_if_the_configuration_says_so(house: House) -> None:
    led = await talk(house, "answers", warm=0)
    first = await led.say("one")
    second = await led.say("two")
    assert first.provider_session == second.provider_session
    assert led.provider.report()["warm"] == 0


async def test_a_process_is_ended_when_its_conversation_rests(tmp_path: Path) -> None:
    clock = SimulatedClock()
    house = House(tmp_path, clock=clock)
    led = await talk(house, "answers", warm_age=300.0)
    await led.say("one")
    (process,) = pids(led)
    await clock.advance(299.0)
    assert pids(led) == [process]
    await clock.advance(2.0)
    assert pids(led) == []
    await house.close()
    assert living([process]) == []


async def test_a_process_that_speaks_between_turns_is_not_used_again(house: House) -> None:
    led = await talk(house, "answers")
    await led.say("one")
    (process,) = pids(led)
    os.kill(process, signal.SIGKILL)
    assert (await led.say("two")).text == "Hello."
    assert pids(led) != [process]
