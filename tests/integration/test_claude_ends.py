"""How turns of the real Claude Code end: refused, at a limit, empty, without a tool, logged out, out of quota."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from ksi.errors import FailureClass, ProviderError
from tests.claude import House, Talk, number_messages, said
from tests.effort import sample
from tests.endpoint import Answer, ScriptedEndpoint, Seen
from tests.integration.test_claude_tools import SERVER, uses

GOOD = Answer(pieces=("All ", "well."))


class Scene:
    """A house, its endpoint, and the endpoint's answers."""

    def __init__(self, house: House, endpoint: ScriptedEndpoint) -> None:
        self.house = house
        self.endpoint = endpoint

    async def talk(self, *answers: Answer, **options: Any) -> Talk:
        self.endpoint.answers.clear()
        self.endpoint.answers.extend(answers)
        return Talk(await self.house.provider(**options))

    def stores_login(self, token: str, *, left: float = 8 * 3600) -> None:
        """Log in as `claude` does it, with a token that is good for `left` seconds."""
        for name in ("ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN"):
            self.house.variables.pop(name, None)
        folder = Path(self.house.variables["CLAUDE_CONFIG_DIR"])
        folder.mkdir(parents=True, exist_ok=True)
        ends_at = int((self.house.clock.now().unix + left) * 1000)
        tokens = {"accessToken": token, "refreshToken": f"refresh-{token}", "expiresAt": ends_at}
        login = {**tokens, "scopes": ["user:inference", "user:profile"], "subscriptionType": "max"}
        folder.joinpath(".credentials.json").write_text(json.dumps({"claudeAiOauth": login}))


@pytest_asyncio.fixture
async def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    number_messages(monkeypatch)
    async with ScriptedEndpoint() as endpoint:
        house = House(tmp_path, endpoint.url)
        yield Scene(house, endpoint)
        await house.close()


async def failed(talk: Talk, prompt: str = "hi", **fields: Any) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await talk.attempt(talk.call(prompt, **fields))
    assert talk.provider.report()["processes"] == []
    return caught.value


# -- ends that are none ---------------------------------------------------------------------------------------------


@pytest.mark.promise("A4", "F9")
@pytest.mark.parametrize("pieces", [(), ("I cannot",)])
async def test_a_refusal_is_refused_and_leaves_no_trace(scene: Scene, pieces: tuple[str, ...]) -> None:
    talk = await scene.talk(GOOD)
    await talk.say("First.")
    scene.endpoint.answers[0] = Answer(pieces=pieces, stop_reason="refusal")
    error = await failed(talk, "Build it.")
    assert error.failure is FailureClass.REFUSED
    assert "can't help with this" in error.message
    scene.endpoint.answers[0] = GOOD
    await talk.say("Second.")
    assert len(scene.endpoint.requests) == 3
    assert "Build it." not in json.dumps(said(scene.endpoint.requests[-1]))


@pytest.mark.promise("A4", "F13")
async def test_a_limit_of_turns_is_named_and_the_work_is_reported(scene: Scene) -> None:
    work = uses("Bash", command="echo hi > work", description="Work")
    talk = await scene.talk(work, tools=["Bash"], allowed_tools=["Bash"], extra_args=["--max-turns=1"])
    error = await failed(talk)
    assert error.failure is FailureClass.LIMIT_REACHED
    assert "max_turns" in error.message and "Reached maximum number of turns (1)" in error.message
    assert error.tools_used == ("Bash",)
    assert talk.tools == ["Bash"]


@pytest.mark.promise("A4")
async def test_a_limit_of_money_is_named(scene: Scene) -> None:
    talk = await scene.talk(
        uses("Bash", command="true", description="d"),
        tools=["Bash"],
        allowed_tools=["Bash"],
        extra_args=["--max-budget-usd=0.000000001"],
    )
    error = await failed(talk)
    assert error.failure is FailureClass.LIMIT_REACHED
    assert "max_budget_usd" in error.message


@pytest.mark.promise("A4")
async def test_an_empty_answer_is_a_failed_attempt(scene: Scene) -> None:
    error = await failed(await scene.talk(Answer(pieces=())))
    assert error.failure is FailureClass.EMPTY_ANSWER


@pytest.mark.promise("A4")
async def test_a_full_context_cuts_an_answer_and_is_not_asked_again(scene: Scene) -> None:
    talk = await scene.talk(Answer(pieces=("So far ", "so good"), stop_reason="model_context_window_exceeded"))
    completion = await talk.say("Go on.")
    assert (completion.text, completion.stop_reason) == ("So far so good", "context_window")
    assert completion.text == "".join(talk.pieces)
    assert len(scene.endpoint.requests) < 4, "by itself it asks four times"
    scene.endpoint.answers[0] = GOOD
    again = await talk.say("And now?")
    assert (again.text, again.fork) == ("All well.", None)


@pytest.mark.promise("A4")
async def test_a_full_context_without_an_answer_is_too_long(scene: Scene) -> None:
    error = await failed(await scene.talk(Answer(pieces=(), stop_reason="model_context_window_exceeded")))
    assert error.failure is FailureClass.CONTEXT_TOO_LONG


async def test_an_object_by_a_schema_is_the_answer(scene: Scene) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    talk = await scene.talk(uses("StructuredOutput", a=1), extra_args=[f"--json-schema={json.dumps(schema)}"])
    completion = await talk.say("Give it.")
    assert (completion.text, completion.stop_reason) == ('{"a":1}', "end_turn")
    assert talk.tools == []


@pytest.mark.promise("A4", "F13")
async def test_a_denied_tool_is_noted_and_had_no_effect(scene: Scene) -> None:
    talk = await scene.talk(uses("Bash", command="touch note", description="Touch"), GOOD, tools=["Bash"])
    completion = await talk.say("Touch it.")
    assert completion.text == "All well."
    assert completion.note == "Claude Code was denied the use of Bash (touch note)."
    scene.endpoint.answers.clear()
    scene.endpoint.answers.extend([uses("Bash", command="touch note", description="Touch"), Answer(pieces=())])
    assert (await failed(talk)).tools_used == ()


# -- tools with effects ---------------------------------------------------------------------------------------------


def agent(seen: Seen) -> Answer:
    """An endpoint at which an agent sends a sub-agent to work, and its API fails behind that for good."""
    messages = json.dumps(seen.json["messages"])
    if "do the work" in messages and "tool_result" not in messages:
        return uses("Bash", command="echo done > work", description="Work")
    if "tool_result" not in messages:
        return uses("Task", description="Work", prompt="do the work", subagent_type="general-purpose")
    return Answer(status=400, error_message="no such thing")


@pytest.mark.promise("F13")
async def test_a_sub_agent_s_tools_count(scene: Scene) -> None:
    scene.endpoint._script = agent
    talk = await scene.talk(tools=["Task", "Bash"], allowed_tools=["Task", "Bash"])
    error = await failed(talk)
    assert error.tools_used == ("Bash",)
    assert talk.tools == ["Bash"]


@pytest.mark.promise("F13", "F2")
async def test_a_passing_fault_behind_a_tool_s_work_does_not_end_the_turn(scene: Scene) -> None:
    work = uses("Bash", command="echo done >> work", description="Work")
    talk = await scene.talk(work, Answer(status=529), GOOD, tools=["Bash"], allowed_tools=["Bash"])
    completion = await talk.say("Work.")
    assert completion.text == "All well."
    assert scene.house.work.joinpath("work").read_text() == "done\n"
    assert len(scene.endpoint.requests) == 3


@pytest.mark.promise("F13", "F2")
async def test_a_passing_fault_behind_a_tool_that_only_reads_ends_the_turn_at_once(
    scene: Scene, tmp_path: Path
) -> None:
    tmp_path.joinpath("note").write_text("read me")
    talk = await scene.talk(uses("Read", file_path=str(tmp_path / "note")), Answer(status=529), tools=["Read"])
    error = await failed(talk)
    assert (error.failure, error.tools_used) == (FailureClass.OVERLOADED, ())
    assert len(scene.endpoint.requests) == 2


@pytest.mark.promise("F13")
@pytest.mark.parametrize("read_only", [True, False])
async def test_an_mcp_tool_counts_unless_it_is_annotated_as_read_only(
    scene: Scene, tmp_path: Path, read_only: bool
) -> None:
    program = tmp_path / "server.py"
    program.write_text(
        SERVER.replace('"inputSchema"', f'"annotations": {{"readOnlyHint": {read_only}}}, "inputSchema"')
    )
    talk = await scene.talk(
        uses("mcp__calc__double", a=21),
        GOOD,
        allowed_tools=["mcp__calc__double"],
        mcp_config={"calc": {"command": sys.executable, "args": ["-I", str(program)]}},
    )
    completion = await talk.say("Twice 21?")
    assert completion.text == "All well."
    assert talk.tools == ([] if read_only else ["mcp__calc__double"])
    scene.endpoint.answers.extend([uses("mcp__calc__double", a=1), GOOD])
    scene.endpoint.answers.popleft()
    await talk.say("And 1?")
    assert talk.tools == ([] if read_only else ["mcp__calc__double"]), "a warm process is asked, too"
    assert talk.provider.report()["warm"] == 1


# -- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.promise("F5")
@pytest.mark.parametrize(
    ("window", "short", "seconds", "models"),
    sample(
        [
            ("five_hour", "5h", 3_600, ""),
            ("seven_day", "7d", 5 * 86_400, ""),
            ("seven_day_opus", "7d_opus", 5 * 86_400, "*opus*"),
            ("seven_day_sonnet", "7d_sonnet", 86_400, "*sonnet*"),
            ("seven_day_overage_included", "7d_oi", 86_400, "*fable*"),
            ("overage", "overage", 20 * 86_400, ""),
        ],
        3,
    ),
)
async def test_a_spent_window_is_reported_with_its_models_and_its_return(
    scene: Scene, window: str, short: str, seconds: int, models: str
) -> None:
    back = str(int(scene.house.clock.now().unix) + seconds)
    headers = {
        "anthropic-ratelimit-unified-status": "rejected",
        "anthropic-ratelimit-unified-reset": back,
        "anthropic-ratelimit-unified-representative-claim": window,
        f"anthropic-ratelimit-unified-{short}-status": "rejected",
        f"anthropic-ratelimit-unified-{short}-reset": back,
    }
    scene.stores_login("token")
    error = await failed(await scene.talk(Answer(status=429, headers=headers)))
    assert error.failure is FailureClass.RATE_LIMITED
    assert (error.limit_window, error.limited_models) == (window, models)
    assert error.retry_after == pytest.approx(seconds, abs=60)
    assert len(scene.endpoint.requests) == 1


# -- the login ------------------------------------------------------------------------------------------------------


def only(*tokens: str) -> Any:
    """An endpoint that takes only these tokens."""

    def script(seen: Seen) -> Answer:
        if seen.headers.get("authorization", "").removeprefix("Bearer ") in tokens:
            return GOOD
        return Answer(status=401, error_message="OAuth token has expired. Please obtain a new token.")

    return script


@pytest.mark.promise("F11")
async def test_an_expired_login_is_reported_and_its_return_is_seen_without_a_call(scene: Scene) -> None:
    scene.stores_login("old")
    scene.endpoint._script = only("old")
    talk = await scene.talk()
    await talk.say("First.")
    other = Talk(talk.provider)
    await other.say("Another.")
    scene.endpoint._script = only("new")
    with pytest.raises(ProviderError) as caught:
        await talk.attempt(talk.call("Second."))
    assert caught.value.failure is FailureClass.AUTHENTICATION
    assert caught.value.details["status"] == 401
    assert "log in" in caught.value.message
    assert "not logged in" in str(talk.provider.problem())
    asked = len(scene.endpoint.requests)
    assert await talk.provider.login_works() is None, "the stored login is the one that failed"
    scene.stores_login("new")
    assert await talk.provider.login_works() is True
    assert talk.provider.problem() is None
    assert len(scene.endpoint.requests) == asked
    assert (await talk.say("Second.")).text == "All well."
    warm = other.provider.report()["warm"]
    assert (await other.say("Again.")).text == "All well."
    assert other.provider.report()["warm"] == warm, "a warm process goes on with the new login"


@pytest.mark.promise("F11")
async def test_a_login_that_is_not_there_is_seen_when_it_comes(scene: Scene) -> None:
    scene.stores_login("token")
    credentials = Path(scene.house.variables["CLAUDE_CONFIG_DIR"]) / ".credentials.json"
    credentials.unlink()
    scene.endpoint._script = only("token")
    talk = await scene.talk()
    error = await failed(talk)
    assert error.failure is FailureClass.AUTHENTICATION
    assert await talk.provider.login_works() is False
    credentials.write_text(json.dumps({"claudeAiOauth": {"accessToken": "", "refreshToken": "", "expiresAt": 0}}))
    assert await talk.provider.login_works() is False, "another process logged itself out"
    scene.stores_login("token")
    assert await talk.provider.login_works() is True
    assert scene.endpoint.requests == []
    assert (await talk.say("hi")).text == "All well."


@pytest.mark.promise("F11")
async def test_a_login_of_the_environment_can_only_be_tried(scene: Scene) -> None:
    talk = await scene.talk(Answer(status=401))
    assert (await failed(talk)).failure is FailureClass.AUTHENTICATION
    assert await talk.provider.login_works() is None
