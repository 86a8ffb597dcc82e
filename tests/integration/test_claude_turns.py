"""Claude Code's turns, with the real program against a scripted endpoint: requests, answers, and transcripts."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from ksi.content.blocks import Message
from ksi.errors import FailureClass, ProviderError
from ksi.providers.base import Completion
from ksi.request import Usage
from tests.claude import House, Talk, living, number_messages, said, session_of, system_of, until
from tests.effort import sample
from tests.endpoint import Answer, ScriptedEndpoint, Seen

USAGE = Usage(input_tokens=12, output_tokens=34, cache_read_tokens=56, cache_write_tokens=78)


def echo(seen: Seen) -> Answer:
    """An endpoint that answers with its last prompt."""
    return Answer(pieces=("You said: ", said(seen)[-1][1]), usage=USAGE)


class Scene:
    """A house, its endpoint, and a provider."""

    def __init__(self, house: House, endpoint: ScriptedEndpoint) -> None:
        self.house = house
        self.endpoint = endpoint

    async def talk(self, **options: Any) -> Talk:
        return Talk(await self.house.provider(**options))

    @property
    def last_said(self) -> list[tuple[str, str]]:
        return said(self.endpoint.requests[-1])


@pytest_asyncio.fixture
async def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    number_messages(monkeypatch)
    async with ScriptedEndpoint(script=echo) as endpoint:
        house = House(tmp_path, endpoint.url)
        yield Scene(house, endpoint)
        await house.close()


def pids(talk: Talk) -> list[int]:
    return [row["pid"] for row in talk.provider.report()["processes"]]


async def failed(talk: Talk, prompt: str = "hi", **fields: Any) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await talk.attempt(talk.call(prompt, **fields))
    return caught.value


# -- one turn -------------------------------------------------------------------------------------------------------


@pytest.mark.promise("T1", "R2")
async def test_a_turn_streams_and_reports_the_endpoint_s_data(scene: Scene) -> None:
    talk = await scene.talk()
    completion = await talk.say("Name a colour.")
    assert completion.text == "You said: Name a colour." == "".join(talk.pieces)
    assert completion.usage is not None
    assert completion.usage.cost_usd is not None and completion.usage.cost_usd > 0
    assert Usage(**{name: getattr(completion.usage, name) for name in USAGE.__struct_fields__[:-1]}) == USAGE
    assert completion.model.startswith("claude-haiku")
    assert completion.stop_reason == "end_turn"
    assert completion.fork is None
    assert completion.raw is not None
    result = json.loads(completion.raw)
    assert result["type"] == "result" and result["session_id"] == completion.provider_session
    assert scene.house.transcript(completion.provider_session).is_file()


async def test_without_options_it_is_a_plain_model(scene: Scene) -> None:
    talk = await scene.talk()
    await talk.say("hi")
    (request,) = scene.endpoint.requests
    assert request.json.get("tools", []) == []
    assert system_of(request) == "You are a helpful assistant."


@pytest.mark.promise("S3")
@pytest.mark.parametrize(
    "prompt", sample(["/cost", "/clear", "/etc/hosts is what?", "@/etc/hostname", "see @/etc/hostname ?"], 2)
)
async def test_a_prompt_is_inert(scene: Scene, prompt: str) -> None:
    talk = await scene.talk()
    completion = await talk.say(prompt)
    assert completion.text.removeprefix("You said: ").strip() == prompt
    (request,) = scene.endpoint.requests
    assert [text.strip() for _, text in said(request)] == [prompt]
    assert socket.gethostname() not in request.body.decode()


@pytest.mark.promise("S3")
async def test_a_prompt_of_two_megabytes_arrives_whole(scene: Scene) -> None:
    talk = await scene.talk()
    prompt = "word " * 400_000
    completion = await talk.say(prompt.strip())
    assert len(completion.text) == len("You said: ") + len(prompt.strip())


@pytest.mark.parametrize("prompt", ["", " \n\t "])
async def test_an_empty_prompt_is_refused(scene: Scene, prompt: str) -> None:
    error = await failed(await scene.talk(), prompt)
    assert error.failure is FailureClass.INVALID_REQUEST
    assert "empty" in error.message
    assert scene.endpoint.requests == []


@pytest.mark.promise("C6")
async def test_an_answer_ends_at_its_limit_of_tokens_and_the_next_turn_goes_on_behind_it(scene: Scene) -> None:
    talk = await scene.talk()
    answers = iter([Answer(pieces=("One, ", "two"), stop_reason="max_tokens", usage=USAGE)])
    scene.endpoint._script = lambda _: next(answers, Answer(silent=True))  # by itself it would ask for the rest
    completion = await talk.say("Count.", max_tokens=50)
    assert completion.text == "One, two"
    assert completion.stop_reason == "max_tokens"
    assert completion.usage is not None and completion.usage.output_tokens == USAGE.output_tokens
    assert scene.endpoint.requests[0].json["max_tokens"] == 50
    scene.endpoint._script = echo
    await talk.say("Go on.")
    assert scene.last_said == [("user", "Count."), ("assistant", "One, two"), ("user", "Go on.")]


@pytest.mark.promise("T1")
async def test_no_report_of_usage_is_unknown_and_not_zero(scene: Scene) -> None:
    talk = await scene.talk()
    scene.endpoint._script = lambda _: Answer(usage=None)
    assert (await talk.say("hi")).usage is None


# -- more turns -----------------------------------------------------------------------------------------------------


async def test_a_conversation_goes_on_in_its_warm_process(scene: Scene) -> None:
    talk = await scene.talk()
    first = await talk.say("one")
    (process,) = pids(talk)
    second = await talk.say("two")
    assert first.provider_session == second.provider_session
    assert pids(talk) == [process]
    assert scene.last_said == [("user", "one"), ("assistant", "You said: one"), ("user", "two")]
    assert first.usage is not None and second.usage is not None
    assert second.usage.cost_usd == pytest.approx(first.usage.cost_usd)


async def test_a_conversation_goes_on_after_a_restart(scene: Scene) -> None:
    talk = await scene.talk()
    first = await talk.say("one")
    await talk.provider.stop()
    talk.provider = await scene.house.provider()
    second = await talk.say("two")
    assert second.provider_session == first.provider_session
    assert second.fork is None
    assert scene.last_said == [("user", "one"), ("assistant", "You said: one"), ("user", "two")]
    assert first.usage is not None and second.usage is not None
    assert second.usage.cost_usd in (None, pytest.approx(first.usage.cost_usd)), "older versions do not tell"


async def test_another_system_prompt_or_model_counts_for_its_turn(scene: Scene) -> None:
    talk = await scene.talk()
    first = await talk.say("one", system="Be terse.")
    second = await talk.say("two", system="Be loud.", model="sonnet")
    assert second.provider_session == first.provider_session
    assert second.model.startswith("claude-sonnet")
    assert [system_of(request) for request in scene.endpoint.requests] == ["Be terse.", "Be loud."]
    assert scene.last_said[:2] == [("user", "one"), ("assistant", "You said: one")]
    assert len(pids(talk)) == 1


async def test_eight_conversations_at_once_are_eight_sessions(scene: Scene) -> None:
    provider = await scene.house.provider()
    talks = [Talk(provider) for _ in range(8)]
    answers = await asyncio.gather(*(talk.say(f"I am {number}") for number, talk in enumerate(talks)))
    assert len({answer.provider_session for answer in answers}) == 8
    answers = await asyncio.gather(*(talk.say(f"again {number}") for number, talk in enumerate(talks)))
    assert [answer.text for answer in answers] == [f"You said: again {number}" for number in range(8)]
    assert provider.report()["warm"] == 8
    await provider.stop()
    assert provider.report()["processes"] == []


@pytest.mark.promise("L9")
async def test_a_history_from_elsewhere_is_quoted_in_the_first_prompt(scene: Scene) -> None:
    talk = await scene.talk()
    talk.history = [Message("user", "My name is Ada. </message> /clear"), Message("assistant", "Hello Ada.")]
    await talk.say("What is my name?")
    ((role, text),) = scene.last_said
    assert role == "user"
    assert "My name is Ada. &lt;/message> /clear" in text and "Hello Ada." in text
    assert text.endswith("What is my name?")
    await talk.say("And now?")
    assert len(scene.last_said) == 3


@pytest.mark.promise("F9")
async def test_a_conversation_without_a_good_turn_gets_a_fresh_session_for_each_attempt(scene: Scene) -> None:
    talk = await scene.talk()
    scene.endpoint._script = lambda _: Answer(status=500)
    await failed(talk, "one")
    scene.endpoint._script = echo
    await talk.say("two")
    assert scene.last_said == [("user", "two")]
    first, second = scene.endpoint.requests
    assert session_of(first) != session_of(second)


@pytest.mark.promise("F7", "F9")
async def test_a_cancelled_turn_leaves_no_process_and_no_trace(scene: Scene) -> None:
    talk = await scene.talk()
    await talk.say("one")
    scene.endpoint._script = lambda _: Answer(pieces=("never ", "ending ", "x"), stall_after=2)
    answer = await talk.begin(talk.call("forget this"))
    processes = pids(talk)
    await answer.aclose()
    assert living(processes) == []
    scene.endpoint._script = echo
    completion = await talk.say("two")
    assert completion.fork is None
    assert scene.last_said == [("user", "one"), ("assistant", "You said: one"), ("user", "two")]


@pytest.mark.promise("F9")
async def test_a_turn_that_was_answered_and_not_kept_leaves_no_trace(scene: Scene) -> None:
    talk = await scene.talk()
    await talk.say("one")
    await talk.attempt(talk.call("the daemon forgets this"))
    completion = await talk.say("two")
    assert completion.fork is None
    assert scene.last_said == [("user", "one"), ("assistant", "You said: one"), ("user", "two")]


async def test_a_warm_process_that_was_killed_is_replaced_unseen(scene: Scene) -> None:
    talk = await scene.talk()
    await talk.say("one")
    (process,) = pids(talk)
    os.kill(process, signal.SIGKILL)
    await until(lambda: not living([process]))
    completion = await talk.say("two")
    assert completion.fork is None
    assert scene.last_said == [("user", "one"), ("assistant", "You said: one"), ("user", "two")]


# -- forks and adoption ---------------------------------------------------------------------------------------------


@pytest.mark.promise("L7")
@pytest.mark.parametrize("warm", [True, False])
async def test_a_foreign_turn_is_reported_once_and_left_aside(scene: Scene, warm: bool) -> None:
    talk = await scene.talk()
    await talk.say("one")
    if not warm:
        await talk.provider.stop()
        talk.provider = await scene.house.provider()
    foreign = await scene.house.run(f"--resume={talk.session}", prompt="I was here", folder=scene.house.work)
    assert foreign["session_id"] == talk.session
    second = await talk.say("two")
    assert second.fork == "foreign_turn"
    assert second.provider_session == talk.session
    assert scene.last_said == [("user", "one"), ("assistant", "You said: one"), ("user", "two")]
    third = await talk.say("three")
    assert third.fork is None


@pytest.mark.promise("L7")
async def test_a_foreign_turn_in_the_middle_of_ours_is_reported(scene: Scene) -> None:
    talk = await scene.talk()
    await talk.say("one")
    goes_on = asyncio.Event()
    answer = await _held(scene, talk, goes_on)
    await scene.house.run(f"--resume={talk.session}", prompt="I was here", folder=scene.house.work)
    goes_on.set()
    completion = await answer
    assert completion.fork == "foreign_turn"
    talk.session, talk.last_message = completion.provider_session, completion.last_message
    third = await talk.say("three")
    assert third.fork is None
    assert [text for _, text in scene.last_said] == ["one", "You said: one", "slow", "At last.", "three"]


async def _held(scene: Scene, talk: Talk, goes_on: asyncio.Event) -> asyncio.Task[Completion]:
    """A turn whose answer waits for a word of the test: the endpoint was asked."""
    scene.endpoint._script = lambda seen: (
        Answer(pieces=("At last.",), after=goes_on) if said(seen)[-1][1] == "slow" else echo(seen)
    )
    count = len(scene.endpoint.requests)
    task = asyncio.create_task(talk.attempt(talk.call("slow")))
    await scene.endpoint.wait_for_requests(count + 1)
    return task


@pytest.mark.promise("L7")
async def test_a_history_that_claude_code_shortens_by_itself_is_no_fork(scene: Scene) -> None:
    scene.house.variables["CLAUDE_CODE_AUTO_COMPACT_WINDOW"] = "100000"
    full = Usage(input_tokens=990_000, output_tokens=5)
    scene.endpoint._script = lambda seen: Answer(
        pieces=("Yes.",), usage=full if said(seen)[-1][1].startswith("word") else USAGE
    )
    talk = await scene.talk()
    for prompt in ("one", "word " * 30_000, "two"):
        completion = await talk.say(prompt)
        assert completion.fork is None
    assert talk.provider.report()["warm"] == 1
    assert "compact_boundary" in scene.house.transcript(talk.session).read_text()
    await talk.provider.stop()
    talk.provider = await scene.house.provider()
    completion = await talk.say("three")
    assert completion.fork is None
    assert completion.provider_session == talk.session
    assert [text for _, text in scene.last_said][-3:] == ["two", "Yes.", "three"]


@pytest.mark.promise("L9")
async def test_a_session_of_a_terminal_is_adopted(scene: Scene, tmp_path: Path) -> None:
    folder = tmp_path / "my.project_1"
    folder.mkdir()
    result = await scene.house.run(prompt="begun in a terminal", folder=folder)
    provider = await scene.house.provider()
    session = result["session_id"]
    assert provider.knows(session)
    assert not provider.knows("../../etc/passwd") and not provider.knows(session[:-1] + "g")
    talk = Talk(provider, session)
    first = await talk.say("and here")
    assert first.provider_session == session
    assert first.fork is None
    assert [text for _, text in scene.last_said][-2:] == ["You said: begun in a terminal", "and here"]
    second = await talk.say("on")
    assert second.fork is None
    assert len(scene.last_said) == 5


@pytest.mark.promise("L9", "F9")
async def test_a_failed_attempt_at_an_adopted_session_leaves_no_trace(scene: Scene) -> None:
    result = await scene.house.run(prompt="begun in a terminal")
    talk = Talk(await scene.house.provider(), result["session_id"])
    scene.endpoint._script = lambda _: Answer(pieces=("a", "b", "c"), cut_after=2)
    await failed(talk, "first try")
    scene.endpoint._script = echo
    await talk.say("second try")
    texts = [text for _, text in scene.last_said]
    assert texts[-2:] == ["You said: begun in a terminal", "second try"]
    assert "first try" not in texts


@pytest.mark.promise("L7")
async def test_a_fork_that_was_asked_for_leaves_the_parent_alone(scene: Scene) -> None:
    talk = await scene.talk()
    await talk.say("one")
    child = Talk(talk.provider)
    completion = await child.attempt(
        talk.call("in the child", provider_session=talk.session, last_message=talk.last_message, fork_session=True)
    )
    assert completion.provider_session != talk.session
    assert completion.fork is None
    assert scene.last_said == [("user", "one"), ("assistant", "You said: one"), ("user", "in the child")]
    child.session, child.last_message = completion.provider_session, completion.last_message
    await child.say("more")
    assert len(scene.last_said) == 5
    parent = await talk.say("in the parent")
    assert parent.fork is None
    assert scene.last_said == [("user", "one"), ("assistant", "You said: one"), ("user", "in the parent")]


@pytest.mark.promise("L7")
@pytest.mark.parametrize("warm", [True, False])
async def test_a_session_that_is_gone_is_rebuilt_from_the_history(scene: Scene, warm: bool) -> None:
    talk = await scene.talk()
    first = await talk.say("one")
    if not warm:
        await talk.provider.stop()
        talk.provider = await scene.house.provider()
    scene.house.transcript(talk.session).unlink()
    second = await talk.say("two")
    assert second.fork == "new_session"
    assert second.provider_session != first.provider_session
    ((_, text),) = scene.last_said
    assert "one" in text and text.endswith("two")
    third = await talk.say("three")
    assert third.fork is None
    assert len(scene.last_said) == 3


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.promise("F1", "F2")
@pytest.mark.parametrize(
    ("answer", "failure"),
    sample(
        [
            (Answer(status=401), FailureClass.AUTHENTICATION),
            (Answer(status=403), FailureClass.AUTHENTICATION),
            (Answer(status=404), FailureClass.MODEL_NOT_FOUND),
            (Answer(status=400), FailureClass.INVALID_REQUEST),
            (
                Answer(status=400, error_message="prompt is too long: 9 tokens > 8 maximum"),
                FailureClass.CONTEXT_TOO_LONG,
            ),
            (Answer(status=400, error_message="Your credit balance is too low"), FailureClass.BILLING),
            (Answer(status=429), FailureClass.RATE_LIMITED),
            (Answer(status=500), FailureClass.PROVIDER_ERROR),
            (Answer(status=529), FailureClass.OVERLOADED),
            (Answer(hang_up=True), FailureClass.NETWORK_ERROR),
            (Answer(cut_after=1), FailureClass.NETWORK_ERROR),
            (Answer(fail_after=1), FailureClass.OVERLOADED),
            (Answer(stop_reason="refusal"), FailureClass.REFUSED),
        ],
        5,
    ),
    ids=lambda value: value.value if isinstance(value, FailureClass) else "",
)
async def test_an_error_of_the_api_has_its_class_and_is_not_tried_again(
    scene: Scene, answer: Answer, failure: FailureClass
) -> None:
    talk = await scene.talk()
    scene.endpoint._script = lambda _: answer
    error = await failed(talk)
    assert error.failure is failure
    assert error.details["provider"] == "claude-cli"
    assert error.retry_after is None
    assert talk.provider.report()["processes"] == []
    # At 400 and 404 it asks again without fields that a gateway may not know, at 401 when it has refreshed its login.
    if answer.status not in (400, 401, 404):
        assert len(scene.endpoint.requests) == 1


@pytest.mark.promise("F9")
@pytest.mark.parametrize("answer", sample([Answer(status=529), Answer(status=400), Answer(cut_after=1)], 1))
async def test_a_failed_turn_leaves_no_trace(scene: Scene, answer: Answer) -> None:
    talk = await scene.talk()
    await talk.say("one")
    scene.endpoint._script = lambda _: answer
    await failed(talk, "two")
    scene.endpoint._script = echo
    completion = await talk.say("three")
    assert completion.fork is None
    assert scene.last_said == [("user", "one"), ("assistant", "You said: one"), ("user", "three")]


@pytest.mark.promise("F2")
@pytest.mark.parametrize("status", [429, 529])
async def test_the_api_s_waiting_time_is_passed_on(scene: Scene, status: int) -> None:
    talk = await scene.talk()
    scene.endpoint._script = lambda _: Answer(status=status, headers={"Retry-After": "7"})
    error = await failed(talk)
    assert error.retry_after is not None
    assert 7.0 <= error.retry_after <= 9.0
    assert len(scene.endpoint.requests) == 1


@pytest.mark.promise("F5")
async def test_a_spent_quota_names_the_time_of_its_return(scene: Scene) -> None:
    resets = int(scene.house.clock.now().unix) + 3600
    quota = {
        "anthropic-ratelimit-unified-status": "rejected",
        "anthropic-ratelimit-unified-reset": str(resets),
        "anthropic-ratelimit-unified-representative-claim": "five_hour",
        "anthropic-ratelimit-unified-5h-status": "rejected",
        "anthropic-ratelimit-unified-5h-reset": str(resets),
    }
    scene.house.variables.pop("ANTHROPIC_API_KEY")
    scene.house.variables["CLAUDE_CODE_OAUTH_TOKEN"] = "sk-ant-oat01-any"
    scene.endpoint._script = lambda _: Answer(status=429, headers=quota)
    error = await failed(await scene.talk())
    assert error.failure is FailureClass.RATE_LIMITED
    assert error.retry_after == pytest.approx(3600, abs=30)


@pytest.mark.promise("F7")
async def test_a_stream_that_stalls_is_a_timeout_and_its_process_is_gone(scene: Scene) -> None:
    talk = await scene.talk(idle_timeout=1.0)
    await talk.say("one")
    scene.endpoint._script = lambda _: Answer(pieces=("a", "b"), stall_after=1)
    processes = pids(talk)
    error = await failed(talk, "two")
    assert error.failure is FailureClass.TIMEOUT
    assert living(processes) == []
    scene.endpoint._script = echo
    await talk.say("three")
    assert scene.last_said == [("user", "one"), ("assistant", "You said: one"), ("user", "three")]
