"""Streamed content blocks, put together again."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ksi.errors import FailureClass, ProviderError
from ksi.providers.anthropic import streamed_blocks


def start(index: int, **block: Any) -> bytes:
    return msgspec.json.encode({"type": "content_block_start", "index": index, "content_block": block})


def delta(index: int, kind: str, **more: Any) -> bytes:
    event = {"type": "content_block_delta", "index": index, "delta": {"type": kind, **more}}
    return msgspec.json.encode(event)


@pytest.mark.promise("A4")
def test_blocks_come_out_as_the_api_would_have_sent_them_whole() -> None:
    cited = {"type": "web_search_result_location", "url": "https://there"}
    events = [
        start(0, type="thinking", thinking="", signature=""),
        delta(0, "thinking_delta", thinking="I should "),
        delta(0, "thinking_delta", thinking="search."),
        delta(0, "signature_delta", signature="sig=="),
        start(1, type="server_tool_use", id="srvtoolu_1", name="web_search", input={}),
        delta(1, "input_json_delta", partial_json=""),
        delta(1, "input_json_delta", partial_json='{"que'),
        delta(1, "input_json_delta", partial_json='ry": "x"}'),
        start(2, type="web_search_tool_result", tool_use_id="srvtoolu_1", content=[{"encrypted_content": "abc"}]),
        start(3, type="text", text="", citations=None),
        delta(3, "text_delta", text="First "),
        delta(3, "citations_delta", citation=cited),
        delta(3, "text_delta", text="half."),
        start(4, type="server_tool_use", id="srvtoolu_2", name="clock", input={}),
    ]
    assert streamed_blocks(events) == [
        {"type": "thinking", "thinking": "I should search.", "signature": "sig=="},
        {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "x"}},
        {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": [{"encrypted_content": "abc"}]},
        {"type": "text", "text": "First half.", "citations": [cited]},
        {"type": "server_tool_use", "id": "srvtoolu_2", "name": "clock", "input": {}},
    ]


@pytest.mark.parametrize(
    "events",
    [
        [start(0, type="text", text=""), delta(0, "new_delta", text="x")],
        [start(0, type="server_tool_use", input={}), delta(0, "input_json_delta", partial_json="{broken")],
    ],
)
def test_pieces_that_cannot_go_back_as_they_came_are_refused_by_name(events: list[bytes]) -> None:
    with pytest.raises(ProviderError, match="pause_turn") as caught:
        streamed_blocks(events, whole=True)
    assert caught.value.failure is FailureClass.PROVIDER_ERROR
