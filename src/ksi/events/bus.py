"""Delivery of events: to subscribers by pattern, and to connections that follow a request of theirs."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import msgspec

from ksi.clock import Clock
from ksi.errors import InvalidData
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
"""Number of remembered ends that only followers were notified of: their own publication may still follow."""


MOST_PATTERNS = 100
"""Patterns that a listener has at most."""


AT_ONCE = 64
"""Listeners that are told within one call; where there are more, they are told in slices of the loop's turns."""

SLICE = 4_000
"""Lines for listeners in one such slice: a few milliseconds."""


class _Wish(msgspec.Struct, frozen=True):
    """The kinds of events that a follower wants."""

    end: bool
    chunks: bool


_WISHES = {(end, chunks): _Wish(end, chunks) for end in (False, True) for chunks in (False, True)}


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
        """True if it must not come together with an answer."""
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
    """A receiver of pushed lines. It must never block or raise."""

    def push(self, line: bytes) -> None:
        """Take one line."""
        ...

    def news(self, news: News) -> None:
        """Send a line that answers no one: it may wait a moment for more, but keeps its place among the lines."""
        ...


class _Editions:
    """One piece of news, written once for each form that a listener of it wants."""

    __slots__ = ("_others", "_usual", "_voices")

    def __init__(self, usual: News, voices: Mapping[Listener, Voice] | None) -> None:
        self._usual = usual
        self._voices = voices
        self._others: dict[Voice, News] | None = None

    def of(self, listener: Listener) -> News:
        """The news in this listener's form."""
        usual = self._usual
        if self._voices is None:
            return usual
        voice = self._voices.get(listener, usual.voice)
        if voice == usual.voice:
            return usual
        if self._others is None:
            self._others = {}
        if voice not in self._others:
            self._others[voice] = News(usual.name, usual.data, usual.at, voice)
        return self._others[voice]


class _NamePattern:
    """A pattern of event names, in which `*` stands for anything.

    A client's pattern is no regular expression, because compiling one takes too long.
    """

    __slots__ = ("_head", "_least", "_middle", "_tail")

    def __init__(self, pattern: str) -> None:
        self._head, *rest = pattern.split("*")
        self._least = len(pattern) - len(rest)
        self._tail = rest.pop() if rest else None
        self._middle = [part for part in rest if part]

    def fits(self, name: str) -> bool:
        """True if a name matches one of the patterns."""
        if self._tail is None:
            return name == self._head
        if len(name) < self._least or not name.startswith(self._head) or not name.endswith(self._tail):
            return False
        at, end = len(self._head), len(name) - len(self._tail)
        for part in self._middle:
            found = name.find(part, at, end)
            if found < 0:
                return False
            at = found + len(part)
        return True


class _Audience(NamedTuple):
    """The subscribers of one event at a moment."""

    listeners: tuple[Listener, ...] = ()
    members: frozenset[Listener] = frozenset()


class _Spread:
    """News on the way to a large audience."""

    __slots__ = ("audience", "edition", "place", "told")

    def __init__(self, edition: _Editions, audience: _Audience, told: set[Listener]) -> None:
        self.edition = edition
        self.audience = audience
        self.place = 0
        """How many of the listeners had their turn."""
        self.told = told
        """Listeners that have it and have not had their turn, or need not get it."""

    def tell(self, listener: Listener) -> None:
        """Tell a listener, unless it knows."""
        if listener not in self.told:
            listener.news(self.edition.of(listener))

    def go_on(self, most: int) -> int:
        """Tell the next ones; returns how many they were."""
        part = self.audience.listeners[self.place : self.place + most]
        for listener in part:
            self.tell(listener)
        self.place += len(part)
        if not self.is_done:
            self.told.update(part)
        return len(part)

    @property
    def is_done(self) -> bool:
        """True if all had their turn."""
        return self.place >= len(self.audience.listeners)


class EventBus:
    """Hands each event to everybody who wants it, once. An event without receivers costs one look-up."""

    def __init__(self, clock: Clock, voice: Voice = TODAY, names: Iterable[str] = ()) -> None:
        """`voice` is for every listener that has not asked for another. For the events with these `names` patterns are
        compared when they come, so that a publication need not."""
        self._clock = clock
        self._voice = voice
        self._voices: WeakKeyDictionary[Listener, Voice] = WeakKeyDictionary()
        """Of the listeners that asked for one form."""
        self._spoken = False
        """True if any ever did."""
        self._patterns: dict[Listener, dict[str, _NamePattern]] = {}
        self._by_name: dict[str, dict[Listener, None]] = {name: {} for name in names}
        self._audiences: dict[str, _Audience] = {}
        """Made of `_by_name` when they are needed."""
        self._spreads: deque[_Spread] = deque()
        self._spreading = False
        self._followers: dict[str, dict[Listener, _Wish]] = {}
        self._followed: dict[Listener, set[str]] = {}
        self._told: dict[str, list[Listener]] = {}
        """Subscribers that have heard of an end as followers."""

    def subscribe(self, listener: Listener, patterns: Iterable[str]) -> list[str]:
        """Add patterns of event names, `*` for anything; returns all that the listener has now.

        Raises:
            InvalidData: there would be more than `MOST_PATTERNS`; nothing is added.
        """
        mine = self._patterns.get(listener, {})
        added = {pattern: _NamePattern(pattern) for pattern in dict.fromkeys(patterns) if pattern not in mine}
        if len(mine) + len(added) > MOST_PATTERNS:
            raise InvalidData(
                f"patterns: a connection has at most {MOST_PATTERNS}, and this one has {len(mine)} already; "
                "unsubscribe from some",
                path="patterns",
            )
        self._patterns[listener] = {**mine, **added}
        for name, listeners in self._by_name.items():
            if listener not in listeners and any(pattern.fits(name) for pattern in added.values()):
                listeners[listener] = None
                self._audiences.pop(name, None)
        return list(self._patterns[listener])

    def unsubscribe(self, listener: Listener, patterns: Iterable[str] | None) -> list[str]:
        """Take patterns away, all without a list; returns those that are left."""
        mine = self._patterns.get(listener, {})
        for pattern in list(mine) if patterns is None else patterns:
            mine.pop(pattern, None)
        if not mine:
            self._patterns.pop(listener, None)
        for name, listeners in self._by_name.items():
            if listener in listeners and not any(pattern.fits(name) for pattern in mine.values()):
                del listeners[listener]
                self._audiences.pop(name, None)
        return list(mine)

    def follow(self, listener: Listener, request_id: str, *, end: bool = True, chunks: bool = False) -> bool:
        """Send a request's chunks to this listener, and its `end`: the result, or a lock's grant or lapse.

        Returns whether the listener did not follow it before.
        """
        followers = self._followers.get(request_id)
        if followers is None:
            followers = self._followers[request_id] = {}
        wish = followers.get(listener)
        if wish is not None:
            followers[listener] = _Wish(wish.end or end, wish.chunks or chunks)
            return False
        followers[listener] = _WISHES[end, chunks]
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
        """True if any listener follows it."""
        return request_id in self._followers

    def followed_ids(self) -> list[str]:
        """All requests with a follower."""
        return list(self._followers)

    def speak(self, listener: Listener, voice: Voice) -> None:
        """Tell a listener of things in this way from now on."""
        if voice != self._voices.get(listener, self._voice):
            self._voices[listener] = voice
            self._spoken = True

    def forget(self, listener: Listener) -> None:
        """A listener is gone."""
        self.unsubscribe(listener, None)
        for request_id in list(self._followed.get(listener, ())):
            self.unfollow(listener, request_id)

    def follows(self, listener: Listener, request_id: str) -> bool:
        """True if a listener still follows a request: neither has left, and it has not ended."""
        return request_id in self._followed.get(listener, ())

    def streams(self, request_id: str) -> bool:
        """True if any follower of a request reads its chunks."""
        followers = self._followers.get(request_id)
        return followers is not None and any(wish.chunks for wish in followers.values())

    def awaits(self, listener: Listener) -> bool:
        """True if a push may still come for a listener."""
        return listener in self._patterns or listener in self._followed

    def wanted(self, name: str, request_id: str | None = None) -> bool:
        """True if any listener would get this event."""
        return bool(self._by_name.get(name) or self._audience(name).listeners) or (
            request_id is not None and request_id in self._followers
        )

    def publish(self, name: str, data: Any, request_id: str | None = None) -> None:
        """Push an event to its subscribers; results, chunks and grants to those who follow `request_id` too."""
        audience = self._audiences.get(name) or self._audience(name)
        followers: Sequence[Listener] = ()
        if request_id is not None and request_id in self._followers:
            followers = self._followers_of(name, request_id)
        if not audience.listeners and not followers:
            return
        told: Sequence[Listener] = ()
        if self._told and request_id is not None and name in ENDINGS:
            told = self._told.pop(request_id, ())
        edition = self._editions(name, data)
        for listener in followers:
            self._tell(listener, edition.of(listener))
        if not audience.listeners:
            return
        if self._spreads or len(audience.listeners) > AT_ONCE:
            self._spreads.append(_Spread(edition, audience, {*followers, *told}))
            self._spread_soon()
            return
        for listener in audience.listeners:
            if listener not in followers and listener not in told:
                listener.news(edition.of(listener))

    def _spread_soon(self) -> None:
        if not self._spreading:
            self._spreading = True
            asyncio.get_running_loop().call_soon(self._spread)

    def _spread(self) -> None:
        """Tell as many listeners as one turn of the loop allows."""
        self._spreading = False
        left = SLICE
        while self._spreads and left > 0:
            left -= self._spreads[0].go_on(left)
            if self._spreads[0].is_done:
                self._spreads.popleft()
        if self._spreads:
            self._spread_soon()

    def catch_up(self, listener: Listener) -> None:
        """Tell a listener what is on the way to it: something else comes behind that now."""
        for spread in self._spreads:
            if listener in spread.audience.members:
                spread.tell(listener)
                spread.told.add(listener)

    def _editions(self, name: str, data: Any) -> _Editions:
        return _Editions(News(name, data, self._clock.unix(), self._voice), self._voices if self._spoken else None)

    def _tell(self, follower: Listener, news: News) -> None:
        if self._spreads:
            self.catch_up(follower)
        if not news.apart or news.name == CHUNK:
            follower.push(news.line())
        else:
            follower.news(news)

    def tell_followers(self, name: str, data: Any, request_id: str) -> None:
        """Push an ending only to the followers of its request: subscribers get it from the daemon where it happened.

        If that was here after all, `publish` of the same ending leaves out the followers.
        """
        if request_id not in self._followers:
            return
        edition = self._editions(name, data)
        followers = self._followers_of(name, request_id)
        for listener in followers:
            self._tell(listener, edition.of(listener))
        subscribers = self._audience(name).members
        if both := [listener for listener in followers if listener in subscribers]:
            self._told[request_id] = both
            if len(self._told) > _TOLD:
                del self._told[next(iter(self._told))]

    def push(self, listener: Listener, name: str, data: Any) -> None:
        """Send an event to one listener."""
        if self._spreads:
            self.catch_up(listener)
        listener.push(self._editions(name, data).of(listener).line())

    def _followers_of(self, name: str, request_id: str) -> list[Listener]:
        """The followers of a request that want this of it; each gets its end once."""
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

    def _audience(self, name: str) -> _Audience:
        found = self._audiences.get(name)
        if found is None:
            listeners = self._by_name.get(name)
            if listeners is None:
                listeners = self._by_name[name] = {
                    listener: None
                    for listener, patterns in self._patterns.items()
                    if any(pattern.fits(name) for pattern in patterns.values())
                }
            found = self._audiences[name] = _Audience(tuple(listeners), frozenset(listeners))
        return found
