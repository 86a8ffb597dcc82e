"""The event stream parser against a plain reading of the standard, however the bytes are cut."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.providers.http.sse import SseEvent, SseParser, SseTooLong

LINE_ENDS = (b"\n", b"\r", b"\r\n")


def parse(*chunks: bytes) -> list[SseEvent]:
    parser = SseParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


def read_plainly(stream: bytes) -> list[SseEvent]:
    """The standard's algorithm over a whole stream, as simply as it can be said."""
    events, name, data = [], "", []
    *lines, _unfinished = re.split(rb"\r\n|\r|\n", stream.removeprefix(b"\xef\xbb\xbf"))
    for line in lines:
        if line:
            field, _, value = line.partition(b":")
            value = value[1:] if value.startswith(b" ") else value
            if field == b"data":
                data.append(value)
            elif field == b"event":
                name = value.decode("utf-8", "replace")
        else:
            if data:
                events.append(SseEvent(name or "message", b"\n".join(data)))
            name, data = "", []
    return events


@st.composite
def cut_streams(draw: st.DrawFn) -> list[bytes]:
    """A stream of fields, comments, blank lines and noise with any line ends, in pieces."""
    values = st.one_of(st.text(max_size=6).map(str.encode), st.binary(max_size=6))
    lines = st.one_of(
        st.just(b""),
        st.builds(
            lambda name, colon, value: name + colon + value,
            st.sampled_from([b"data", b"event", b"id", b"retry", b"", b"\xef\xbb\xbfdata", b"Data"]),
            st.sampled_from([b":", b": ", b":  ", b""]),
            values,
        ),
    )
    parts = draw(st.lists(st.tuples(lines, st.sampled_from(LINE_ENDS)), max_size=12))
    stream = draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + b"".join(line + end for line, end in parts)
    cuts = draw(st.lists(st.integers(0, len(stream)), max_size=8))
    return [stream[a:b] for a, b in pairwise([0, *sorted(cuts), len(stream)])]


@pytest.mark.promise("F1")
@given(cut_streams())
def test_any_split_of_the_bytes_gives_the_events_of_the_standard(chunks: list[bytes]) -> None:
    expected = read_plainly(b"".join(chunks))
    assert parse(*chunks) == expected
    assert parse(b"".join(chunks)) == expected
    assert parse(*(bytes([byte]) for chunk in chunks for byte in chunk)) == expected


@pytest.mark.parametrize("end", LINE_ENDS)
def test_each_line_end_is_understood(end: bytes) -> None:
    stream = end.join((b"event: a", b"data: 1", b"", b"data: 2", b"", b""))
    assert parse(stream) == [SseEvent("a", b"1"), SseEvent("message", b"2")]


def test_data_lines_are_joined_by_newlines() -> None:
    assert parse(b"data: a\ndata\ndata: b\n\n") == [SseEvent("message", b"a\n\nb")]


def test_only_the_first_space_behind_the_colon_is_taken_off() -> None:
    assert parse(b"data:  a\n\n") == [SseEvent("message", b" a")]


def test_comments_and_unknown_fields_are_passed_over() -> None:
    assert parse(b": keep-alive\n\nid: 7\nretry: 10\ndata: x\nother: y\n\n") == [SseEvent("message", b"x")]


def test_an_event_without_data_is_not_dispatched_and_its_name_is_forgotten() -> None:
    assert parse(b"event: a\n\ndata: x\n\n") == [SseEvent("message", b"x")]


def test_a_carriage_return_at_the_end_of_a_piece_ends_the_line_at_once() -> None:
    parser = SseParser()
    assert parser.feed(b"data: x\r\n\r") == [SseEvent("message", b"x")]
    assert parser.feed(b"\ndata: y\r\n\r\n") == [SseEvent("message", b"y")]


def test_a_carriage_return_and_a_line_feed_in_two_pieces_are_one_line_end() -> None:
    assert parse(b"data: x\r", b"\ndata: y\r", b"", b"\n\r\n") == [SseEvent("message", b"x\ny")]


def test_an_event_cut_off_by_the_end_is_not_dispatched() -> None:
    assert parse(b"data: whole\n\ndata: half\n") == [SseEvent("message", b"whole")]


@pytest.mark.parametrize("piece", [b"data: " + b"x" * 60, b"data: 01234567890123\n", b"data:\n" * 30])
def test_an_endless_event_is_refused_before_it_fills_the_memory(piece: bytes) -> None:
    parser = SseParser(limit=100)
    with pytest.raises(SseTooLong):
        for _ in range(20):
            parser.feed(piece)


def test_an_event_that_comes_in_many_pieces_counts_once_against_the_limit() -> None:
    parser = SseParser(limit=100)
    for _ in range(5):
        assert [e for byte in b"data: " + b"x" * 80 + b"\n\n" for e in parser.feed(bytes([byte]))] == [
            SseEvent("message", b"x" * 80)
        ]
