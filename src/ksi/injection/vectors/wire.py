"""What the daemon and the process that makes vectors say to each other: MessagePack with its length before it."""

from __future__ import annotations

import msgspec

LENGTH = 4
"""Bytes that a message's length takes."""


class Meant(msgspec.Struct, frozen=True, array_like=True):
    """What the model says of one sentence."""

    signs: bytes
    """Of its vector's numbers, one bit each."""
    emptiness: int
    """How much it sounds like those that bring nothing, in hundredths; learned."""


def frame(message: object) -> bytes:
    """A message as it is sent."""
    data = msgspec.msgpack.encode(message)
    return len(data).to_bytes(LENGTH) + data
