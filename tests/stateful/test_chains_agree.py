"""The machine that compares the stores, with chains: members, limits, follow-ups, reminders, an operator's hands."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from ksi.clock import microseconds
from ksi.request import Attempt
from ksi.store.chains import Aftermath, Block, ChainLimits, ChildRequest, Delivered, FollowUp, InjectionView, Membership
from ksi.store.snapshot.records import Loaded
from ksi.store.values import Retry, StoreRules
from tests.conformance.world import World
from tests.effort import effort
from tests.reference_store.store import MemoryStore
from tests.stateful.pair import Pair, Twins
from tests.stateful.test_stores_agree import (
    CONVERSATIONS,
    ROUTES,
    SHORT,
    Batch,
    Ending,
    StoresAgree,
    batches,
    conversations,
    endings,
    offered,
    places,
)

TIGHT = ChainLimits(max_depth=2, token_budget=300, time_window=microseconds(100))
RULES = [
    SHORT,
    StoreRules(max_interruptions=2, chain_limits=TIGHT, guard_messages=1),
    StoreRules(fail_interrupted=True, chain_limits=TIGHT, keep_finished=microseconds(60)),
]
LOOP = Block(code="cycle", message="round and round", risk_score=0.75, evidence=("a", "b"))

mostly = st.sampled_from([True, True, True, False])
seldom = st.sampled_from([False, False, False, False, False, False, False, True])
blocks = st.sampled_from([None] * 9 + [LOOP])
marks = st.sampled_from([None, b"", b"\xff mark"])
limits = st.builds(
    ChainLimits,
    max_depth=st.sampled_from([0, 1, 2, 9, 9]),
    token_budget=st.sampled_from([8, 40, 150, 10_000, 10_000]),
    time_window=st.sampled_from([microseconds(seconds) for seconds in (10, 90, 10_000, 10_000)]),
)
memberships = st.builds(
    Membership,
    limits=limits,
    injects=mostly,
    estimate=st.sampled_from([0, 3, 20]),
    output_cap=st.sampled_from([1, 10, 500]),
    block=blocks,
    trips=seldom,
    guard=seldom,
    mark=marks,
)
parents = st.none() | places | places | places
"""Which of the known requests a member is born of."""


@st.composite
def follow_ups(draw: st.DrawFn) -> FollowUp:
    """A delivery; its id is made when it is sent."""
    child = None
    if draw(mostly):
        child = ChildRequest(
            body=draw(st.sampled_from([b"{}", b'{"prompt":"go on"}'])),
            route=draw(st.sampled_from(ROUTES)),
            rank=draw(st.sampled_from([0, 10**18])),
            model="stub/echo",
            priority=draw(st.sampled_from([0, 2, 4])),
            membership=draw(memberships),
            agent_id=draw(st.sampled_from([None, "ann", "bob"])),
            error=draw(st.sampled_from([None] * 6 + ["nobody serves it"])),
        )
    return FollowUp(
        injection_id="",
        target=draw(conversations),
        trigger=draw(st.sampled_from(["general", "memory"])),
        text=draw(st.sampled_from(["", "short", "ümlaut " * 9])),
        child=child,
        block=draw(blocks),
        guard=draw(seldom),
    )


aftermaths = st.none() | st.builds(
    Aftermath, follow_ups=st.lists(follow_ups(), max_size=3).map(tuple), mark=marks, trip=blocks
)


def named(aftermath: Aftermath | None, parent: str) -> Aftermath | None:
    """An aftermath whose deliveries have their ids."""
    if aftermath is None:
        return None
    sent = tuple(_named(one, f"{parent}/{number}") for number, one in enumerate(aftermath.follow_ups))
    return Aftermath(follow_ups=sent, mark=aftermath.mark, trip=aftermath.trip)


def _named(follow_up: FollowUp, name: str) -> FollowUp:
    return FollowUp(
        injection_id=name,
        target=follow_up.target,
        trigger=follow_up.trigger,
        text=follow_up.text,
        child=follow_up.child,
        block=follow_up.block,
        guard=follow_up.guard,
    )


class ChainsAgree(StoresAgree):
    """All that `StoresAgree` does, and chains."""

    def __init__(self) -> None:
        super().__init__()
        self.deliveries: list[InjectionView] = []

    @initialize(rules=st.sampled_from(RULES))
    def begin(self, rules: StoreRules) -> None:
        self.pair = Pair(rules, self.other())

    @rule(batch=batches, chains=st.lists(st.tuples(memberships, parents), min_size=4, max_size=4), offers=offered)
    def enqueue_members(self, batch: Batch, chains: list[tuple[Membership, int | None]], offers: Any) -> None:
        for (conversation, wish), (membership, place) in zip(batch, chains, strict=False):
            parent = None if place is None or not self.names else self._name(place)
            name = f"r{len(self.names)}"
            chain = Membership(
                limits=membership.limits,
                parent=parent,
                injects=membership.injects,
                estimate=membership.estimate,
                output_cap=membership.output_cap,
                block=membership.block,
                trips=membership.trips,
                guard=membership.guard,
                mark=membership.mark,
            )
            self.names.append(name)
            self._enqueue(name, conversation, wish | {"chain": chain}, offers)

    @precondition(lambda self: self.pair is not None and self.pair.running)
    @rule(steps=st.lists(st.tuples(places, endings(), aftermaths), min_size=1, max_size=4), again=seldom)
    def end_with_an_aftermath(self, steps: list[tuple[int, Ending, Aftermath | None]], again: bool) -> None:
        for place, ending, aftermath in steps:
            if self.both.running:
                claims = self.both.running.pop(place % len(self.both.running))
                self._settle_with(claims, ending, aftermath)
                if again:
                    self._settle_with(claims, ending, aftermath)

    def _settle_with(self, claims: Twins, ending: Ending, aftermath: Aftermath | None) -> None:
        claim, verdict = claims.of[0], ending.verdict
        if isinstance(verdict, Retry):
            verdict = Retry(
                at=self.both.clock.wall + verdict.at,
                route=verdict.route,
                parked=verdict.parked,
                error=verdict.error,
                message=verdict.message,
            )
        attempt = Attempt(
            number=claim.attempt,
            provider=claim.provider,
            outcome=ending.outcome,
            started_at=claim.started_at,
            finished_at=self.both.clock.wall,
            **ending.fields,
        )
        settled = self.both.settle(claims, attempt, verdict, named(aftermath, claim.request_id))
        self._know(() if settled is None else settled.injections)

    def _know(self, injections: tuple[InjectionView, ...]) -> None:
        """Children that deliveries made are requests like others."""
        self.names += [
            one.request_id for one in injections if one.request_id is not None and one.request_id not in self.names
        ]

    @rule(aftermath=aftermaths, place=places)
    def deliver(self, aftermath: Aftermath | None, place: int) -> None:
        """What ended without an aftermath gets one; now and then, something else is asked for."""
        waiting = self.both.do(lambda world: world.store.unrouted())
        name = waiting[0] if waiting else self._name(place) if self.names else "nobody"
        sent = named(aftermath, name) or Aftermath()
        delivered = self.both.do(lambda world: world.store.deliver(name, sent, world.clock.now()))
        if isinstance(delivered, Delivered):
            self._know(delivered.injections)

    @precondition(lambda self: self.deliveries)
    @rule(place=places, again=follow_ups(), dead=mostly)
    def redeliver(self, place: int, again: FollowUp, dead: bool) -> None:
        letters = [one for one in self.deliveries if one.state in ("blocked", "failed")]
        among = letters if dead and letters else self.deliveries
        name = among[place % len(among)].injection_id
        sent = _named(again, f"{name}/again")
        delivered = self.both.do(lambda world: world.store.redeliver(name, sent, world.clock.now()))
        if isinstance(delivered, Delivered):
            self._know(delivered.injections)

    @precondition(lambda self: self.names)
    @rule(place=places, reset=mostly, cancel=mostly)
    def an_operator_s_hand(self, place: int, reset: bool, cancel: bool) -> None:
        name = self._name(place)
        if reset:
            self.both.do(lambda world: world.store.reset_chain(name, world.clock.now()))
            return
        closed = self.both.do(lambda world: world.store.close_chain(name, world.clock.now(), 2))
        for member in closed.unfinished if closed is not None and cancel else ():
            self.both.do(lambda world, of=member: world.cancel(of))  # type: ignore[misc]

    @rule()
    def both_are_saved_alike(self) -> None:
        """What each gives as a snapshot makes the same chains of an empty store."""
        self.both.do(_as_saved)

    @invariant()
    def chains_are_alike(self) -> None:
        if self.pair is not None:
            self.deliveries = self.pair.compare_chains(self.names)


async def _as_saved(world: World) -> Any:
    """The chains of a store that took in what this one holds."""
    now = world.clock.now()
    records = [record async for piece in world.store.export(now) for record in piece]
    copy = MemoryStore(world.rules, world.chance)
    loaded: Loaded = await copy.load(records, now)
    chains = (await copy.chains(1_000)).items
    names = [one.injection_id for one in (await copy.injections(1_000)).items]
    return (
        sorted(loaded.interrupted),
        sorted(loaded.failed),
        chains,
        [(await copy.members(chain.chain, 1_000)).items for chain in chains],
        [await copy.injection(name) for name in names],
        await copy.unrouted(),
        [await copy.session(name) is None for name in CONVERSATIONS],
    )


TestChainsAgree = ChainsAgree.TestCase
TestChainsAgree.settings = settings(
    max_examples=effort(25, 300),
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
)
TestChainsAgree = pytest.mark.timeout(900)(
    pytest.mark.promise("C2", "C3", "C5", "C6", "C8", "F8", "Q3", "R5")(TestChainsAgree)
)
