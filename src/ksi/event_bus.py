"""Who hears of what: subscribers by pattern, and connections that follow a request of theirs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import translate
from typing import Any, Protocol

import msgspec

from ksi.clock import Clock
from ksi.protocol import encode_reply

RESULT = "completion:result"
CHUNK = "completion:chunk"
LOCKED = "conversation:locked"
LOCK_EXPIRED = "conversation:lock_expired"

ENDINGS = frozenset({RESULT, LOCKED, LOCK_EXPIRED})
"""After one of these there is nothing more to follow: a request has ended, a wait for a lock is over."""


class _Wish(msgspec.Struct):
    """What a follower wants to hear of."""

    end: bool
    chunks: bool


class Listener(Protocol):
    """Where pushed lines go. It must never block or raise."""

    def push(self, line: bytes) -> None:
        """Take one line."""
        ...


class EventBus:
    """Hands each event to everybody who wants it, once (R1, L5). An event that nobody wants costs one look-up."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._patterns: dict[Listener, dict[str, re.Pattern[str]]] = {}
        self._by_name: dict[str, tuple[Listener, ...]] = {}
        self._followers: dict[str, dict[Listener, _Wish]] = {}
        self._followed: dict[Listener, set[str]] = {}

    def subscribe(self, listener: Listener, patterns: Iterable[str]) -> list[str]:
        """Add patterns of event names, `*` for anything; returns all that the listener has now."""
        mine = self._patterns.setdefault(listener, {})
        for pattern in patterns:
            mine[pattern] = re.compile(translate(pattern))
        self._by_name.clear()
        return list(mine)

    def unsubscribe(self, listener: Listener, patterns: Iterable[str] | None) -> list[str]:
        """Take patterns away, all without a list; returns those that are left."""
        mine = self._patterns.get(listener, {})
        for pattern in list(mine) if patterns is None else patterns:
            mine.pop(pattern, None)
        if not mine:
            self._patterns.pop(listener, None)
        self._by_name.clear()
        return list(mine)

    def follow(self, listener: Listener, request_id: str, *, end: bool = True, chunks: bool = False) -> bool:
        """Send a request's chunks to this listener, and its `end`: the result, or a lock's grant or lapse.

        Returns whether the listener did not follow it before.
        """
        followers = self._followers.setdefault(request_id, {})
        wish = followers.get(listener)
        if wish is not None:
            followers[listener] = _Wish(wish.end or end, wish.chunks or chunks)
            return False
        followers[listener] = _Wish(end, chunks)
        self._followed.setdefault(listener, set()).add(request_id)
        return True

    def unfollow(self, listener: Listener, request_id: str) -> None:
        """Undo `follow`."""
        followers = self._followers.get(request_id)
        if followers is not None:
            followers.pop(listener, None)
            if not followers:
                del self._followers[request_id]
        self._drop_followed(listener, request_id)

    def followed(self, request_id: str) -> bool:
        """Whether anybody follows it."""
        return request_id in self._followers

    def followed_ids(self) -> list[str]:
        """Everything that somebody follows."""
        return list(self._followers)

    def forget(self, listener: Listener) -> None:
        """A listener is gone."""
        self.unsubscribe(listener, None)
        for request_id in list(self._followed.get(listener, ())):
            self.unfollow(listener, request_id)

    def follows(self, listener: Listener, request_id: str) -> bool:
        """Whether a listener still follows a request: neither has left, and it has not ended."""
        return request_id in self._followed.get(listener, ())

    def streams(self, request_id: str) -> bool:
        """Whether anybody who follows a request reads its chunks."""
        return any(wish.chunks for wish in self._followers.get(request_id, {}).values())

    def awaits(self, listener: Listener) -> bool:
        """Whether anything may still come for a listener."""
        return listener in self._patterns or listener in self._followed

    def wanted(self, name: str, request_id: str | None = None) -> bool:
        """Whether anybody would get this event."""
        return bool(self._subscribers(name)) or (request_id is not None and request_id in self._followers)

    def publish(self, name: str, data: Any, request_id: str | None = None) -> None:
        """Push an event to its subscribers; results, chunks and grants to those who follow `request_id` too."""
        targets: Iterable[Listener] = self._subscribers(name)
        if request_id is not None and request_id in self._followers:
            targets = self._with_followers(name, request_id, targets)
        if not targets:
            return
        line = encode_reply(name, data, None, self._clock.unix())
        for listener in targets:
            listener.push(line)

    def push(self, listener: Listener, name: str, data: Any) -> None:
        """Send an event to one listener."""
        listener.push(encode_reply(name, data, None, self._clock.unix()))

    def _with_followers(self, name: str, request_id: str, subscribers: Iterable[Listener]) -> list[Listener]:
        targets = dict.fromkeys(subscribers)
        if name in ENDINGS:
            for listener, wish in self._followers.pop(request_id).items():
                if wish.end:
                    targets[listener] = None
                self._drop_followed(listener, request_id)
        elif name == CHUNK:
            targets.update(dict.fromkeys(one for one, wish in self._followers[request_id].items() if wish.chunks))
        return list(targets)

    def _drop_followed(self, listener: Listener, request_id: str) -> None:
        followed = self._followed.get(listener)
        if followed is not None:
            followed.discard(request_id)
            if not followed:
                del self._followed[listener]

    def _subscribers(self, name: str) -> tuple[Listener, ...]:
        found = self._by_name.get(name)
        if found is None:
            found = tuple(
                listener
                for listener, patterns in self._patterns.items()
                if any(pattern.match(name) for pattern in patterns.values())
            )
            self._by_name[name] = found
        return found
