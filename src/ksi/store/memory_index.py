"""Sorted keys, and pages of them with cursors."""

from __future__ import annotations

import base64
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from ksi.errors import InternalError, InvalidData
from ksi.store.values import Page

T = TypeVar("T")

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


@dataclass(slots=True, frozen=True, kw_only=True)
class Listed:
    """How one list is paged: its name and key shape make its cursors its own."""

    name: str
    index: Ordered
    shape: tuple[type, ...]
    prefix: Key = ()
    backwards: bool = False

    def page(self, limit: int, cursor: str | None, item: Callable[[Key], T | None]) -> Page[T]:
        """One page; keys whose `item` is None are not part of the list.

        Raises:
            InvalidData: the cursor is not one of this list's.
        """
        after = None if cursor is None else self._read(cursor)
        items: list[T] = []
        last: Key | None = None
        for key in self.index.walk(self.prefix, after, self.backwards):
            found = item(key)
            if found is None:
                continue
            if len(items) == limit:
                return Page(tuple(items), None if last is None else self._write(last))
            items.append(found)
            last = key
        return Page(tuple(items))

    def _write(self, key: Key) -> str:
        return base64.urlsafe_b64encode(msgspec.json.encode((self.name, *key))).decode()

    def _read(self, cursor: str) -> Key:
        try:
            name, *key = msgspec.json.decode(base64.urlsafe_b64decode(cursor), type=list[Any])
        except (ValueError, msgspec.DecodeError, RecursionError):
            name, key = None, []
        right = name == self.name and tuple(type(part) for part in key) == self.shape
        if not right or tuple(key[: len(self.prefix)]) != self.prefix:
            raise InvalidData(
                "cursor: not one of this list's; take it from the last page's reply, or leave it out to begin anew",
                path="cursor",
            )
        return tuple(key)
