"""Text with torn characters and JSON that is not quite JSON."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.providers.json_text import TextJoiner, decode_json, encode_clean, is_json, repaired

ANY = msgspec.json.Decoder()


def strings(*pieces: bytes) -> list[str]:
    """The text of JSON strings with these bytes in them, as one answer's pieces."""
    joiner = TextJoiner()
    texts = [joiner.add(str(decode_json(b'"' + piece + b'"', ANY)[0])) for piece in pieces]
    return [*texts, joiner.rest()]


@pytest.mark.promise("A8")
@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ((b"smile \xf0\x9f", b"\x98\x80 end"), "smile \U0001f600 end"),
        ((b"\xf0", b"\x9f", b"\x98", b"\x80"), "\U0001f600"),
        ((b"a \\ud83d", b"\\ude00 b"), "a \U0001f600 b"),
        ((b"x \\ud83d", b"\\udc80"), "x \U0001f480"),
        ((b"cut \\ud83d",), "cut \ufffd"),
        ((b"cut \\ud83d", b"no half"), "cut \ufffdno half"),
        ((b"good \xff answer",), "good \ufffd answer"),
        ((b"\\ude00 first",), "\ufffd first"),
        ((b"end \xe2\x82",), "end \ufffd"),
        ((b"a\nb",), "a\nb"),
        ((b"plain", "é".encode()), "plainé"),
    ],
)
def test_halves_of_characters_find_each_other_or_become_the_replacement(pieces: tuple[bytes, ...], text: str) -> None:
    assert "".join(strings(*pieces)) == text


@pytest.mark.promise("A8")
@given(st.text(max_size=20), st.lists(st.integers(0, 80), max_size=6))
def test_utf8_cut_anywhere_is_joined_again(text: str, cuts: list[int]) -> None:
    data = json.dumps(text, ensure_ascii=False)[1:-1].encode()
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    # A cut behind a backslash would tear an escape, which is no matter of characters.
    parts = [data[a:b] for a, b in pairwise(places)]
    if any(re.search(rb"(?<!\\)(\\\\)*\\$", part) or b"\\u" in part for part in parts):
        return
    assert "".join(strings(*parts)) == text


@given(st.text(st.characters(), max_size=20))
def test_repaired_text_can_always_be_sent_on(text: str) -> None:
    assert repaired(text).encode().decode() == repaired(text)


@pytest.mark.promise("A8", "R3")
def test_an_unclean_answer_is_kept_as_clean_json() -> None:
    value, clean = decode_json(b'\xef\xbb\xbf{"a": "x \xff \\ud83d", "b": [1, null]}', ANY)
    assert not clean
    assert msgspec.json.decode(encode_clean(value)) == {"a": "x \ufffd \ufffd", "b": [1, None]}


@pytest.mark.parametrize(
    ("data", "whole"), [(b"{}", True), (b"7", True), (b'{"a": "\xff"}', True), (b'{"a"', False), (b"", False)]
)
def test_whole_json_is_known(data: bytes, whole: bool) -> None:
    assert is_json(data) is whole


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"nul"])
def test_bytes_that_are_no_json_are_refused(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_json(data, ANY)
