"""Where spans stand: W3C's `traceparent`, and ids that are the same everywhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.completion.trace.context import TraceContext, attempt_span, parse, request_span, trace_id

pytestmark = pytest.mark.promise("V3")

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (f"00-{TRACE}-{SPAN}-01", TraceContext(TRACE, SPAN)),
        (f" 00-{TRACE}-{SPAN}-00 ", TraceContext(TRACE, SPAN, sampled=False)),
        (f"00-{TRACE}-{SPAN}-03", TraceContext(TRACE, SPAN)),
        (f"cc-{TRACE}-{SPAN}-01-what-comes-later", TraceContext(TRACE, SPAN)),
        (f"00-{TRACE}-{SPAN}-01-more", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"00-{TRACE}-{SPAN}", None),
        ("", None),
        (None, None),
    ],
)
def test_a_traceparent_is_read_as_its_standard_says(header: str | None, found: TraceContext | None) -> None:
    assert parse(header) == found


@given(st.text(max_size=80))
def test_any_text_is_a_traceparent_or_none(text: str) -> None:
    found = parse(text)
    assert found is None or parse(found.header) == found


@given(st.text(st.characters(exclude_categories=())))
def test_ids_follow_from_names_and_have_their_form(name: str) -> None:
    spans = {request_span(name), attempt_span(name, 1), attempt_span(name, 2)}
    assert len(spans) == 3
    assert all(len(span) == 16 for span in spans)
    assert parse(TraceContext(trace_id(name), request_span(name)).header) is not None
