"""Who hears of what: subscribers by pattern, and connections that follow a request of theirs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import translate
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import msgspec

from ksi.clock import Clock
from ksi.protocol import encode_reply

RESULT = "completion:result"
CHUNK = "completion:chunk"
LOCKED = "conversation:locked"
LOCK_EXPIRED = "conversation:lock_expired"

ENDINGS = frozenset({RESULT, LOCKED, LOCK_EXPIRED})
"""After one of these there is nothing more to follow: a request has ended, a wait for a lock is over."""


Encode = Callable[[str, Any, float], bytes]
"""Writes an event as one line: its name, its data, and the time in Unix seconds."""

_TOLD = 1000
"""Ends told to followers alone that are remembered: their own publication, if it comes, is under way already."""


class _Wish(msgspec.Struct):
    """What a follower wants to hear of."""

    end: bool
    chunks: bool


def encode_push(name: str, data: Any, at: float) -> bytes:
    """A pushed event in today's form."""
    return encode_reply(name, data, None, at)


NEWS_PAUSE = 0.002
"""Seconds that news wait for more: a listener is then woken once for all of them, and no answer waits behind it."""


class Voice(msgspec.Struct, frozen=True):
    """How a listener wants to hear of things."""

    encode: Encode = encode_push
    apart: float | None = None
    """Seconds between a reply and the end of the request that it is about, for clients that take all that they read
    at once for one line. Without it, a follower hears of an end at once."""


TODAY = Voice()


class News(msgspec.Struct):
    """An event for subscribers, made into a line when it is sent, once for all of them. Its data changes no more."""

    name: str
    data: Any
    at: float
    """Unix seconds."""
    voice: Voice = TODAY
    encoded: bytes | None = None

    @property
    def apart(self) -> bool:
        """Whether it must not come together with an answer."""
        return self.voice.apart is not None

    @property
    def pause(self) -> float:
        """Seconds that it waits for more."""
        return self.voice.apart or NEWS_PAUSE

    def line(self) -> bytes:
        """The line to send."""
        if self.encoded is None:
            self.encoded = self.voice.encode(self.name, self.data, self.at)
        return self.encoded


class Listener(Protocol):
    """Where pushed lines go. It must never block or raise."""

    def push(self, line: bytes) -> None:
        """Take one line."""
        ...

    def news(self, news: News) -> None:
        """Take what is nobody's answer: it may wait a moment for more, but keeps its place among the lines."""
        ...


class EventBus:
    """Hands each event to everybody who wants it, once (R1, L5). An event that nobody wants costs one look-up."""

    def __init__(self, clock: Clock, voice: Voice = TODAY) -> None:
        """`voice` is for every listener that has not asked for another."""
        self._clock = clock
        self._voice = voice
        self._voices: WeakKeyDictionary[Listener, Voice] = WeakKeyDictionary()
        """Of the listeners that asked for one."""
        self._patterns: dict[Listener, dict[str, re.Pattern[str]]] = {}
        self._by_name: dict[str, tuple[Listener, ...]] = {}
        self._followers: dict[str, dict[Listener, _Wish]] = {}
        self._followed: dict[Listener, set[str]] = {}
        self._told: dict[str, list[Listener]] = {}
        """Subscribers that have heard of an end as followers."""

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

    def speak(self, listener: Listener, voice: Voice) -> None:
        """Tell a listener of things in this way from now on."""
        if voice != self._voices.get(listener, self._voice):
            self._voices[listener] = voice

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
        subscribers = self._subscribers(name)
        followers: Iterable[Listener] = ()
        if request_id is not None and request_id in self._followers:
            followers = self._followers_of(name, request_id)
        if not subscribers and not followers:
            return
        told = self._told.pop(request_id, ()) if self._told and request_id is not None and name in ENDINGS else ()
        news = self._editions(name, data)
        for listener in followers:
            self._tell(listener, news(listener))
        for listener in subscribers:
            if listener not in followers and listener not in told:
                listener.news(news(listener))

    def _editions(self, name: str, data: Any) -> Callable[[Listener], News]:
        """One piece of news, written once for each form that a listener of it wants."""
        at = self._clock.unix()
        usual = News(name, data, at, self._voice)
        if not self._voices:
            return lambda _: usual
        made = {self._voice: usual}

        def edition(listener: Listener) -> News:
            voice = self._voices.get(listener, self._voice)
            if voice not in made:
                made[voice] = News(name, data, at, voice)
            return made[voice]

        return edition

    def _tell(self, follower: Listener, news: News) -> None:
        if not news.apart or news.name == CHUNK:
            follower.push(news.line())
        else:
            follower.news(news)

    def tell_followers(self, name: str, data: Any, request_id: str) -> None:
        """Push an ending to those who follow its request, and to nobody else: subscribers hear of it where it happened.

        If that was here after all, `publish` of the same ending leaves out who was told.
        """
        if request_id not in self._followers:
            return
        news = self._editions(name, data)
        followers = self._followers_of(name, request_id)
        for listener in followers:
            self._tell(listener, news(listener))
        subscribers = self._subscribers(name)
        if both := [listener for listener in followers if listener in subscribers]:
            self._told[request_id] = both
            if len(self._told) > _TOLD:
                del self._told[next(iter(self._told))]

    def push(self, listener: Listener, name: str, data: Any) -> None:
        """Send an event to one listener."""
        listener.push(self._editions(name, data)(listener).line())

    def _followers_of(self, name: str, request_id: str) -> list[Listener]:
        """Who follows a request and wants this of it; its end is told once."""
        if name in ENDINGS:
            ended = self._followers.pop(request_id)
            for listener in ended:
                self._drop_followed(listener, request_id)
            return [listener for listener, wish in ended.items() if wish.end]
        if name == CHUNK:
            return [listener for listener, wish in self._followers[request_id].items() if wish.chunks]
        return []

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
