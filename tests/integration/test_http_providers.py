"""Both HTTP providers against a scripted endpoint on loopback: answers, usage, failures, closing, time limits."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from ksi.content.blocks import Message
from ksi.errors import ConfigError, FailureClass, ProviderError
from ksi.providers.base import Chunk, Completion, Frame, Piece
from ksi.providers.http.access import Timeouts
from ksi.providers.http.endpoint import Streaming
from ksi.providers.openai import Options, chat_body
from ksi.request import Usage
from tests.endpoint import Answer, ScriptedEndpoint
from tests.integration.http_calls import (
    CHAT_OR_MESSAGE,
    KEY,
    SOON,
    a_call,
    both_apis,
    both_ways,
    failure,
    make,
    pair,
    running,
    whole,
)


def said(item: Piece | Frame | Completion) -> str:
    """The received text."""
    assert isinstance(item, Chunk | Completion)
    return item.text


class TestAnswers:
    """The answer, and the request sent for it."""

    @both_apis
    @pytest.mark.promise("T1")
    @pytest.mark.parametrize(
        "pieces",
        [("Hello", " there."), ("one\n\ntwo\r\n", "data: x", "\u2028"), ("é🙂" * 500,), tuple("abc" * 100)],
    )
    async def test_streamed_and_whole_answers_are_the_same(self, api: str, pieces: tuple[str, ...]) -> None:
        usage = Usage(input_tokens=11, output_tokens=7, cache_read_tokens=5)
        answer = Answer(pieces=pieces, usage=usage, model="small-2", stop_reason="stop_sequence")
        async with pair(api, answer) as (_, provider):
            no_chunks, at_once = await whole(provider, a_call())
            chunks, streamed = await whole(provider, a_call(stream=True))
        assert no_chunks == []
        assert "".join(chunks) == answer.text
        assert "" not in chunks
        expected = Completion(text=answer.text, model="small-2", usage=usage, stop_reason="stop_sequence")
        assert streamed == expected
        assert msgspec.structs.replace(at_once, raw=None) == expected

    @both_apis
    @pytest.mark.promise("R3")
    async def test_a_whole_answer_is_kept_untouched(self, api: str) -> None:
        async with pair(api, Answer()) as (_, provider):
            _, completion = await whole(provider, a_call())
        assert completion.raw is not None
        assert json.loads(completion.raw)["model"] == "small"

    @pytest.mark.promise("T1")
    @both_ways
    async def test_openai_s_cached_tokens_are_not_counted_as_input_again(self, stream: bool) -> None:
        usage = Usage(input_tokens=100, output_tokens=40, cache_read_tokens=900, reasoning_tokens=30)
        async with pair("openai", Answer(usage=usage)) as (endpoint, provider):
            _, completion = await whole(provider, a_call(stream=stream))
        assert completion.usage == usage
        asked = endpoint.requests[0].json
        assert asked.get("stream_options") == ({"include_usage": True} if stream else None)

    @pytest.mark.promise("T1")
    @both_ways
    async def test_anthropic_s_output_is_its_last_count_and_never_a_sum(self, stream: bool) -> None:
        usage = Usage(input_tokens=100, output_tokens=40, cache_read_tokens=900, cache_write_tokens=60)
        async with pair("anthropic", Answer(usage=usage, pieces=tuple("many pieces"))) as (_, provider):
            _, completion = await whole(provider, a_call(stream=stream))
        assert completion.usage == usage

    @pytest.mark.promise("T1")
    async def test_a_later_count_replaces_an_earlier_one_field_by_field(self) -> None:
        events = [
            {"type": "message_start", "message": {"model": "m", "usage": {"input_tokens": 5, "output_tokens": 1}}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hello"}},
            {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 20, "cache_read_input_tokens": 3}},
            {
                "type": "message_delta",
                "delta": {"stop_reason": "end_turn"},
                "usage": {"input_tokens": 6, "output_tokens": 30},
            },
            {"type": "something_new", "value": 1},
            {"type": "message_stop"},
        ]
        body = b"".join(b"data: " + msgspec.json.encode(event) + b"\n\n" for event in events)
        async with pair("anthropic", Answer(body=body, content_type="text/event-stream")) as (_, provider):
            _, completion = await whole(provider, a_call(stream=True))
        assert completion.usage == Usage(input_tokens=6, output_tokens=30, cache_read_tokens=3)

    @both_apis
    @both_ways
    @pytest.mark.promise("T1")
    async def test_no_report_is_unknown_usage_and_not_zero(self, api: str, stream: bool) -> None:
        async with pair(api, Answer(usage=None)) as (_, provider):
            _, completion = await whole(provider, a_call(stream=stream))
        assert completion.usage is None

    async def test_an_endpoint_that_rejects_stream_options_can_be_spared_them(self) -> None:
        async with ScriptedEndpoint(Answer()) as endpoint:
            provider = make("openai", endpoint.url, stream_usage=False)
            async with running(provider):
                _, completion = await whole(provider, a_call(stream=True))
        assert "stream_options" not in endpoint.requests[0].json
        assert completion.usage is None

    @both_apis
    async def test_the_call_goes_out_as_the_api_wants_it(self, api: str) -> None:
        history = [Message("user", "One?"), Message("assistant", "1"), Message("user", "Two?")]
        call = a_call(messages=history, system="Be brief.", max_tokens=9, temperature=0.5, stop=["END"])
        async with pair(api, Answer(), headers={"X-Team": "blue"}) as (endpoint, provider):
            await whole(provider, call)
        seen = endpoint.requests[0]
        wire = [msgspec.to_builtins(message) for message in history]
        common = {"model": "small", "max_tokens": 9, "temperature": 0.5, "stream": False}
        if api == "openai":
            assert seen.path == "/v1/chat/completions"
            assert seen.headers["authorization"] == f"Bearer {KEY}"
            system = {"role": "system", "content": "Be brief."}
            assert seen.json == {**common, "messages": [system, *wire], "stop": ["END"]}
        else:
            assert seen.path == "/v1/messages"
            assert seen.headers["x-api-key"] == KEY
            assert seen.headers["anthropic-version"] == "2023-06-01"
            assert seen.json == {**common, "messages": wire, "system": "Be brief.", "stop_sequences": ["END"]}
        assert seen.headers["content-type"] == "application/json"
        assert seen.headers["x-team"] == "blue"

    @both_apis
    async def test_options_add_and_fill_in_but_never_override_the_call(self, api: str) -> None:
        options = {
            "model": "other",
            "messages": [],
            "stream": True,
            "stream_options": {"include_usage": False},
            "temperature": 0.9,
            "max_tokens": 5,
            "top_p": 0.1,
        }
        async with pair(api, Answer()) as (endpoint, provider):
            await whole(provider, a_call(options=options, temperature=0.2))
        asked = endpoint.requests[0].json
        assert (asked["model"], asked["stream"], len(asked["messages"])) == ("small", False, 1)
        assert (asked["temperature"], asked["max_tokens"], asked["top_p"]) == (0.2, 5, 0.1)
        if api == "openai":
            assert "stream_options" not in asked

    async def test_blank_messages_are_left_out_for_anthropic(self) -> None:
        messages = [Message("user", "Hi"), Message("assistant", ""), Message("user", "Again")]
        async with pair("anthropic", Answer()) as (endpoint, provider):
            await whole(provider, a_call(messages=messages))
        assert [message["content"] for message in endpoint.requests[0].json["messages"]] == ["Hi", "Again"]

    async def test_anthropic_s_base_url_may_end_with_its_version(self) -> None:
        async with (
            ScriptedEndpoint(Answer()) as endpoint,
            running(make("anthropic", f"{endpoint.url}/v1/")) as provider,
        ):
            await whole(provider, a_call())
        assert endpoint.requests[0].path == "/v1/messages"

    async def test_a_query_in_the_base_url_stays_behind_the_path(self) -> None:
        async with ScriptedEndpoint(Answer()) as endpoint:
            url = f"{endpoint.url}/deployments/a?api-version=1"
            async with running(make("openai", "", base_url=url)) as provider:
                await whole(provider, a_call())
        assert (endpoint.requests[0].path, endpoint.requests[0].query) == (
            "/deployments/a/chat/completions",
            "api-version=1",
        )

    @both_apis
    @pytest.mark.parametrize(
        ("streaming", "asked", "sent"),
        [(Streaming.ALWAYS, False, True), (Streaming.NEVER, True, False), (Streaming.ASKED, True, True)],
    )
    async def test_the_streaming_switch_decides_the_request_s_form(
        self, api: str, streaming: Streaming, asked: bool, sent: bool
    ) -> None:
        async with pair(api, Answer(), streaming=streaming) as (endpoint, provider):
            chunks, completion = await whole(provider, a_call(stream=asked))
        assert endpoint.requests[0].json["stream"] is sent
        assert provider.capabilities.stream is (streaming is not Streaming.NEVER)
        assert "".join(chunks) == completion.text == "Hello there."

    @both_apis
    @pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
    async def test_a_stream_may_end_its_lines_as_it_likes(self, api: str, newline: bytes) -> None:
        async with pair(api, Answer(newline=newline)) as (_, provider):
            assert (await whole(provider, a_call(stream=True)))[1].text == "Hello there."

    async def test_text_in_parts_is_read_and_thinking_is_not(self) -> None:
        content = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "Yes"}]
        body = msgspec.json.encode({"choices": [{"index": 0, "message": {"content": content}}]})
        async with pair("openai", Answer(body=body)) as (_, provider):
            assert (await whole(provider, a_call()))[1].text == "Yes"

    async def test_counts_written_as_decimals_or_null_are_read(self) -> None:
        usage = {"prompt_tokens": 5.0, "completion_tokens": "2", "prompt_tokens_details": {"cached_tokens": None}}
        body = msgspec.json.encode({"choices": [{"message": {"content": "Yes"}}], "usage": usage})
        async with pair("openai", Answer(body=body)) as (_, provider):
            _, completion = await whole(provider, a_call())
        assert (completion.text, completion.usage) == ("Yes", Usage(input_tokens=5, output_tokens=2))

    @both_apis
    @pytest.mark.promise("T1")
    @pytest.mark.parametrize("count", [-1, 10**30])
    async def test_counts_that_cannot_be_are_no_report(self, api: str, count: int) -> None:
        usage = Usage(input_tokens=10, output_tokens=count)
        async with pair(api, Answer(body=json.dumps(CHAT_OR_MESSAGE[api](Answer(usage=usage), "m")).encode())) as (
            _,
            provider,
        ):
            assert (await whole(provider, a_call()))[1].usage is None

    @pytest.mark.parametrize(
        ("field", "openai", "sent"),
        [
            (None, False, "max_tokens"),
            (None, True, "max_completion_tokens"),
            ("max_tokens", True, "max_tokens"),
            ("limit", False, "limit"),
        ],
    )
    def test_the_answer_s_limit_has_the_name_that_the_endpoint_knows(
        self, field: str | None, openai: bool, sent: str
    ) -> None:
        body = chat_body(a_call(max_tokens=7), Options(max_tokens_field=field), openai=openai)
        assert {name: value for name, value in body.items() if value == 7} == {sent: 7}

    @both_apis
    async def test_a_proxy_is_sent_the_whole_url(self, api: str) -> None:
        async with ScriptedEndpoint(Answer()) as proxy:
            provider = make(api, "http://model.invalid", proxy=proxy.url)
            async with running(provider):
                await whole(provider, a_call())
        assert proxy.requests[0].target.startswith("http://model.invalid/v1/")

    @both_apis
    @both_ways
    async def test_a_prompt_of_ten_megabytes_arrives(self, api: str, stream: bool) -> None:
        prompt = "x" * 10_000_000
        async with pair(api, Answer()) as (endpoint, provider):
            await whole(provider, a_call(prompt, stream=stream))
        assert endpoint.requests[0].json["messages"][0]["content"] == prompt

    @both_apis
    @both_ways
    @pytest.mark.parametrize("answer", [Answer(), Answer(end_delay=0.01)])
    async def test_calls_one_after_another_share_one_connection(self, api: str, stream: bool, answer: Answer) -> None:
        async with pair(api, answer) as (endpoint, provider):
            for _ in range(5):
                await whole(provider, a_call(stream=stream))
            assert endpoint.connections == 1
            assert len(endpoint.requests) == 5

    @both_apis
    async def test_an_endpoint_that_never_closes_its_stream_keeps_no_answer_back(self, api: str) -> None:
        async with pair(api, Answer(linger=True)) as (endpoint, provider):
            _, completion = await whole(provider, a_call(stream=True))
            assert completion.text == "Hello there."
            await asyncio.wait_for(endpoint.requests[0].gone.wait(), SOON)


class TestFailures:
    """Each failure has its class, is tried once, and says something that helps."""

    @both_apis
    @both_ways
    @pytest.mark.promise("F1", "F2")
    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            (Answer(status=400), "invalid_request"),
            (Answer(status=400, error_message="prompt is too long: 9 tokens > 8 maximum"), "context_too_long"),
            (Answer(status=400, error_code="context_length_exceeded"), "context_too_long"),
            (Answer(status=413), "context_too_long"),
            (Answer(status=401), "authentication"),
            (Answer(status=403), "authentication"),
            (Answer(status=404), "invalid_request"),
            (Answer(status=408), "timeout"),
            (Answer(status=429), "rate_limited"),
            (Answer(status=429, error_code="insufficient_quota"), "billing"),
            (Answer(status=500), "provider_error"),
            (Answer(status=502, body=b"<html>Bad gateway</html>", content_type="text/html"), "provider_error"),
            (Answer(status=503), "overloaded"),
            (Answer(status=529), "overloaded"),
            (Answer(status=302, headers={"Location": "http://127.0.0.1:1/"}), "invalid_request"),
            (Answer(body=b"{"), "provider_error"),
            (Answer(body=b""), "provider_error"),
            (Answer(body=b"[]"), "provider_error"),
            (Answer(body=b"{}"), "provider_error"),
            (Answer(body=b'{"choices": ' + b'[{"x": ' * 100_000), "provider_error"),
            (Answer(body=b"[" * 100_000, status=500), "provider_error"),
            (Answer(raw=b"HTTP/1.1 204 No Content\r\n\r\n"), "provider_error"),
            (Answer(body=b'{"choices": [], "content": 7}'), "provider_error"),
            (Answer(body=b"\xff\xfe"), "provider_error"),
            (Answer(body=b"<html>log in</html>", content_type="text/html"), "provider_error"),
            (Answer(body=b'{"type": "error", "error": {"type": "overloaded_error", "message": "x"}}'), "overloaded"),
            (Answer(raw=b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), "provider_error"),
            (Answer(raw=bytes(range(256))), "provider_error"),
            (Answer(hang_up=True), "network_error"),
            (Answer(cut_after=1), "network_error"),
        ],
    )
    async def test_an_endpoint_s_failure_has_its_class(
        self, api: str, stream: bool, answer: Answer, expected: str
    ) -> None:
        async with pair(api, answer) as (endpoint, provider):
            error = await failure(provider, a_call(stream=stream))
            assert (error.failure, error.retryable) == (expected, FailureClass(expected).retryable)
            assert len(endpoint.requests) == 1

    @both_apis
    @pytest.mark.promise("F1")
    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            (Answer(cut_after=0), "network_error"),
            (Answer(cut_after=1), "network_error"),
            (Answer(end_after=0), "network_error"),
            (Answer(end_after=1), "network_error"),
            (Answer(fail_after=1, error_type="overloaded_error"), "overloaded"),
            (Answer(fail_after=1, error_type="rate_limit_error"), "rate_limited"),
            (Answer(fail_after=1, error_type="api_error"), "provider_error"),
            (Answer(fail_after=0, error_type="authentication_error"), "authentication"),
            (Answer(fail_after=1, error_type="invalid_request_error"), "invalid_request"),
            (Answer(fail_after=1, error_type="new_kind"), "provider_error"),
            (Answer(body=b"data: {\n\n", content_type="text/event-stream"), "provider_error"),
            (Answer(body=b"data: 7\n\n", content_type="text/event-stream"), "provider_error"),
            (Answer(body=b"hello", content_type="text/event-stream"), "network_error"),
            (Answer(body=b"", content_type="text/event-stream"), "network_error"),
        ],
    )
    async def test_a_stream_that_fails_in_the_middle_has_its_class(
        self, api: str, answer: Answer, expected: str
    ) -> None:
        async with pair(api, answer) as (_, provider):
            assert (await failure(provider, a_call(stream=True))).failure == expected

    @both_apis
    @pytest.mark.promise("F1")
    async def test_pieces_before_a_cut_are_delivered(self, api: str) -> None:
        texts: list[str] = []
        async with pair(api, Answer(cut_after=1, piece_delay=0.01)) as (_, provider):
            with pytest.raises(ProviderError):
                async for piece in provider.complete(a_call(stream=True)):
                    assert isinstance(piece, Chunk)
                    texts.append(piece.text)
        assert texts == ["Hello"]

    @both_apis
    @pytest.mark.promise("F1", "F5")
    @pytest.mark.parametrize("status", [429, 503, 529])
    async def test_the_endpoint_s_word_on_when_to_come_back_is_carried(self, api: str, status: int) -> None:
        async with pair(api, Answer(status=status, headers={"Retry-After": "17"}), Answer(status=status)) as (
            _,
            provider,
        ):
            assert (await failure(provider, a_call())).retry_after == 17.0
            assert (await failure(provider, a_call())).retry_after is None

    @both_apis
    @pytest.mark.promise("F1")
    async def test_a_refused_connection_is_a_network_error_that_names_the_place(self, api: str) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            async with running(make(api, f"http://127.0.0.1:{port}")) as provider:
                error = await failure(provider, a_call())
        assert error.failure is FailureClass.NETWORK_ERROR
        assert f"127.0.0.1:{port}" in error.message

    @both_apis
    @both_ways
    @pytest.mark.promise("S3")
    async def test_a_key_that_the_endpoint_repeats_reaches_no_message(self, api: str, stream: bool) -> None:
        says = f"Incorrect API key provided: {KEY}; X-Extra was hidden-value"
        answer = Answer(status=401, error_message=says)
        async with pair(api, answer, headers={"X-Extra": "Token hidden-value"}) as (_, provider):
            error = await failure(provider, a_call(stream=stream))
            assert "Incorrect API key provided: ***; X-Extra was ***" in error.message
            assert KEY not in (provider.problem() or "")

    @both_apis
    @both_ways
    async def test_an_answer_over_the_limit_is_refused(
        self, api: str, stream: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ksi.providers.http.endpoint.MAX_ANSWER", 20_000)
        async with pair(api, Answer(pieces=("x" * 1000,) * 30)) as (_, provider):
            error = await failure(provider, a_call(stream=stream))
        assert error.failure is FailureClass.PROVIDER_ERROR
        assert "larger than 20000 bytes" in error.message

    @both_apis
    async def test_a_proxy_that_refuses_is_a_network_error(self, api: str) -> None:
        async with ScriptedEndpoint() as proxy:
            provider = make(api, "https://model.invalid", proxy=proxy.url)
            async with running(provider):
                error = await failure(provider, a_call())
        assert error.failure is FailureClass.NETWORK_ERROR
        assert "proxy" in error.message

    @both_apis
    async def test_an_endless_error_text_is_cut(self, api: str) -> None:
        async with pair(api, Answer(status=500, error_message="x" * 100_000)) as (_, provider):
            assert len((await failure(provider, a_call())).message) < 1000

    @both_apis
    async def test_an_error_body_that_breaks_off_leaves_the_status_to_speak(self, api: str) -> None:
        raw = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 1000\r\n\r\n{"
        async with pair(api, Answer(raw=raw)) as (_, provider):
            assert (await failure(provider, a_call())).failure is FailureClass.AUTHENTICATION

    @both_apis
    async def test_a_request_that_cannot_be_written_as_json_is_the_request_s_fault(self, api: str) -> None:
        async with pair(api, Answer()) as (endpoint, provider):
            for call in (a_call("\ud800"), a_call(options={"x": object()})):
                assert (await failure(provider, call)).failure is FailureClass.INVALID_REQUEST
            assert endpoint.requests == []

    @both_apis
    async def test_a_stopped_provider_says_so_and_can_be_started_again(self, api: str) -> None:
        async with ScriptedEndpoint(Answer()) as endpoint:
            provider = make(api, endpoint.url)
            assert (await failure(provider, a_call())).failure is FailureClass.PROVIDER_ERROR
            for _ in range(2):
                async with running(provider):
                    await whole(provider, a_call())
            assert (await failure(provider, a_call())).failure is FailureClass.PROVIDER_ERROR

    @both_apis
    async def test_stopping_ends_the_calls_that_still_run(self, api: str) -> None:
        async with ScriptedEndpoint(Answer(silent=True)) as endpoint:
            provider = make(api, endpoint.url)
            await provider.start()
            task = asyncio.create_task(whole(provider, a_call()))
            await endpoint.wait_for_requests(1)
            await provider.stop()
            with pytest.raises(ProviderError) as caught:
                await asyncio.wait_for(task, SOON)
            assert caught.value.failure is FailureClass.NETWORK_ERROR


class TestProblems:
    """The value of `problem` before and after calls."""

    @both_apis
    async def test_a_missing_key_names_its_variable_and_no_call_is_sent(self, api: str) -> None:
        async with pair(api, Answer(), api_key="  ") as (endpoint, provider):
            assert provider.problem() == "no API key: set the environment variable TEAM_KEY"
            error = await failure(provider, a_call())
            assert error.failure is FailureClass.AUTHENTICATION
            assert "TEAM_KEY" in error.message
            assert endpoint.requests == []

    @both_apis
    async def test_an_endpoint_without_keys_needs_none(self, api: str) -> None:
        async with pair(api, Answer(), api_key=None) as (endpoint, provider):
            assert provider.problem() is None
            await whole(provider, a_call())
        assert not {"authorization", "x-api-key"} & set(endpoint.requests[0].headers)

    @both_apis
    async def test_a_key_no_header_can_carry_is_reported(self, api: str) -> None:
        async with pair(api, Answer(), api_key="sk-1\n2") as (_, provider):
            assert "TEAM_KEY" in (provider.problem() or "")
            assert (await failure(provider, a_call())).failure is FailureClass.AUTHENTICATION

    @both_apis
    async def test_a_key_with_a_newline_at_its_end_is_taken_without_it(self, api: str) -> None:
        async with pair(api, Answer(), api_key=f"{KEY}\n") as (endpoint, provider):
            await whole(provider, a_call())
        assert KEY in " ".join(endpoint.requests[0].headers.values())

    @both_apis
    @pytest.mark.parametrize(
        "answer", [Answer(status=401), Answer(status=429, error_code="insufficient_quota", error_message="no credit")]
    )
    async def test_a_refused_account_is_a_problem_until_a_call_succeeds(self, api: str, answer: Answer) -> None:
        async with pair(api, answer, Answer(status=500), Answer()) as (_, provider):
            await failure(provider, a_call())
            told = provider.problem()
            assert told is not None
            assert answer.error_message in told
            await failure(provider, a_call())
            assert provider.problem() == told
            await whole(provider, a_call())
            assert provider.problem() is None

    @both_apis
    @pytest.mark.parametrize(
        "url", ["", "127.0.0.1:80", "ftp://x", "http://", "http://h:99999999", "http://u:pw-secret@h"]
    )
    def test_a_base_url_that_cannot_be_called_is_refused_when_it_is_configured(self, api: str, url: str) -> None:
        with pytest.raises(ConfigError) as caught:
            make(api, "", base_url=url)
        assert caught.value.place == "providers.team.base_url"
        assert "pw-secret" not in str(caught.value)

    @both_apis
    @pytest.mark.parametrize(
        ("arguments", "place"),
        [
            ({"proxy": "socks5://127.0.0.1:1"}, "proxy"),
            ({"proxy": "nowhere"}, "proxy"),
            ({"headers": {"X-A": "line\nbreak-secret"}}, "headers"),
            ({"headers": {"X A": "value-secret"}}, "headers"),
        ],
    )
    def test_a_value_that_no_request_can_carry_is_refused_when_it_is_configured(
        self, api: str, arguments: dict[str, Any], place: str
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            make(api, "http://127.0.0.1:1", **arguments)
        assert caught.value.place == f"providers.team.{place}"
        assert "secret" not in str(caught.value)


class TestClosing:
    """An abandoned answer is not paid for."""

    @both_apis
    @pytest.mark.promise("F7", "F8")
    async def test_closing_the_iterator_early_closes_the_connection(self, api: str) -> None:
        async with pair(api, Answer(stall_after=1)) as (endpoint, provider):
            pieces = provider.complete(a_call(stream=True))
            async with aclosing(pieces):
                assert await anext(pieces) == Chunk("Hello")
            await asyncio.wait_for(endpoint.requests[0].gone.wait(), SOON)

    @both_apis
    @both_ways
    @pytest.mark.promise("F7", "F8")
    async def test_cancelling_a_waiting_call_closes_the_connection(self, api: str, stream: bool) -> None:
        async with pair(api, Answer(silent=True)) as (endpoint, provider):
            task = asyncio.create_task(whole(provider, a_call(stream=stream)))
            (seen,) = await endpoint.wait_for_requests(1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(seen.gone.wait(), SOON)

    @both_apis
    async def test_a_call_that_is_closed_takes_nothing_from_its_neighbours(self, api: str) -> None:
        def script(seen: Any) -> Answer:
            return Answer(stall_after=1) if b"stall" in seen.body else Answer()

        async with ScriptedEndpoint(script=script) as endpoint, running(make(api, endpoint.url)) as provider:

            async def closed_early() -> None:
                async with aclosing(provider.complete(a_call("stall", stream=True))) as pieces:
                    await anext(pieces)

            async def read_whole() -> str:
                return (await whole(provider, a_call(stream=True)))[1].text

            async with asyncio.TaskGroup() as group:
                texts = [group.create_task(read_whole()) for _ in range(10)]
                for _ in range(10):
                    group.create_task(closed_early())
            assert {task.result() for task in texts} == {"Hello there."}


class TestTimeLimits:
    """F7's two limits, and the one for the connection."""

    @both_apis
    @pytest.mark.promise("F1", "F7")
    @pytest.mark.parametrize("answer", [Answer(silent=True), Answer(stall_after=0), Answer(stall_after=1)])
    async def test_a_stream_that_falls_silent_times_out(self, api: str, answer: Answer) -> None:
        async with pair(api, answer, timeouts=Timeouts(idle=0.2)) as (endpoint, provider):
            error = await failure(provider, a_call(stream=True))
            assert (error.failure, "0.2 s" in error.message) == (FailureClass.TIMEOUT, True)
            await asyncio.wait_for(endpoint.requests[0].gone.wait(), SOON)

    @both_apis
    @pytest.mark.promise("F7")
    async def test_a_stream_that_goes_on_slowly_is_not_idle(self, api: str) -> None:
        answer = Answer(pieces=tuple("slowly"), piece_delay=0.1)
        async with pair(api, answer, timeouts=Timeouts(idle=0.4)) as (_, provider):
            assert (await whole(provider, a_call(stream=True)))[1].text == "slowly"

    @both_apis
    @pytest.mark.promise("F7")
    async def test_a_whole_answer_may_be_silent_for_longer_than_a_stream(self, api: str) -> None:
        async with pair(api, Answer(delay=0.3), timeouts=Timeouts(idle=0.1)) as (_, provider):
            assert (await whole(provider, a_call()))[1].text == "Hello there."

    @both_apis
    @both_ways
    @pytest.mark.promise("F1", "F7")
    async def test_an_endpoint_that_never_answers_times_out(self, api: str, stream: bool) -> None:
        async with pair(api, Answer(silent=True), timeouts=Timeouts(total=0.2)) as (endpoint, provider):
            error = await failure(provider, a_call(stream=stream))
            assert (error.failure, "0.2 s" in error.message) == (FailureClass.TIMEOUT, True)
            await asyncio.wait_for(endpoint.requests[0].gone.wait(), SOON)

    @both_apis
    @pytest.mark.promise("F7")
    async def test_an_answer_that_never_ends_times_out(self, api: str) -> None:
        answer = Answer(pieces=("more ",) * 10_000, piece_delay=0.02)
        async with pair(api, answer, timeouts=Timeouts(total=0.3, idle=0.2)) as (_, provider):
            error = await failure(provider, a_call(stream=True))
            assert (error.failure, "0.3 s" in error.message) == (FailureClass.TIMEOUT, True)

    @both_apis
    @pytest.mark.promise("F7")
    async def test_a_reader_that_takes_its_time_is_no_fault_of_the_endpoint(self, api: str) -> None:
        read = asyncio.Event()
        async with pair(api, Answer(), timeouts=Timeouts(idle=0.1)) as (_, provider):
            pieces = provider.complete(a_call(stream=True))
            async with aclosing(pieces):
                texts = [said(await anext(pieces))]
                asyncio.get_running_loop().call_later(0.3, read.set)
                await read.wait()
                texts.extend([said(piece) async for piece in pieces])
        assert texts[-1] == "Hello there."

    @both_apis
    @pytest.mark.promise("F1", "F7")
    async def test_a_connection_that_does_not_come_about_times_out(self, api: str) -> None:
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            port = full.getsockname()[1]
            crowd = [socket.socket() for _ in range(4)]
            try:
                for one in crowd:
                    one.setblocking(False)
                    one.connect_ex(("127.0.0.1", port))
                timeouts = Timeouts(connect=0.2)
                async with running(make(api, f"http://127.0.0.1:{port}", timeouts=timeouts)) as provider:
                    error = await failure(provider, a_call())
                assert (error.failure, "0.2 s" in error.message) == (FailureClass.TIMEOUT, True)
            finally:
                for one in crowd:
                    one.close()


@both_apis
@both_ways
async def test_fifty_calls_at_once_are_fifty_answers(api: str, stream: bool) -> None:
    def script(seen: Any) -> Answer:
        return Answer(pieces=(seen.json["messages"][0]["content"],))

    async with ScriptedEndpoint(script=script) as endpoint, running(make(api, endpoint.url)) as provider:
        calls = [whole(provider, a_call(f"number {n}", stream=stream)) for n in range(50)]
        answers = await asyncio.gather(*calls)
    assert [completion.text for _, completion in answers] == [f"number {n}" for n in range(50)]


@pytest.mark.parametrize("path", ["/v1/messages/count_tokens", "/v1/messages?beta=true"])
async def test_the_scripted_endpoint_counts_tokens_and_knows_queries(path: str) -> None:
    async with ScriptedEndpoint(Answer()) as endpoint:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(endpoint.url.rpartition(":")[2]))
        body = b'{"model": "m", "messages": []}'
        writer.write(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(body)) + body)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SOON)
        assert head.startswith(b"HTTP/1.1 200")
        writer.close()
