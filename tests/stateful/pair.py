"""Two stores driven alike: every answer of the one must be the other's, apart from what each may choose for itself.

A store chooses its keys and tokens, and the numbers of its turns as long as they grow; cursors are its own. Turns are
compared by when they were made, keys and tokens only by being there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec

from ksi.errors import KsiError
from ksi.request import Attempt, State
from ksi.store.base import Store
from ksi.store.chains import Aftermath, InjectionView
from ksi.store.values import (
    Claimed,
    Claims,
    Enqueued,
    Listing,
    LockGrant,
    LockView,
    LoggedTurn,
    RequestRow,
    RequestView,
    Settled,
    StoreRules,
    Verdict,
)
from tests.conformance.in_play import check_in_play
from tests.conformance.world import Home, MemoryHome, SharedHome, World, check, items

T = TypeVar("T")

TURN_FIELDS = {"turn", "head", "id", "previous"}
OWN_FIELDS = {"key", "token"}

Deed = Callable[[World], Awaitable[Any]]


class Twins(msgspec.Struct, frozen=True):
    """One claim, as each of the two stores knows it."""

    of: tuple[Claimed, ...]


class Pair:
    """A reference and the store that is compared with it, on one clock.

    Where the other one can be shared, `away` are stores of a second machine on both of them (D4).
    """

    def __init__(self, rules: StoreRules, other: Home | SharedHome, *, shared: bool = False) -> None:
        self._runner = asyncio.Runner()
        homes: tuple[Home | SharedHome, ...] = (MemoryHome(), other)
        self.worlds = tuple(World(home, rules) for home in homes)
        self.away = tuple(World(home.beside("away"), rules) for home in homes if shared and hasattr(home, "beside"))
        self.clock = self.worlds[0].clock
        for world in (*self.worlds, *self.away):
            world.clock = self.clock
        self.claims: list[Twins] = []
        self.running: list[Twins] = []
        """Those whose runs have not ended yet, as far as their daemon knows."""
        self.grants: dict[str, int] = {}
        """The last fence that was granted to each outside holder."""
        self.views: dict[str, RequestView] = {}
        """What was last seen of each request."""
        self._turns: tuple[dict[int, int], ...] = ({}, {})
        """For each store, which of all turns one of its numbers means."""
        self.set_aside = False
        """Whether something may be set aside; which place it has in the list of what is ready is a store's own."""
        self._fence = 0
        self._looks = 0
        self.do(lambda world: world.open())
        for world in self.away:
            self.run(world.open())

    def close(self) -> None:
        """End all stores and their loop."""
        for world in (*self.away, *self.worlds):
            self.run(world.store.close())
        self._runner.close()

    def run(self, work: Awaitable[T]) -> T:
        """Run on this pair's loop."""

        async def waited() -> T:
            return await work

        return self._runner.run(waited())

    # -- doing --------------------------------------------------------------------------------------------------------

    def do(self, deed: Deed, *, away: bool = False) -> Any:
        """Do the same to both and compare the answers; the reference's answer, None where both refused."""
        return self.run(self._do(deed, away=away))

    async def _do(self, deed: Deed, *, away: bool = False) -> Any:
        return self._agree([await _answer(deed, world) for world in (self.away if away else self.worlds)])

    def settle(
        self,
        claims: Twins,
        attempt: Attempt,
        verdict: Verdict,
        aftermath: Aftermath | None = None,
        *,
        away: bool = False,
    ) -> Settled | None:
        """Settle one claim, each store by its own; what the reference answered.

        A store that machines do not share keeps none of them (D4).
        """
        if not self.away:
            attempt = msgspec.structs.replace(attempt, node=None)
        answers = [
            self.run(_answer(lambda world, own=claim: world.settle(own, verdict, attempt, aftermath), world))  # type: ignore[misc]
            for world, claim in zip(self.away if away else self.worlds, claims.of, strict=True)
        ]
        settled = answers[0]
        if isinstance(settled, Settled) and settled.turn is not None:
            number = len(self._turns[0])
            for turns, answer in zip(self._turns, answers, strict=True):
                assert isinstance(answer, Settled)
                assert answer.turn is not None
                assert all(answer.turn > earlier for earlier in turns), "a turn's number did not grow"
                turns[answer.turn] = number
        self._agree(answers)
        return settled if isinstance(settled, Settled) else None

    def set_watermark(self, turns: int | None) -> None:
        """The response log has written the first so many answers, or all."""
        for stores, numbers in zip(self._stores(), self._turns, strict=True):
            known = sorted(numbers)[:turns]
            for store in stores:
                self.run(store.set_log_watermark(known[-1] if known else 0))

    def _stores(self) -> list[list[Store]]:
        """Of the reference and of the other, the stores of all machines."""
        return [
            [world.store for world in machines] for machines in zip(self.worlds, self.away or self.worlds, strict=True)
        ]

    async def _compare_log(self) -> None:
        """Each machine logs what it ran, and together that is all."""
        self._agree([await _unlogged(stores) for stores in self._stores()])

    def _agree(self, answers: Sequence[Any]) -> Any:
        shown = [self._shown(answer, side) for side, answer in enumerate(answers)]
        assert shown[0] == shown[1], f"reference: {shown[0]}\nother:     {shown[1]}"
        self._note(answers)
        return None if isinstance(answers[0], KsiError) else answers[0]

    def _note(self, answers: Sequence[Any]) -> None:
        """Keep the claims that came, and see that fences grow: a later claim's is above all that were seen."""
        of = tuple(_claims(answer) for answer in answers)
        for claims in zip(*of, strict=True):
            assert claims[0].fence > self._fence, "a claim's fence did not grow"
            self._fence = claims[0].fence
            self.claims.append(Twins(claims))
            self.running.append(self.claims[-1])
        for grant in _grants(answers[0]):
            self.grants[grant.request_id] = grant.fence
            self._fence = max(self._fence, grant.fence)

    def _shown(self, value: Any, side: int, field: str = "") -> Any:
        """A value as the two are compared by."""
        if isinstance(value, KsiError):
            return (type(value).__name__, value.message, dict(value.details))
        if isinstance(value, msgspec.Struct):
            fields = {name: self._shown(getattr(value, name), side, name) for name in value.__struct_fields__}
            return (type(value).__name__, fields)
        if isinstance(value, list | tuple):
            return [self._shown(part, side) for part in value]
        if field in OWN_FIELDS:
            return bool(value)
        if field in TURN_FIELDS and value is not None:
            return f"turn {self._turns[side][value]}"
        return value

    # -- looking ------------------------------------------------------------------------------------------------------

    def compare_all(self, request_ids: Sequence[str], conversations: Sequence[str]) -> None:
        """Compare all that can be asked; what is final already, only at each eighth look."""
        self.run(self._compare_all(request_ids, conversations))

    async def _compare_all(self, request_ids: Sequence[str], conversations: Sequence[str]) -> None:
        self._looks += 1
        check_in_play(self.worlds[1].store)
        for name in request_ids:
            before = self.views.get(name)
            if before is None or not before.state.final or self._looks % 8 == 0:
                await self._compare_request(name)
        for name in conversations:
            session = await self._do(lambda world, of=name: world.store.session(of))  # type: ignore[misc]
            await self._do(lambda world, of=name: world.store.lock(of, 5))  # type: ignore[misc]
            await self._do(lambda world, of=name: _all(lambda cursor: world.store.forks(2, cursor, of)))  # type: ignore[misc]
            if session is not None and session.head is not None:
                await self._compare_history(name)
        for listing in Listing:
            await self._do(lambda world, of=listing: _rows(world, of, any_order=self.set_aside))  # type: ignore[misc]
        await self._do(lambda world: world.store.find("request", "r", 1_000))
        await self._do(lambda world: world.store.find("conversation", "", 1_000))
        await self._do(lambda world: _all(lambda cursor: world.store.sessions(3, cursor)))
        await self._do(lambda world: _all(lambda cursor: world.store.sessions(2, cursor, "ann")))
        await self._do(lambda world: _all(lambda cursor: world.store.forks(2, cursor)))
        await self._do(_locks)
        await self._do(lambda world: world.store.totals())
        await self._do(lambda world: world.store.waiting_by_route())
        await self._compare_log()

    def compare_chains(self, request_ids: Sequence[str]) -> list[InjectionView]:
        """Compare all that can be asked about chains and deliveries; returns the deliveries, the newest first."""
        return self.run(self._compare_chains(request_ids))

    async def _compare_chains(self, request_ids: Sequence[str]) -> list[InjectionView]:
        chains = await self._do(lambda world: _all(lambda cursor: world.store.chains(2, cursor)))
        for view in chains:
            await self._do(lambda world, of=view.chain: _all(lambda cursor: world.store.members(of, 2, cursor)))  # type: ignore[misc]
            await self._do(lambda world, of=view.chain: world.store.chain(of))  # type: ignore[misc]
            assert view.spending.reserved >= 0
        for name in request_ids:
            view = self.views.get(name)
            if view is not None and view.chain is not None:
                await self._do(lambda world, of=name: world.store.chain(of))  # type: ignore[misc]
                await self._do(lambda world, of=name: world.store.trail(of, 3))  # type: ignore[misc]
        deliveries: list[InjectionView] = await self._do(
            lambda world: _all(lambda cursor: world.store.injections(3, cursor))
        )
        for one in deliveries:
            await self._do(lambda world, of=one.injection_id: world.store.injection(of))  # type: ignore[misc]
        for state in ("queued", "failed"):
            await self._do(lambda world, of=state: _all(lambda cursor: world.store.injections(2, cursor, of)))  # type: ignore[misc]
        await self._do(lambda world: world.store.unrouted())
        return deliveries

    def check(self) -> None:
        """What holds for every store holds for the reference, and so for its equal."""
        self.run(check(self.worlds[0].store, self.worlds[0].pruned))

    async def _compare_request(self, name: str) -> None:
        view = await self._do(lambda world: world.store.get(name))
        before = self.views.get(name)
        if view is None:
            self.views.pop(name, None)
            return
        if before is not None and before.state.final and before.enqueued_at == view.enqueued_at:
            late = view.attempts[len(before.attempts) :]
            assert all(attempt.outcome == "fenced" for attempt in late)
            seen = msgspec.structs.replace(view, attempts=before.attempts)
            if before.chain is None:
                # A request that is named as a parent becomes a root, whenever that is.
                seen = msgspec.structs.replace(seen, chain=None, depth=None)
            assert seen == before, "a final request changed"
        if view.state is State.COMPLETED:
            assert view.answer is not None
        self.views[name] = view

    async def _compare_history(self, name: str) -> None:
        async def history(world: World) -> Any:
            session = await world.store.session(name)
            assert session is not None
            assert session.head is not None
            return [await world.store.history(session.head, limit) for limit in (0, 120, 10_000)]

        await self._do(history)


async def _answer(deed: Deed, world: World) -> Any:
    try:
        return await deed(world)
    except KsiError as error:
        return error


def _claims(answer: Any) -> list[Claimed]:
    """The claims that an enqueue or a claim brought, in order."""
    if isinstance(answer, Claims):
        return list(answer.started)
    return [answer.claim] if isinstance(answer, Enqueued) and answer.claim is not None else []


def _grants(value: Any) -> list[LockGrant]:
    """Every grant of a lock somewhere in an answer."""
    if isinstance(value, LockGrant):
        return [value]
    if isinstance(value, msgspec.Struct):
        value = [getattr(value, name) for name in value.__struct_fields__]
    return [grant for part in value for grant in _grants(part)] if isinstance(value, list | tuple) else []


async def _all(page: Callable[[str | None], Awaitable[Any]]) -> list[Any]:
    return [item async for item in items(page)]


async def _rows(world: World, listing: Listing, *, any_order: bool) -> list[RequestRow]:
    """A listing; lines come in any order of conversations, but each in one piece. What is ready is put in order where
    it may come in `any_order`."""
    rows: list[RequestRow] = await _all(lambda cursor: world.store.requests(listing, 3, cursor))
    if listing is Listing.WAITING:
        order = [row.conversation for row in rows]
        pieces = [name for place, name in enumerate(order) if place == 0 or order[place - 1] != name]
        assert len(pieces) == len(set(pieces))
        rows.sort(key=lambda row: row.conversation)
    if listing is Listing.READY and any_order:
        rows.sort(key=lambda row: row.request_id)
    return rows


async def _locks(world: World) -> list[LockView]:
    """All held locks, in whatever order they come."""
    locks: list[LockView] = await _all(lambda cursor: world.store.locks(2, cursor))
    return sorted(locks, key=lambda lock: lock.conversation)


async def _unlogged(stores: Sequence[Store]) -> list[LoggedTurn]:
    turns: dict[int, LoggedTurn] = {}
    for store in stores:
        turns.update({turn.id: turn for turn in await store.log_after(await store.log_watermark(), 100)})
    return [turn for _, turn in sorted(turns.items())]
