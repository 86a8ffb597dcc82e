"""Claude Code's stream-json: lines out of bytes, events out of lines."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from ksi.protocol import LineReader
from ksi.providers.claude_cli.stream import (
    AssistantBlock,
    Called,
    Denial,
    Denied,
    Event,
    Finished,
    HarmlessTools,
    Limited,
    MessageBegins,
    Other,
    Piece,
    Results,
    Retrying,
    Started,
    Stopped,
    StreamJsonError,
    Thinks,
    Tool,
    parse,
    parse_all,
)
from ksi.request import Usage


def line(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def result(**fields: Any) -> Finished:
    event = parse(line(type="result", **{"subtype": "success", "session_id": "s", "num_turns": 1, **fields}))
    assert isinstance(event, Finished)
    return event


# -- events ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [b"{", b"null", b"[]", b"Warning: x", b"\xff{}", b"[" * 100_000])
def test_a_line_that_is_no_json_object_is_unreadable(bad: bytes) -> None:
    with pytest.raises(StreamJsonError):
        parse(bad)


def test_a_turn_s_lines_are_its_events() -> None:
    text = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}}
    thought = {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}}
    stop = {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": {"output_tokens": 1}}
    blocks: list[Any] = [{"type": "text", "text": "Hi"}, {"type": "tool_use", "id": "t", "name": "Bash", "input": {}}]
    told = {"status": "rejected", "resetsAt": 1_795_434_984, "rateLimitType": "five_hour", "unifiedWindows": {}}
    pairs = [
        (
            line(type="system", subtype="init", session_id="s", model="m", claude_code_version="2.1.330", tools=[]),
            Started("s", "m", "2.1.330"),
        ),
        (
            line(
                type="system",
                subtype="init",
                session_id="s",
                mcp_servers=[{"name": "a", "status": "connected"}, {"name": "b", "status": "failed", "scope": "x"}],
            ),
            Started("s", "", "", ("b",)),
        ),
        (line(type="system", subtype="status", status="requesting"), Other("system")),
        (line(type="stream_event", event={"type": "message_start", "message": {}}), MessageBegins()),
        (line(type="stream_event", event=text), Piece("Hi")),
        (line(type="stream_event", event=thought), Thinks("hm")),
        (line(type="stream_event", event={"type": "ping"}), Other("stream_event")),
        (line(type="stream_event", event=stop), Stopped("max_tokens")),
        (
            line(type="assistant", uuid="u", message={"model": "m", "content": blocks}),
            AssistantBlock("u", "m", "Hi", None, (Tool("Bash", "t"),), tuple(blocks[1:])),
        ),
        (
            line(type="assistant", uuid="u", error="rate_limit", message={"model": "<synthetic>", "content": "no"}),
            AssistantBlock("u", "<synthetic>", "no", "rate_limit"),
        ),
        (
            line(
                type="system", subtype="api_retry", error_status=529, error="overloaded", retry_delay_ms=5248, attempt=1
            ),
            Retrying(529, "overloaded", 5.248),
        ),
        (line(type="rate_limit_event", rate_limit_info=told), Limited("rejected", 1_795_434_984, "five_hour")),
        (line(type="user", message={"role": "user", "content": []}), Other("user")),
        (line(type="what comes next year", event=3, message="x"), Other("what comes next year")),
    ]
    for data, event in pairs:
        assert parse(data) == event


def test_the_text_of_a_sub_agent_is_not_the_turn_s_text() -> None:
    delta = {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "inner"}}
    assert parse(line(type="stream_event", parent_tool_use_id="t", event=delta)) == Other("stream_event")
    message = {"model": "m", "content": [{"type": "text", "text": "inner"}]}
    assert parse(line(type="assistant", parent_tool_use_id="t", uuid="u", message=message)) == Other("assistant")


@pytest.mark.promise("F13")
def test_tools_are_reported_by_name_and_id_those_of_sub_agents_too() -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {"command": "ls"}}
    message = {"model": "m", "content": [call]}
    assert parse(line(type="assistant", uuid="u", message=message)) == AssistantBlock(
        "u", "m", "", None, (Tool("Bash", "toolu_1"),), (call,)
    )
    assert parse(line(type="assistant", parent_tool_use_id="t", uuid="u", message=message)) == Called(
        (Tool("Bash", "toolu_1"),)
    )
    denied = line(type="system", subtype="permission_denied", tool_name="Bash", tool_use_id="toolu_1", message="no")
    assert parse(denied) == Denied("toolu_1")


@pytest.mark.promise("F13")
def test_annotations_of_mcp_tools_tell_which_are_harmless() -> None:
    read = {"name": "read page", "annotations": {"readOnly": True}}
    write = {"name": "write", "annotations": {"readOnly": False}}
    servers = [
        {"name": "my.wiki", "tools": [read, write, {"name": "plain"}, "odd"]},
        {"name": "x", "status": "pending"},
    ]
    answer = {"subtype": "success", "request_id": "mcp_status", "response": {"mcpServers": servers}}
    assert parse(line(type="control_response", response=answer)) == HarmlessTools(
        frozenset({"mcp__my_wiki__read_page"})
    )
    assert parse(line(type="control_response", response={"subtype": "success"})) == Other("control_response")


# -- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.promise("A8")
@pytest.mark.parametrize(
    ("data", "event"),
    [
        (b"{}", Other("")),
        (b'{"type": 7}', Other("")),
        (
            b'{"type":"user","message":{"content":[{"type":"tool_result","content":"cut \\ud83d"}]}}',
            Results(({"type": "tool_result", "content": "cut \ufffd"},)),
        ),
        (b'{"type":"user","message":{"content":"stray \xff\xfe bytes"}}', Other("user")),
        (b'{"type":"user","message":{"content":"a raw \x01 control character"}}', Other("user")),
        (b'{"type":"rate_limit_event","rate_limit_info":null}', Other("rate_limit_event")),
        (b'{"type":"rate_limit_event"}', Other("rate_limit_event")),
        (b'{"type":"system","subtype":"init","mcp_servers":"none"}', Other("system")),
        (b'{"type":"system","subtype":"api_retry","retry_delay_ms":"soon"}', Other("system")),
        (b'{"type":"system","subtype":"permission_denied","tool_use_id":3}', Denied("")),
        (b'{"type":"stream_event","event":[]}', Other("stream_event")),
        (b'{"type":"control_response","response":"\\udc00"}', Other("control_response")),
        (b'{"type":"assistant","uuid":"u","message":"text"}', AssistantBlock("u", "", "", None)),
        (
            b'{"type":"assistant","uuid":"u","error":{},"message":{"model":"m","content":[3,{"type":"text"},'
            b'{"type":"text","text":"cut \\ud83d"},{"type":"tool_use","name":null}]}}',
            AssistantBlock("u", "m", "cut \ufffd", None, (Tool(""),), ({"type": "tool_use", "name": None},)),
        ),
    ],
)
def test_a_line_of_an_odd_shape_or_with_torn_characters_ends_nothing(data: bytes, event: object) -> None:
    assert parse(data) == event


@pytest.mark.promise("A8")
@pytest.mark.parametrize(
    ("data", "events"),
    [
        (b'{"type":"a"}', [Other("a")]),
        (b'{"type":"a"}{"type":"b","x":{"y":"}{"}}', [Other("a"), Other("b")]),
        (b'Warning: no end of line{"x":"\xff","type":"a"}', [Other("a")]),
        (b'{"type":"a"}Warning: behind it', [Other("a")]),
        ('{"type":"user","x":"a\u2028b\u2029c\u0085d"}'.encode(), [Other("user")]),
    ],
)
def test_events_that_share_a_line_are_all_read(data: bytes, events: list[Event]) -> None:
    assert list(LineReader().feed(data + b"\n")) == [data]
    assert parse_all(data) == events


@pytest.mark.parametrize("bad", [b"Warning: {x}", b'Warning: {"x": ', b"[1]", b'see {"x"'])
def test_a_line_without_a_whole_object_is_unreadable(bad: bytes) -> None:
    with pytest.raises(StreamJsonError):
        parse_all(bad)


@pytest.mark.promise("A8")
def test_a_torn_character_in_the_result_is_replaced_and_its_line_kept_as_clean_json() -> None:
    data = b'{"type":"result","num_turns":1,"result":"the answer \\ud83d","errors":["\\udc00"],"other":"\\ud83d"}'
    event = parse(data)
    assert isinstance(event, Finished)
    assert (event.text, event.errors) == ("the answer \ufffd", ("\ufffd",))
    assert msgspec.json.decode(event.raw)["other"] == "\ufffd"


@pytest.mark.promise("A8")
def test_a_result_whose_side_fields_are_odd_is_a_result() -> None:
    event = result(
        result="fine",
        usage="none",
        num_turns="one",
        errors="single",
        total_cost_usd={},
        api_error_status="429",
        model_usage_since_last_result=[1],
        permission_denials={"a": 1},
        stop_reason=7,
    )
    assert (event.text, event.usage, event.turns, event.errors) == ("fine", None, None, ("single",))
    assert (event.total_cost, event.turn_cost, event.status, event.denials) == (None, None, 429, ())
    assert result(result={"a": 1}).text == '{"a":1}'


def test_a_result_lists_the_denied_calls() -> None:
    given = {"command": "make"}
    listed = [{"tool_name": "Bash", "tool_use_id": "t", "tool_input": given}, "odd"]
    assert result(permission_denials=listed).denials == (Denial(Tool("Bash", "t"), given),)


@pytest.mark.promise("T1")
def test_a_result_s_usage_is_counted_as_it_says() -> None:
    usage = {
        "input_tokens": 12,
        "cache_creation_input_tokens": 78,
        "cache_read_input_tokens": 56,
        "output_tokens": 34,
        "output_tokens_details": {"thinking_tokens": 9},
        "server_tool_use": {"web_search_requests": 0},
    }
    assert result(usage=usage).usage == Usage(
        input_tokens=12, output_tokens=34, cache_read_tokens=56, cache_write_tokens=78, reasoning_tokens=9
    )
    assert result(usage={"input_tokens": 0, "output_tokens": 0}).usage is None
    assert result(usage=None).usage is None
    assert result().usage is None


@pytest.mark.promise("T1")
def test_a_turn_s_cost_is_that_of_its_models_since_the_last_result() -> None:
    costs = {"haiku": {"costUSD": 0.5, "inputTokens": 1}, "opus": {"costUSD": 0.25}}
    assert result(model_usage_since_last_result=costs, total_cost_usd=9.0).turn_cost == 0.75
    assert result(model_usage_since_last_result={"new": {"inputTokens": 1}}).turn_cost is None
    assert result(total_cost_usd=9.0).turn_cost is None


def test_a_result_keeps_its_line_and_tolerates_missing_fields() -> None:
    data = line(type="result", subtype="error_during_execution", is_error=True, errors=["a", {"b": 1}], result=None)
    event = parse(data)
    assert isinstance(event, Finished)
    assert event.raw == data
    assert (event.text, event.session, event.turns, event.errors) == ("", "", None, ("a", "{'b': 1}"))
