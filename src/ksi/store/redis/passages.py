"""Values out of which a passage was cut: how they stand on the server, and how they become whole here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from ksi.store.chains import ChildRequest
from ksi.store.passages import put_back_bytes

_HEAD = re.compile(rb"\0([0-9]{16})([0-9]{12})")
"""See `lua/05_chains.lua`."""

_NONE = b"0" * 16

_children = msgspec.msgpack.Decoder(ChildRequest)


class Kept(NamedTuple):
    """A value as it is kept."""

    rest: bytes
    passage: str | None = None
    """The number of what was cut out of it."""
    place: int = 0

    @classmethod
    def of(cls, value: bytes) -> Kept:
        """Read it."""
        head = _HEAD.match(value)
        if head is None:
            return cls(value)
        number = None if head[1] == _NONE else head[1].decode()
        return cls(value[head.end() :], number, int(head[2]))

    def whole(self, passages: Mapping[str, bytes]) -> bytes:
        """With the passage back in its place; `passages` by their numbers, as they stand in such a value."""
        return self.rest if self.passage is None else put_back_bytes(self.rest, self.place, passages[self.passage])

    def child(self, passages: Mapping[str, bytes]) -> ChildRequest:
        """A delivery's request; the passage was cut out of its body."""
        child = _children.decode(self.rest)
        if self.passage is None:
            return child
        return msgspec.structs.replace(child, body=put_back_bytes(child.body, self.place, passages[self.passage]))


def read_child(value: bytes, passage: bytes) -> ChildRequest:
    """A delivery's request, and what was cut out of its body."""
    kept = Kept.of(value)
    return kept.child({kept.passage: passage} if kept.passage is not None else {})


def keep_whole(value: bytes) -> bytes:
    """A value as it is kept with nothing cut out of it."""
    return b"\0" + _NONE + b"0" * 12 + value if value[:1] == b"\0" else value
