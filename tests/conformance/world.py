"""Common parts of the store tests: a clock by hand, a store that can be crashed, short verbs, invariants."""

from __future__ import annotations

import random
import shutil
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ksi.clock import MICROSECONDS, Chance, Moment, microseconds
from ksi.request import Attempt, HeadStarts, Outcome, Priority, State, Usage
from ksi.store.base import Store
from ksi.store.chains import Aftermath
from ksi.store.redis.address import Address
from ksi.store.redis.store import RedisStore
from ksi.store.values import (
    Acquired,
    Cancelled,
    Claimed,
    Enqueued,
    Expiry,
    Finish,
    GiveBack,
    Listing,
    LockGrant,
    LockView,
    NewLock,
    NewRequest,
    Offer,
    Page,
    Passing,
    Recovery,
    RequestView,
    Retry,
    Settled,
    StoreRules,
    Totals,
    Verdict,
)
from tests.conformance.in_play import check_in_play
from tests.reference_store.data import MemoryData
from tests.reference_store.store import MemoryStore

T = TypeVar("T")

START = 1_800_000_000 * MICROSECONDS
HOUR = 3_600.0
DAY = 24 * HOUR
HEAD_STARTS = HeadStarts(
    high=microseconds(6 * HOUR), normal=microseconds(3 * HOUR), low=microseconds(1 * HOUR), background=0
)
ROUTE = "stub"
OFFER = Offer(ROUTE, "stub", 1_000)
"""Room for all."""


class HandClock:
    """Two clocks that move only on demand."""

    def __init__(self) -> None:
        self.wall = START
        self.mono = 5_000 * MICROSECONDS

    def now(self) -> Moment:
        """This instant."""
        return Moment(self.wall, self.mono)

    def forward(self, seconds: float) -> Moment:
        """Time passes."""
        self.wall += microseconds(seconds)
        self.mono += microseconds(seconds)
        return self.now()

    def step_wall(self, seconds: float) -> Moment:
        """Set the wall clock, as an operator would."""
        self.wall += microseconds(seconds)
        return self.now()


class Home(Protocol):
    """The place of a store's data, from one opening to the next."""

    def store(self, rules: StoreRules, chance: Chance) -> Store:
        """A store over the data, not yet open."""
        ...

    async def crash(self, store: Store) -> None:
        """Crash the store as `kill -9` would; the next one finds the files of that moment."""
        ...


class SharedHome(Home, Protocol):
    """One that stores of several machines can have at once."""

    def beside(self, node: str) -> SharedHome:
        """The same data for a store on another machine; opened while nothing runs."""
        ...


class MemoryHome:
    """The reference's data."""

    def __init__(self, node: str = "here", data: MemoryData | None = None) -> None:
        self._node = node
        self._data = MemoryData() if data is None else data

    def beside(self, node: str) -> MemoryHome:
        """See `SharedHome.beside`."""
        return MemoryHome(node, self._data)

    def store(self, rules: StoreRules, chance: Chance) -> Store:
        """See `Home.store`."""
        return MemoryStore(rules, chance, self._data, node=self._node)

    async def crash(self, store: Store) -> None:
        """See `Home.crash`: the data is all there is."""


class SqliteHome:
    """A folder with a database; each life of the store has its own copy."""

    def __init__(self, folder: Path, durability: str = "full") -> None:
        self._folder = folder
        self._life = 0
        self._durability = durability

    @property
    def path(self) -> Path:
        """The database's file."""
        return self._folder / f"life{self._life}" / "ksi.db"

    def store(self, rules: StoreRules, chance: Chance) -> Store:
        """See `Home.store`."""
        from ksi.store.sqlite.store import SqliteStore

        self.path.parent.mkdir(parents=True, exist_ok=True)
        durability: Any = self._durability
        return SqliteStore(self.path, rules, chance, durability=durability, log_bytes=0)

    async def crash(self, store: Store) -> None:
        """See `Home.crash`: the next life gets the files as they are now, before the old store can tidy up."""
        old = self.path
        self._life += 1
        self.path.parent.mkdir(parents=True)
        for suffix in ("", "-wal"):
            source = old.with_name(old.name + suffix)
            if source.exists():
                shutil.copyfile(source, self.path.with_name(source.name))
        await store.close()
        shutil.rmtree(old.parent, onerror=_unless_gone)


def _unless_gone(_: Any, __: str, raised: Any) -> None:
    """SQLite may take a file of its own away at the same moment."""
    if not isinstance(raised[1], FileNotFoundError):
        raise raised[1]


class RedisHome:
    """A namespace of its own on a server; time is the test's."""

    def __init__(
        self, url: str, namespace: str | None = None, *, node: str = "here", lease: int = microseconds(30)
    ) -> None:
        self._url = url
        self._namespace = namespace or uuid.uuid4().hex
        self._node = node
        self._lease = lease

    def beside(self, node: str) -> RedisHome:
        """See `SharedHome.beside`."""
        return RedisHome(self._url, self._namespace, node=node, lease=self._lease)

    def store(self, rules: StoreRules, chance: Chance) -> Store:
        """See `Home.store`."""
        address = Address(f"{self._url}?namespace={self._namespace}")
        daemon, node = f"one@{self._node}", self._node
        return RedisStore(address, rules, chance, daemon=daemon, node=node, lease=self._lease, hand=True)

    async def crash(self, store: Store) -> None:
        """See `Home.crash`: the server gets no notice."""
        assert isinstance(store, RedisStore)
        await store.leave()


class World:
    """One store at its work, with the verbs in short."""

    def __init__(self, home: Home, rules: StoreRules, seed: int = 1) -> None:
        self.home = home
        self.rules = rules
        self.clock = HandClock()
        self.chance = Chance(random.Random(seed))
        self.calls = 0
        """How often the store said that there may be work."""
        self.pruned = False
        self.store: Store = home.store(rules, self.chance)

    # -- life ---------------------------------------------------------------------------------------------------------

    async def open(self) -> Recovery:
        """Open the store."""
        return await self.store.open(self.clock.now(), self._on_work)

    async def crash(self, mono: int | None = None) -> Recovery:
        """Kill the store and open the next one, after a reboot if a new monotonic time is given."""
        await self.home.crash(self.store)
        if mono is not None:
            self.clock.mono = mono
        self.store = self.home.store(self.rules, self.chance)
        return await self.open()

    async def restart(self) -> Recovery:
        """Close the store in order and open the next one."""
        await self.store.close()
        self.store = self.home.store(self.rules, self.chance)
        return await self.open()

    def _on_work(self) -> None:
        self.calls += 1

    # -- verbs --------------------------------------------------------------------------------------------------------

    def new(self, request_id: str, conversation: str = "talk", **fields: Any) -> NewRequest:
        """A request as the service would hand it over: its rank follows from its priority and due time."""
        priority = fields.get("priority", Priority.NORMAL)
        at = max(fields.get("due") or 0, self.clock.wall)
        defaults: dict[str, Any] = {
            "request_id": request_id,
            "conversation": conversation,
            "body": b'{"prompt":"%s"}' % request_id.encode(),
            "route": ROUTE,
            "rank": HEAD_STARTS.rank(priority, at),
            "model": "stub/echo",
        }
        return NewRequest(**(defaults | fields))

    async def enqueue(
        self, request_id: str, conversation: str = "talk", offers: Sequence[Offer] = (), **fields: Any
    ) -> Enqueued:
        """Enqueue; without offers it never runs at once."""
        return await self.store.enqueue(self.new(request_id, conversation, **fields), offers, self.clock.now())

    async def run(self, request_id: str, conversation: str = "talk", **fields: Any) -> Claimed:
        """Enqueue into a free conversation and have it run at once."""
        enqueued = await self.enqueue(request_id, conversation, [OFFER], **fields)
        assert enqueued.claim is not None
        return enqueued.claim

    async def claim(self, *offers: Offer, limit: int = 100) -> list[Claimed]:
        """Claim, and return the started requests; by default with room for all."""
        return list((await self.store.claim(offers or (OFFER,), limit, self.clock.now())).started)

    async def claim_one(self) -> Claimed:
        """Claim the next one; there must be one."""
        (claim,) = await self.claim(limit=1)
        return claim

    async def claim_ids(self, *offers: Offer, limit: int = 100) -> list[str]:
        """Claim, and return only the started requests."""
        return [claim.request_id for claim in await self.claim(*offers, limit=limit)]

    def attempt(self, claim: Claimed, outcome: Outcome = Outcome.COMPLETED, **fields: Any) -> Attempt:
        """How a claim's run ended."""
        defaults: dict[str, Any] = {
            "number": claim.attempt,
            "provider": claim.provider,
            "outcome": outcome,
            "started_at": claim.started_at,
            "finished_at": self.clock.wall,
        }
        if outcome is Outcome.COMPLETED:
            defaults |= {"text": f"answer to {claim.request_id}", "usage": Usage(input_tokens=10, output_tokens=5)}
        return Attempt(**(defaults | fields))

    async def settle(
        self, claim: Claimed, verdict: Verdict, attempt: Attempt, aftermath: Aftermath | None = None
    ) -> Settled:
        """Settle."""
        return await self.store.settle(claim, attempt, verdict, self.clock.now(), aftermath)

    async def complete(self, claim: Claimed, **fields: Any) -> Settled:
        """The run brought an answer."""
        return await self.settle(claim, Finish(state=State.COMPLETED), self.attempt(claim, **fields))

    async def fail(self, claim: Claimed, error: str = "provider_error", message: str | None = "it broke") -> Settled:
        """The run failed for good."""
        attempt = self.attempt(claim, Outcome.FAILED, error=error, message=message)
        return await self.settle(claim, Finish(state=State.FAILED, error=error, message=message), attempt)

    async def retry(self, claim: Claimed, after: float = 10.0, **fields: Any) -> Settled:
        """The run failed and is tried again `after` seconds."""
        fields.setdefault("error", "overloaded")
        attempt = self.attempt(claim, Outcome.FAILED, error=fields["error"])
        return await self.settle(claim, Retry(at=self.clock.wall + microseconds(after), **fields), attempt)

    async def give_back(self, claim: Claimed) -> Settled:
        """The daemon stops in order."""
        return await self.settle(claim, GiveBack(), self.attempt(claim, Outcome.SHUTDOWN))

    async def cancel(self, request_id: str, by: str | None = None) -> Cancelled:
        """Cancel."""
        return await self.store.cancel(request_id, self.clock.now(), by)

    def lock_wish(self, request_id: str, conversation: str = "talk", **fields: Any) -> NewLock:
        """An outside holder's wish; `timeout` in seconds becomes the deadline."""
        priority = fields.get("priority", Priority.NORMAL)
        if (timeout := fields.pop("timeout", None)) is not None:
            fields["deadline"] = self.clock.mono + microseconds(timeout)
        defaults: dict[str, Any] = {
            "request_id": request_id,
            "conversation": conversation,
            "rank": HEAD_STARTS.rank(priority, self.clock.wall),
        }
        return NewLock(**(defaults | fields))

    async def acquire(self, request_id: str, conversation: str = "talk", **fields: Any) -> Acquired:
        """Acquire."""
        return await self.store.acquire(self.lock_wish(request_id, conversation, **fields), self.clock.now())

    async def renew_lock(self, request_id: str, fence: int | None = None) -> LockGrant:
        """Renew an external lock."""
        return await self.store.renew_lock(request_id, self.clock.now(), fence)

    async def withdraw(self, request_id: str) -> Passing | None:
        """An external waiter's connection is gone."""
        return await self.store.withdraw(request_id, self.clock.now())

    async def release(self, request_id: str, fence: int | None = None) -> Passing:
        """Release an external lock."""
        return await self.store.release(request_id, self.clock.now(), fence)

    async def expire(self, limit: int = 500) -> Expiry:
        """Expire."""
        return await self.store.expire(self.clock.now(), limit)

    async def renew(self) -> tuple[int, ...]:
        """Renew the lease; the keys of the runs that are lost. Nothing can be lost if a store has one daemon."""
        store = self.store if isinstance(self.store, MemoryStore) else self.store.shared
        return () if store is None else await store.renew(self.clock.now())

    async def prune(self) -> tuple[int, int]:
        """Prune to the end; how many requests and conversations went."""
        self.pruned = True
        requests = conversations = 0
        while True:
            pruned = await self.store.prune(self.clock.now(), 3)
            requests += pruned.requests
            conversations += pruned.conversations
            if not (pruned.more or pruned.requests or pruned.conversations):
                return requests, conversations

    async def view(self, request_id: str) -> RequestView:
        """A request that is kept."""
        view = await self.store.get(request_id)
        assert view is not None
        return view

    async def state(self, request_id: str) -> State:
        """A kept request's state."""
        return (await self.view(request_id)).state

    async def look(self, conversation: str = "talk") -> LockView:
        """A known conversation's lock, with the first hundred of its line."""
        lock = await self.store.lock(conversation, 100)
        assert lock is not None
        return lock

    async def line(self, conversation: str = "talk") -> list[str]:
        """The waiters of a conversation's queue."""
        return [entry.request_id for entry in (await self.look(conversation)).line]

    async def listed(self, listing: Listing) -> list[str]:
        """All of a listing."""
        return [row.request_id async for row in items(lambda cursor: self.store.requests(listing, 50, cursor))]


async def items(page: Callable[[str | None], Awaitable[Page[T]]]) -> AsyncIterator[T]:
    """Every item of a paged list."""
    cursor: str | None = None
    while True:
        found = await page(cursor)
        for item in found.items:
            yield item
        cursor = found.cursor
        if cursor is None:
            return


async def recount(store: Store) -> Totals:
    """The totals of a store that has pruned nothing, counted from its lists."""
    rows = {
        listing: [row async for row in items(lambda cursor, of=listing: store.requests(of, 7, cursor))]  # type: ignore[misc]
        for listing in Listing
    }
    states: Counter[str] = Counter()
    queued = {row.request_id for listing in (Listing.WAITING, Listing.READY) for row in rows[listing]}
    states[State.QUEUED.value] = len(queued)
    for listing in (Listing.ACTIVE, Listing.DELAYED, Listing.FINISHED):
        states.update(row.state.value for row in rows[listing])
    states[State.SCHEDULED.value] += sum(
        row.state is State.SCHEDULED for row in rows[Listing.ASKING] if row.due is None
    )
    locks = [lock async for lock in items(lambda cursor: store.locks(7, cursor))]
    sessions = [session async for session in items(lambda cursor: store.sessions(7, cursor))]
    waiters = 0
    for session in sessions:
        lock = await store.lock(session.conversation, 10_000)
        assert lock is not None
        waiters += sum(entry.external for entry in lock.line)
    return Totals(
        **states,
        locks=len(locks),
        external_locks=sum(lock.external for lock in locks),
        external_waiters=waiters,
        conversations=len(sessions),
    )


async def check(store: Store, pruned: bool = False) -> None:
    """Rules that hold for every store at every moment (L1, Q8)."""
    check_in_play(store)
    active = [row async for row in items(lambda cursor: store.requests(Listing.ACTIVE, 7, cursor))]
    locks = [lock async for lock in items(lambda cursor: store.locks(7, cursor))]
    holders = {lock.conversation: lock.holder for lock in locks}
    assert len(holders) == len(locks), "a conversation has two locks"
    fences = [lock.fence for lock in locks]
    assert len(set(fences)) == len(fences), "two holders share a fence"
    for row in active:
        assert row.state is State.RUNNING
        assert holders.get(row.conversation) == row.request_id, "a running request does not hold its conversation"
    ready = [row async for row in items(lambda cursor: store.requests(Listing.READY, 7, cursor))]
    assert len({row.conversation for row in ready}) == len(ready), "two requests of one conversation are ready"
    for row in ready:
        assert row.state is State.QUEUED
        assert holders.get(row.conversation) in (None, row.request_id), "a ready request's conversation is held"
    counted, kept = await recount(store), await store.totals()
    if pruned:
        gone = [state.value for state in State if state.final]
        for name in gone:
            assert getattr(counted, name) <= getattr(kept, name)
        cleared = dict.fromkeys(gone, 0)
        counted = Totals(**(_fields(counted) | cleared))
        kept = Totals(**(_fields(kept) | cleared))
    assert counted == kept


def _fields(totals: Totals) -> dict[str, int]:
    return {name: getattr(totals, name) for name in Totals.__struct_fields__}
