"""The reading verbs of the store on Redis; what each means is written in `ksi.store.base.Store`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from ksi.clock import Moment
from ksi.request import Turn
from ksi.store.chains import ChainLimits
from ksi.store.memory_chain_data import Chain
from ksi.store.memory_data import Conversation, MemoryData
from ksi.store.memory_data import Spent as Attributed
from ksi.store.memory_usage import report
from ksi.store.redis_calls import Calls
from ksi.store.redis_values import (
    Answer,
    Fields,
    LockFields,
    LockMap,
    Spent,
    kept_account,
    key16,
    logged_turn,
    pad20,
    read_cursor,
    turn_of,
    write_cursor,
)
from ksi.store.usage import Pricing, UsageQuery, UsageReport
from ksi.store.values import (
    Fork,
    Listing,
    LockView,
    LoggedTurn,
    Named,
    NodeView,
    Page,
    RequestRow,
    RequestView,
    SessionView,
    Totals,
)

T = TypeVar("T")

_CHARS = 2**52
"""The most that a function counts to."""

_ACCOUNT_PAGE = 2_000

_SPECIAL = "*?[]\\^"
"""Characters that mean something in a pattern of SCAN."""


class _Viewed(Answer, frozen=True, kw_only=True):
    view: Fields | None = None
    unheard: bool = False


class _Watched(Answer, frozen=True, kw_only=True):
    existing: Fields | None = None


class _Session(Answer, frozen=True, kw_only=True):
    view: SessionView | None = None


class _Rows(msgspec.Struct, frozen=True):
    items: tuple[msgspec.Raw, ...]
    places: tuple[tuple[str, str], ...]


class _Routes(msgspec.Struct, frozen=True):
    routes: tuple[tuple[str, int], ...]


class _Watermark(msgspec.Struct, frozen=True):
    watermark: int


class _Nodes(msgspec.Struct, frozen=True):
    heard: tuple[tuple[str, int], ...]
    lost: tuple[tuple[str, int], ...]


class _Root(msgspec.Struct, frozen=True):
    root: str


_LISTS: dict[Listing, dict[str, Any]] = {
    Listing.ACTIVE: {"index": "active"},
    Listing.READY: {"index": "routes", "inner": "ready:"},
    Listing.WAITING: {"index": "lined", "inner": "l:"},
    Listing.DELAYED: {"index": "delayed"},
    Listing.FAILED: {"index": "failed", "backwards": True},
    Listing.FINISHED: {"index": "finished", "backwards": True},
}


class RedisReads:
    """The verbs that change nothing."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def get(self, request_id: str) -> RequestView | None:
        """See the protocol."""
        found, bytes_of = await self._calls.read("get", _Viewed, request_id=request_id)
        if found.unheard:
            # Whoever looks at what has not ended may wait for it: its end is to be told here, wherever it comes (D1).
            watched, bytes_of = await self._calls.change("watch", Moment(0, 0), _Watched, request_id=request_id)
            return None if watched.existing is None else watched.existing.view(bytes_of)
        return None if found.view is None else found.view.view(bytes_of)

    async def find(self, kind: Named, beginning: str, limit: int) -> tuple[str, ...]:
        """See the protocol. Keys have no order here: all are looked through, in steps that hold nobody up."""
        prefix = f"{self._calls.namespace}:{'id' if kind == 'request' else 'name'}:"
        pattern = "".join(f"\\{char}" if char in _SPECIAL else char for char in prefix + beginning) + "*"
        found: set[str] = set()
        cursor = b""
        while cursor != b"0" and len(found) < limit:
            # It names a key, as SCAN does not: so the next command goes to the node that has the namespace.
            await self._calls.plain("EXISTS", f"{self._calls.namespace}:meta")
            cursor, keys = await self._calls.plain("SCAN", cursor or b"0", "MATCH", pattern, "COUNT", "2000")
            for name in (key.decode()[len(prefix) :] for key in keys):
                if kind == "request" or await self._is_own_name(name):
                    found.add(name)
        return tuple(sorted(found)[:limit])

    async def _is_own_name(self, name: str) -> bool:
        """Whether a conversation is called so, and not a provider session that means it."""
        view = await self.session(name)
        return view is not None and view.conversation == name

    async def history(self, head: int, max_chars: int) -> list[Turn]:
        """See the protocol."""
        _, parts = await self._calls.read("history", Answer, head=key16(head), max_chars=min(max_chars, _CHARS))
        return [turn_of(*parts[at : at + 4]) for at in range(0, len(parts), 4)]

    async def session(self, conversation: str) -> SessionView | None:
        """See the protocol."""
        found, _ = await self._calls.read("session", _Session, name=conversation)
        return found.view

    async def sessions(self, limit: int, cursor: str | None = None, agent_id: str | None = None) -> Page[SessionView]:
        """See the protocol."""
        index = "sessions" if agent_id is None else f"as:{agent_id}"
        return await self._page(index, limit, cursor, SessionView, index=index, show="session", backwards=True)

    async def lock(self, conversation: str, line_limit: int) -> LockView | None:
        """See the protocol."""
        found, _ = await self._calls.read("lock", LockMap, name=conversation, line_limit=line_limit)
        return None if found.view is None else found.view.shown

    async def locks(self, limit: int, cursor: str | None = None) -> Page[LockView]:
        """See the protocol."""
        page = await self._page("locks", limit, cursor, LockFields, index="held", show="lock")
        return Page(tuple(view.shown for view in page.items), page.cursor)

    async def forks(self, limit: int, cursor: str | None = None, conversation: str | None = None) -> Page[Fork]:
        """See the protocol."""
        index = "forks"
        if conversation is not None:
            found, _ = await self._calls.read("root", _Root, name=conversation)
            index = f"tree:{found.root}"
        return await self._page(index, limit, cursor, Fork, index=index, show="fork")

    async def requests(self, listing: Listing, limit: int, cursor: str | None = None) -> Page[RequestRow]:
        """See the protocol."""
        page = await self._page(listing.value, limit, cursor, Fields, show="row", **_LISTS[listing])
        return Page(tuple(fields.row() for fields in page.items), page.cursor)

    async def totals(self) -> Totals:
        """See the protocol."""
        totals, _ = await self._calls.read("totals", Totals)
        return totals

    async def waiting_by_route(self) -> Mapping[str, int]:
        """See the protocol."""
        found, _ = await self._calls.read("routes", _Routes)
        return dict(found.routes)

    async def nodes(self) -> list[NodeView]:
        """Machines that were heard of lately, by name; lost ones for thirty days."""
        found, _ = await self._calls.read("nodes", _Nodes)
        heard = [NodeView(node=node, heard_at=at) for node, at in found.heard]
        lost = [NodeView(node=node, heard_at=at, lost=True) for node, at in found.lost]
        return sorted(heard + lost, key=lambda view: view.node)

    async def log_after(self, watermark: int, limit: int, max_chars: int = 2**62) -> list[LoggedTurn]:
        """See the protocol: what this daemon ran."""
        _, parts = await self._calls.read(
            "log", Answer, after=key16(watermark), limit=limit, max_chars=min(max_chars, _CHARS)
        )
        return [logged_turn(*parts[at : at + 4]) for at in range(0, len(parts), 4)]

    async def log_watermark(self) -> int:
        """See the protocol."""
        found, _ = await self._calls.read("watermark", _Watermark)
        return found.watermark

    async def usage(self, query: UsageQuery, pricing: Pricing) -> UsageReport:
        """See the protocol. The account is read in pages, and summed up in a thread."""
        data = MemoryData()
        if query.conversation is not None:
            session = await self.session(query.conversation)
            if session is not None:
                data.conversations[query.conversation] = Conversation(
                    number=0, name=session.conversation, created_at=0, active_at=0
                )
        if query.chain is not None:
            _, keys = await self._calls.read("chain_keys", Answer, name=query.chain)
            data.chains.named[query.chain] = _members(query.chain, [int(key) for key in keys])
        after, until = f"{pad20(query.since)}:", pad20(query.until)
        while True:
            _, page = await self._calls.read("account", Answer, after=after, until=until, limit=_ACCOUNT_PAGE)
            data.spent += [attributed(kept_account(entry)) for entry in page]
            if len(page) < _ACCOUNT_PAGE:
                break
            after = page[-1][:36].decode()
        return await asyncio.to_thread(report, data, query, pricing)

    async def _page(self, name: str, limit: int, cursor: str | None, kind: type[T], **args: Any) -> Page[T]:
        """One page of a list."""
        outer, after = (None, None) if cursor is None else read_cursor(cursor, name)
        found, _ = await self._calls.read("page", _Rows, limit=limit, outer=outer, after=after, **args)
        items = tuple(msgspec.msgpack.decode(item, type=kind, strict=False) for item in found.items[:limit])
        more = len(found.items) > limit and limit > 0
        return Page(items, write_cursor(name, *found.places[limit - 1]) if more else None)


def _members(name: str, keys: list[int]) -> Chain:
    """A chain of which reports want the members alone."""
    limits = ChainLimits(max_depth=0, token_budget=0, time_window=0)
    return Chain(number=0, name=name, limits=limits, created_at=0, started_at=0, members=keys)


def attributed(spent: Spent) -> Attributed:
    """An account's entry as reports read it."""
    return Attributed(
        request=spent.key,
        conversation=spent.conversation,
        agent_id=spent.agent_id,
        attempt=spent.attempt,
        first=spent.first,
    )
