"""The vendors' own SDKs as clients of the HTTP door. They take seconds to import, so only these tests do it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.endpoint import Answer, ScriptedEndpoint
from tests.http_door import Door, door

if TYPE_CHECKING:
    import anthropic
    import openai
    from openai.types.responses import Response, ToolParam

CHAT_TOOL: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
TOOL: ToolParam = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
CALL = b"""{"type":"message","role":"assistant","model":"claude-x","stop_reason":"tool_use","content":
[{"type":"tool_use","id":"t1","name":"weather","input":{"city":"Bonn"}}],"usage":{"input_tokens":5,"output_tokens":2}}"""


@asynccontextmanager
async def openai_at(here: Door) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's SDK, which asks here alone."""
    import openai

    async with openai.AsyncOpenAI(base_url=f"{here.url}/v1", api_key=here.token, max_retries=0) as client:
        yield client


@asynccontextmanager
async def anthropic_at(here: Door) -> AsyncIterator[anthropic.AsyncAnthropic]:
    """Anthropic's SDK, which asks here alone."""
    import anthropic

    async with anthropic.AsyncAnthropic(base_url=here.url, api_key=here.token, max_retries=0) as client:
        yield client


def checked(response: Response) -> Response:
    """A response with the fields that its type demands, recursively."""
    from openai.types.responses import Response

    return Response.model_validate(response.model_dump(mode="python"), strict=True)


@pytest.mark.promise("H2")
async def test_anthropics_sdk_asks_streams_counts_and_lists() -> None:
    async with ScriptedEndpoint() as endpoint, door(endpoint) as here, anthropic_at(here) as client:
        asked: Any = {"max_tokens": 50, "messages": [{"role": "user", "content": "Hi."}]}
        message = await client.messages.create(model="claude-x", **asked)
        assert (message.content[0].text, message.usage.input_tokens) == ("Hello there.", 10)
        for model in ("claude-x", "stub/echo"):
            async with client.messages.stream(model=model, **asked) as stream:
                final = await stream.get_final_message()
            assert final.content[0].text == {"claude-x": "Hello there."}.get(model, "echo: Hi.")  # type: ignore[union-attr]
        counted = await client.messages.count_tokens(model="claude-x", messages=asked["messages"])
        assert counted.input_tokens > 0
        assert [model.id async for model in client.models.list()] == ["stub/echo"]


@pytest.mark.promise("H2")
@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Answer(status=400, error_message="odd"), "BadRequestError"),
        (Answer(status=404, error_message="model: claude-x"), "NotFoundError"),
        (Answer(status=402, error_message="no money"), "APIStatusError"),
    ],
)
async def test_anthropics_sdk_raises_its_own_errors(answer: Answer, error: str) -> None:
    import anthropic

    async with ScriptedEndpoint(answer) as endpoint, door(endpoint) as here, anthropic_at(here) as client:
        with pytest.raises(getattr(anthropic, error)) as caught:
            await client.messages.create(model="claude-x", max_tokens=5, messages=[{"role": "user", "content": "Hi."}])
        assert answer.error_message in str(caught.value)


async def weather(city: str) -> str:
    """Tell the weather.

    Args:
        city: Where.
    """
    return f"sunny in {city}"


@pytest.mark.promise("H2", "A6")
async def test_anthropics_sdk_runs_its_tools_without_a_thread_if_the_endpoint_has_none() -> None:
    import anthropic

    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    choice = {"index": 0, "finish_reason": "tool_calls", "message": message}
    calls = json.dumps({"id": "c1", "object": "chat.completion", "model": "gpt-x", "choices": [choice]}).encode()
    async with ScriptedEndpoint(Answer(body=calls), Answer()) as endpoint:
        async with door(openai=endpoint) as here, anthropic_at(here) as client:
            runner = client.beta.messages.tool_runner(
                model="openai/gpt-x",
                max_tokens=50,
                messages=[{"role": "user", "content": "Hi."}],
                tools=[anthropic.beta_async_tool(weather)],
            )
            final = await runner.until_done()
            refused = await here.message(model="openai/gpt-x", thread={"type": "create"})
        assert final.content[0].text == "Hello there."  # type: ignore[union-attr]
        assert endpoint.requests[1].json["messages"][-1]["content"] == "sunny in Bonn"
        assert refused.json["error"]["details"]["error_code"] == "thread_unsupported_request"


@pytest.mark.promise("H3")
async def test_openais_sdk_asks_and_streams_chat_completions_with_tools() -> None:
    answers = (Answer(body=CALL), Answer())
    async with ScriptedEndpoint(*answers) as endpoint, door(endpoint) as here, openai_at(here) as client:
        asked: Any = {"model": "anthropic/claude-x", "tools": [CHAT_TOOL], "max_tokens": 50}
        messages: list[Any] = [{"role": "user", "content": "Weather?"}]
        first = await client.chat.completions.create(messages=messages, **asked)
        [call] = first.choices[0].message.tool_calls or []
        assert (first.choices[0].finish_reason, call.function.arguments) == ("tool_calls", '{"city":"Bonn"}')
        messages += [first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sun"}]
        second = await client.chat.completions.create(messages=messages, **asked)
        assert second.choices[0].message.content == "Hello there."
        assert [m["role"] for m in endpoint.requests[1].json["messages"]] == ["user", "assistant", "user"]
        async with client.chat.completions.stream(
            model="stub/echo", messages=[{"role": "user", "content": "Hi."}], stream_options={"include_usage": True}
        ) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.content == "echo: Hi."
        assert final.usage is not None


@pytest.mark.promise("H3")
async def test_openais_sdk_raises_its_own_errors() -> None:
    import openai

    async with ScriptedEndpoint(Answer(status=400, error_message="odd")) as endpoint, door(openai=endpoint) as here:
        said: Any = [{"role": "user", "content": "Hi."}]
        async with openai_at(here) as client:
            with pytest.raises(openai.BadRequestError, match="odd"):
                await client.chat.completions.create(model="gpt-x", messages=said)
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(model="nobody/x", messages=said)
            with pytest.raises(openai.BadRequestError, match="does not support: n"):
                await client.chat.completions.create(model="stub/echo", messages=said, n=3)
        async with openai.AsyncOpenAI(base_url=f"{here.url}/v1", api_key="ksi_bad", max_retries=0) as stranger:
            with pytest.raises(openai.AuthenticationError):
                await stranger.models.list()


@pytest.mark.promise("H3")
async def test_a_response_goes_on_from_the_one_before_it_and_from_the_same_one_twice() -> None:
    async with door() as here, openai_at(here) as client:
        first = checked(await client.responses.create(model="stub/echo", input="one"))
        assert (first.output_text, first.status) == ("echo: one", "completed")
        second = await client.responses.create(model="stub/echo", input="two", previous_response_id=first.id)
        branch = await client.responses.create(model="stub/echo", input="other", previous_response_id=first.id)
        assert (second.output_text, branch.output_text) == ("echo: two", "echo: other")
        views = [await here.daemon.store.get(r.id.removeprefix("resp_")) for r in (first, second, branch)]
        conversations = [view.conversation for view in views if view is not None]
        assert conversations[0] == conversations[1] != conversations[2]
        items = [item async for item in await client.responses.input_items.list(branch.id)]
        assert [item.role for item in items] == ["user", "assistant", "user"]  # type: ignore[union-attr]


@pytest.mark.promise("H3", "L1")
async def test_a_conversation_of_responses_is_ksis_own() -> None:
    async with door() as here, openai_at(here) as client:
        conversation = await client.conversations.create()
        for text in ("one", "two"):
            response = await client.responses.create(model="stub/echo", input=text, conversation=conversation.id)
            assert response.conversation is not None
        session = await here.daemon.store.session(conversation.id)
        assert session is not None
        assert session.turns == 2
        items = [item async for item in client.conversations.items.list(conversation.id)]
        assert [item.role for item in items] == ["assistant", "user", "assistant", "user"]  # type: ignore[union-attr]


@pytest.mark.promise("H3")
async def test_a_call_of_a_tool_is_answered_in_the_next_response() -> None:
    answers = (Answer(body=CALL), Answer())
    async with ScriptedEndpoint(*answers) as endpoint, door(endpoint) as here, openai_at(here) as client:
        first = checked(await client.responses.create(model="anthropic/claude-x", input="Weather?", tools=[TOOL]))
        [call] = first.output
        assert call.type == "function_call"
        second = await client.responses.create(
            model="anthropic/claude-x",
            input=[{"type": "function_call_output", "call_id": call.call_id, "output": "sun"}],
            previous_response_id=first.id,
            tools=[TOOL],
        )
        assert second.output_text == "Hello there."
        sent = endpoint.requests[1].json["messages"]
        assert [message["role"] for message in sent] == ["user", "assistant", "user"]
        assert sent[1]["content"][0]["id"] == sent[2]["content"][0]["tool_use_id"] == "t1"


@pytest.mark.promise("H3")
async def test_a_streamed_response_has_the_events_that_the_sdk_builds_it_from() -> None:
    answers = (Answer(), Answer(body=CALL))
    async with ScriptedEndpoint(*answers) as endpoint, door(endpoint) as here, openai_at(here) as client:
        async with client.responses.stream(model="anthropic/claude-x", input="Hi.") as stream:
            numbers = [event.sequence_number async for event in stream]
            final = await stream.get_final_response()
        assert (final.output_text, numbers == sorted(set(numbers))) == ("Hello there.", True)
        async with client.responses.stream(model="anthropic/claude-x", input="Hi.", tools=[TOOL]) as stream:
            called = await stream.get_final_response()
        assert called.output[0].type == "function_call"
        assert len(endpoint.requests) == 2


@pytest.mark.promise("H3")
async def test_a_response_in_the_background_is_looked_at_resumed_and_cancelled() -> None:
    answers = (Answer(), Answer(silent=True))
    async with ScriptedEndpoint(*answers) as endpoint, door(endpoint) as here, openai_at(here) as client:
        made = await client.responses.create(model="anthropic/claude-x", input="Hi.", background=True)
        assert made.status in ("queued", "in_progress")
        seen = [event async for event in await client.responses.retrieve(made.id, stream=True)]
        assert seen[-1].type == "response.completed"
        middle = 10
        rest = [e async for e in await client.responses.retrieve(made.id, stream=True, starting_after=middle)]
        assert all(event.sequence_number > middle for event in rest)
        assert rest[-1].sequence_number == seen[-1].sequence_number
        whole = await client.responses.retrieve(made.id)
        assert (whole.status, whole.output_text) == ("completed", "Hello there.")
        running = await client.responses.create(model="anthropic/claude-x", input="Wait.", background=True)
        await endpoint.wait_for_requests(2)
        cancelled = await client.responses.cancel(running.id)
        assert cancelled.status == "cancelled"
        await asyncio.wait_for(endpoint.requests[1].gone.wait(), 10)


@pytest.mark.promise("H3")
async def test_a_feature_of_this_api_that_ksi_lacks_is_refused_by_name() -> None:
    import openai

    async with door() as here, openai_at(here) as client:
        with pytest.raises(openai.BadRequestError, match="web_search"):
            await client.responses.create(model="stub/echo", input="Hi.", tools=[{"type": "web_search"}])
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve("resp_none")
        with pytest.raises(openai.NotFoundError):
            await client.responses.create(model="stub/echo", input="Hi.", previous_response_id="resp_none")


@pytest.mark.promise("H3", "V4")
async def test_a_response_is_deleted_with_the_conversation_that_it_is_alone_in() -> None:
    import openai

    async with door() as here, openai_at(here) as client:
        alone = await client.responses.create(model="stub/echo", input="Hi.")
        await client.responses.delete(alone.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(alone.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.delete(alone.id)


@pytest.mark.promise("H3", "V4")
async def test_a_response_among_others_is_deleted_with_its_whole_conversation_only() -> None:
    import openai

    async with door() as here, openai_at(here) as client:
        talk = await client.conversations.create()
        one = await client.responses.create(model="stub/echo", input="One.", conversation=talk.id)
        other = await client.responses.create(model="stub/echo", input="Two.", previous_response_id=one.id)
        for response in (one, other):
            with pytest.raises(openai.ConflictError, match=f"one of 2 turns.*DELETE /v1/conversations/{talk.id}"):
                await client.responses.delete(response.id)
        gone = await client.conversations.delete(talk.id)
        assert (gone.id, gone.deleted) == (talk.id, True)
        for response in (one, other):
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(response.id)
