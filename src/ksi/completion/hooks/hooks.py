"""Follows the store and delivers what happened to the configured hooks: at least once, in order within a conversation.

The store is the outbox: ends, open questions and what budgets told are read from it, and a small record beside the
pauses says up to where they are delivered and what is tried again. So nothing is lost with the daemon; what was under
way when it died is delivered again under the same id. Of several daemons on one store, the one that holds the record's
lease delivers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import aiohttp
import msgspec
import structlog

from ksi.budgets.rules import EXCEEDED, Cap, Notice, Use
from ksi.clock import MICROSECONDS, Clock
from ksi.completion.budget.book import BudgetBook, notice_push
from ksi.completion.hooks.delivery import HookFailed, post, run, signed
from ksi.completion.replies import Teller
from ksi.config.schema import Hooks as Settings
from ksi.host.private_files import append, make_folder
from ksi.host.supervise import Periodic
from ksi.request import State
from ksi.store.base import Store
from ksi.store.provider_records import KeptRecord
from ksi.store.values import Listing, RequestRow

RECORD = ":hooks"
"""The name of the record in the store; no provider can be called that."""

EVERY = 1.0
"""Seconds between two looks at the store."""

LEASE = 30 * MICROSECONDS
OVERLAP = 5 * MICROSECONDS
"""Ends that are this much older than the newest may still become visible: they are looked at again."""

AT_ONCE = 8
"""Deliveries at once, each of another conversation."""

FIRST_WAIT, LONGEST_WAIT = 5.0, 3_600.0
"""Seconds before a delivery is tried again; they double."""

Event = Literal["end", "block", "budget", "approval"]


class Item(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something to deliver."""

    id: str
    """The same each time that it is delivered."""
    event: Event
    conversation: str = ""
    body: bytes
    attempts: int = 0
    due: int = 0


class Kept(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far deliveries are."""

    until: int
    """Ends up to this time are delivered, or wait below."""
    told: tuple[str, ...] = ()
    """The notices of budgets in their present windows."""
    asked: tuple[str, ...] = ()
    """Open questions that were delivered."""
    waiting: tuple[Item, ...] = ()
    """To be tried again."""
    owner: str = ""
    lease: int = 0


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Kept).decode


class Hooks:
    """Delivers. `task` runs it."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        book: BudgetBook,
        teller: Teller,
        dead: Path,
        owner: str,
        key: bytes | None,
        clock: Clock,
    ) -> None:
        """`dead` is the file for what could not be delivered, `owner` this daemon's name, `key` signs webhooks."""
        self._settings = settings
        self._store = store
        self._book = book
        self._teller = teller
        self._dead = dead
        self._owner = owner
        self._key = key
        self._clock = clock
        self._version = 0
        self._kept: Kept | None = None
        self._recent: dict[str, int] = {}
        """Ends that were taken up, with their times, as far back as they are looked at again."""
        self._looked = False
        self._began = clock.now().wall - 1
        self._buried = 0
        self._session: aiohttp.ClientSession | None = None
        self._log = structlog.get_logger("ksi.hooks")
        self.task = Periodic("ksi-hooks", self.step, EVERY, clock)

    async def stop(self) -> None:
        """Deliver no more. What is under way is delivered again by the next start."""
        await self.task.stop()
        if self._session is not None:
            await self._session.close()

    def problems(self) -> list[str]:
        """One sentence on what could not be delivered since the start."""
        waiting = 0 if self._kept is None else len(self._kept.waiting)
        found = [f"{waiting} deliveries to hooks are tried again; the log says why"] if waiting else []
        if self._buried:
            found.append(f"{self._buried} deliveries to hooks were given up; they are in {self._dead}")
        return found

    async def step(self) -> None:
        """Deliver what is new and what is due again.

        Raises:
            StoreError: the store says no; the next step does it.
        """
        if not await self._take_lease() or self._kept is None:
            return
        now = self._clock.now().wall
        ends, until = await self._ends(self._kept.until)
        notices, told = await self._notices(self._kept.told, now)
        questions, asked = await self._questions(self._kept.asked)
        waiting = await self._deliver([*self._kept.waiting, *ends, *notices, *questions])
        await self._keep(msgspec.structs.replace(self._kept, until=until, told=told, asked=asked, waiting=waiting))

    # -- the record ---------------------------------------------------------------------------------------------------

    async def _take_lease(self) -> bool:
        """Whether this daemon delivers now."""
        now = self._clock.now().wall
        found = (await self._store.provider_records(self._clock.now())).records.get(RECORD, KeptRecord())
        kept = _decode(found.value) if found.version else Kept(until=self._began)
        self._version = found.version
        if kept.owner not in ("", self._owner) and kept.lease > now:
            self._kept = None
            return False
        if kept.owner == self._owner and kept.lease > now + LEASE // 2:
            self._kept = kept
            return True
        return await self._keep(msgspec.structs.replace(kept, owner=self._owner, lease=now + LEASE))

    async def _keep(self, kept: Kept) -> bool:
        if kept == self._kept:
            return True
        now = self._clock.now()
        put = await self._store.put_provider_record(RECORD, self._version, _encode(kept), now, tell=False)
        self._version = put.kept.version
        self._kept = kept if put.written else None
        return put.written

    # -- what happened ------------------------------------------------------------------------------------------------

    async def _ends(self, since: int) -> tuple[list[Item], int]:
        """Requests that ended since then, the oldest first, and up to when that is."""
        if not (self._settings.on_end or self._settings.on_block):
            return [], self._clock.now().wall
        rows: list[RequestRow] = []
        cursor: str | None = None
        while True:
            page = await self._store.requests(Listing.FINISHED, 100, cursor)
            new = [row for row in page.items if (row.finished_at or 0) >= since - OVERLAP]
            rows += new
            cursor = page.cursor
            if cursor is None or len(new) < len(page.items):
                break
        newest = max((row.finished_at or 0 for row in rows), default=since)
        fresh = [row for row in rows if row.request_id not in self._recent]
        if not self._looked:
            # After a start: what was delivered just before it would come again with the overlap.
            fresh = [row for row in fresh if (row.finished_at or 0) > since]
        self._looked = True
        self._recent |= {row.request_id: row.finished_at or 0 for row in rows}
        self._recent = {name: at for name, at in self._recent.items() if at >= newest - 2 * OVERLAP}
        items = [item for row in reversed(fresh) for item in await self._end(row)]
        return items, max(since, newest)

    async def _end(self, row: RequestRow) -> list[Item]:
        events: list[Event] = []
        if self._settings.on_end:
            events.append("end")
        if self._settings.on_block and row.state is State.BLOCKED:
            events.append("block")
        view = await self._store.get(row.request_id) if events else None
        if view is None:
            return []
        data = msgspec.to_builtins(await self._teller.tell(view))
        at = row.finished_at or 0
        return [
            Item(
                id=f"{event}_{row.request_id}",
                event=event,
                conversation=row.conversation,
                body=_body(f"completion.{event}", at, data),
            )
            for event in events
        ]

    async def _notices(self, told: Sequence[str], now: int) -> tuple[list[Item], tuple[str, ...]]:
        """The notices of budgets in their present windows that were not delivered yet."""
        if not self._settings.on_budget:
            return [], ()
        items: list[Item] = []
        known: list[str] = []
        for cap in self._book.caps(now):
            for use in await self._store.budget_uses(cap.name, cap.start):
                for notice, name in _told(cap, use.subject, use.use) if use.start == cap.start else ():
                    known.append(name)
                    if name not in told:
                        push = msgspec.to_builtins(notice_push(notice))
                        kind = "budget.exceeded" if notice.threshold is None else "budget.warning"
                        items.append(Item(id=name, event="budget", body=_body(kind, now, push)))
        return items, tuple(known)

    async def _questions(self, asked: Sequence[str]) -> tuple[list[Item], tuple[str, ...]]:
        """Requests that wait for a person, each question once."""
        if not self._settings.on_approval:
            return [], ()
        page = await self._store.requests(Listing.ASKING, 1_000)
        items: list[Item] = []
        known: list[str] = []
        for row in page.items:
            if row.question is None:
                continue
            name = f"approval_{row.request_id}_{row.question.asked_at}"
            known.append(name)
            if name not in asked:
                data = {
                    "request_id": row.request_id,
                    "session_id": row.conversation,
                    "agent_id": row.agent_id,
                    "model": row.model,
                    "question": msgspec.to_builtins(row.question),
                }
                body = _body("completion.approval_required", row.question.asked_at, data)
                items.append(Item(id=name, event="approval", conversation=row.conversation, body=body))
        return items, tuple(known)

    # -- delivering ---------------------------------------------------------------------------------------------------

    async def _deliver(self, items: Iterable[Item]) -> tuple[Item, ...]:
        """Deliver, in order within a conversation; what is to be tried again."""
        lanes: dict[str, list[Item]] = {}
        for item in items:
            lanes.setdefault(item.conversation or item.id, []).append(item)
        room = asyncio.Semaphore(AT_ONCE)

        async def lane(of: list[Item]) -> list[Item]:
            async with room:
                for number, item in enumerate(of):
                    again = await self._try(item)
                    if again is not None:
                        return [again, *of[number + 1 :]]
            return []

        left = await asyncio.gather(*(lane(of) for of in lanes.values()))
        return tuple(item for of in left for item in of)

    async def _try(self, item: Item) -> Item | None:
        """Deliver one; None where it has arrived or is given up."""
        now = self._clock.now().wall
        if item.due > now:
            return item
        try:
            await self._send(item, now)
        except HookFailed as error:
            attempts = item.attempts + 1
            told: Mapping[str, Any] = {"hook": item.event, "id": item.id, "attempts": attempts, "error": str(error)}
            if attempts >= self._settings.attempts:
                self._log.error("a delivery to a hook is given up", **told)
                self._bury(item, str(error))
                return None
            self._log.warning("a delivery to a hook failed", **told)
            wait = min(FIRST_WAIT * 2 ** (attempts - 1), LONGEST_WAIT)
            return msgspec.structs.replace(item, attempts=attempts, due=now + round(wait * MICROSECONDS))
        return None

    async def _send(self, item: Item, now: int) -> None:
        where = self._settings.of(item.event)
        if isinstance(where, str):
            if self._session is None:
                timeout = aiohttp.ClientTimeout(total=self._settings.timeout)
                self._session = aiohttp.ClientSession(timeout=timeout, trust_env=True)
            await post(self._session, where, signed(self._key, item.id, now, item.body), item.body)
        elif where:
            await run(where, item.event, item.body, self._settings.timeout)

    def _bury(self, item: Item, error: str) -> None:
        """Keep what could not be delivered in a file, one JSON object a line."""
        self._buried += 1
        line = {"id": item.id, "hook": item.event, "error": error, "event": msgspec.Raw(item.body)}
        make_folder(self._dead.parent)
        append(self._dead, msgspec.json.encode(line) + b"\n", private=True)


def _body(kind: str, at: int, data: Any) -> bytes:
    """An event as Standard Webhooks has it: its type, its time and its data."""
    time = datetime.fromtimestamp(at / MICROSECONDS, UTC).isoformat().replace("+00:00", "Z")
    return msgspec.json.encode({"type": kind, "timestamp": time, "data": data})


def _told(cap: Cap, subject: str, use: Use) -> Iterable[tuple[Notice, str]]:
    """The notices of a budget about a subject, each with a name of its own."""
    limit = cap.limit_of(subject)
    if use.told_of != limit:
        return
    bits: list[float | None] = [None, *cap.warn_at]
    for place, threshold in enumerate(bits):
        if use.told >> place & EXCEEDED:
            notice = Notice(
                name=cap.name,
                subject=subject,
                unit=cap.unit,
                used=use.used.of(cap.unit),
                limit=limit,
                start=cap.start,
                end=cap.end,
                threshold=threshold,
            )
            yield notice, f"budget_{cap.name}_{subject}_{cap.start}_{place}_{limit}"
