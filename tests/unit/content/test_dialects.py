"""What a request says in one dialect is said in the other: each row of the table in docs/reference/dialects.md."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.content import anthropic, chat
from ksi.content.blocks import Message
from ksi.content.features import Asked, Features, Native
from ksi.content.native import contents_of, needs
from ksi.errors import InvalidData
from ksi.providers.anthropic import Options as MessagesOptions
from ksi.providers.anthropic import messages_body
from ksi.providers.base import Call
from ksi.providers.openai import Options as ChatOptions
from ksi.providers.openai import chat_body

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "dialects.md"
PICTURE = base64.b64encode(b"\x89PNG").decode()
PAPER = base64.b64encode(b"%PDF-1.7").decode()
HI = {"role": "user", "content": "Hi"}
LOOK = {"name": "look", "description": "Looks", "input_schema": {"type": "object", "properties": {"at": {}}}}
LOOK_CHAT = {
    "type": "function",
    "function": {"name": "look", "description": "Looks", "parameters": LOOK["input_schema"]},
}
CALLED = {"role": "assistant", "content": [{"type": "tool_use", "id": "a1", "name": "look", "input": {"at": "x"}}]}
CALLED_CHAT = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "a1", "type": "function", "function": {"name": "look", "arguments": '{"at":"x"}'}}],
}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}


def block_of(kind: str, source: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": kind, "source": source, **more}]}


def answered(*results: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "tool_result", **result} for result in results]}


def encoded(media_type: str, data: str) -> dict[str, Any]:
    return {"type": "base64", "media_type": media_type, "data": data}


def two_calls() -> tuple[dict[str, Any], dict[str, Any]]:
    ours = {"role": "assistant", "content": [CALLED["content"][0], {**CALLED["content"][0], "id": "a2"}]}  # type: ignore[dict-item]
    theirs = {**CALLED_CHAT, "tool_calls": [CALLED_CHAT["tool_calls"][0], {**CALLED_CHAT["tool_calls"][0], "id": "a2"}]}  # type: ignore[index,dict-item]
    return ours, theirs


BOTH, FORTH, BACK = "both", "forth", "back"
ROWS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    (
        "`system`",
        {"system": "Be brief", "messages": [HI]},
        {"messages": [{"role": "system", "content": "Be brief"}, HI]},
        BOTH,
    ),
    (
        "a message of the system within the dialogue",
        {"messages": [HI, {"role": "system", "content": "Now in French"}, HI]},
        {"messages": [HI, {"role": "system", "content": "Now in French"}, HI]},
        FORTH,
    ),
    (
        "a message of the system within the dialogue",
        {"messages": [HI, HI], "system": [{"type": "text", "text": "Now in French"}]},
        {"messages": [HI, {"role": "developer", "content": "Now in French"}, HI]},
        BACK,
    ),
    ("text", {"messages": [HI]}, {"messages": [HI]}, BOTH),
    (
        "`image` with base64",
        {"messages": [block_of("image", encoded("image/png", PICTURE))]},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}}],
                }
            ]
        },
        BOTH,
    ),
    (
        "`image` with a URL",
        {"messages": [block_of("image", {"type": "url", "url": "https://there/a.png"})]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://there/a.png"}}]}
            ]
        },
        BOTH,
    ),
    (
        "`document` with base64",
        {"messages": [block_of("document", encoded("application/pdf", PAPER), title="a.pdf")]},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "file",
                            "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{PAPER}"},
                        }
                    ],
                }
            ]
        },
        BOTH,
    ),
    (
        "`document` with text",
        {"messages": [block_of("document", {"type": "text", "media_type": "text/plain", "data": "words"})]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "words"}]}]},
        FORTH,
    ),
    (
        "`document` with text",
        {
            "messages": [
                block_of("document", {"type": "text", "media_type": "text/plain", "data": "words"}, title="a.txt")
            ]
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "file",
                            "file": {
                                "filename": "a.txt",
                                "file_data": f"data:text/plain;base64,{base64.b64encode(b'words').decode()}",
                            },
                        }
                    ],
                }
            ]
        },
        BACK,
    ),
    (
        "`tool_use`",
        {"messages": [HI, CALLED, answered({"tool_use_id": "a1", "content": "seen"})]},
        {"messages": [HI, CALLED_CHAT, {"role": "tool", "tool_call_id": "a1", "content": "seen"}]},
        BOTH,
    ),
    (
        "`tool_result`",
        {"messages": [HI, CALLED, answered({"tool_use_id": "a1", "content": [{"type": "text", "text": "seen"}]})]},
        {"messages": [HI, CALLED_CHAT, {"role": "tool", "tool_call_id": "a1", "content": "seen"}]},
        FORTH,
    ),
    (
        "several `tool_result` in one message",
        {
            "messages": [
                HI,
                two_calls()[0],
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "a1", "content": "one"},
                        {"type": "tool_result", "tool_use_id": "a2", "content": "two"},
                    ],
                },
            ]
        },
        {
            "messages": [
                HI,
                two_calls()[1],
                {"role": "tool", "tool_call_id": "a1", "content": "one"},
                {"role": "tool", "tool_call_id": "a2", "content": "two"},
            ]
        },
        BOTH,
    ),
    (
        "several `tool_result` in one message",
        {
            "messages": [
                HI,
                two_calls()[0],
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "Here:"},
                        {"type": "tool_result", "tool_use_id": "a1", "content": "one"},
                        {"type": "tool_result", "tool_use_id": "a2", "content": "two"},
                    ],
                },
            ]
        },
        {
            "messages": [
                HI,
                two_calls()[1],
                {"role": "tool", "tool_call_id": "a1", "content": "one"},
                {"role": "tool", "tool_call_id": "a2", "content": "two"},
                {"role": "user", "content": [{"type": "text", "text": "Here:"}]},
            ]
        },
        FORTH,
    ),
    (
        "an image in a `tool_result`",
        {
            "messages": [
                HI,
                CALLED,
                answered(
                    {
                        "tool_use_id": "a1",
                        "content": [
                            {"type": "text", "text": "seen"},
                            {"type": "image", "source": encoded("image/png", PICTURE)},
                        ],
                    }
                ),
            ]
        },
        {
            "messages": [
                HI,
                CALLED_CHAT,
                {"role": "tool", "tool_call_id": "a1", "content": "seen"},
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}}],
                },
            ]
        },
        FORTH,
    ),
    (
        "`tool_result` with `is_error`",
        {"messages": [HI, CALLED, answered({"tool_use_id": "a1", "content": "gone", "is_error": True})]},
        {"messages": [HI, CALLED_CHAT, {"role": "tool", "tool_call_id": "a1", "content": "Error: gone"}]},
        FORTH,
    ),
    (
        "`thinking`",
        {
            "messages": [
                HI,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "hm", "signature": "s"},
                        {"type": "text", "text": "Yes"},
                    ],
                },
                HI,
            ]
        },
        {"messages": [HI, {"role": "assistant", "content": "Yes"}, HI]},
        FORTH,
    ),
    ("`tools`", {"messages": [HI], "tools": [LOOK]}, {"messages": [HI], "tools": [LOOK_CHAT]}, BOTH),
    (
        "`tool_choice` `auto`, `none`",
        {"messages": [HI], "tools": [LOOK], "tool_choice": {"type": "auto"}},
        {"messages": [HI], "tools": [LOOK_CHAT], "tool_choice": "auto"},
        BOTH,
    ),
    (
        "`tool_choice` `auto`, `none`",
        {"messages": [HI], "tools": [LOOK], "tool_choice": {"type": "none"}},
        {"messages": [HI], "tools": [LOOK_CHAT], "tool_choice": "none"},
        BOTH,
    ),
    (
        "`tool_choice` `any`",
        {"messages": [HI], "tools": [LOOK], "tool_choice": {"type": "any"}},
        {"messages": [HI], "tools": [LOOK_CHAT], "tool_choice": "required"},
        BOTH,
    ),
    (
        "`tool_choice` `tool`",
        {"messages": [HI], "tools": [LOOK], "tool_choice": {"type": "tool", "name": "look"}},
        {"messages": [HI], "tools": [LOOK_CHAT], "tool_choice": {"type": "function", "function": {"name": "look"}}},
        BOTH,
    ),
    (
        "`disable_parallel_tool_use`",
        {"messages": [HI], "tools": [LOOK], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
        {"messages": [HI], "tools": [LOOK_CHAT], "tool_choice": "auto", "parallel_tool_calls": False},
        BOTH,
    ),
    (
        "`output_config.format`",
        {"messages": [HI], "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        {
            "messages": [HI],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
            },
        },
        BOTH,
    ),
    (
        "`output_config.effort`",
        {"messages": [HI], "output_config": {"effort": "high"}},
        {"messages": [HI], "reasoning_effort": "high"},
        BOTH,
    ),
    (
        "`output_config.effort`",
        {"messages": [HI], "output_config": {"effort": "max"}},
        {"messages": [HI], "reasoning_effort": "xhigh"},
        BOTH,
    ),
    (
        "`output_config.effort`",
        {"messages": [HI], "output_config": {"effort": "low"}},
        {"messages": [HI], "reasoning_effort": "minimal"},
        BACK,
    ),
    (
        "`thinking` disabled",
        {"messages": [HI], "thinking": {"type": "disabled"}},
        {"messages": [HI], "reasoning_effort": "none"},
        BACK,
    ),
    (
        "`thinking.budget_tokens`",
        {"messages": [HI], "thinking": {"type": "enabled", "budget_tokens": 4_000}},
        {"messages": [HI], "reasoning_effort": "low"},
        FORTH,
    ),
    (
        "`thinking.budget_tokens`",
        {"messages": [HI], "thinking": {"type": "enabled", "budget_tokens": 4_001}},
        {"messages": [HI], "reasoning_effort": "medium"},
        FORTH,
    ),
    (
        "`thinking.budget_tokens`",
        {"messages": [HI], "thinking": {"type": "enabled", "budget_tokens": 31_999}},
        {"messages": [HI], "reasoning_effort": "high"},
        FORTH,
    ),
    ("`max_tokens`", {"messages": [HI], "max_tokens": 7}, {"messages": [HI], "max_tokens": 7}, BOTH),
    ("`max_tokens`", {"messages": [HI], "max_tokens": 7}, {"messages": [HI], "max_completion_tokens": 7}, BACK),
    ("`stop_sequences`", {"messages": [HI], "stop_sequences": ["x"]}, {"messages": [HI], "stop": ["x"]}, BOTH),
    (
        "`temperature`, `top_p`, `top_k`",
        {"messages": [HI], "temperature": 0.5, "top_p": 0.9, "top_k": 4},
        {"messages": [HI], "temperature": 0.5, "top_p": 0.9, "top_k": 4},
        BOTH,
    ),
    (
        "`service_tier` `auto`, `standard_only`",
        {"messages": [HI], "service_tier": "auto"},
        {"messages": [HI], "service_tier": "auto"},
        BOTH,
    ),
    (
        "`service_tier` `auto`, `standard_only`",
        {"messages": [HI], "service_tier": "standard_only"},
        {"messages": [HI], "service_tier": "default"},
        BOTH,
    ),
]
ANSWERS = (
    "stop reason `tool_use`",
    "stop reason `max_tokens`",
    "stop reason `end_turn`",
    "stop reason `refusal`",
    "`usage` with cached tokens in addition to `input_tokens`",
)
"""Rows of answers, which tests/integration/test_http_content.py reads from endpoints."""


def call_of(asked: Asked) -> Call:
    return Call(
        request_id="r",
        attempt=1,
        conversation="c",
        model="m",
        messages=asked.messages,
        system=asked.system,
        max_tokens=asked.max_tokens,
        temperature=asked.temperature,
        stop=asked.stop,
        features=asked.features,
    )


def as_chat(body: dict[str, Any]) -> dict[str, Any]:
    asked = anthropic.read_request({"model": "m", **body})
    return plain(chat_body(call_of(asked), ChatOptions()))


def as_anthropic(body: dict[str, Any]) -> dict[str, Any]:
    asked = chat.read_request({"model": "m", **body})
    return plain(messages_body(call_of(asked), MessagesOptions()))


def plain(body: dict[str, Any]) -> dict[str, Any]:
    """A body as JSON holds it, without what every body has."""
    read: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(body))
    return {name: value for name, value in read.items() if name not in ("model", "stream")}


@pytest.mark.promise("A6")
@pytest.mark.parametrize(("ours", "theirs"), [(ours, theirs) for _, ours, theirs, way in ROWS if way != BACK], ids=str)
def test_the_fields_of_anthropic_s_dialect_are_translated_to_chat(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert as_chat(ours) == theirs


@pytest.mark.promise("A6")
@pytest.mark.parametrize(("ours", "theirs"), [(ours, theirs) for _, ours, theirs, way in ROWS if way != FORTH], ids=str)
def test_the_fields_of_the_chat_dialect_are_translated_to_anthropic_s(
    ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    assert as_anthropic(theirs) == {"max_tokens": 8_192, **ours}


@pytest.mark.promise("A6")
def test_every_row_of_the_table_is_tried() -> None:
    section = PAGE.read_text("utf-8").split("## The mapping")[1].split("\n## ")[0]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in section.splitlines() if line.startswith("| ")][2:]
    assert set(rows) == {row for row, *_ in ROWS} | set(ANSWERS)


# -- what does not map ------------------------------------------------------------------------------------------------


@pytest.mark.promise("A6")
@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"mcp_servers": [{"name": "x"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"speed": "fast"}, "speed"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"output_config": {"task_budget": {"total": 1}}}, "output_config.task_budget"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"messages": [{"role": "user", "content": [{"type": "search_result", "source": "x"}]}]}, "search_result"),
        ({"messages": [block_of("image", {"type": "file", "file_id": "f"})]}, "by file_id"),
        ({"messages": [block_of("document", {"type": "url", "url": "https://there/a.pdf"})]}, "by url"),
        (
            {"messages": [block_of("document", encoded("application/pdf", PAPER), citations={"enabled": True})]},
            "citations",
        ),
    ],
)
def test_features_that_chat_lacks_are_named(body: dict[str, Any], named: str) -> None:
    asked = anthropic.read_request({"model": "m", "messages": [HI], **body})
    wanted = [*asked.unmapped, *needs(asked.features, contents_of(asked.messages, asked.system)).values()]
    assert any(named in name for name in wanted)


@pytest.mark.promise("A6")
@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"n": 2}, "n"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"logprobs": True}, "logprobs"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"web_search_options": {"x": 1}}, "web_search_options"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"seed": 5}, "seed"),
        ({"response_format": {"type": "json_object"}}, "json_object"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "custom"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "allowed_tools"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "input_audio"),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]}, "file"),
    ],
)
def test_features_that_anthropic_lacks_are_named(body: dict[str, Any], named: str) -> None:
    asked = chat.read_request({"model": "m", "messages": [HI], **body})
    wanted = needs(asked.features, contents_of(asked.messages, asked.system))
    assert any(named in name for name in (*asked.unmapped, *wanted, *wanted.values()))


@pytest.mark.promise("A6")
@pytest.mark.parametrize(
    ("reader", "body", "path"),
    [
        (anthropic, {"messages": "Hi"}, "messages"),
        (anthropic, {"messages": []}, "messages"),
        (anthropic, {"messages": [5]}, "messages[0]"),
        (anthropic, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        (anthropic, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (anthropic, {"messages": [HI], "tools": [5]}, "tools[0]"),
        (anthropic, {"messages": [HI], "max_tokens": "7"}, "max_tokens"),
        (anthropic, {"messages": [HI], "service_tier": 5}, "service_tier"),
        (chat, {"messages": [{"role": "critic", "content": "x"}]}, "messages[0].role"),
        (chat, {"messages": [HI, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
        (chat, {"messages": [HI], "tool_choice": 5}, "tool_choice"),
        (chat, {"messages": [HI], "temperature": "hot"}, "temperature"),
        (
            chat,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x,y"}}]}]},
            "messages[0].content[0]",
        ),
        (
            chat,
            {
                "messages": [
                    HI,
                    {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{"}}]},
                ]
            },
            "messages[1].tool_calls[0].function.arguments",
        ),
    ],
)
def test_an_invalid_request_is_refused_with_its_place(reader: Any, body: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidData) as caught:
        reader.read_request({"model": "m", **body})
    assert caught.value.facts["path"] == path


# -- whatever is asked ------------------------------------------------------------------------------------------------

words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(words, json_values, max_size=3)
texts = st.builds(lambda text: {"type": "text", "text": text}, words)
pictures = st.builds(
    lambda data: {"type": "image", "source": encoded("image/png", base64.b64encode(data).decode())},
    st.binary(max_size=20),
)
said = words | st.lists(texts | pictures, min_size=1, max_size=3).filter(
    lambda blocks: any(b["type"] == "image" for b in blocks)
).map(tuple)


@st.composite
def dialogues(draw: st.DrawFn) -> list[Message]:
    """Dialogues of words, images, and calls of tools that are answered."""
    messages = [Message("user", draw(said))]
    for turn in range(draw(st.integers(0, 3))):
        calls = [
            {
                "type": "tool_use",
                "id": f"call_{turn}_{n}",
                "name": draw(st.sampled_from(["look", "find"])),
                "input": draw(objects),
            }
            for n in range(draw(st.integers(0, 2)))
        ]
        text = draw(words)
        messages.append(Message("assistant", ({"type": "text", "text": text}, *calls) if calls else text))
        results = tuple({"type": "tool_result", "tool_use_id": call["id"], "content": draw(words)} for call in calls)
        messages.append(Message("user", results or draw(said)))
    return messages


features = st.builds(
    Features,
    tools=st.just(({"name": "look", "description": "Looks", "input_schema": {"type": "object"}},)),
    tool_choice=st.none() | st.sampled_from([{"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "look"}]),
    response_format=st.none()
    | st.just({"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}),
    reasoning=st.none() | st.sampled_from([{"effort": "low"}, {"effort": "high"}]),
    top_p=st.none() | st.sampled_from([0.1, 1.0]),
    top_k=st.none() | st.integers(1, 9),
    service_tier=st.none() | st.sampled_from(["auto", "default"]),
)


@pytest.mark.promise("A6")
@given(messages=dialogues(), system=st.none() | words, asks=features)
def test_a_written_and_reread_request_asks_the_same(
    messages: list[Message], system: str | None, asks: Features
) -> None:
    asked = Asked(messages=tuple(messages), model="m", system=system, max_tokens=9, features=asks)
    theirs = chat.read_request(through_json(chat_body(call_of(asked), ChatOptions())))
    ours = anthropic.read_request(through_json(messages_body(call_of(asked), MessagesOptions())))
    assert theirs == asked
    if asks.tool_choice is not None:
        assert ours == asked
    assert ours.messages == asked.messages


def through_json(body: dict[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(body))
    return read


names = st.text("abcdefghij_", min_size=1, max_size=12)
SETTLED = {"model", "stream", "stream_options", "max_tokens"}


@pytest.mark.promise("A6")
@given(body=st.dictionaries(names, json_values, max_size=6), stream=st.booleans())
def test_a_native_request_goes_out_with_every_field_it_has(body: dict[str, Any], stream: bool) -> None:
    body = {**body, "model": "theirs", "messages": [HI], "stream": stream, "max_tokens": 5}
    asked = Asked(messages=())
    for dialect in ("anthropic", "chat"):
        native = Native(dialect=dialect, body=body)
        call = msgspec.structs.replace(call_of(asked), native=native, stream=stream)
        sent = (
            messages_body(call, MessagesOptions())
            if dialect == "anthropic"
            else chat_body(call, ChatOptions(stream_usage=False))
        )
        assert sent == {**body, "model": "m"}


@pytest.mark.promise("A6")
@given(
    body=st.dictionaries(
        st.sampled_from(
            [
                "system",
                "tools",
                "tool_choice",
                "stop",
                "stop_sequences",
                "thinking",
                "response_format",
                "output_config",
                "max_tokens",
                "top_p",
                "service_tier",
                "reasoning_effort",
            ]
        ),
        json_values,
    ),
    messages=json_values,
)
def test_whatever_a_body_holds_it_is_read_or_refused(body: dict[str, Any], messages: Any) -> None:
    for reader in (anthropic, chat):
        path, asked = read(reader, {"model": "m", **body, "messages": messages})
        assert re.match(r"\w+", path) if asked is None else asked.messages


def read(reader: Any, body: dict[str, Any]) -> tuple[str, Asked | None]:
    try:
        return "", reader.read_request(body)
    except InvalidData as error:
        return error.facts["path"], None
