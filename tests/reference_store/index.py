"""Pages of sorted keys, with cursors."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from ksi.store.image.ordered import Key, Ordered
from ksi.store.rules import refusals
from ksi.store.values import Page

T = TypeVar("T")


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
            raise refusals.foreign_cursor()
        return tuple(key)
