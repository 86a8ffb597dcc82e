"""The wire: however a stream is cut its lines are the same, and whatever they hold the answer is typed."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ksi.errors import (
    InternalError,
    InvalidData,
    InvalidEnvelope,
    InvalidJson,
    NotFound,
    PayloadTooLarge,
    QueueFull,
)
from ksi.events.completions import CompletionData
from ksi.protocol import (
    MAX_LINE,
    Envelope,
    LineReader,
    convert,
    decode_envelope,
    encode,
    encode_error,
    encode_reply,
    error_body,
    field_names,
    nearest,
    split_path,
    unknown_fields,
)

TOO_LONG = "too long"

# -- lines ------------------------------------------------------------------------------------------------------------


def read(reader: LineReader, *chunks: bytes) -> list[bytes | str]:
    """All lines of a stream, its unfinished end included, with a word for each that was too long."""
    lines: list[bytes | str] = []
    for chunk in chunks:
        for line in reader.feed(chunk):
            lines.append(TOO_LONG if isinstance(line, PayloadTooLarge) else line)
    rest = reader.finish()
    return lines if rest is None else [*lines, rest]


def read_plainly(stream: bytes, limit: int) -> list[bytes | str]:
    *lines, rest = stream.split(b"\n")
    whole = [*lines, rest] if rest else lines
    return [TOO_LONG if len(line) > limit else line for line in whole]


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    """The stream in pieces; some are empty."""
    ends = [0, *sorted(place % (len(stream) + 1) for place in places), len(stream)]
    return [stream[begin:end] for begin, end in pairwise(ends)]


streams = st.lists(st.sampled_from([b"\n", b"a", b"bc", b"\r", b"\x00", b"\xff", b"12345678"]), max_size=40).map(
    b"".join
)


@pytest.mark.promise("S1")
@given(stream=streams, places=st.lists(st.integers(0, 400), max_size=12), limit=st.integers(0, 12))
@example(stream=b"123456\n1\n", places=[1, 2, 3, 4, 5, 6, 7], limit=5)
@example(stream=b"123456", places=[5], limit=5)
def test_any_cut_of_a_stream_gives_the_same_lines(stream: bytes, places: list[int], limit: int) -> None:
    assert read(LineReader(limit), *cut(stream, places)) == read_plainly(stream, limit)


@pytest.mark.promise("S1")
def test_a_stream_that_comes_byte_by_byte_gives_the_same_lines() -> None:
    stream = b'{"event": "a"}\n\n{"event": "b"}\nrest'
    assert read(LineReader(), *(stream[at : at + 1] for at in range(len(stream)))) == stream.split(b"\n")


@pytest.mark.promise("S1")
@pytest.mark.parametrize(("length", "taken"), [(9, True), (10, True), (11, False)])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_line_may_have_exactly_the_limit_without_its_newline(length: int, taken: bool, at_once: bool) -> None:
    stream = b"x" * length + b"\nnext\n"
    chunks = [stream] if at_once else cut(stream, list(range(len(stream))))
    assert read(LineReader(10), *chunks) == [b"x" * length if taken else TOO_LONG, b"next"]


@pytest.mark.promise("S1", "S4")
def test_a_line_that_is_too_long_is_reported_once_as_soon_as_it_is_and_its_rest_is_not_kept() -> None:
    reader = LineReader(1_000)
    assert list(reader.feed(b"x" * 1_000)) == []
    (refused,) = reader.feed(b"x")
    assert isinstance(refused, PayloadTooLarge)
    assert refused.details == {"limit": 1_000}
    for _ in range(100):
        assert list(reader.feed(b"x" * 1_000)) == []
    assert list(reader.feed(b"tail\nnext\nhal")) == [b"next"]
    assert list(reader.feed(b"f\n")) == [b"half"]
    assert reader.finish() is None


@pytest.mark.promise("S1")
def test_the_end_of_a_line_that_was_too_long_is_no_line() -> None:
    reader = LineReader(3)
    assert [type(line) for line in reader.feed(b"12345")] == [PayloadTooLarge]
    assert reader.finish() is None


def test_after_its_end_a_reader_holds_nothing() -> None:
    reader = LineReader()
    assert list(reader.feed(b"half")) == []
    assert reader.finish() == b"half"
    assert reader.finish() is None


@pytest.mark.promise("S1")
def test_a_line_of_seventeen_mebibytes_is_too_long_and_sixteen_are_not() -> None:
    line = b"x" * MAX_LINE
    assert [type(found) for found in LineReader().feed(line + b"\n")] == [bytes]
    assert [type(found) for found in LineReader().feed(b"x" * (17 * 1024 * 1024) + b"\n")] == [PayloadTooLarge]


# -- envelopes --------------------------------------------------------------------------------------------------------


def test_an_envelope_is_an_event_its_data_and_maybe_a_correlation_id() -> None:
    line = b'{"event": "completion:async", "data": {"prompt": "hi"}, "correlation_id": "7"}'
    assert decode_envelope(line) == Envelope("completion:async", {"prompt": "hi"}, "7")
    assert decode_envelope(b'{"event":"a"}\r') == Envelope("a", {}, None)
    assert decode_envelope(b'{"event":"a","correlation_id":7}').correlation_id == 7
    assert decode_envelope(b'{"event":"a","correlation_id":null}').correlation_id is None


def test_old_clients_fields_next_to_an_event_are_ignored() -> None:
    line = b'{"event": "a", "data": {}, "client_id": "x", "timestamp": 1.5, "more": [1, {"b": null}]}'
    assert decode_envelope(line) == Envelope("a")


NOT_JSON = {
    "empty": b"",
    "blank": b"  ",
    "words": b"hello",
    "half": b'{"event": "a", "data": {"b": ',
    "two values": b'{"event": "a"} {"event": "b"}',
    "single quotes": b"{'event': 'a'}",
    "bad UTF-8 in a value": b'{"event": "a", "data": {"b": "\xff\xfe"}}',
    "bad UTF-8 in a key": b'{"event": "a", "data": {"\xc3\x28": 1}}',
    "bad UTF-8 in the event": b'{"event": "\xed\xa0\x80"}',
    "deep beside": b'{"event": "a", "other": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "overlong UTF-8": b'{"event": "a", "data": {"b": "\xc0\xaf"}}',
    "lone surrogate": b'{"event": "a", "data": {"b": "\\ud800"}}',
    "lone low surrogate": b'{"event": "a", "data": {"b": "\\udc00 x"}}',
    "surrogates in the wrong order": b'{"event": "a", "data": {"b": "\\udc00\\ud800"}}',
    "lone surrogate in a key": b'{"event": "a", "data": {"\\ud800": 1}}',
    "bad escape": b'{"event": "a", "data": {"b": "\\x41"}}',
    "control character": b'{"event": "a", "data": {"b": "\x01"}}',
    "1e400": b'{"event": "a", "data": {"b": 1e400}}',
    "-1e400": b'{"event": "a", "data": {"b": [-1e400]}}',
    "NaN": b'{"event": "a", "data": {"b": NaN}}',
    "Infinity": b'{"event": "a", "data": {"b": Infinity}}',
    "leading zero": b'{"event": "a", "data": {"b": 01}}',
    "deep lists": b'{"event": "a", "data": {"b": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
    "deep objects": b'{"event": "a", "data": {"b": ' + b'{"c":' * 100_000 + b"1" + b"}" * 100_002,
    "deep and open": b'{"event": "a", "data": ' + b'{"c":' * 100_000,
    "byte order mark": b'\xef\xbb\xbf{"event": "a"}',
    "NUL": b"\x00",
}


@pytest.mark.promise("S1")
@pytest.mark.parametrize("line", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_a_line_that_is_not_json_is_invalid_json(line: bytes) -> None:
    with pytest.raises(InvalidJson) as refused:
        decode_envelope(line)
    assert refused.value.code == "invalid_json"
    assert 0 < len(refused.value.message) < 500
    encode_error(None, refused.value, None, 0.0)


NO_ENVELOPE = {
    "a number": (b"1", None),
    "a list": (b'[{"event": "a"}]', None),
    "null": (b"null", None),
    "what cannot become one, nested 100,000 deep": (b"[" * 100_000, None),
    "no event": (b'{"data": {}}', "event"),
    "event of another type": (b'{"event": 1}', "event"),
    "event null": (b'{"event": null}', "event"),
    "data of another type": (b'{"event": "a", "data": []}', "data"),
    "data null": (b'{"event": "a", "data": null}', "data"),
    "correlation id of another type": (b'{"event": "a", "correlation_id": {}}', "correlation_id"),
    "correlation id that is no whole number": (b'{"event": "a", "correlation_id": 1.5}', "correlation_id"),
}


@pytest.mark.promise("S1")
@pytest.mark.parametrize(("line", "path"), NO_ENVELOPE.values(), ids=NO_ENVELOPE.keys())
def test_json_that_is_no_event_is_an_invalid_envelope_with_the_place(line: bytes, path: str | None) -> None:
    with pytest.raises(InvalidEnvelope) as refused:
        decode_envelope(line)
    assert refused.value.code == "invalid_envelope"
    assert refused.value.details.get("path") == path


@pytest.mark.promise("S1")
@given(
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.binary(max_size=30).map(lambda inner: b'{"event": "a", "data": {"b": "' + inner + b'"}}')
    | st.text('{}[]":,\\u0123456789abcdefevntlsru.-+ ', max_size=60).map(str.encode)
)
def test_any_bytes_are_an_envelope_or_a_typed_error(line: bytes) -> None:
    try:
        envelope = decode_envelope(line)
    except (InvalidJson, InvalidEnvelope) as refused:
        json.loads(encode_error(None, refused, None, 0.0))
    else:
        assert json.loads(encode(envelope.data)) == envelope.data


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=10,
)
objects = st.dictionaries(texts, json_values, max_size=5)
correlations = st.none() | texts | st.integers(-(2**63), 2**63)


@given(event=texts, data=objects, correlation=correlations)
def test_the_output_of_any_json_writer_is_read_as_it_was_meant(
    event: str, data: dict[str, Any], correlation: str | int | None
) -> None:
    message: dict[str, Any] = {"event": event, "data": data, "correlation_id": correlation}
    for ascii_only in (True, False):
        line = json.dumps(message, ensure_ascii=ascii_only).encode()
        assert decode_envelope(line) == Envelope(event, data, correlation)


@given(event=texts, data=objects, correlation=correlations, timestamp=st.floats(0, 4e9))
def test_a_reply_is_one_line_that_any_json_reader_reads(
    event: str, data: dict[str, Any], correlation: str | int | None, timestamp: float
) -> None:
    line = encode_reply(event, data, correlation, timestamp)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    message = {"event": event, "data": data, "timestamp": timestamp}
    assert json.loads(line) == (message if correlation is None else message | {"correlation_id": correlation})


# -- errors -----------------------------------------------------------------------------------------------------------


def test_an_error_says_its_code_its_facts_and_whether_trying_again_can_help() -> None:
    line = encode_error("completion:async", QueueFull("full", limit=5, holder=None), "7", 1.5)
    assert json.loads(line) == {
        "event": "completion:async",
        "error": {"code": "queue_full", "message": "full", "retryable": True, "details": {"limit": 5}},
        "correlation_id": "7",
        "timestamp": 1.5,
    }
    assert line.count(b"\n") == 1


def test_an_error_without_an_event_or_correlation_id_is_an_answer_too() -> None:
    assert json.loads(encode_error(None, InternalError("a\nb"), None, 2.0)) == {
        "event": None,
        "error": {"code": "internal_error", "message": "a\nb", "retryable": False, "details": {}},
        "timestamp": 2.0,
    }
    assert error_body(NotFound("gone", request_id="r"))["details"] == {"request_id": "r"}


# -- an event's data --------------------------------------------------------------------------------------------------


class Inner(msgspec.Struct):
    size: int


class Sample(msgspec.Struct, rename={"kind": "type"}):
    name: str
    inner: Inner | None = None
    many: list[Inner] = []
    kind: str = ""


@pytest.mark.promise("S1")
@pytest.mark.parametrize(
    ("data", "path"),
    [
        ({}, "name"),
        ({"name": 1}, "name"),
        ({"name": "a", "inner": 5}, "inner"),
        ({"name": "a", "inner": {"size": "big"}}, "inner.size"),
        ({"name": "a", "many": [{"size": 1}, {"size": None}]}, "many[1].size"),
        ({"name": "a", "type": 4}, "type"),
    ],
)
def test_wrong_data_is_refused_with_the_fields_path(data: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidData) as refused:
        convert(data, Sample)
    assert refused.value.code == "invalid_data"
    assert refused.value.details["path"] == path
    assert path.rpartition(".")[2].partition("[")[0] in refused.value.message


@pytest.mark.promise("S1")
def test_a_missing_field_deep_inside_is_named_with_where_it_is_missing() -> None:
    with pytest.raises(InvalidData) as refused:
        convert({"name": "a", "many": [{}]}, Sample)
    assert "many[0]" in refused.value.message
    assert "size" in refused.value.message


def test_right_data_becomes_its_type() -> None:
    assert convert({"name": "a", "inner": {"size": 2}, "else": 1}, Sample) == Sample("a", Inner(2))


@pytest.mark.parametrize(
    ("message", "reason", "path"),
    [
        ("Expected `int`, got `str` - at `$.a[0].b`", "Expected `int`, got `str`", "a[0].b"),
        ("Expected `object`, got `int`", "Expected `object`, got `int`", ""),
        ("Object missing required field `name`", "Object missing required field `name`", "name"),
    ],
)
def test_a_checkers_message_is_taken_apart_into_reason_and_path(message: str, reason: str, path: str) -> None:
    assert split_path(message) == (reason, path)


def test_a_types_fields_are_known_by_their_wire_names() -> None:
    assert field_names(Sample) == {"name", "inner", "many", "type"}


@pytest.mark.promise("S1")
def test_unknown_fields_are_named_with_a_guess_at_the_typo() -> None:
    assert unknown_fields({"name": 1, "many": 2}, Sample) == []
    typo, stranger = unknown_fields({"nam": 1, "zzz": 2, "name": 3}, Sample)
    assert "'nam'" in typo
    assert "did you mean 'name'?" in typo
    assert "'zzz'" in stranger
    assert "did you mean" not in stranger


@pytest.mark.promise("S1")
def test_an_unknown_field_within_a_field_is_named_with_its_place() -> None:
    config = {"token_budgt": 5, "max_depth": 1}
    (warning,) = unknown_fields({"prompt": "x", "circuit_breaker_config": config}, CompletionData)
    assert "'circuit_breaker_config.token_budgt'" in warning
    assert "did you mean 'token_budget'?" in warning
    assert unknown_fields({"circuit_breaker_config": None, "retry": 5, "metadata": {"any": 1}}, CompletionData) == []


@pytest.mark.promise("S1", "S4")
def test_warnings_are_bounded_however_many_and_long_the_unknown_fields_are() -> None:
    data = {f"{'x' * 10_000}{number}": 1 for number in range(1_000)}
    warnings = unknown_fields(data, Sample)
    assert len(warnings) == 20
    assert all(len(warning) < 200 for warning in warnings)


def test_a_guess_is_the_nearest_name_or_none() -> None:
    names = ["completion:async", "completion:status", "system:health"]
    assert nearest("completion:asynk", names) == "completion:async"
    assert nearest("qqqq", names) is None
    assert nearest("x" * 1_000_000, names) is None
