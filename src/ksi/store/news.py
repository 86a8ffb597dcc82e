"""Events at other daemons of the same store that a client here may wait for."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import msgspec

from ksi.store.values import Ended, Lapsed, LockGrant


class Kind(StrEnum):
    """The subject of a piece of news."""

    WORK = "work"
    """Something may have become ready."""
    ROUTE = "route"
    """A route that was not used before; `name` is it."""
    ENDED = "ended"
    """A request that this daemon cares for is final."""
    STOP = "stop"
    """A request that runs here is to be stopped."""
    GRANTED = "granted"
    """An external waiter of this daemon has its lock."""
    GONE = "gone"
    """An external holder or waiter of this daemon is none any more."""
    PROVIDER = "provider"
    """The record of a provider changed; `name` is it."""
    LOST = "lost"
    """This daemon's lease expired: the runs `keys` are not its own any more."""
    MISSED = "missed"
    """News may have got lost: look again."""


class News(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of news."""

    kind: Kind
    name: str = ""
    grant: LockGrant | None = None
    lapsed: Lapsed | None = None
    ended: Ended | None = None
    keys: tuple[int, ...] = ()


OnNews = Callable[[News], None]
