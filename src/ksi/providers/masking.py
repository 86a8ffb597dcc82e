"""Messages of endpoints and programs, without the secrets that they were given. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from urllib.parse import parse_qsl, unquote, urlsplit

MASK = "***"
SHORTEST_SECRET = 8
"""Shorter values are ordinary words, and would blot out the rest of a message."""


def masked(text: str, secrets: Sequence[str]) -> str:
    """The text with `***` in the place of each secret; give the longest first, as `worth_masking` does.

    Mask before you cut a text: half of a secret is not found.
    """
    for secret in secrets:
        text = text.replace(secret, MASK)
    return text


def worth_masking(values: Iterable[str]) -> tuple[str, ...]:
    """The values that are long enough, longest first."""
    return tuple(sorted({value for value in values if len(value) >= SHORTEST_SECRET}, key=lambda one: (-len(one), one)))


def pieces(value: str) -> Iterator[str]:
    """The parts of a value that must be masked: of an address everything but scheme and host, of another value the
    whole and its words."""
    if "://" in value:
        yield from _address(value)
        return
    yield value
    # `Authorization:` in front of a header's value is no secret.
    yield from (word for word in value.split() if not word.endswith(":"))


def _address(value: str) -> Iterator[str]:
    try:
        parts = urlsplit(value)
    except ValueError:
        yield value
        return
    user, at, _ = parts.netloc.rpartition("@")
    found = [user, *user.split(":", 1)] if at else []
    found += [parts.path, *parts.path.split("/"), parts.query, parts.fragment]
    found += [text for _, text in parse_qsl(parts.query)]
    for text in found:
        yield text
        yield unquote(text)
