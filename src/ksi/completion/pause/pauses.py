"""Pauses as frozen values, and the rule that says which requests they hold.

A pause keeps requests from being started; running ones continue. Its scope is everything, or one provider, agent,
session or priority, and it holds until the same scope is resumed or its time is over. Times are wall time in
microseconds.
"""

from __future__ import annotations

from datetime import UTC, tzinfo
from enum import StrEnum

import msgspec

from ksi.completion.pool.limits import shown_time
from ksi.request import Priority
from ksi.store.values import NO_PAUSE, Paused


class Scope(StrEnum):
    """The kind of thing that a pause names."""

    ALL = "all"
    PROVIDER = "provider"
    AGENT = "agent"
    SESSION = "session"
    PRIORITY = "priority"


class Pause(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that is held back."""

    scope: Scope
    name: str = ""
    """The provider, agent, session or priority; empty for everything."""
    since: int
    until: int | None = None
    """The pause ends by itself at this time."""
    by: str = ""
    """The operator's name, as given."""
    why: str = ""

    def active(self, now: int) -> bool:
        """Return whether it holds now."""
        return self.until is None or now < self.until

    @property
    def what(self) -> str:
        """The thing in words."""
        return "everything" if self.scope is Scope.ALL else f"{self.scope} {self.name}"

    def sentence(self, now: int, zone: tzinfo = UTC) -> str:
        """Describe the pause in one sentence: operator, scope, beginning, end and reason."""
        words = f"{self.what} is paused since {shown_time(self.since, now, zone)}"
        words += f" by {self.by}" if self.by else ""
        words += f" until {shown_time(self.until, now, zone)}" if self.until is not None else ""
        return f"{words}: {self.why}" if self.why else words

    def shifted(self, by: int) -> Pause:
        """The same on a clock that is ahead by so many microseconds."""
        until = None if self.until is None else self.until + by
        return msgspec.structs.replace(self, since=self.since + by, until=until)


class Pauses(msgspec.Struct, frozen=True):
    """All that is held back."""

    items: tuple[Pause, ...] = ()

    def with_(self, pause: Pause) -> Pauses:
        """After a pause began; one of the same thing is replaced."""
        return Pauses((*self.without(pause.scope, pause.name).items, pause))

    def without(self, scope: Scope, name: str) -> Pauses:
        """After a thing was resumed."""
        return Pauses(tuple(one for one in self.items if (one.scope, one.name) != (scope, name)))

    def since_ended(self, now: int) -> Pauses:
        """Without those whose time is over."""
        return Pauses(tuple(one for one in self.items if one.active(now)))

    def find(self, scope: Scope, name: str, now: int) -> Pause | None:
        """The pause of one thing."""
        return next((one for one in self.items if (one.scope, one.name) == (scope, name) and one.active(now)), None)

    def of(self, agent_id: str | None, conversation: str, priority: Priority, now: int) -> Pause | None:
        """The pause that keeps such a request from being started at any provider."""
        if not self.items:
            return None
        named = {Scope.ALL: "", Scope.SESSION: conversation, Scope.PRIORITY: priority.word, Scope.AGENT: agent_id}
        return next((one for one in self.items if one.name == named.get(one.scope) and one.active(now)), None)

    def paused(self, now: int) -> Paused:
        """The requests that a store is not to start. Everything, and a provider, it is not offered at all."""
        if not self.items:
            return NO_PAUSE
        named: dict[Scope, set[str]] = {scope: set() for scope in Scope}
        for one in self.items:
            if one.active(now):
                named[one.scope].add(one.name)
        return Paused(
            agents=frozenset(named[Scope.AGENT]),
            conversations=frozenset(named[Scope.SESSION]),
            priorities=frozenset(priority for priority in Priority if priority.word in named[Scope.PRIORITY]),
        )

    def ends_next(self, now: int) -> int | None:
        """Return the time at which the next pause ends by itself."""
        return min((one.until for one in self.items if one.until is not None and one.until > now), default=None)

    def shifted(self, by: int) -> Pauses:
        """The same on a clock that is ahead by so many microseconds."""
        return self if not by else Pauses(tuple(one.shifted(by) for one in self.items))


encode_pauses = msgspec.msgpack.Encoder().encode
decode_pauses = msgspec.msgpack.Decoder(Pauses).decode
