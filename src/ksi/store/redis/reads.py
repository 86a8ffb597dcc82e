"""The reading verbs of the store on Redis; what each means is written in `ksi.store.base.Store`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from ksi.clock import Moment
from ksi.request import Priority, Turn
from ksi.store.account import Spent, report
from ksi.store.redis.budgets import UsesMap, WaitsMap
from ksi.store.redis.calls import Calls
from ksi.store.redis.values import (
    Answer,
    Fields,
    LockFields,
    LockMap,
    kept_account,
    key16,
    logged_turn,
    pad20,
    read_cursor,
    turn_of,
    write_cursor,
)
from ksi.store.rules.fairness import Flow, next_flows
from ksi.store.usage import Pricing, UsageQuery, UsageReport
from ksi.store.values import (
    BudgetUse,
    BudgetWait,
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

_NAMES_PAGE = 1_000

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


class _Names(msgspec.Struct, frozen=True):
    names: tuple[str, ...]


class _Watermark(msgspec.Struct, frozen=True):
    watermark: int


class _Flows(msgspec.Struct, frozen=True):
    found: tuple[tuple[int, int, str, str, str], ...]


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
    Listing.ASKING: {"index": "asking"},
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
            # A reader of an unfinished request may wait for it: its end is to be reported here, wherever it happens.
            watched, bytes_of = await self._calls.change("watch", Moment(0, 0), _Watched, request_id=request_id)
            return None if watched.existing is None else watched.existing.view(bytes_of)
        return None if found.view is None else found.view.view(bytes_of)

    async def find(self, kind: Named, beginning: str, limit: int) -> tuple[str, ...]:
        """See the protocol. Keys have no order here: all are scanned, in small steps."""
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
        """True if a conversation has this name, and not only a provider session that means it."""
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
        return await self.page(index, limit, cursor, SessionView, index=index, show="session", backwards=True)

    async def lock(self, conversation: str, line_limit: int) -> LockView | None:
        """See the protocol."""
        found, _ = await self._calls.read("lock", LockMap, name=conversation, line_limit=line_limit)
        return None if found.view is None else found.view.shown

    async def locks(self, limit: int, cursor: str | None = None) -> Page[LockView]:
        """See the protocol."""
        page = await self.page("locks", limit, cursor, LockFields, index="held", show="lock")
        return Page(tuple(view.shown for view in page.items), page.cursor)

    async def forks(self, limit: int, cursor: str | None = None, conversation: str | None = None) -> Page[Fork]:
        """See the protocol."""
        index = "forks"
        if conversation is not None:
            found, _ = await self._calls.read("root", _Root, name=conversation)
            index = f"tree:{found.root}"
        return await self.page(index, limit, cursor, Fork, index=index, show="fork")

    async def requests(self, listing: Listing, limit: int, cursor: str | None = None) -> Page[RequestRow]:
        """See the protocol."""
        page = await self.page(listing.value, limit, cursor, Fields, show="row", **_LISTS[listing])
        return Page(tuple(fields.row() for fields in page.items), page.cursor)

    async def totals(self) -> Totals:
        """See the protocol."""
        totals, _ = await self._calls.read("totals", Totals)
        return totals

    async def waiting_by_route(self) -> Mapping[str, int]:
        """See the protocol."""
        found, _ = await self._calls.read("routes", _Routes)
        return dict(found.routes)

    async def waiting_by_priority(self) -> Mapping[Priority, int] | None:
        """See the protocol: the server has no list by priority."""
        return None

    async def nodes(self) -> list[NodeView]:
        """Machines that were heard of lately, by name; lost ones for thirty days."""
        found, _ = await self._calls.read("nodes", _Nodes)
        heard = [NodeView(node=node, heard_at=at) for node, at in found.heard]
        lost = [NodeView(node=node, heard_at=at, lost=True) for node, at in found.lost]
        return sorted(heard + lost, key=lambda view: view.node)

    async def log_after(self, watermark: int, limit: int, max_chars: int = 2**62) -> list[LoggedTurn]:
        """See the protocol: for requests that this daemon ran."""
        _, parts = await self._calls.read(
            "log", Answer, after=key16(watermark), limit=limit, max_chars=min(max_chars, _CHARS)
        )
        return [logged_turn(*parts[at : at + 4]) for at in range(0, len(parts), 4)]

    async def log_watermark(self) -> int:
        """See the protocol."""
        found, _ = await self._calls.read("watermark", _Watermark)
        return found.watermark

    async def next_flows(self, limit: int = 3) -> Sequence[Flow]:
        """See the protocol."""
        answer, _ = await self._calls.read("next_flows", _Flows, limit=10 * limit)
        return next_flows([(p, tag, int(rank), flow, name) for p, tag, rank, flow, name in answer.found], limit)

    async def budget_uses(self, budget: str, since: int) -> Sequence[BudgetUse]:
        """See the protocol."""
        found, _ = await self._calls.read("budget_uses", UsesMap, budget=budget, since=pad20(since))
        return found.found()

    async def budget_waits(self, limit: int = 1_000) -> Sequence[BudgetWait]:
        """See the protocol."""
        found, _ = await self._calls.read("budget_waits", WaitsMap, limit=limit)
        return found.found()

    async def usage(self, query: UsageQuery, pricing: Pricing) -> UsageReport:
        """See the protocol. The account is read in pages, and summed up in a thread."""
        own_name, members = None, None
        if query.conversation is not None:
            session = await self.session(query.conversation)
            own_name = "" if session is None else session.conversation
        if query.chain is not None:
            _, keys = await self._calls.read("chain_keys", Answer, name=query.chain)
            members = frozenset(map(int, keys))
        account: list[Spent] = []
        after, until = f"{pad20(query.since)}:", pad20(query.until)
        while True:
            _, page = await self._calls.read("account", Answer, after=after, until=until, limit=_ACCOUNT_PAGE)
            account += map(kept_account, page)
            if len(page) < _ACCOUNT_PAGE:
                break
            after = f"{page[-1][:36].decode()}~"  # behind that entry, whatever follows its number
        account = await self._by_present_names(account)
        return await asyncio.to_thread(report, account, query, pricing, conversation=own_name, members=members)

    async def _by_present_names(self, account: list[Spent]) -> list[Spent]:
        """The account under the names that its conversations have now."""
        names = list({spent.conversation for spent in account} - {""})
        present: dict[str, str] = {"": ""}
        for at in range(0, len(names), _NAMES_PAGE):
            some = names[at : at + _NAMES_PAGE]
            found, _ = await self._calls.read("names", _Names, names=some)
            present.update(zip(some, found.names, strict=True))
        return [
            spent
            if present[spent.conversation] == spent.conversation
            else msgspec.structs.replace(spent, conversation=present[spent.conversation])
            for spent in account
        ]

    async def page(self, name: str, limit: int, cursor: str | None, kind: type[T], **args: Any) -> Page[T]:
        """One page of a list."""
        outer, after = (None, None) if cursor is None else read_cursor(cursor, name)
        found, _ = await self._calls.read("page", _Rows, limit=limit, outer=outer, after=after, **args)
        items = tuple(msgspec.msgpack.decode(item, type=kind, strict=False) for item in found.items[:limit])
        more = len(found.items) > limit and limit > 0
        return Page(items, write_cursor(name, *found.places[limit - 1]) if more else None)
