"""What endpoints say when they refuse, read as failure classes and waits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from ksi.errors import FailureClass
from ksi.providers.faults import read_report, refusal, reported, retry_after

NOW = 1_800_000_000.0


def classify(status: int, body: Any) -> FailureClass:
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return refusal(status, "Reason", {}, data, now=NOW).failure


def error(message: str = "no", **words: Any) -> dict[str, Any]:
    return {"error": {"message": message, **words}}


@pytest.mark.promise("F1")
@pytest.mark.parametrize(
    ("status", "failure"),
    [
        (400, "invalid_request"),
        (401, "authentication"),
        (402, "authentication"),
        (403, "authentication"),
        (404, "invalid_request"),
        (408, "timeout"),
        (413, "context_too_long"),
        (422, "invalid_request"),
        (429, "rate_limited"),
        (500, "provider_error"),
        (502, "provider_error"),
        (503, "overloaded"),
        (504, "timeout"),
        (529, "overloaded"),
        (307, "invalid_request"),
        (204, "provider_error"),
    ],
)
def test_a_status_alone_has_a_class(status: int, failure: str) -> None:
    assert classify(status, b"") == failure
    assert classify(status, b"<html>what</html>") == failure


@pytest.mark.promise("F1", "L9")
@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, error("too long", type="invalid_request_error", code="context_length_exceeded")),
        (400, error("prompt is too long: 208310 tokens > 200000 maximum", type="invalid_request_error")),
        (400, error("input length and `max_tokens` exceed context limit: 188240 + 21333 > 200000")),
        (400, error("the request exceeds the available context size", type="exceed_context_size_error", code=400)),
        (400, {"object": "error", "message": "This model's maximum context length is 4096 tokens", "code": 400}),
        (400, [error("The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).")]),
        (422, error("Input validation error: `inputs` must have less than 1024 tokens. Given: 3000")),
        (500, error("the prompt does not fit the context window")),
        (413, error("Request exceeds the maximum size", type="request_too_large")),
    ],
)
def test_a_context_that_is_too_long_is_known_by_code_or_words(status: int, body: Any) -> None:
    assert classify(status, body) is FailureClass.CONTEXT_TOO_LONG


@pytest.mark.promise("F1")
@pytest.mark.parametrize(
    ("status", "body", "failure"),
    [
        (400, error("max_tokens is too large: 100000. This model supports at most 16384"), "invalid_request"),
        (
            400,
            error("Your credit balance is too low to access the API", type="invalid_request_error"),
            "authentication",
        ),
        (400, error("API key not valid. Please pass a valid API key.", status="INVALID_ARGUMENT"), "authentication"),
        (500, error("Overloaded", type="overloaded_error"), "overloaded"),
        (400, error("slow down", type="rate_limit_error"), "rate_limited"),
        (429, error("tokens per minute: context length 9", type="tokens", code="rate_limit_exceeded"), "rate_limited"),
        (401, error("the context window", type="x"), "authentication"),
        (500, error("who knows", type="invalid_request_error"), "provider_error"),
    ],
)
def test_words_decide_where_the_status_says_little(status: int, body: Any, failure: str) -> None:
    assert classify(status, body) == failure


@pytest.mark.promise("F1")
@pytest.mark.parametrize(
    ("body", "failure"),
    [
        ({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, "overloaded"),
        ({"type": "error", "error": {"type": "api_error", "message": "Internal"}}, "provider_error"),
        ({"type": "error", "error": {"type": "invalid_request_error", "message": "no"}}, "invalid_request"),
        (error("slow", type="requests", code="rate_limit_exceeded"), "rate_limited"),
        (error("upstream", code=502), "provider_error"),
        (error("upstream", code=429), "rate_limited"),
        (error("upstream", code="503"), "overloaded"),
        (error("the prompt exceeds the context window"), "context_too_long"),
        ({"error": "boom"}, "provider_error"),
        ({"error": {}}, "provider_error"),
    ],
)
def test_an_error_in_the_middle_of_a_stream_has_a_class(body: Any, failure: str) -> None:
    assert reported(msgspec.json.encode(body)).failure == failure


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": " no "}}', "no"),
        (b'{"error": "no"}', "no"),
        (b'{"object": "error", "message": "no"}', "no"),
        (b'{"detail": "no"}', "no"),
        (b'{"detail": [{"loc": ["body"]}]}', '[{"loc":["body"]}]'),
        (b'[{"error": {"message": "no"}}]', "no"),
        (b"Bad gateway\n", "Bad gateway"),
        (b"\xff", "\ufffd"),
        (b"", ""),
        (b"[]", ""),
        (b"7", ""),
        (b'{"error": null}', ""),
        (b"[" * 10_000, "[" * 10_000),
    ],
)
def test_error_bodies_of_all_shapes_are_read(body: bytes, message: str) -> None:
    assert read_report(body).message == message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["context", "tokens"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["error", "message", "type", "code", "detail", "status"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(json_values, st.integers(300, 599))
def test_any_error_body_gives_an_error_with_a_class(value: Any, status: int) -> None:
    data = msgspec.json.encode(value)
    assert refusal(status, None, {}, data, now=NOW).failure in FailureClass
    assert reported(data).failure in FailureClass


def test_a_refusal_says_status_kind_and_the_endpoint_s_own_words() -> None:
    body = msgspec.json.encode(error("no such model: x", type="invalid_request_error", code="model_not_found"))
    told = refusal(404, "Not Found", {}, body, now=NOW)
    assert told.message == "HTTP 404 (model_not_found): no such model: x"
    assert told.details["status"] == 404


def test_a_redirect_says_where_to_point_base_url() -> None:
    assert "set base_url" in refusal(301, "Moved", {"Location": "https://there"}, b"", now=NOW).message


@pytest.mark.promise("F1", "F5")
@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "1500", "Retry-After": "2"}, 1.5),
        ({"Retry-After": "Fri, 15 Jan 2027 08:01:00 GMT"}, 60.0),
        ({"Retry-After": "Fri, 15 Jan 2027 07:00:00 GMT"}, 0.0),
        ({"Retry-After": "Thu, 01 Jan 2026 00:01:00 GMT", "Date": "Thu, 01 Jan 2026 00:00:00 GMT"}, 60.0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": "inf"}, None),
        (
            {
                "anthropic-ratelimit-requests-remaining": "0",
                "anthropic-ratelimit-requests-reset": "2027-01-15T08:00:30Z",
            },
            30.0,
        ),
        (
            {
                "anthropic-ratelimit-requests-remaining": "9",
                "anthropic-ratelimit-requests-reset": "2027-01-15T08:00:30Z",
            },
            None,
        ),
        (
            {"anthropic-ratelimit-unified-status": "rejected", "anthropic-ratelimit-unified-reset": "1800003600"},
            3600.0,
        ),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0.5s"}, 360.5),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "20ms"}, 0.02),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "later"}, None),
        ({"Retry-After": "1", "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "9s"}, 1.0),
    ],
)
def test_the_wait_is_read_as_the_endpoint_says_it(headers: Mapping[str, str], wait: float | None) -> None:
    assert retry_after(CIMultiDict(headers), now=NOW) == (pytest.approx(wait) if wait is not None else None)


@given(st.dictionaries(st.sampled_from(["Retry-After", "retry-after-ms", "Date"]), st.text(max_size=12)))
def test_no_header_breaks_the_reading_of_the_wait(headers: dict[str, str]) -> None:
    wait = retry_after(CIMultiDict(headers), now=NOW)
    assert wait is None or wait >= 0


def test_a_failure_that_no_wait_can_help_carries_none() -> None:
    assert refusal(401, None, {"Retry-After": "5"}, b"", now=NOW).retry_after is None
    assert refusal(529, None, {"Retry-After": "5"}, b"", now=NOW).retry_after == 5.0
