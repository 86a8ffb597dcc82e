"""Streams and bytes as endpoints really send them: no answer that came is lost, and no silence lasts for ever."""

from __future__ import annotations

import gzip
import json
from typing import Any

import msgspec
import pytest

from ksi.errors import FailureClass
from ksi.providers.http.access import Timeouts
from ksi.providers.http.endpoint import is_stream
from ksi.request import Usage
from tests.endpoint import Answer, chat_answer, message_answer
from tests.integration.http_calls import a_call, both_apis, failure, pair, whole

COUNTED = Usage(input_tokens=10, output_tokens=5)
QUICK = Timeouts(end=0.3)
DONE = b"data: [DONE]\n\n"


def event(value: Any, name: str | None = None) -> bytes:
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + (value if isinstance(value, bytes) else msgspec.json.encode(value)) + b"\n\n"


def piece(text: str | None = None, finish: Any = None, **choice: Any) -> bytes:
    delta = {} if text is None else {"content": text}
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish, **choice}]})


def raw_piece(data: bytes) -> bytes:
    return event(b'{"choices": [{"index": 0, "delta": {"content": "' + data + b'"}, "finish_reason": null}]}')


CHAT = (piece("the whole "), piece("answer"), piece(finish="stop"))
COUNTS = event({"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}})
MESSAGE = (
    event({"type": "message_start", "message": {"model": "m", "usage": {"input_tokens": 10, "output_tokens": 1}}}),
    event({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}),
    event({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "the whole answer"}}),
    event({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 5}}),
)
WHOLE = {"openai": (*CHAT, COUNTS), "anthropic": MESSAGE}
BEGUN = {"openai": CHAT[:1], "anthropic": MESSAGE[:2]}


class TestEnds:
    """An answer is whole behind its finish reason, whatever follows."""

    @both_apis
    @pytest.mark.promise("A8")
    @pytest.mark.parametrize("then", ["stall", "reset", "end", b": ping\n\n", b"event: ping\ndata: {}\n\n"], ids=str)
    async def test_a_finish_reason_ends_the_answer_whatever_comes_behind_it(self, api: str, then: Any) -> None:
        async with pair(api, Answer(parts=WHOLE[api], then=then), timeouts=QUICK) as (endpoint, provider):
            chunks, completion = await whole(provider, a_call(stream=True))
            assert len(endpoint.requests) == 1
        assert ("".join(chunks), completion.text) == ("the whole answer", "the whole answer")
        assert (completion.stop_reason, completion.usage) == ("end_turn", COUNTED)

    @pytest.mark.promise("A8")
    async def test_a_reset_behind_the_finish_reason_leaves_the_usage_unknown(self) -> None:
        async with pair("openai", Answer(parts=CHAT, then="reset")) as (_, provider):
            _, completion = await whole(provider, a_call(stream=True))
        assert (completion.text, completion.usage) == ("the whole answer", None)

    @both_apis
    @pytest.mark.promise("A8")
    async def test_an_error_behind_the_finish_reason_takes_no_text_away(self, api: str) -> None:
        late = event({"error": {"message": "too late", "type": "server_error"}, "type": "error"}, "error")
        async with pair(api, Answer(parts=(*WHOLE[api], late))) as (_, provider):
            assert (await whole(provider, a_call(stream=True)))[1].text == "the whole answer"

    @pytest.mark.promise("A8")
    async def test_a_finish_reason_with_every_piece_is_no_end(self) -> None:
        parts = (piece("the ", "stop"), piece("whole ", "stop"), piece("answer", "stop"), DONE)
        async with pair("openai", Answer(parts=parts, then="stall"), timeouts=QUICK) as (_, provider):
            assert (await whole(provider, a_call(stream=True)))[1].text == "the whole answer"

    @both_apis
    @pytest.mark.promise("A8", "F7")
    @pytest.mark.parametrize(
        "beat", [b": ping\n\n", b"event: ping\ndata: {}\n\n", b"data:\n\n", b'data: ""\n\n', b"\n"]
    )
    @pytest.mark.parametrize("begun", [False, True])
    async def test_pings_are_no_progress_of_the_answer(self, api: str, beat: bytes, begun: bool) -> None:
        answer = Answer(parts=BEGUN[api] if begun else (), then=beat)
        async with pair(api, answer, timeouts=Timeouts(idle=0.3)) as (_, provider):
            error = await failure(provider, a_call(stream=True))
        assert (error.failure, "0.3 s" in error.message) == (FailureClass.TIMEOUT, True)

    @both_apis
    @pytest.mark.promise("A8", "F7")
    async def test_an_answer_that_goes_on_between_pings_is_not_idle(self, api: str) -> None:
        answer = Answer(pieces=tuple("slowly"), piece_delay=0.1)
        async with pair(api, answer, timeouts=Timeouts(idle=0.4)) as (_, provider):
            assert (await whole(provider, a_call(stream=True)))[1].text == "slowly"

    @both_apis
    @pytest.mark.promise("A8")
    async def test_a_stream_of_nothing_but_odd_data_tells_it(self, api: str) -> None:
        async with pair(api, Answer(parts=(b"data: come back later\n\n",))) as (_, provider):
            error = await failure(provider, a_call(stream=True))
        assert error.failure is FailureClass.PROVIDER_ERROR
        assert "come back later" in error.message


class TestEvents:
    """Heartbeats and side fields of any shape."""

    @both_apis
    @pytest.mark.promise("A8")
    @pytest.mark.parametrize(
        "beat",
        [
            b"data:\n\n",
            b"data: \n\n",
            b'event: ping\ndata: ""\n\n',
            b"event: ping\ndata: ping\n\n",
            b"event: keepalive\ndata: {}\n\n",
            b"event: heartbeat\ndata: {broken\n\n",
            b'data: {"type": "ping"}\n\n',
            b"data: 7\n\n",
            b": OPENROUTER PROCESSING\n\n",
        ],
    )
    async def test_heartbeats_are_passed_over(self, api: str, beat: bytes) -> None:
        parts = [part for one in WHOLE[api] for part in (beat, one)]
        async with pair(api, Answer(parts=(*parts, beat))) as (_, provider):
            _, completion = await whole(provider, a_call(stream=True))
        assert (completion.text, completion.usage) == ("the whole answer", COUNTED)

    @both_apis
    @pytest.mark.promise("A8")
    @pytest.mark.parametrize("done", [b"data: [DONE] \n\n", b"data:[DONE]\n\n", b"data:  [DONE]\t\n\n"])
    async def test_the_end_may_have_blanks_around_it(self, api: str, done: bytes) -> None:
        async with pair(api, Answer(parts=(*WHOLE[api], done), then="stall"), timeouts=Timeouts(end=60)) as (
            _,
            provider,
        ):
            assert (await whole(provider, a_call(stream=True)))[1].text == "the whole answer"

    @pytest.mark.promise("A8")
    async def test_pieces_may_be_called_messages(self) -> None:
        said = [{"choices": [{"message": {"content": text}, "finish_reason": None}]} for text in ("the ", "answer")]
        parts = (*map(event, said), piece(finish="stop"), DONE)
        async with pair("openai", Answer(parts=parts)) as (_, provider):
            assert (await whole(provider, a_call(stream=True)))[1].text == "the answer"

    @pytest.mark.promise("A8")
    async def test_a_whole_message_behind_its_pieces_is_not_said_twice(self) -> None:
        last = event({"choices": [{"message": {"content": "the whole answer"}, "finish_reason": "stop"}]})
        async with pair("openai", Answer(parts=(*CHAT[:2], last, DONE))) as (_, provider):
            assert (await whole(provider, a_call(stream=True)))[1].text == "the whole answer"

    @pytest.mark.promise("A8")
    async def test_of_two_choices_the_first_is_taken(self) -> None:
        other = event({"choices": [{"index": 1, "delta": {"content": "other"}, "finish_reason": "stop"}]})
        parts = (CHAT[0], other, CHAT[1], other, CHAT[2], DONE)
        async with pair("openai", Answer(parts=parts)) as (_, provider):
            assert (await whole(provider, a_call(stream=True)))[1].text == "the whole answer"

    @pytest.mark.promise("A8")
    @pytest.mark.parametrize(
        "choice",
        [
            {"index": None},
            {"index": 1},
            {"finish_reason": 0},
            {"logprobs": "none"},
            {"message": {"content": "the answer", "refusal": [], "tool_calls": "", "function_call": 7}},
        ],
    )
    async def test_side_fields_of_a_choice_may_be_anything(self, choice: dict[str, Any]) -> None:
        body = {"choices": [{"index": 0, "message": {"content": "the answer"}, "finish_reason": "stop", **choice}]}
        async with pair("openai", Answer(body=msgspec.json.encode({**body, "model": 5, "usage": "none"}))) as (
            _,
            provider,
        ):
            _, completion = await whole(provider, a_call())
        assert (completion.text, completion.model, completion.usage) == ("the answer", "small", None)

    @pytest.mark.promise("A8")
    async def test_side_fields_of_a_message_may_be_anything(self) -> None:
        content = [{"type": "text", "text": "the answer", "citations": 7}, "noise", {"type": None}]
        body = {"type": 5, "content": content, "model": [], "stop_reason": 0, "usage": {"input_tokens": "many"}}
        async with pair("anthropic", Answer(body=msgspec.json.encode(body))) as (_, provider):
            _, completion = await whole(provider, a_call())
        assert (completion.text, completion.model, completion.usage) == ("the answer", "small", None)
        assert completion.stop_reason is None

    @pytest.mark.promise("A8")
    @pytest.mark.parametrize(
        "side", [{"usage": []}, {"usage": "", "model": 7}, {"choices": [{"delta": []}]}, {"choices": [{"delta": ""}]}]
    )
    async def test_side_fields_of_an_event_may_be_anything(self, side: dict[str, Any]) -> None:
        async with pair("openai", Answer(parts=(CHAT[0], event(side), *CHAT[1:], event(side), COUNTS, DONE))) as (
            _,
            provider,
        ):
            _, completion = await whole(provider, a_call(stream=True))
        assert (completion.text, completion.usage) == ("the whole answer", COUNTED)

    @pytest.mark.promise("A7")
    async def test_running_totals_in_every_piece_never_fall(self) -> None:
        def counted(prompt: int, made: int) -> bytes:
            return piece("x", usage=None) + event(
                {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": made}}
            )

        parts = (counted(10, 0), counted(10, 5), counted(0, 0), piece(finish="stop"), DONE)
        async with pair("openai", Answer(parts=parts)) as (_, provider):
            _, completion = await whole(provider, a_call(stream=True))
        assert completion.usage == COUNTED

    @pytest.mark.promise("A7")
    async def test_a_closing_zero_is_no_news(self) -> None:
        start = {"input_tokens": 15, "output_tokens": 0, "cache_read_input_tokens": 4000}
        last = {"input_tokens": 0, "output_tokens": 12, "cache_read_input_tokens": 0}
        parts = (
            event({"type": "message_start", "message": {"model": "m", "usage": start}}),
            *MESSAGE[1:3],
            event({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": last}),
            event({"type": "message_stop"}),
        )
        async with pair("anthropic", Answer(parts=parts)) as (_, provider):
            _, completion = await whole(provider, a_call(stream=True))
        assert completion.usage == Usage(input_tokens=15, output_tokens=12, cache_read_tokens=4000)


class TestBytes:
    """Bodies whose bytes, types and framing are not quite right."""

    @pytest.mark.promise("A8")
    @pytest.mark.parametrize(
        ("pieces", "text"),
        [
            ((b"smile \\ud83d", b"\\ude00 end"), "smile \U0001f600 end"),
            ((b"smile \xf0\x9f", b"\x98\x80 end"), "smile \U0001f600 end"),
            ((b"cut \\ud83d",), "cut \ufffd"),
            ((b"stray \xff byte",), "stray \ufffd byte"),
        ],
    )
    async def test_torn_characters_of_a_chat_are_joined(self, pieces: tuple[bytes, ...], text: str) -> None:
        parts = (*map(raw_piece, pieces), piece(finish="stop"), DONE)
        async with pair("openai", Answer(parts=parts)) as (endpoint, provider):
            chunks, completion = await whole(provider, a_call(stream=True))
            assert len(endpoint.requests) == 1
        assert "".join(chunks) == completion.text == text

    @pytest.mark.promise("A8")
    async def test_torn_characters_of_a_message_are_joined(self) -> None:
        def half(data: bytes) -> bytes:
            text = b'{"type": "text_delta", "text": "' + data + b'"}'
            return event(b'{"type": "content_block_delta", "index": 0, "delta": ' + text + b"}")

        parts = (*MESSAGE[:2], half(b"smile \\ud83d"), half(b"\\ude00 \xf0\x9f"), half(b"\x98\x80"), MESSAGE[3])
        async with pair("anthropic", Answer(parts=parts)) as (_, provider):
            _, completion = await whole(provider, a_call(stream=True))
        assert completion.text == "smile \U0001f600 \U0001f600"

    @both_apis
    @pytest.mark.promise("A8", "R3")
    @pytest.mark.parametrize("torn", [b"cut \\ud83d", b"cut \xff"])
    async def test_a_whole_answer_with_half_a_character_stands(self, api: str, torn: bytes) -> None:
        answer = (chat_answer if api == "openai" else message_answer)(Answer(pieces=("TORN",)), "m")
        body = json.dumps(answer).encode().replace(b"TORN", torn)
        async with pair(api, Answer(body=body)) as (_, provider):
            _, completion = await whole(provider, a_call())
        assert completion.text == "cut \ufffd"
        assert completion.raw is not None
        assert "cut \ufffd" in completion.raw.decode()

    @both_apis
    @pytest.mark.promise("A8")
    @pytest.mark.parametrize("status", [201, 202])
    @pytest.mark.parametrize("stream", [False, True])
    async def test_another_good_status_is_good(self, api: str, status: int, stream: bool) -> None:
        body = msgspec.json.encode((chat_answer if api == "openai" else message_answer)(Answer(), "m"))
        answer = Answer(parts=WHOLE[api], status=status) if stream else Answer(body=body, status=status)
        async with pair(api, answer) as (_, provider):
            assert (await whole(provider, a_call(stream=stream)))[1].text

    @both_apis
    @pytest.mark.promise("A8")
    @pytest.mark.parametrize(
        "kind", ["text/plain", "application/vnd.api+json", "application/json", "text/html", "application/octet-stream"]
    )
    @pytest.mark.parametrize("asked", [False, True])
    async def test_a_stream_is_known_by_its_bytes(self, api: str, kind: str, asked: bool) -> None:
        async with pair(api, Answer(parts=(b": hello\n\n", *WHOLE[api]), content_type=kind)) as (_, provider):
            assert (await whole(provider, a_call(stream=asked)))[1].text == "the whole answer"

    @both_apis
    @pytest.mark.promise("A8")
    @pytest.mark.parametrize("kind", ["text/event-stream", "text/plain", "application/x-ndjson"])
    async def test_a_whole_answer_is_known_by_its_bytes(self, api: str, kind: str) -> None:
        body = b"\n \n" + msgspec.json.encode((chat_answer if api == "openai" else message_answer)(Answer(), "m"))
        async with pair(api, Answer(body=body, content_type=kind)) as (_, provider):
            assert (await whole(provider, a_call(stream=True)))[1].text == "Hello there."

    @both_apis
    @pytest.mark.promise("A8")
    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_body_that_is_whole_json_stands_though_more_was_promised(self, api: str, stream: bool) -> None:
        body = msgspec.json.encode((chat_answer if api == "openai" else message_answer)(Answer(), "m"))
        raw = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n" + body
        async with pair(api, Answer(raw=raw)) as (_, provider):
            assert (await whole(provider, a_call(stream=stream)))[1].text == "Hello there."
        async with pair(api, Answer(raw=raw[:-1])) as (_, provider):
            assert (await failure(provider, a_call(stream=stream))).failure is FailureClass.NETWORK_ERROR

    @both_apis
    @pytest.mark.promise("A8")
    async def test_a_compressed_body_is_read(self, api: str) -> None:
        body = gzip.compress(msgspec.json.encode((chat_answer if api == "openai" else message_answer)(Answer(), "m")))
        async with pair(api, Answer(body=body, headers={"Content-Encoding": "gzip"})) as (_, provider):
            assert (await whole(provider, a_call()))[1].text == "Hello there."

    @both_apis
    @pytest.mark.promise("A8")
    @pytest.mark.parametrize(
        "headers",
        [
            {"Content-Security-Policy": "x" * 9000},
            {f"X-Gateway-{number}": "v" for number in range(300)},
            {f"Set-Cookie-{number}": "c" * 3000 for number in range(20)},
        ],
        ids=["one", "many", "all"],
    )
    async def test_large_heads_are_read(self, api: str, headers: dict[str, str]) -> None:
        async with pair(api, Answer(headers=headers)) as (endpoint, provider):
            assert (await whole(provider, a_call()))[1].text == "Hello there."
            assert len(endpoint.requests) == 1

    @both_apis
    @pytest.mark.promise("F1")
    @pytest.mark.parametrize(
        ("head", "words"),
        [
            (b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", "Transfer-Encoding"),
            (b"Content-Length: 2\r\nX-Policy: " + b"x" * 100_000 + b"\r\n", "65536 bytes"),
            (b"".join(b"X-%d: v\r\n" % number for number in range(2000)), "Too many headers"),
        ],
        ids=["framing", "one header", "many headers"],
    )
    async def test_a_form_that_can_never_be_read_is_not_asked_for_again(
        self, api: str, head: bytes, words: str
    ) -> None:
        raw = b"HTTP/1.1 200 OK\r\n" + head + b"\r\n2\r\n{}\r\n0\r\n\r\n"
        async with pair(api, Answer(raw=raw)) as (_, provider):
            error = await failure(provider, a_call())
        assert (error.failure, error.retryable) == (FailureClass.INVALID_REQUEST, False)
        assert words in error.message

    @both_apis
    @pytest.mark.promise("F1")
    @pytest.mark.parametrize("encoding", ["br", "zstd"])
    async def test_a_compression_that_is_not_installed_is_named(
        self, api: str, encoding: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("aiohttp.http_parser.HAS_BROTLI", False)
        monkeypatch.setattr("aiohttp.http_parser.HAS_ZSTD", False)
        async with pair(api, Answer(body=b"....", headers={"Content-Encoding": encoding})) as (_, provider):
            error = await failure(provider, a_call())
        assert (error.failure, error.retryable) == (FailureClass.INVALID_REQUEST, False)
        assert "install" in error.message


@pytest.mark.parametrize(
    ("opening", "kind", "asked", "stream"),
    [
        (b"data: {}", "text/plain", False, True),
        (b"\xef\xbb\xbfdata: {}", "application/json", False, True),
        (b"\n\nevent: ping", "application/json", False, True),
        (b": hello", "text/html", False, True),
        (b' {"a": "data: x"}', "text/event-stream", True, False),
        (b"<html>", "text/event-stream", True, False),
        (b"dat", "text/event-stream", False, True),
        (b"dat", "text/plain", True, True),
        (b"dat", "text/plain", False, False),
        (b"dat", "application/json", True, False),
        (b"", "application/octet-stream", True, False),
        (b"", "text/event-stream", True, True),
    ],
)
def test_the_first_bytes_say_whether_a_body_is_a_stream(opening: bytes, kind: str, asked: bool, stream: bool) -> None:
    assert is_stream(opening, kind, asked=asked) is stream
