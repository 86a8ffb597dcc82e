"""Sorted keys."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from typing import Any

from ksi.errors import InternalError

Key = tuple[Any, ...]
"""Sorts in its index; the last part is the number of the record it stands for."""


class Ordered:
    """A sorted list of keys without repetition."""

    def __init__(self) -> None:
        self._keys: list[Key] = []

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: Key) -> None:
        """Put a key in its place."""
        insort(self._keys, key)

    def remove(self, key: Key) -> None:
        """Take a key out; it must be there."""
        at = bisect_left(self._keys, key)
        if at == len(self._keys) or self._keys[at] != key:
            raise InternalError(f"an index lost its entry {key!r}")
        del self._keys[at]

    def first(self) -> Key | None:
        """The lowest key."""
        return self._keys[0] if self._keys else None

    def count(self, prefix: Key) -> int:
        """How many keys begin with `prefix`."""
        low, high = self._range(prefix)
        return high - low

    def before(self, key: Key, prefix: Key) -> int:
        """How many of the keys that begin with `prefix` are lower than `key`."""
        return bisect_left(self._keys, key) - self._range(prefix)[0]

    def walk(self, prefix: Key = (), after: Key | None = None, backwards: bool = False) -> Iterator[Key]:
        """Keys that begin with `prefix`, in order, from behind `after`. The list must not change meanwhile."""
        low, high = self._range(prefix)
        if after is not None and backwards:
            high = bisect_left(self._keys, after)
        elif after is not None:
            low = bisect_right(self._keys, after)
        places = range(low, high)
        return (self._keys[at] for at in (reversed(places) if backwards else places))

    def _range(self, prefix: Key) -> tuple[int, int]:
        if not prefix:
            return 0, len(self._keys)

        def cut(key: Key) -> Key:
            return key[: len(prefix)]

        return bisect_left(self._keys, prefix, key=cut), bisect_right(self._keys, prefix, key=cut)
