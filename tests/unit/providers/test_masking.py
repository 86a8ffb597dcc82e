"""Secrets in messages of endpoints and programs."""

from __future__ import annotations

import pytest

from ksi.providers.masking import masked, pieces, worth_masking


def told(text: str, *values: str) -> str:
    return masked(text, worth_masking(piece for value in values for piece in pieces(value)))


@pytest.mark.promise("S3")
@pytest.mark.parametrize(
    ("value", "said", "shown"),
    [
        ("sk-ant-0123456789", "bad key sk-ant-0123456789.", "bad key ***."),
        ("Bearer abcdefghij", "token abcdefghij expired", "token *** expired"),
        ("Authorization: Bearer abcdefghij", "no Authorization: abcdefghij", "no Authorization: ***"),
        (
            "http://user:pass%2Fword9@proxy.example:3128",
            "proxy.example said no to pass/word9",
            "proxy.example said no to ***",
        ),
        ("http://user:pass%2Fword9@proxy.example:3128", "via user:pass%2Fword9@proxy.example", "via ***@proxy.example"),
        ("http://proxy.example:3128", "http://proxy.example:3128 is down", "http://proxy.example:3128 is down"),
        ("https://mcp.example/s/abcdefghij/mcp", "404 for /s/abcdefghij/mcp", "404 for ***"),
        ("https://mcp.example/s/abcdefghij/mcp", "unknown abcdefghij", "unknown ***"),
        ("https://mcp.example/?key=abcdefghij", "key abcdefghij was revoked", "key *** was revoked"),
        ("http://[::1", "http://[::1 is no address", "*** is no address"),
        ("low", "effort low", "effort low"),
    ],
)
def test_confidential_values_are_masked_and_nothing_else(value: str, said: str, shown: str) -> None:
    assert told(said, value) == shown


def test_the_longest_secret_is_masked_first() -> None:
    assert told("abcdefghijkl", "abcdefgh", "abcdefghijkl") == "***"
