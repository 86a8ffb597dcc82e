"""Chains: members, blocks, and the actions of an operator (C5, C8, F8)."""

from __future__ import annotations

import msgspec
import pytest

from ksi.clock import microseconds
from ksi.errors import InvalidData, NotFound, RequestIdConflict, UnknownParent
from ksi.request import OnBusy, State
from ksi.store.chains import Block, ChainLimits, Hop, MemberGrant, Trail
from ksi.store.values import CancelOutcome, Enqueued
from tests.conformance.chain_parts import (
    LOOP,
    after,
    begin,
    born,
    claims,
    complete,
    fail,
    figures,
    hops,
    limits,
    member,
    reminder,
)
from tests.conformance.conftest import StoreFactory
from tests.conformance.world import DAY, HOUR, OFFER, World, items


def code(enqueued: Enqueued) -> str | None:
    """Why a newcomer was blocked."""
    return None if enqueued.block is None else enqueued.block.code


# Membership.


@pytest.mark.promise("C5")
async def test_a_request_without_parent_limits_or_injection_is_in_no_chain(world: World) -> None:
    claim = await world.run("a")
    assert (claim.chain, claim.reminders) == (None, ())
    view = await world.view("a")
    assert (view.chain, view.parent, view.depth, view.block, view.injection) == (None, None, None, None, None)
    assert await world.store.chain("a") is None
    assert await world.store.trail("a", 5) is None
    assert (await world.store.members("a", 5)).items == ()
    assert (await world.store.chains(5)).items == ()


@pytest.mark.promise("C5")
async def test_a_request_with_limits_begins_a_chain_of_its_name(world: World) -> None:
    claim = await begin(world)
    assert claim.chain == MemberGrant(chain="root", depth=0, parent=None, output_cap=100, injects=False)
    view = await world.view("root")
    assert (view.chain, view.parent, view.depth, view.block, view.injection) == ("root", None, 0, None, None)
    chain = await figures(world)
    assert (chain.chain, chain.created_at, chain.limits) == ("root", world.clock.wall, limits())
    assert (chain.members, chain.unfinished, chain.depth, chain.resets, chain.guard_messages) == (1, 1, 0, 0, 0)
    assert (chain.spending.started_at, chain.spending.used, chain.spending.reserved) == (world.clock.wall, 0, 110)
    assert (chain.spending.closed, chain.spending.tripped) == (False, None)


@pytest.mark.promise("C5")
async def test_a_child_is_one_deeper_in_the_chain_of_its_parent(world: World) -> None:
    await begin(world)
    await born(world, "child", "root")
    await born(world, "grandchild", "child")
    view = await world.view("grandchild")
    assert (view.chain, view.parent, view.depth) == ("root", "child", 2)
    (child, grandchild) = await world.claim()
    assert (child.chain, grandchild.chain) == (
        MemberGrant(chain="root", depth=1, parent="root", output_cap=100, injects=False),
        MemberGrant(chain="root", depth=2, parent="child", output_cap=100, injects=False),
    )
    chain = await figures(world)
    assert (chain.members, chain.unfinished, chain.depth) == (3, 3, 2)


@pytest.mark.promise("C5")
async def test_a_request_s_limits_are_the_minimum_over_itself_and_its_ancestors(world: World) -> None:
    await begin(world, limits=limits(3, 1_000, HOUR))
    await born(world, "child", "root", limits=limits(9, 500, 9 * HOUR))
    await born(world, "grandchild", "child", limits=limits(2, 900, 60))
    assert (await figures(world, "child")).limits == limits(3, 500, HOUR)
    assert (await figures(world, "grandchild")).limits == limits(2, 500, 60)
    assert (await figures(world)).limits == limits(3, 1_000, HOUR)


@pytest.mark.promise("C5")
async def test_a_sibling_s_limits_bind_no_other(world: World) -> None:
    await begin(world, limits=limits(3, 1_000))
    await born(world, "one", "root", limits=limits(1, 500))
    await born(world, "two", "root", limits=limits(2, 900))
    assert (await figures(world, "two")).limits == limits(2, 900)


@pytest.mark.promise("C5")
async def test_the_same_request_again_is_no_second_member(world: World) -> None:
    await begin(world)
    first = await born(world, "child", "root")
    again = await born(world, "child", "root")
    assert first.existing is None
    assert again.existing is not None
    assert (again.existing.chain, again.existing.depth) == ("root", 1)
    assert (await figures(world)).members == 2


@pytest.mark.promise("C5")
async def test_a_parent_in_no_chain_becomes_the_root_under_the_daemon_s_maxima(store_factory: StoreFactory) -> None:
    maxima = ChainLimits(max_depth=7, token_budget=700, time_window=microseconds(DAY))
    world = await store_factory(chain_limits=maxima)
    await world.run("a", "talk", agent_id="ann")
    begun_at = world.clock.wall
    world.clock.forward(60)
    await born(world, "b", "a", limits=limits(9, 9_000, HOUR))
    chain = await figures(world, "a")
    assert (chain.limits, chain.created_at, chain.spending.started_at) == (maxima, begun_at, begun_at)
    assert (chain.members, chain.unfinished) == (2, 2)
    assert (await figures(world, "b")).limits == limits(7, 700, HOUR)
    view = await world.view("a")
    assert (view.chain, view.parent, view.depth) == ("a", None, 0)
    assert await hops(world, "b") == ["b", "a"]


@pytest.mark.promise("C5")
async def test_the_usage_of_a_parent_before_it_had_a_chain_counts(world: World) -> None:
    claim = await world.run("a")
    await world.retry(claim, 0)
    await world.expire()
    await complete(world, await world.claim_one(), tokens=40)
    await born(world, "b", "a")
    chain = await figures(world, "a")
    assert (chain.spending.used, chain.estimated, chain.unfinished, chain.members) == (40, 0, 1, 2)
    await world.claim()
    claim = await world.run("c", "elsewhere")
    await complete(world, claim, usage=None, text="x" * 41)
    await born(world, "d", "c")
    chain = await figures(world, "c")
    assert (chain.spending.used, chain.estimated) == (10, 10)
    (root, _) = (await world.store.members("c", 5)).items
    assert (root.tokens, root.estimated) == (10, True)


@pytest.mark.promise("C5")
async def test_a_parent_that_waits_is_checked_when_it_runs_and_has_no_cap(world: World) -> None:
    holder = await world.run("holder")
    await world.enqueue("a")
    await world.enqueue("b")
    await born(world, "of a", "a")
    await born(world, "of b", "b")
    await world.store.close_chain("b", world.clock.now())
    await complete(world, holder)
    started = (await claims(world)).started
    a = next(claim for claim in started if claim.request_id == "a")
    assert a.chain == MemberGrant(chain="a", depth=0, parent=None, output_cap=None, injects=False)
    assert (await figures(world, "a")).spending.reserved == 110, "only its child's"
    await complete(world, a, tokens=30)
    assert (await figures(world, "a")).spending.used == 30
    (b,) = (await claims(world)).blocked
    assert (b.request_id, b.block and b.block.code) == ("b", "chain_closed")


@pytest.mark.promise("C5")
async def test_an_unknown_parent_is_refused_and_nothing_is_written(world: World) -> None:
    await world.acquire("lock", "locked")
    for parent in ("nobody", "lock", "child"):
        with pytest.raises(UnknownParent):
            await born(world, "child", parent)
    assert await world.store.get("child") is None
    assert (await world.store.chains(5)).items == ()
    assert await world.store.session("talk of child") is None


@pytest.mark.promise("C5")
async def test_a_parent_past_its_retention_is_unknown(store_factory: StoreFactory) -> None:
    world = await store_factory(keep_finished=microseconds(60))
    await complete(world, await world.run("a"))
    await world.store.set_log_watermark(2**40)
    world.clock.forward(61)
    await world.prune()
    with pytest.raises(UnknownParent):
        await born(world, "child", "a")


@pytest.mark.promise("C5")
async def test_a_chain_s_name_is_not_given_twice(store_factory: StoreFactory) -> None:
    world = await store_factory(keep_finished=microseconds(60))
    await complete(world, await begin(world))
    await born(world, "child", "root")
    await world.store.set_log_watermark(2**40)
    world.clock.forward(61)
    assert (await world.prune())[0] == 1
    with pytest.raises(RequestIdConflict):
        await world.enqueue("root", chain=member())
    await world.enqueue("root")
    with pytest.raises(RequestIdConflict):
        await born(world, "other", "root")
    assert (await figures(world)).members == 1


# Blocks.


@pytest.mark.promise("C5")
async def test_a_request_that_is_too_deep_is_kept_as_blocked(world: World) -> None:
    await begin(world, limits=limits(1))
    await born(world, "child", "root")
    blocked = await born(world, "deep", "child")
    assert (blocked.state, code(blocked), blocked.ready, blocked.position) == (State.BLOCKED, "max_depth", False, 0)
    assert blocked.chain is not None
    assert (blocked.chain.depth, blocked.chain.limits, blocked.chain.members) == (2, limits(1), 3)
    view = await world.view("deep")
    assert (view.state, view.error, view.finished_at) == (State.BLOCKED, "blocked", world.clock.wall)
    assert (view.block, view.message) == (blocked.block, blocked.block and blocked.block.message)
    assert (view.chain, view.parent, view.depth) == ("root", "child", 2)
    assert (await world.store.totals()).blocked == 1
    assert (await figures(world)).unfinished == 2
    assert await world.line("talk of deep") == []


@pytest.mark.promise("C5")
async def test_a_blocked_request_interrupts_none_and_needs_no_room(store_factory: StoreFactory) -> None:
    world = await store_factory(max_queued=1)
    await begin(world, limits=limits(0))
    await world.enqueue("fills the queue", "other")
    for on_busy in OnBusy:
        blocked = await world.enqueue(f"child {on_busy}", "talk", chain=member("root"), on_busy=on_busy)
        assert (code(blocked), blocked.stopping) == ("max_depth", None)
    assert not (await world.view("root")).cancelling


@pytest.mark.promise("C5")
async def test_the_root_has_depth_zero(world: World) -> None:
    assert (await world.enqueue("a", chain=member(limits=limits(0)))).block is None


@pytest.mark.promise("C5")
async def test_a_chain_past_its_time_window_takes_no_more(world: World) -> None:
    await begin(world, limits=limits(window=60))
    world.clock.forward(60)
    assert (await born(world, "in time", "root")).block is None
    world.clock.forward(1)
    assert code(await born(world, "late", "root")) == "time_window"


@pytest.mark.promise("C5")
async def test_a_chain_that_spent_its_budget_takes_no_more(world: World) -> None:
    claim = await begin(world, limits=limits(budget=200))
    await complete(world, claim, tokens=199)
    assert (await born(world, "one left", "root", estimate=0)).block is None
    await world.cancel("one left")
    claim = await world.run("spends it", "elsewhere", chain=member("root", estimate=0, output_cap=1))
    await complete(world, claim, tokens=1)
    assert code(await born(world, "none left", "root")) == "token_budget"


@pytest.mark.promise("C5", "C8")
async def test_an_earlier_finding_blocks_and_trips_the_chain_if_it_says_so(world: World) -> None:
    await begin(world)
    kept = await born(world, "one", "root", block=LOOP)
    assert (kept.state, kept.block) == (State.BLOCKED, LOOP)
    assert (await figures(world)).spending.tripped is None
    tripping = await born(world, "two", "root", block=LOOP, trips=True)
    assert (tripping.block, tripping.chain and tripping.chain.spending.tripped) == (LOOP, LOOP)
    assert (await born(world, "three", "root")).block == LOOP
    other = Block(code="growth", message="ever longer")
    assert (await born(world, "four", "root", block=other, trips=True)).block == other
    assert (await figures(world)).spending.tripped == LOOP, "the first one stays"


@pytest.mark.promise("C5")
async def test_a_root_that_is_blocked_begins_a_blocked_chain(world: World) -> None:
    blocked = await world.enqueue("root", "talk", [OFFER], chain=member(block=LOOP, trips=True))
    assert (blocked.state, blocked.claim) == (State.BLOCKED, None)
    assert (await figures(world)).spending.tripped == LOOP
    assert await claims(world) == await world.store.claim((), 5, world.clock.now())


@pytest.mark.promise("C5")
async def test_a_waiting_request_is_checked_again_before_it_runs(world: World) -> None:
    claim = await begin(world, limits=limits(window=60))
    await born(world, "child", "root", "talk")
    await world.enqueue("behind", "talk")
    world.clock.forward(61)
    await complete(world, claim)
    took = await claims(world)
    (blocked,) = took.blocked
    assert (blocked.request_id, blocked.state, blocked.error) == ("child", State.BLOCKED, "blocked")
    assert (blocked.block and blocked.block.code, blocked.conversation) == ("time_window", "talk")
    assert blocked.passing is None
    assert [claim.request_id for claim in took.started] == ["behind"], "its line went on in the same step"
    view = await world.view("child")
    assert (view.state, view.block, view.attempts) == (State.BLOCKED, blocked.block, ())
    assert (await figures(world)).unfinished == 0


@pytest.mark.promise("C5")
async def test_one_claim_takes_its_limit_of_started_and_blocked_together(world: World) -> None:
    await begin(world)
    for number in range(3):
        await born(world, f"child {number}", "root")
        await world.enqueue(f"free {number}", f"free {number}")
    await world.store.close_chain("root", world.clock.now())
    seen = []
    for _ in range(3):
        took = await claims(world, 2)
        assert len(took.started) + len(took.blocked) == 2
        seen += [claim.request_id for claim in took.started] + [ended.request_id for ended in took.blocked]
    assert sorted(seen) == sorted([f"{kind} {number}" for kind in ("child", "free") for number in range(3)])


@pytest.mark.promise("C5", "L8")
async def test_a_retry_that_is_blocked_lets_its_conversation_go(world: World) -> None:
    claim = await begin(world, limits=limits(window=60))
    await world.enqueue("behind")
    await world.retry(claim, 100)
    world.clock.forward(100)
    await world.expire()
    took = await claims(world)
    (blocked,) = took.blocked
    assert blocked.passing is not None
    assert (blocked.passing.released_by, blocked.passing.next_request) == ("root", "behind")
    assert [claim.request_id for claim in took.started] == ["behind"]


@pytest.mark.promise("C5", "L5")
async def test_an_outside_waiter_behind_a_blocked_one_gets_the_lock(world: World) -> None:
    claim = await begin(world)
    await born(world, "child", "root", "talk")
    await world.acquire("outside")
    await world.store.close_chain("root", world.clock.now())
    await complete(world, claim)
    (blocked,) = (await claims(world)).blocked
    assert blocked.passing is not None
    assert blocked.passing.granted is not None
    assert blocked.passing.granted.request_id == "outside"


@pytest.mark.promise("C5")
async def test_a_delayed_member_is_checked_when_it_comes_and_when_it_runs(world: World) -> None:
    await begin(world, limits=limits(window=60))
    due = world.clock.wall + microseconds(120)
    scheduled = await world.enqueue("later", "other", chain=member("root"), due=due)
    assert scheduled.state is State.SCHEDULED
    world.clock.forward(120)
    assert code(await world.enqueue("late", "other", chain=member("root"), due=world.clock.wall + 1)) == "time_window"
    await world.expire()
    (blocked,) = (await claims(world)).blocked
    assert blocked.request_id == "later"


# Guard messages.


@pytest.mark.promise("C5")
async def test_a_guard_message_passes_the_limits_of_others_up_to_its_number(store_factory: StoreFactory) -> None:
    world = await store_factory(guard_messages=2)
    await begin(world, limits=limits(0, 110, 1))
    await world.store.close_chain("root", world.clock.now())
    world.clock.forward(100)
    claim = await world.run("one", "other", chain=member("root", guard=True))
    assert claim.chain == MemberGrant(chain="root", depth=1, parent="root", output_cap=None, injects=False)
    assert (await born(world, "two", "root", guard=True)).block is None
    assert code(await born(world, "three", "root", guard=True)) == "guard_cap"
    assert (await world.claim_ids()) == ["two"]
    chain = await figures(world)
    assert (chain.guard_messages, chain.spending.reserved) == (2, 110)
    await complete(world, claim, tokens=7)
    assert (await figures(world)).spending.used == 7, "what it used is counted"


# Closing and resetting.


@pytest.mark.promise("F8")
async def test_a_closed_chain_accepts_no_more_and_names_the_unfinished_members(world: World) -> None:
    claim = await begin(world)
    for name in ("one", "two", "three"):
        await born(world, name, "root")
    await world.cancel("two")
    closed = await world.store.close_chain("three", world.clock.now(), 2)
    assert (closed.chain, closed.unfinished) == ("root", ("root", "one"))
    assert (await figures(world)).spending.closed
    assert code(await born(world, "four", "root")) == "chain_closed"
    assert (await world.cancel("root")).outcome is CancelOutcome.STOPPING
    await world.cancel("one")
    closed = await world.store.close_chain("root", world.clock.now(), 2)
    assert closed.unfinished == ("three",), "what is being stopped is not asked for again"
    await world.cancel("three")
    assert (await world.store.close_chain("root", world.clock.now())).unfinished == ()
    await fail(world, claim)
    assert (await figures(world)).unfinished == 0


@pytest.mark.promise("F8", "C8")
async def test_an_unknown_chain_is_neither_closed_nor_reset(world: World) -> None:
    await world.enqueue("plain")
    for name in ("nobody", "plain"):
        with pytest.raises(NotFound):
            await world.store.close_chain(name, world.clock.now())
        with pytest.raises(NotFound):
            await world.store.reset_chain(name, world.clock.now())


@pytest.mark.promise("C8")
async def test_a_reset_restarts_budget_and_time_and_opens_the_chain(world: World) -> None:
    claim = await begin(world, limits=limits(5, 300, 60))
    await complete(world, claim, after(trip=LOOP), tokens=250)
    running = await world.run("runs", "other", chain=member("root", guard=True))
    await world.store.close_chain("root", world.clock.now())
    world.clock.forward(61)
    assert code(await born(world, "one", "root")) == "chain_closed"
    view = await world.store.reset_chain("root", world.clock.now())
    assert (view.spending.used, view.spending.closed, view.spending.tripped) == (0, False, None)
    assert (view.spending.started_at, view.resets, view.guard_messages) == (world.clock.wall, 1, 0)
    assert view == await figures(world)
    assert (await born(world, "two", "root")).block is None
    await complete(world, running, tokens=300)
    assert code(await born(world, "three", "root")) == "token_budget"
    assert (await world.store.reset_chain("runs", world.clock.now())).depth == 1
    assert code(await born(world, "deep", "root", limits=limits(0))) == "max_depth"


@pytest.mark.promise("C8")
async def test_a_running_request_at_a_reset_keeps_its_reservation(world: World) -> None:
    claim = await begin(world)
    await world.store.reset_chain("root", world.clock.now())
    assert (await figures(world)).spending.reserved == 110
    await complete(world, claim, tokens=20)
    chain = await figures(world)
    assert (chain.spending.reserved, chain.spending.used) == (0, 20)


@pytest.mark.promise("C8")
async def test_chains_survive_a_crash(world: World) -> None:
    claim = await begin(world, injects=True, mark=b"prompt")
    await complete(world, claim, after(reminder("root/1", "other"), mark=b"result", trip=LOOP), tokens=77)
    await born(world, "blocked", "root")
    await world.store.close_chain("root", world.clock.now())
    before = (await figures(world), await world.store.trail("blocked", 5), await world.store.members("root", 5))
    await world.crash()
    assert (await figures(world), await world.store.trail("blocked", 5), await world.store.members("root", 5)) == before
    assert (await born(world, "again", "root")).block is not None


# Looking.


@pytest.mark.promise("C7", "C8")
async def test_a_trail_leads_from_a_request_back_to_its_root(world: World) -> None:
    claim = await world.run("root", "talk", agent_id="ann", chain=member(mark=b"p0"))
    await complete(world, claim, after(mark=b"r0"))
    claim = await world.run("child", "other", agent_id="bob", chain=member("root", mark=b"p1"))
    await fail(world, claim, after(mark=b"r1"))
    await born(world, "last", "child", "talk")
    trail = await world.store.trail("last", 10)
    assert trail == Trail(
        view=await figures(world, "last"),
        hops=(
            Hop(
                request_id="last",
                depth=2,
                conversation="talk",
                agent_id=None,
                state=State.QUEUED,
                error=None,
                mark=None,
                result=None,
            ),
            Hop(
                request_id="child",
                depth=1,
                conversation="other",
                agent_id="bob",
                state=State.FAILED,
                error="timeout",
                mark=b"p1",
                result=b"r1",
            ),
            Hop(
                request_id="root",
                depth=0,
                conversation="talk",
                agent_id="ann",
                state=State.COMPLETED,
                error=None,
                mark=b"p0",
                result=b"r0",
            ),
        ),
    )
    assert await hops(world, "last", 2) == ["last", "child"]
    assert await hops(world, "last", 0) == []
    assert await world.store.trail("nobody", 2) is None


@pytest.mark.promise("C8")
async def test_a_trail_ends_at_the_reset(world: World) -> None:
    await complete(world, await begin(world))
    await born(world, "before", "root")
    await world.store.reset_chain("root", world.clock.now())
    assert await hops(world, "before") == []
    await born(world, "after", "before")
    await born(world, "later", "after")
    assert await hops(world, "later") == ["later", "after"]


@pytest.mark.promise("C8")
async def test_a_chain_s_requests_are_listed_as_they_came(world: World) -> None:
    claim = await world.run("root", "talk", agent_id="ann", chain=member(limits=limits(1)))
    await born(world, "child", "root")
    await born(world, "deep", "child")
    world.clock.forward(1)
    await complete(world, claim, tokens=33)
    rows = [row async for row in items(lambda cursor: world.store.members("deep", 1, cursor))]
    assert [(row.request_id, row.parent, row.depth, row.state) for row in rows] == [
        ("root", None, 0, State.COMPLETED),
        ("child", "root", 1, State.QUEUED),
        ("deep", "child", 2, State.BLOCKED),
    ]
    assert [(row.tokens, row.estimated, row.agent_id) for row in rows] == [
        (33, False, "ann"),
        (0, False, None),
        (0, False, None),
    ]
    assert [None if row.reason is None else row.reason.code for row in rows] == [None, None, "max_depth"]
    assert (rows[0].finished_at, rows[0].conversation) == (world.clock.wall, "talk")
    assert (await world.store.members("nobody", 5)).items == ()


@pytest.mark.promise("C8")
async def test_chains_are_listed_newest_first(world: World) -> None:
    for number in range(5):
        await begin(world, f"root {number}", f"talk {number}")
    listed = [view async for view in items(lambda cursor: world.store.chains(2, cursor))]
    assert [view.chain for view in listed] == [f"root {number}" for number in reversed(range(5))]
    assert listed[0] == await figures(world, "root 4")


@pytest.mark.promise("C8")
async def test_a_foreign_cursor_is_refused(world: World) -> None:
    await begin(world, "root 0", "talk 0")
    await begin(world, "root 1", "talk 1")
    await born(world, "child", "root 0")
    cursor = (await world.store.chains(1)).cursor
    with pytest.raises(InvalidData):
        await world.store.members("root 0", 1, cursor)
    with pytest.raises(InvalidData):
        await world.store.injections(1, cursor)
    with pytest.raises(InvalidData):
        await world.store.chains(1, "nonsense")


# Keeping.


@pytest.mark.promise("R7")
async def test_a_chain_goes_with_its_last_request(store_factory: StoreFactory) -> None:
    world = await store_factory(keep_finished=microseconds(60))
    await complete(world, await begin(world))
    world.clock.forward(30)
    await complete(world, await world.run("child", "other", chain=member("root")))
    await world.store.set_log_watermark(2**40)
    world.clock.forward(31)
    await world.prune()
    assert (await figures(world)).members == 1
    assert await hops(world, "child") == ["child"]
    view = await world.view("child")
    assert (view.parent, view.depth, view.chain) == ("root", 1, "root")
    world.clock.forward(31)
    await world.prune()
    assert await world.store.chain("root") is None
    assert (await world.store.chains(5)).items == ()
    await begin(world)
    assert (await figures(world)).members == 1


def test_limits_of_both_are_the_minimum_of_each() -> None:
    one, other = limits(1, 20, 30), limits(10, 2, 300)
    assert one.within(other) == other.within(one) == limits(1, 2, 30)
    assert msgspec.structs.astuple(one.within(one)) == msgspec.structs.astuple(one)
