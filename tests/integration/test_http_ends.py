"""Ends of answers at both HTTP providers: refusals, emptiness, tools, pauses, and errors in the place of an answer."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ksi.errors import FailureClass
from ksi.providers.anthropic import MOST_PAUSES
from ksi.request import UNPRICED, Usage
from tests.endpoint import Answer, ScriptedEndpoint
from tests.integration.http_calls import a_call, both_apis, both_ways, failure, make, pair, running, whole

NO = "I cannot help with building that."
DONE = b"data: [DONE]\n\n"


def chat(message: dict[str, Any], finish: str | None = "stop", **more: Any) -> bytes:
    return msgspec.json.encode({"choices": [{"index": 0, "message": message, "finish_reason": finish}], **more})


def streamed_chat(*deltas: dict[str, Any], finish: str | None = "stop", **more: Any) -> tuple[bytes, ...]:
    choices: list[dict[str, Any]] = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": finish, **more})
    return (*(b"data: " + msgspec.json.encode({"choices": [choice]}) + b"\n\n" for choice in choices), DONE)


def message(content: list[dict[str, Any]], stop: str, **more: Any) -> bytes:
    usage = {"input_tokens": 10, "output_tokens": 5}
    return msgspec.json.encode({"type": "message", "content": content, "stop_reason": stop, "usage": usage, **more})


def streamed_message(content: list[dict[str, Any]], stop: str, **delta: Any) -> tuple[bytes, ...]:
    """A message as the API streams it: each block begins empty."""
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": {"model": "m", "usage": {"input_tokens": 10, "output_tokens": 1}}}
    ]
    for index, block in enumerate(content):
        empty, pieces = _pieces(block)
        events.append({"type": "content_block_start", "index": index, "content_block": empty})
        events += [{"type": "content_block_delta", "index": index, "delta": piece} for piece in pieces]
        events.append({"type": "content_block_stop", "index": index})
    events.append(
        {"type": "message_delta", "delta": {"stop_reason": stop, **delta}, "usage": {"output_tokens": 5}},
    )
    events.append({"type": "message_stop"})
    return tuple(b"event: %b\ndata: %b\n\n" % (e["type"].encode(), msgspec.json.encode(e)) for e in events)


def _pieces(block: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if block["type"] == "text":
        return {**block, "text": ""}, [{"type": "text_delta", "text": letter} for letter in block["text"]]
    if "input" in block:
        text = msgspec.json.encode(block["input"]).decode()
        parts = [text[:4], text[4:]]
        return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": part} for part in parts]
    return block, []


REFUSALS = {
    "refusal": ("openai", Answer(body=chat({"content": None, "refusal": NO}))),
    "refusal part": ("openai", Answer(body=chat({"content": [{"type": "refusal", "refusal": NO}]}))),
    "streamed refusal": ("openai", Answer(parts=streamed_chat({"refusal": NO[:9]}, {"refusal": NO[9:]}))),
    "filter": ("openai", Answer(body=chat({"content": NO}, "content_filter"))),
    "streamed filter": ("openai", Answer(parts=streamed_chat({"content": NO}, finish="content_filter"))),
    "safety": ("openai", Answer(body=chat({"content": NO}, "SAFETY"))),
    "native": ("openai", Answer(parts=streamed_chat({"content": NO}, native_finish_reason="refusal"))),
    "filter before": ("openai", Answer(status=400, error_code="content_filter", error_message=NO)),
    "message": ("anthropic", Answer(body=message([{"type": "text", "text": NO}], "refusal"))),
    "streamed message": ("anthropic", Answer(parts=streamed_message([{"type": "text", "text": NO}], "refusal"))),
    "explained": ("anthropic", Answer(body=message([], "refusal", stop_details={"explanation": NO}))),
    "streamed explained": (
        "anthropic",
        Answer(parts=streamed_message([], "refusal", stop_details={"type": "refusal", "explanation": NO})),
    ),
}


@pytest.mark.promise("A4")
@pytest.mark.parametrize("name", REFUSALS)
async def test_a_refusal_has_one_class_and_the_model_s_words(name: str) -> None:
    api, answer = REFUSALS[name]
    async with pair(api, answer) as (endpoint, provider):
        error = await failure(provider, a_call(stream="streamed" in name))
        assert len(endpoint.requests) == 1
    assert (error.failure, error.retryable) == (FailureClass.REFUSED, False)
    assert NO in error.message


@pytest.mark.promise("A4")
@both_ways
async def test_a_refusal_without_a_word_is_one_too(stream: bool) -> None:
    answer = Answer(parts=streamed_message([], "refusal")) if stream else Answer(body=message([], "refusal"))
    async with pair("anthropic", answer) as (_, provider):
        assert (await failure(provider, a_call(stream=stream))).failure is FailureClass.REFUSED


THINKING = {"type": "thinking", "thinking": "hm", "signature": "s"}
TOOL_USE = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}}
CALLS = [{"index": 0, "id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]
SERVER_TOOL = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "x"}}
EMPTY = {
    "null": ("openai", Answer(body=chat({"content": None})), "no text"),
    "blank": ("openai", Answer(body=chat({"content": " \n"})), "no text"),
    "no content": ("openai", Answer(body=chat({"role": "assistant"}, "length")), "raise max_tokens"),
    "streamed": ("openai", Answer(parts=streamed_chat({"role": "assistant", "content": ""})), "no text"),
    "done": ("openai", Answer(parts=(DONE,)), "no text"),
    "reasoning": ("openai", Answer(body=chat({"content": "", "reasoning_content": "hm"})), "reasoning and no text"),
    "limit": ("openai", Answer(body=chat({"content": "", "reasoning": "hm"}, "length")), "reasoning used up"),
    "streamed limit": (
        "openai",
        Answer(parts=streamed_chat({"reasoning_content": "hm"}, finish="length")),
        "reasoning used up",
    ),
    "message": ("anthropic", Answer(body=message([], "end_turn")), "no text"),
    "streamed message": ("anthropic", Answer(parts=streamed_message([], "end_turn")), "no text"),
    "thinking": ("anthropic", Answer(body=message([THINKING], "max_tokens")), "reasoning used up"),
    "streamed thinking": ("anthropic", Answer(parts=streamed_message([THINKING], "max_tokens")), "reasoning used up"),
    "server tools": ("anthropic", Answer(body=message([SERVER_TOOL], "end_turn")), "no text"),
}


@pytest.mark.promise("A4")
@pytest.mark.parametrize("name", EMPTY)
async def test_an_answer_without_text_is_empty_and_says_why(name: str) -> None:
    api, answer, words = EMPTY[name]
    async with pair(api, answer) as (_, provider):
        error = await failure(provider, a_call(stream="streamed" in name))
    assert (error.failure, error.retryable) == (FailureClass.EMPTY_ANSWER, True)
    assert words in error.message


TOOLS = {
    "calls": ("openai", Answer(body=chat({"content": None, "tool_calls": CALLS}, "tool_calls"))),
    "streamed calls": ("openai", Answer(parts=streamed_chat({"tool_calls": CALLS}, finish="tool_calls"))),
    "function": ("openai", Answer(body=chat({"function_call": {"name": "weather"}}, "function_call"))),
    "message": ("anthropic", Answer(body=message([TOOL_USE], "tool_use"))),
    "streamed message": ("anthropic", Answer(parts=streamed_message([TOOL_USE], "tool_use"))),
}


@pytest.mark.promise("A3", "A4")
@pytest.mark.parametrize("name", TOOLS)
async def test_calls_of_tools_alone_are_an_answer_of_blocks(name: str) -> None:
    api, answer = TOOLS[name]
    async with pair(api, answer) as (_, provider):
        _, completion = await whole(provider, a_call(stream="streamed" in name))
    assert completion.text == ""
    assert [(block["type"], block["name"]) for block in completion.content] == [("tool_use", "weather")]


@both_apis
@both_ways
async def test_text_next_to_calls_of_tools_is_kept_and_they_are_blocks(api: str, stream: bool) -> None:
    content: list[dict[str, Any]] = [{"type": "text", "text": "Let me look."}, TOOL_USE]
    chats = Answer(body=chat({"content": "Let me look.", "tool_calls": CALLS}, "tool_calls"))
    if stream:
        chats = Answer(parts=streamed_chat({"content": "Let me look."}, {"tool_calls": CALLS}, finish="tool_calls"))
    messages = (
        Answer(parts=streamed_message(content, "tool_use")) if stream else Answer(body=message(content, "tool_use"))
    )
    async with pair(api, chats if api == "openai" else messages) as (_, provider):
        _, completion = await whole(provider, a_call(stream=stream))
    assert (completion.text, completion.stop_reason) == ("Let me look.", "tool_use")
    assert [block["type"] for block in completion.content] == ["text", "tool_use"]


@pytest.mark.promise("A3")
@both_apis
@both_ways
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("stop", "end_turn"), "end_turn"),
        (("length", "max_tokens"), "max_tokens"),
        (("model_length", "model_context_window_exceeded"), "context_window"),
        (("new_word", "new_word"), "new_word"),
    ],
)
async def test_both_dialects_end_in_the_same_words(api: str, stream: bool, words: tuple[str, str], reason: str) -> None:
    async with pair(api, Answer(stop_reason=words[api == "anthropic"])) as (_, provider):
        _, completion = await whole(provider, a_call(stream=stream))
    assert completion.stop_reason == reason


@pytest.mark.promise("A4")
@pytest.mark.parametrize(
    ("finish", "expected"),
    [("error", "provider_error"), ("network_error", "provider_error"), ("insufficient_system_resource", "overloaded")],
)
@both_ways
async def test_a_torso_is_no_answer(stream: bool, finish: str, expected: str) -> None:
    parts = Answer(parts=streamed_chat({"content": "Half of"}, finish=finish))
    async with pair("openai", parts if stream else Answer(body=chat({"content": "Half of"}, finish))) as (_, provider):
        error = await failure(provider, a_call(stream=stream))
    assert error.failure == expected
    assert finish in error.message


ERRORS = [
    ({"object": "error", "message": "The model `m` does not exist", "code": 404}, "model_not_found", "`m`"),
    ({"object": "error", "message": "too large", "type": "BadRequestError", "code": 400}, "invalid_request", "large"),
    ({"text": "**HIGH TRAFFIC**", "error_code": 50001}, "provider_error", "HIGH TRAFFIC"),
    ({"choices": None, "base_resp": {"status_code": 1002, "status_msg": "slow"}}, "rate_limited", "slow"),
    ({"detail": "who are you"}, "provider_error", "who are you"),
    ({"error": {"message": "slow", "code": 429, "metadata": {"raw": "upstream"}}}, "rate_limited", "upstream"),
    ({"success": False, "errors": [{"message": "no worker"}]}, "provider_error", "no worker"),
]


@both_apis
@both_ways
@pytest.mark.promise("A4", "F1")
@pytest.mark.parametrize(("body", "expected", "words"), ERRORS)
async def test_an_error_body_with_status_200_is_an_error_with_its_words(
    api: str, stream: bool, body: Any, expected: str, words: str
) -> None:
    encoded = msgspec.json.encode(body)
    answer = Answer(parts=(b"data: " + encoded + b"\n\n",)) if stream else Answer(body=encoded)
    async with pair(api, answer) as (_, provider):
        error = await failure(provider, a_call(stream=stream))
    assert error.failure == expected
    assert words in error.message


@both_ways
@pytest.mark.promise("A4", "F1")
async def test_an_error_inside_a_choice_is_one(stream: bool) -> None:
    choice = {"delta": {"content": ""}, "error": {"code": 502, "message": "upstream died"}, "finish_reason": "error"}
    body = msgspec.json.encode({"choices": [choice]})
    answer = Answer(parts=(b"data: " + body + b"\n\n",)) if stream else Answer(body=body)
    async with pair("openai", answer) as (_, provider):
        error = await failure(provider, a_call(stream=stream))
    assert error.failure is FailureClass.PROVIDER_ERROR
    assert "upstream died" in error.message


@both_apis
@pytest.mark.promise("F5")
async def test_an_error_in_a_stream_tells_the_time_of_return(api: str) -> None:
    body = msgspec.json.encode({"error": {"message": "slow", "code": 429, "resets_in_seconds": 90}})
    async with pair(api, Answer(parts=(b"event: error\ndata: " + body + b"\n\n",))) as (_, provider):
        error = await failure(provider, a_call(stream=True))
    assert (error.failure, error.retry_after) == (FailureClass.RATE_LIMITED, 90.0)


@both_apis
async def test_an_html_page_is_reported_by_its_words(api: str) -> None:
    page = b"<html><head><style>p {}</style></head><body><h1>Log in</h1></body></html>"
    async with pair(api, Answer(body=page, content_type="text/html")) as (_, provider):
        error = await failure(provider, a_call())
    assert error.failure is FailureClass.PROVIDER_ERROR
    assert "an HTML page: Log in; base_url may be wrong" in error.message


class TestPauses:
    """A turn that the API pauses continues by itself."""

    FIRST = ({"type": "text", "text": "First half. "}, SERVER_TOOL)
    SECOND = ({"type": "text", "text": "Second half."},)

    def answer(self, content: tuple[dict[str, Any], ...], stop: str, stream: bool, **more: Any) -> Answer:
        if stream:
            return Answer(parts=streamed_message(list(content), stop, **more))
        return Answer(body=message(list(content), stop, **more))

    @both_ways
    @pytest.mark.promise("A4", "A7")
    async def test_a_paused_answer_goes_on_with_its_content_as_it_came(self, stream: bool) -> None:
        answers = (
            self.answer(self.FIRST, "pause_turn", stream, container={"id": "box_1"}),
            self.answer((THINKING,), "pause_turn", stream),
            self.answer(self.SECOND, "end_turn", stream),
        )
        async with pair("anthropic", *answers) as (endpoint, provider):
            chunks, completion = await whole(provider, a_call(stream=stream))
            bodies = [seen.json for seen in endpoint.requests]
        assert completion.text == "First half. Second half."
        assert "".join(chunks) == (completion.text if stream else "")
        assert completion.usage == Usage(input_tokens=30, output_tokens=15)
        assert (completion.stop_reason, completion.raw) == ("end_turn", None)
        said = {"role": "user", "content": "Hi"}
        assert bodies[1]["messages"] == [said, {"role": "assistant", "content": [*self.FIRST]}]
        assert bodies[2]["messages"] == [said, {"role": "assistant", "content": [*self.FIRST, THINKING]}]
        assert bodies[1]["container"] == "box_1"
        assert {**bodies[2], "messages": bodies[0]["messages"]} == bodies[0]

    @both_ways
    @pytest.mark.promise("A4")
    async def test_an_answer_that_stays_paused_is_none(self, stream: bool) -> None:
        async with pair("anthropic", self.answer(self.FIRST, "pause_turn", stream)) as (endpoint, provider):
            error = await failure(provider, a_call(stream=stream))
            assert len(endpoint.requests) == MOST_PAUSES + 1
        assert error.failure is FailureClass.PROVIDER_ERROR
        assert "pause_turn" in error.message

    @pytest.mark.promise("A7")
    async def test_a_part_without_a_report_makes_the_usage_unknown(self) -> None:
        paused = Answer(body=message([SERVER_TOOL], "pause_turn", usage=None))
        async with pair("anthropic", paused, Answer()) as (_, provider):
            _, completion = await whole(provider, a_call())
        assert (completion.text, completion.usage) == ("Hello there.", None)

    @pytest.mark.promise("A4")
    async def test_a_failure_behind_a_pause_is_the_call_s_failure(self) -> None:
        paused = Answer(body=message([SERVER_TOOL], "pause_turn"))
        async with pair("anthropic", paused, Answer(status=529)) as (_, provider):
            assert (await failure(provider, a_call())).failure is FailureClass.OVERLOADED


@pytest.mark.promise("A7")
@both_ways
async def test_an_hour_s_cache_leaves_the_cost_to_who_knows_the_prices(stream: bool) -> None:
    written = {"ephemeral_5m_input_tokens": 50, "ephemeral_1h_input_tokens": 30}
    usage = {"input_tokens": 10, "output_tokens": 5, "cache_creation_input_tokens": 80, "cache_creation": written}
    text = [{"type": "text", "text": "Yes"}]
    if stream:
        start = {"type": "message_start", "message": {"model": "m", "usage": usage}}
        answer = Answer(
            parts=(b"data: " + msgspec.json.encode(start) + b"\n\n", *streamed_message(text, "end_turn")[1:])
        )
    else:
        answer = Answer(body=message(text, "end_turn", usage=usage))
    async with pair("anthropic", answer) as (_, provider):
        _, completion = await whole(provider, a_call(stream=stream))
    assert completion.usage == Usage(input_tokens=10, output_tokens=5, cache_write_tokens=80, cost_usd=UNPRICED)
    assert completion.cache_write_hour_tokens == 30


@pytest.mark.promise("A7")
@both_ways
async def test_a_chat_s_tier_reaches_its_cost(stream: bool) -> None:
    counts = {"prompt_tokens": 10, "completion_tokens": 5}
    body = {"choices": [{"message": {"content": "Yes"}, "finish_reason": "stop"}], "usage": counts}
    encoded = msgspec.json.encode({**body, "service_tier": "flex"})
    answer = Answer(parts=(b"data: " + encoded + b"\n\n", DONE)) if stream else Answer(body=encoded)
    async with pair("openai", answer) as (_, provider):
        _, completion = await whole(provider, a_call(stream=stream))
    assert completion.usage == Usage(input_tokens=10, output_tokens=5, cost_usd=UNPRICED)


async def test_extra_fields_go_with_each_part_of_a_paused_answer() -> None:
    paused = Answer(body=message([SERVER_TOOL], "pause_turn"))
    tools = [{"type": "web_search_20250305", "name": "web_search"}]
    async with ScriptedEndpoint(paused, Answer()) as endpoint:
        provider = make("anthropic", endpoint.url, extra_body={"tools": tools})
        async with running(provider):
            await whole(provider, a_call())
        assert [seen.json["tools"] for seen in endpoint.requests] == [tools, tools]
