"""The time at which an endpoint can be asked again, in all the places and forms in which endpoints tell it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from ksi.providers.retry_after import retry_after

NOW = 1_800_000_000.0
"""2027-01-15 08:00:00 UTC."""


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


@pytest.mark.promise("F5")
@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"X-RateLimit-Reset": "1800003000000", "X-RateLimit-Remaining": "0"}, 3000.0),
        ({"X-RateLimit-Reset": "1800003000"}, 3000.0),
        ({"X-RateLimit-Reset": "30"}, 30.0),
        ({"X-RateLimit-Reset": "2027-01-15T08:00:30Z"}, 30.0),
        ({"X-RateLimit-Reset": "30", "X-RateLimit-Remaining": "2"}, None),
        ({"x-ratelimit-reset-requests-day": "33011.38", "x-ratelimit-remaining-requests-day": "0"}, 33_011.38),
        ({"RateLimit-Reset": "12"}, 12.0),
        (
            {"anthropic-ratelimit-unified-5h-status": "allowed", "anthropic-ratelimit-unified-5h-reset": "1800003600"},
            None,
        ),
        ({"Retry-After": "0", "X-RateLimit-Reset": "30"}, 30.0),
        ({"Retry-After": "0"}, 0.0),
        ({"Retry-After": "86400"}, 86_400.0),
        ({"Retry-After": "18000"}, 18_000.0),
        ({"Retry-After": "604800"}, 604_800.0),
    ],
)
def test_vendors_forms_of_a_reset_are_read(headers: Mapping[str, str], wait: float | None) -> None:
    assert retry_after(CIMultiDict(headers), now=NOW) == (pytest.approx(wait) if wait is not None else None)


@pytest.mark.promise("F5")
@pytest.mark.parametrize(
    "headers",
    [
        {"Retry-After": "1800003600"},
        {"Retry-After": "60000"},
        {"Retry-After": "999999999"},
        {"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"},
        {"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"},
        {"Retry-After": "-1"},
        {"retry-after-ms": "99999999999"},
        {"X-RateLimit-Reset": "253402300799"},
        {"X-RateLimit-Reset": "0001-01-01T00:00:00Z"},
        {"X-RateLimit-Reset": "-30"},
    ],
)
def test_nonsense_is_not_believed(headers: Mapping[str, str]) -> None:
    assert retry_after(CIMultiDict(headers), now=NOW) is None


RETRY_INFO = {
    "error": {
        "code": 429,
        "details": [
            {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": []},
            {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "353s"},
        ],
    }
}
OPENROUTER = {"X-RateLimit-Limit": "50", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "1800003000000"}


def google_error(**metadata: str) -> dict[str, Any]:
    return {"error": {"details": [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "metadata": metadata}]}}


@pytest.mark.promise("F5")
@pytest.mark.parametrize(
    ("body", "wait"),
    [
        (RETRY_INFO, 353.0),
        ([RETRY_INFO], 353.0),
        (google_error(quotaResetDelay="2h0m0s", quotaResetTimeStamp="2027-01-15T10:00:00Z"), 7200.0),
        (google_error(quotaResetDelay="1.5s"), 1.5),
        (google_error(quotaResetTimeStamp="9999-12-31T23:59:59Z"), None),
        ({"error": {"resets_at": 1_800_005_400, "resets_in_seconds": 5400}}, 5400.0),
        ({"error": {"resets_at": 1_800_005_400_000}}, 5400.0),
        ({"error": {"resets_at": -5, "resets_in_seconds": -5}}, None),
        ({"error": {"resets_at": 5400}}, None),
        ({"error": {"resets_at": True, "resets_in_seconds": [3]}}, None),
        ({"error": {"metadata": {"headers": OPENROUTER}}}, 3000.0),
        ({"error": {"metadata": {"headers": {"Retry-After": 7}}}}, 7.0),
        ({"error": {"metadata": {"raw": msgspec.json.encode(RETRY_INFO).decode()}}}, 353.0),
        ({"error": {"retry_after_ms": 1500}}, 1.5),
        ({"retry_after": "12"}, 12.0),
        ({"error": {"message": "no"}}, None),
        (None, None),
        ("text", None),
    ],
)
def test_a_body_tells_the_time_of_return(body: Any, wait: float | None) -> None:
    assert retry_after(CIMultiDict(), body, now=NOW) == (pytest.approx(wait) if wait is not None else None)


@pytest.mark.promise("F5")
def test_a_body_knows_better_than_a_header() -> None:
    headers = CIMultiDict({"Retry-After": "1"})
    assert retry_after(headers, {"error": {"resets_in_seconds": 5400}}, now=NOW) == 5400.0
    assert retry_after(headers, {"error": {"resets_in_seconds": -1}}, "try again in 9s", now=NOW) == 1.0


@pytest.mark.promise("F5")
@pytest.mark.parametrize(
    ("sentence", "wait"),
    [
        ("Limit 30000, Used 29000. Please try again in 6m0s. Visit https://platform", 360.0),
        ("Please try again in 359ms.", 0.359),
        ("Please retry after 26 seconds.", 26.0),
        ("Please retry in 37.456s.", 37.456),
        ("Your quota will reset after 2h0m0s.", 7200.0),
        ("Try again in about 5 minutes", 300.0),
        ("please try your request again in 1 hour and 2 minutes, thanks", 3720.0),
        ("try again later", None),
        ("Limit 5 in 60 seconds", None),
        ("try again in 99999 days", None),
        ("try again in 3 apples", None),
    ],
)
def test_a_sentence_tells_the_time_of_return(sentence: str, wait: float | None) -> None:
    told = retry_after(CIMultiDict(), None, sentence, now=NOW)
    assert told == (pytest.approx(wait) if wait is not None else None)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["6m0s", "{", "[1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["error", "headers", "resets_at", "retryDelay", "retry_after_ms", "quotaResetTimeStamp"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(values, st.text(max_size=30))
def test_no_body_and_no_sentence_breaks_the_reading_of_the_wait(body: Any, sentence: str) -> None:
    wait = retry_after(CIMultiDict(), body, sentence, now=NOW)
    assert wait is None or wait >= 0
