"""What endpoints say when they refuse, read as failure classes and waits."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.errors import FailureClass, ProviderError
from ksi.providers.faults import is_error, read_report, refusal
from ksi.providers.faults import reported as reported_with

NOW = 1_800_000_000.0


def classify(status: int, body: Any) -> FailureClass:
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return refusal(status, "Reason", {}, data, now=NOW).failure


def reported(body: bytes) -> ProviderError:
    return reported_with(body, {}, now=NOW)


def error(message: str = "no", **words: Any) -> dict[str, Any]:
    return {"error": {"message": message, **words}}


@pytest.mark.promise("F1")
@pytest.mark.parametrize(
    ("status", "failure"),
    [
        (400, "invalid_request"),
        (401, "authentication"),
        (402, "billing"),
        (403, "authentication"),
        (404, "invalid_request"),
        (408, "timeout"),
        (409, "provider_error"),
        (413, "context_too_long"),
        (420, "rate_limited"),
        (425, "provider_error"),
        (499, "provider_error"),
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
            "billing",
        ),
        (400, error("API key not valid. Please pass a valid API key.", status="INVALID_ARGUMENT"), "authentication"),
        (500, error("Overloaded", type="overloaded_error"), "overloaded"),
        (400, error("slow down", type="rate_limit_error"), "rate_limited"),
        (429, error("tokens per minute: context length 9", type="tokens", code="rate_limit_exceeded"), "rate_limited"),
        (401, error("the context window", type="x"), "authentication"),
        (500, error("who knows", type="invalid_request_error"), "provider_error"),
    ],
)
def test_words_decide_if_the_status_says_little(status: int, body: Any, failure: str) -> None:
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
        (b"[" * 10_000, "[" * 4_000),
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


def test_a_redirect_names_the_address_for_base_url() -> None:
    assert "set base_url" in refusal(301, "Moved", {"Location": "https://there"}, b"", now=NOW).message


def test_a_failure_that_no_wait_can_help_carries_none() -> None:
    assert refusal(401, None, {"Retry-After": "5"}, b"", now=NOW).retry_after is None
    assert refusal(529, None, {"Retry-After": "5"}, b"", now=NOW).retry_after == 5.0


GEMINI_GONE = "models/gemini-x is not found for API version v1main, or is not supported for generateContent."


@pytest.mark.promise("F12")
@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, error("It does not exist or you have no access to it.", code="model_not_found")),
        (403, error("Project `p` does not have access to model `m-1`", code="model_not_found")),
        (404, {"type": "error", "error": {"type": "not_found_error", "message": "model: m-1"}}),
        (404, {"object": "error", "message": "The model `m-1` does not exist.", "type": "NotFoundError", "code": 404}),
        (404, {"error": "model 'm-1' not found"}),
        (404, error('model "m-1" not found, try pulling it first', type="api_error")),
        (404, [error(GEMINI_GONE, code=404, status="NOT_FOUND")]),
        (404, error("Model not found, inaccessible, and/or not deployed", code="NOT_FOUND")),
        (404, error("The API deployment for this resource does not exist.", code="DeploymentNotFound")),
        (400, error("m-1 is not a valid model ID", code=400)),
        (400, error("Model Not Exist", type="invalid_request_error")),
        (400, error("Invalid model: m-1", type="invalid_model", code="1500")),
        (400, error("The model `m-1` has been decommissioned and is no longer supported", code="model_decommissioned")),
    ],
)
def test_a_model_that_is_not_there_is_known_and_named(status: int, body: Any) -> None:
    told = refusal(status, "Reason", {}, msgspec.json.encode(body), now=NOW, model="m-1")
    assert told.failure is FailureClass.MODEL_NOT_FOUND
    assert told.message.startswith("the endpoint does not have the model 'm-1': HTTP")


@pytest.mark.promise("F12")
@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b"<html><body><h1>404 Not Found</h1></body></html>"),
        (404, {"detail": "Not Found"}),
        (404, {"type": "error", "error": {"type": "not_found_error", "message": "Not found"}}),
        (404, b""),
    ],
)
def test_a_404_that_names_no_model_doubts_the_base_url(status: int, body: Any) -> None:
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    told = refusal(status, "Not Found", {}, data, now=NOW, model="m-1")
    assert told.failure is FailureClass.INVALID_REQUEST
    assert "base_url may be wrong" in told.message
    assert "<" not in told.message


@pytest.mark.parametrize(
    "said",
    [
        "max_tokens is too large: 1. This model supports at most 16384",
        "The parameter `temperature` is not supported with this model; invalid value.",
        "model is required",
        "Invalid value for model parameter top_p: not valid",
    ],
)
def test_a_sentence_that_only_mentions_a_model_is_about_the_request(said: str) -> None:
    assert classify(400, error(said)) is FailureClass.INVALID_REQUEST


@pytest.mark.promise("F5")
@pytest.mark.parametrize(
    ("status", "body"),
    [
        (429, error("You exceeded your current quota, please check your plan.", code="insufficient_quota")),
        (402, error("Insufficient Balance")),
        (402, b""),
        (400, error("Your credit balance is too low to access the Anthropic API.", type="invalid_request_error")),
        (403, error("Your team has either used all available credits or reached its monthly spending limit.")),
        (429, error("Your account org-1 is suspended, please check your plan and billing details")),
        (400, error("no", type="billing_error")),
    ],
)
def test_an_account_without_money_is_no_throttle(status: int, body: Any) -> None:
    assert classify(status, body) is FailureClass.BILLING


@pytest.mark.promise("F5")
def test_a_quota_that_comes_back_is_no_matter_of_money() -> None:
    said = "You exceeded your current quota, please check your plan and billing details. Please retry in 12s."
    told = refusal(429, None, {}, msgspec.json.encode([error(said, status="RESOURCE_EXHAUSTED")]), now=NOW)
    assert (told.failure, told.retry_after) == (FailureClass.RATE_LIMITED, 12.0)


@pytest.mark.promise("A4")
@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, error("The response was filtered due to the prompt", code="content_filter")),
        (400, error("Output blocked by content filtering policy", type="invalid_request_error")),
        (403, error('requires moderation. Your input was flagged for "violence"', code=403)),
        (400, error("Content Exists Risk", type="invalid_request_error")),
        (400, error("may contain inappropriate content", code="data_inspection_failed")),
    ],
)
def test_a_filter_before_the_model_is_a_refusal(status: int, body: Any) -> None:
    assert classify(status, body) is FailureClass.REFUSED


@pytest.mark.promise("F1")
def test_one_request_that_is_larger_than_a_minute_s_limit_is_too_long() -> None:
    said = "Request too large for gpt-4.1 in organization org-1 on tokens per min (TPM): Limit 30000, Requested 35364."
    assert classify(429, error(said, type="tokens", code="rate_limit_exceeded")) is FailureClass.CONTEXT_TOO_LONG


@pytest.mark.promise("A4")
@pytest.mark.parametrize(
    ("body", "failure", "words"),
    [
        ({"object": "error", "message": "The model `x` does not exist.", "code": 404}, "model_not_found", "`x`"),
        (
            {"object": "error", "message": "too large 4711", "type": "BadRequestError", "code": 400},
            *("invalid_request", "4711"),
        ),
        ({"text": "**HIGH TRAFFIC** 4711", "error_code": 50001}, "provider_error", "HIGH TRAFFIC"),
        ({"text": "no worker", "error_code": 42901}, "rate_limited", "no worker"),
        ({"text": "too long", "error_code": 40303}, "context_too_long", "too long"),
        ({"base_resp": {"status_code": 2013, "status_msg": "invalid params"}}, "invalid_request", "invalid params"),
        ({"base_resp": {"status_code": 1002, "status_msg": "slow down"}}, "rate_limited", "slow down"),
        ({"base_resp": {"status_code": 1008, "status_msg": "no money"}}, "billing", "no money"),
        ({"success": False, "errors": [{"code": 10000, "message": "who are you"}]}, "provider_error", "who are you"),
        ({"error": "overloaded", "message": "come later"}, "provider_error", "overloaded: come later"),
        ({"code": 500, "msg": "404 NOT_FOUND", "success": False}, "provider_error", "404 NOT_FOUND"),
        (
            error("Provider returned error", code=429, metadata={"raw": "it is rate-limited upstream"}),
            *("rate_limited", "Provider returned error: it is rate-limited upstream"),
        ),
    ],
)
def test_an_error_body_with_a_good_status_is_known_and_keeps_its_words(body: Any, failure: str, words: str) -> None:
    assert is_error(body)
    told = reported(msgspec.json.encode(body))
    assert told.failure == failure
    assert words in told.message


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"type": "ping"},
        {"error": None, "code": 0},
        {"base_resp": {"status_code": 0, "status_msg": ""}},
        {"object": "chat.completion.chunk", "choices": []},
        [],
        7,
    ],
)
def test_a_normal_answer_is_not_taken_for_an_error(value: Any) -> None:
    assert not is_error(value)


QUOTA = {
    "error": {
        "code": 429,
        "status": "RESOURCE_EXHAUSTED",
        "details": [{"violations": [{"quotaDimensions": {"model": "gemini-9-pro", "location": "global"}}]}],
    }
}
OPENAI_LIMIT = "Rate limit reached for gpt-4o in organization org-x on tokens per min (TPM). Please try again in 6m0s."


@pytest.mark.promise("F5")
@pytest.mark.parametrize(
    ("model", "body", "headers", "limited", "window"),
    [
        ("gpt-4o-2024-08-06", error(OPENAI_LIMIT), {}, "gpt-4o-2024-08-06", None),
        ("gemini-9-pro", QUOTA, {}, "gemini-9-pro", None),
        ("gemini-9-flash", QUOTA, {}, "", None),
        ("gemini-9", error("You have exhausted your capacity on this model."), {}, "gemini-9", None),
        ("claude-x[1m]", error("rate limit of 80,000 tokens (model: claude-x[1m])"), {}, "claude-x[[]1m]", None),
        ("gpt-4", error("Rate limit of gpt-4.1-mini is spent."), {}, "", None),
        ("claude-x", error("slow down"), {}, "", None),
        (
            *("claude-x", error("slow down")),
            {"anthropic-ratelimit-unified-representative-claim": "seven_day_opus"},
            *("*opus*", "seven_day_opus"),
        ),
        (
            *("claude-x", error("slow down")),
            {"anthropic-ratelimit-unified-representative-claim": "five_hour"},
            *("", "five_hour"),
        ),
    ],
)
def test_a_limit_of_one_model_says_so(
    model: str, body: Any, headers: dict[str, str], limited: str, window: str | None
) -> None:
    told = refusal(429, None, headers, msgspec.json.encode(body), now=NOW, model=model)
    assert (told.failure, told.limited_models, told.limit_window) == (FailureClass.RATE_LIMITED, limited, window)


@pytest.mark.promise("F1")
@pytest.mark.parametrize(
    ("said", "unserved"),
    [
        ("Loading model", True),
        ("Model m is currently loading", True),
        ("The model is not ready", True),
        ("Overloaded", False),
        ("", False),
    ],
)
def test_a_model_that_is_loading_has_not_served_the_request(said: str, unserved: bool) -> None:
    told = refusal(503, "Unavailable", {}, msgspec.json.encode(error(said)), now=NOW)
    assert (told.failure, told.unserved) == (FailureClass.OVERLOADED, unserved)


def test_a_loading_model_s_estimate_is_its_time_of_return() -> None:
    body = msgspec.json.encode({"error": "Model m is currently loading", "estimated_time": 20.0})
    assert refusal(503, None, {}, body, now=NOW).retry_after == 20.0
