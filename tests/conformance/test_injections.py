"""Deliveries: follow-ups in the step of their parent's end, reminders, dead letters (C2, C3)."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ksi.clock import microseconds
from ksi.errors import InternalError, InvalidData, NotFound
from ksi.request import OnBusy, Outcome, Priority, State
from ksi.store.chains import Block, Delivered, InjectionState, Reminder
from ksi.store.values import Claimed, Finish, GiveBack, Retry
from tests.conformance.chain_parts import (
    LOOP,
    after,
    begin,
    born,
    claims,
    complete,
    deliveries,
    delivery,
    direct,
    fail,
    figures,
    hops,
    limits,
    member,
    reminder,
    told,
)
from tests.conformance.conftest import StoreFactory
from tests.conformance.world import DAY, OFFER, World

TIMEOUT = Block(code="timeout", message="slow")


async def reminded(world: World, *names: str, target: str = "other") -> None:
    """Reminders that wait for a conversation's next prompt."""
    claim = await begin(world, injects=True)
    await complete(world, claim, after(*(reminder(name, target) for name in names)))


# Follow-ups that are requests.


@pytest.mark.promise("C3")
async def test_follow_ups_come_in_the_step_of_their_parent_s_end(world: World) -> None:
    claim = await begin(world, injects=True)
    settled = await complete(world, claim, after(direct("root/1", "other", agent_id="ann"), direct("root/2", "third")))
    assert told(settled) == [("root/1", "queued"), ("root/2", "queued")]
    view = await world.view("root/1")
    assert (view.state, view.conversation, view.agent_id, view.model) == (State.QUEUED, "other", "ann", "stub/echo")
    assert (view.chain, view.parent, view.depth, view.injection) == ("root", "root", 1, "root/1")
    assert view.body == b'{"prompt":"root/1"}'
    (first, second) = await world.claim()
    assert first.chain is not None
    assert (first.request_id, first.chain.depth, first.chain.parent) == ("root/1", 1, "root")
    assert second.request_id == "root/2"
    session = await world.store.session("other")
    assert session is not None
    assert session.agents == ("ann",)


@pytest.mark.promise("C3")
async def test_a_delivery_has_its_facts_and_its_state(world: World) -> None:
    claim = await begin(world, injects=True)
    world.clock.forward(5)
    settled = await complete(world, claim, after(direct("root/1", "other")))
    view = await delivery(world, "root/1")
    assert (view.chain, view.parent, view.target, view.mode, view.trigger) == (
        *("root", "root", "other", "direct", "general"),
    )
    assert (view.state, view.created_at, view.finished_at, view.request_id, view.reason) == (
        *("queued", world.clock.wall, None, "root/1", None),
    )
    assert (view.text, view.child) == ("text root/1", None)
    assert settled.injections == (msgspec.structs.replace(view, text=""),)
    assert await deliveries(world.store) == list(settled.injections)
    assert await world.store.injection("root/2") is None


@pytest.mark.promise("C3")
async def test_a_follow_up_to_its_own_conversation_is_next_when_the_lock_passes_on(world: World) -> None:
    claim = await begin(world, injects=True)
    settled = await complete(world, claim, after(direct("root/1", "talk")))
    assert settled.passing is not None
    assert settled.passing.next_request == "root/1"
    assert await world.claim_ids() == ["root/1"]


@pytest.mark.promise("C3")
async def test_a_follow_up_takes_its_place_by_rank(world: World) -> None:
    claim = await begin(world, injects=True)
    await world.enqueue("low", "talk", priority=Priority.LOW)
    await complete(world, claim, after(direct("root/1", "talk")))
    assert await world.line() == ["root/1", "low"]


@pytest.mark.promise("C3", "Q5")
async def test_follow_ups_pass_the_queue_s_limit(store_factory: StoreFactory) -> None:
    world = await store_factory(max_queued=1)
    claim = await begin(world, injects=True)
    await world.enqueue("fills it", "filler")
    settled = await complete(world, claim, after(*(direct(f"root/{n}", f"t{n}") for n in range(3))))
    assert [state for _, state in told(settled)] == ["queued"] * 3
    assert (await world.store.totals()).queued == 4


@pytest.mark.promise("C3", "L7")
async def test_a_target_named_by_a_provider_session_is_its_conversation(world: World) -> None:
    await complete(world, await world.run("first", "other"), provider_session="ps")
    await complete(world, await begin(world, injects=True), after(direct("root/1", "ps"), reminder("root/2", "ps")))
    assert (await world.view("root/1")).conversation == "other"
    assert (await delivery(world, "root/1")).target == (await delivery(world, "root/2")).target == "other"
    assert await world.store.session("ps") == await world.store.session("other")


@pytest.mark.promise("C3")
async def test_a_delivery_is_done_when_its_request_completed(world: World) -> None:
    await complete(world, await begin(world, injects=True), after(direct("root/1", "other")))
    world.clock.forward(7)
    settled = await complete(world, await world.claim_one())
    assert told(settled) == [("root/1", "delivered")]
    view = await delivery(world, "root/1")
    assert (view.state, view.finished_at, view.child) == ("delivered", world.clock.wall, None)


@pytest.mark.promise("C3")
async def test_a_retry_leaves_a_delivery_on_its_way(world: World) -> None:
    await complete(world, await begin(world, injects=True), after(direct("root/1", "other")))
    settled = await world.retry(await world.claim_one(), 0)
    assert settled.injections == ()
    await world.crash()
    assert (await delivery(world, "root/1")).state == "queued"


async def _failed(world: World) -> Any:
    return await fail(world, await world.claim_one())


async def _cancelled(world: World) -> Any:
    return await world.cancel("root/1")


async def _stopped(world: World) -> Any:
    claim = await world.claim_one()
    await world.cancel("root/1")
    return await world.retry(claim)


async def _blocked(world: World) -> Any:
    await world.store.close_chain("root", world.clock.now())
    return (await claims(world)).blocked[0]


async def _recovered(world: World) -> Any:
    await world.claim_one()
    await world.cancel("root/1")
    return (await world.crash()).ended[0]


@pytest.mark.promise("C3")
@pytest.mark.parametrize(
    ("end", "state", "code", "message"),
    [
        (_failed, "failed", "timeout", "slow"),
        (_cancelled, "failed", "cancelled", "request 'root/1' ended cancelled"),
        (_stopped, "failed", "cancelled", "request 'root/1' ended cancelled"),
        (_blocked, "blocked", "chain_closed", "the chain was cancelled and takes no new requests"),
        (_recovered, "failed", "cancelled", "request 'root/1' ended cancelled"),
    ],
)
async def test_a_delivery_whose_request_ends_otherwise_is_a_dead_letter(
    world: World, end: Any, state: str, code: str, message: str
) -> None:
    follow_up = direct("root/1", "other", injects=True)
    await complete(world, await begin(world, injects=True), after(follow_up))
    told_of = await end(world)
    assert told(told_of) == [("root/1", state)]
    view = await delivery(world, "root/1")
    assert (view.state, view.reason, view.finished_at) == (state, Block(code=code, message=message), world.clock.wall)
    assert (view.child, view.text, view.request_id) == (follow_up.child, "text root/1", "root/1")
    assert told_of.injections == (msgspec.structs.replace(view, text="", child=None),)


@pytest.mark.promise("C3", "C5")
async def test_a_follow_up_that_its_chain_has_no_place_for_is_a_dead_letter(world: World) -> None:
    claim = await begin(world, injects=True, limits=limits(0))
    settled = await complete(world, claim, after(direct("root/1", "new"), reminder("root/2", "new")))
    assert told(settled) == [("root/1", "blocked"), ("root/2", "blocked")]
    view = await delivery(world, "root/1")
    assert view.reason is not None
    assert (view.reason.code, view.request_id, view.finished_at) == ("max_depth", None, world.clock.wall)
    assert view.child is not None
    assert await world.store.get("root/1") is None
    assert await world.store.session("new") is None, "a dead letter makes no conversation"
    assert (await figures(world)).members == 1


@pytest.mark.promise("C5", "C6")
async def test_follow_ups_are_checked_against_the_usage_of_their_parent(world: World) -> None:
    claim = await begin(world, injects=True, limits=limits(budget=200))
    settled = await complete(world, claim, after(direct("root/1", "other")), tokens=200)
    assert told(settled) == [("root/1", "blocked")]
    view = await delivery(world, "root/1")
    assert view.reason is not None
    assert view.reason.code == "token_budget"


@pytest.mark.promise("C3", "C7")
async def test_a_finding_against_a_follow_up_or_its_chain_makes_dead_letters(world: World) -> None:
    claim = await begin(world, injects=True)
    settled = await complete(world, claim, after(direct("root/1", "other", block=LOOP), direct("root/2", "other")))
    assert told(settled) == [("root/1", "blocked"), ("root/2", "queued")]
    assert (await delivery(world, "root/1")).reason == LOOP
    child = await world.claim_one()
    settled = await complete(world, child, after(direct("x/1", "other"), trip=LOOP))
    assert told(settled) == [("root/2", "delivered"), ("x/1", "blocked")]
    assert (await delivery(world, "x/1")).reason == LOOP
    assert (await figures(world)).spending.tripped == LOOP


@pytest.mark.promise("C7")
async def test_a_follow_up_s_own_check_can_trip_the_chain_for_those_behind_it(world: World) -> None:
    claim = await begin(world, injects=True)
    found = direct("root/1", "other", trips=True)
    assert found.child is not None
    membership = msgspec.structs.replace(found.child.membership, block=LOOP)
    found = msgspec.structs.replace(found, child=msgspec.structs.replace(found.child, membership=membership))
    settled = await complete(world, claim, after(found, direct("root/2", "other")))
    assert told(settled) == [("root/1", "blocked"), ("root/2", "blocked")]
    assert (await figures(world)).spending.tripped == LOOP


@pytest.mark.promise("C3", "L3")
async def test_an_interruption_that_ends_a_waiting_holder_leaves_it_to_be_routed(world: World) -> None:
    await complete(world, await begin(world, injects=True), after(direct("root/1", "other", injects=True)))
    await world.retry(await world.claim_one(), 100)
    enqueued = await world.enqueue("urgent", "other", on_busy=OnBusy.INTERRUPT)
    assert enqueued.passing is not None
    assert enqueued.passing.released_by == "root/1"
    assert [(told.injection_id, told.state) for told in enqueued.injections] == [("root/1", "failed")]
    view = await delivery(world, "root/1")
    assert (view.state, view.reason and view.reason.code) == ("failed", "cancelled")
    assert await world.store.unrouted() == ("root/1",)
    assert (await figures(world)).unfinished == 0


@pytest.mark.promise("C3")
async def test_a_follow_up_that_cannot_be_asked_for_is_a_failed_dead_letter(world: World) -> None:
    claim = await begin(world, injects=True)
    settled = await complete(world, claim, after(direct("root/1", "other", error="no provider serves x/y")))
    assert told(settled) == [("root/1", "failed")]
    reason = (await delivery(world, "root/1")).reason
    assert reason == Block(code="invalid_request", message="no provider serves x/y")


@pytest.mark.promise("C5")
async def test_guard_messages_go_out_of_a_tripped_chain_up_to_their_number(store_factory: StoreFactory) -> None:
    world = await store_factory(guard_messages=2)
    claim = await begin(world, injects=True, limits=limits(0))
    follow_ups = (
        direct("root/1", "other", guard=True),
        reminder("root/2", "other", guard=True),
        direct("root/3", "other", guard=True),
        reminder("root/4", "other", guard=True),
    )
    settled = await complete(world, claim, after(*follow_ups, trip=LOOP))
    assert [state for _, state in told(settled)] == ["queued", "queued", "blocked", "blocked"]
    reason = (await delivery(world, "root/3")).reason
    assert reason is not None
    assert reason.code == "guard_cap"
    (guard,) = await world.claim()
    assert guard.chain is not None
    assert (guard.request_id, guard.chain.output_cap, len(guard.reminders)) == ("root/1", None, 1)
    assert (await figures(world)).guard_messages == 2


@pytest.mark.promise("C5")
async def test_notices_of_blocks_are_no_members_of_their_chain(store_factory: StoreFactory) -> None:
    world = await store_factory(guard_messages=2, keep_finished=microseconds(60))
    claim = await begin(world, injects=True)
    await complete(world, claim, after(direct("root/1", "a", guard=True), direct("root/2", "b", guard=True), trip=LOOP))
    chain = await figures(world)
    assert (chain.members, chain.depth, chain.unfinished, chain.guard_messages) == (1, 0, 2, 2)
    rows = (await world.store.members("root", 5)).items
    assert [row.request_id for row in rows] == ["root", "root/1", "root/2"], "an operator sees them"
    await world.store.set_log_watermark(2**40)
    world.clock.forward(61)
    await world.prune()
    assert (await figures(world)).members == 0
    for notice in await world.claim():
        await complete(world, notice)
    world.clock.forward(61)
    await world.prune()
    assert await world.store.chain("root") is None


@pytest.mark.promise("C3")
async def test_an_id_that_is_taken_gets_a_plus(world: World) -> None:
    claim = await begin(world, "root", "mine", injects=True)
    await world.enqueue("root/1", "taken")
    await world.acquire("root/2", "locked")
    follow_ups = (direct("root/1", "a"), direct("root/2", "b"), reminder("root/2", "c"), reminder("root/2", "d"))
    settled = await complete(world, claim, after(*follow_ups))
    assert [name for name, _ in told(settled)] == ["root/1+", "root/2+", "root/2", "root/2++"]
    assert (await world.view("root/1+")).injection == "root/1+"
    assert (await world.view("root/1")).injection is None


@pytest.mark.promise("C3", "F10")
async def test_an_aftermath_of_a_fenced_or_ended_run_is_not_written(world: World) -> None:
    old = await begin(world, injects=True)
    await world.crash()
    settled = await complete(world, old, after(direct("root/1", "other"), trip=LOOP, mark=b"m"))
    assert (settled.fenced, settled.injections) == (True, ())
    (again,) = await world.claim()
    await complete(world, again, after(direct("root/1", "other")))
    settled = await complete(world, again, after(direct("root/2", "other")))
    assert settled.fenced
    assert [one.injection_id for one in await deliveries(world.store)] == ["root/1"]
    assert (await figures(world)).spending.tripped is None


@pytest.mark.promise("C3")
async def test_an_aftermath_with_a_retry_waits_for_the_end(world: World) -> None:
    claim = await begin(world, injects=True)
    attempt = world.attempt(claim, Outcome.FAILED, error="overloaded")
    for verdict in (Retry(at=world.clock.wall), GiveBack()):
        settled = await world.store.settle(claim, attempt, verdict, world.clock.now(), after(direct("root/1", "other")))
        assert settled.injections == ()
        await world.expire()
        (claim,) = await world.claim()
        attempt = world.attempt(claim, Outcome.FAILED, error="overloaded")
    assert await deliveries(world.store) == []


@pytest.mark.promise("C3")
async def test_an_aftermath_of_a_request_in_no_chain_is_a_defect(world: World) -> None:
    claim = await world.run("plain")
    with pytest.raises(InternalError):
        await complete(world, claim, after(direct("plain/1", "other")))
    assert (await world.state("plain"), await deliveries(world.store)) == (State.RUNNING, [])


@pytest.mark.promise("C3")
async def test_deliveries_are_listed_newest_first_and_by_state(world: World) -> None:
    claim = await begin(world, injects=True, limits=limits(1))
    await complete(world, claim, after(*(direct(f"root/{n}", f"t{n}") for n in range(5))))
    first, second, *_ = await world.claim()
    await complete(world, first, after(direct("deep/1", "x")))
    await fail(world, second)
    listed = await deliveries(world.store)
    assert [one.injection_id for one in listed] == ["deep/1", "root/4", "root/3", "root/2", "root/1", "root/0"]
    by_state = {state: [one.injection_id for one in await deliveries(world.store, state)] for state in _STATES}
    assert by_state == {
        "queued": ["root/4", "root/3", "root/2"],
        "taken": [],
        "delivered": ["root/0"],
        "blocked": ["deep/1"],
        "failed": ["root/1"],
        "retried": [],
        "nonsense": [],
    }
    assert all(one.text == "" and one.child is None for one in listed)


_STATES = (
    *(InjectionState.QUEUED, InjectionState.TAKEN, InjectionState.DELIVERED, InjectionState.BLOCKED),
    *(InjectionState.FAILED, InjectionState.RETRIED, "nonsense"),
)


# Ends without an aftermath.


@pytest.mark.promise("C3")
async def test_ends_outside_a_settle_wait_to_be_routed(world: World) -> None:
    holder = await world.run("holder")
    await begin(world, "runs", "elsewhere", injects=True)
    late = world.clock.wall + microseconds(5)
    await world.enqueue("expires", "talk", expires=late, chain=member(injects=True))
    await world.enqueue("cancelled", "talk", chain=member(injects=True))
    await world.enqueue("silent", "talk", chain=member())
    await world.enqueue("blocked", "talk", chain=member(injects=True, block=LOOP))
    assert await world.store.unrouted() == ("blocked",)
    await world.cancel("cancelled")
    await world.cancel("silent")
    world.clock.forward(6)
    await world.expire()
    await world.cancel("runs")
    await world.crash()
    assert await world.store.unrouted() == ("runs", "expires", "cancelled", "blocked")
    assert await world.store.unrouted(2) == ("runs", "expires")
    assert holder.chain is None


@pytest.mark.promise("C3")
async def test_a_settle_without_an_aftermath_leaves_it_to_be_routed(world: World) -> None:
    await complete(world, await begin(world, injects=True))
    await complete(world, await begin(world, "empty", injects=True), after())
    assert await world.store.unrouted() == ("root",)


@pytest.mark.promise("C3")
async def test_an_unrouted_end_is_delivered_once(world: World) -> None:
    await fail(world, await begin(world, injects=True))
    aftermath = after(direct("root/1", "other"), reminder("root/2", "other"), mark=b"r")
    delivered = await world.store.deliver("root", aftermath, world.clock.now())
    assert told(delivered) == [("root/1", "queued"), ("root/2", "queued")]
    assert await world.store.unrouted() == ()
    assert await world.store.deliver("root", aftermath, world.clock.now()) == Delivered()
    trail = await world.store.trail("root", 1)
    assert trail is not None
    assert trail.hops[0].result == b"r"
    assert await world.claim_ids() == ["root/1"]


@pytest.mark.promise("C3")
async def test_only_an_undispatched_result_is_delivered(world: World) -> None:
    await begin(world, "runs", injects=True)
    await world.enqueue("plain")
    await complete(world, await begin(world, "routed", "x", injects=True), after())
    for name in ("runs", "plain", "routed", "nobody"):
        assert await world.store.deliver(name, after(direct("x/1", "other")), world.clock.now()) == Delivered()
    assert await deliveries(world.store) == []


@pytest.mark.promise("C3")
async def test_an_undispatched_result_is_reported_as_work(world: World) -> None:
    await fail(world, await begin(world, injects=True))
    before = world.calls
    await world.store.deliver("root", after(direct("root/1", "other")), world.clock.now())
    assert world.calls > before


@pytest.mark.promise("C3")
async def test_a_settle_that_leaves_follow_ups_is_reported_as_work(world: World) -> None:
    claim = await begin(world, injects=True)
    before = world.calls
    await complete(world, claim, after(direct("root/1", "other")))
    assert world.calls > before


# Reminders.


@pytest.mark.promise("C2")
async def test_the_next_prompt_of_a_conversation_takes_its_waiting_deliveries_in_order(world: World) -> None:
    await reminded(world, "root/1", "root/2")
    assert [one.state for one in await deliveries(world.store)] == ["queued", "queued"]
    await world.enqueue("plain", "other")
    (claim,) = await world.claim()
    assert claim.reminders == (
        Reminder(injection_id="root/1", text="text root/1"),
        Reminder(injection_id="root/2", text="text root/2"),
    )
    view = await delivery(world, "root/1")
    assert (view.state, view.request_id, view.mode) == ("taken", "plain", "next")
    settled = await complete(world, claim)
    assert told(settled) == [("root/1", "delivered"), ("root/2", "delivered")]
    view = await delivery(world, "root/2")
    assert (view.state, view.request_id, view.finished_at) == ("delivered", "plain", world.clock.wall)
    assert (await world.run("later", "other")).reminders == ()


@pytest.mark.promise("C2")
async def test_a_request_that_runs_at_once_takes_them_too(world: World) -> None:
    await reminded(world, "root/1")
    claim = await world.run("plain", "other")
    assert [one.injection_id for one in claim.reminders] == ["root/1"]


@pytest.mark.promise("C2")
@pytest.mark.parametrize("how", ["failed", "cancelled", "retried", "given back", "crashed"])
async def test_deliveries_taken_by_a_run_wait_again_if_it_did_not_complete(world: World, how: str) -> None:
    await reminded(world, "root/1", "root/2")
    claim = await world.run("plain", "other")
    await reminded_again(world, "late/1")
    await _end(world, claim, how)
    assert [(one.injection_id, one.state, one.request_id) for one in await deliveries(world.store)] == [
        ("late/1", "queued", None),
        ("root/2", "queued", None),
        ("root/1", "queued", None),
    ]
    if how in ("failed", "cancelled"):
        await world.enqueue("again", "other")
    world.clock.forward(60)
    await world.expire()
    (again,) = [one for one in await world.claim() if one.conversation == "other"]
    assert [one.injection_id for one in again.reminders] == ["root/1", "root/2", "late/1"], "in the order of creation"


async def reminded_again(world: World, name: str) -> None:
    claim = await begin(world, "second", "second", injects=True)
    await complete(world, claim, after(reminder(name, "other")))


async def _end(world: World, claim: Claimed, how: str) -> None:
    match how:
        case "failed":
            await fail(world, claim)
        case "cancelled":
            verdict = Finish(state=State.CANCELLED, error="cancelled")
            await world.settle(claim, verdict, world.attempt(claim, Outcome.CANCELLED))
        case "retried":
            await world.retry(claim)
        case "given back":
            await world.give_back(claim)
        case _:
            await world.crash()


@pytest.mark.promise("C2")
async def test_history_has_the_reminders_before_a_prompt(world: World) -> None:
    await reminded(world, "root/1", "root/2")
    settled = await complete(world, await world.run("plain", "other"))
    assert settled.turn is not None
    await complete(world, await world.run("next", "other"))
    session = await world.store.session("other")
    assert session is not None
    assert session.head is not None
    turns = await world.store.history(session.head, 10_000)
    assert [turn.reminders for turn in turns] == [(), ("text root/1", "text root/2")]
    assert len(await world.store.history(session.head, 70)) == 1, "they count as what the history holds"


@pytest.mark.promise("C2")
async def test_a_member_that_is_blocked_takes_no_reminder(world: World) -> None:
    await reminded(world, "root/1")
    await born(world, "child", "root", "other")
    await world.enqueue("plain", "other")
    await world.store.close_chain("root", world.clock.now())
    took = await claims(world)
    assert [ended.request_id for ended in took.blocked] == ["child"]
    assert [len(claim.reminders) for claim in took.started] == [1]


@pytest.mark.promise("C2")
async def test_a_target_that_does_not_exist_is_made_for_a_reminder(world: World) -> None:
    await reminded(world, "root/1", target="new")
    session = await world.store.session("new")
    assert session is not None
    assert (session.turns, session.created_at) == (0, world.clock.wall)


# Sending again.


@pytest.mark.promise("C3")
async def test_a_dead_letter_is_sent_again_under_another_id(world: World) -> None:
    await complete(world, await begin(world, injects=True), after(direct("root/1", "other")))
    await fail(world, await world.claim_one())
    delivered = await world.store.redeliver("root/1", direct("root/1/again", "other"), world.clock.now())
    assert told(delivered) == [("root/1", "retried"), ("root/1/again", "queued")]
    view = await world.view("root/1/again")
    assert (view.parent, view.depth, view.chain, view.injection) == ("root", 1, "root", "root/1/again")
    assert (await delivery(world, "root/1")).reason == TIMEOUT
    assert await world.claim_ids() == ["root/1/again"]
    with pytest.raises(InvalidData):
        await world.store.redeliver("root/1", direct("root/1/twice", "other"), world.clock.now())


@pytest.mark.promise("C3")
async def test_a_resent_delivery_is_checked_again(world: World) -> None:
    claim = await begin(world, injects=True)
    await complete(world, claim, after(direct("root/1", "other"), reminder("root/2", "other"), trip=LOOP))
    delivered = await world.store.redeliver("root/1", direct("root/3", "other"), world.clock.now())
    assert told(delivered) == [("root/1", "retried"), ("root/3", "blocked")]
    await world.store.reset_chain("root", world.clock.now())
    delivered = await world.store.redeliver("root/3", direct("root/4", "other"), world.clock.now())
    assert told(delivered) == [("root/3", "retried"), ("root/4", "queued")]
    delivered = await world.store.redeliver("root/2", reminder("root/5", "other"), world.clock.now())
    assert told(delivered) == [("root/2", "retried"), ("root/5", "queued")]
    (claim,) = await world.claim()
    assert [one.injection_id for one in claim.reminders] == ["root/5"]


@pytest.mark.promise("C3")
async def test_only_a_dead_letter_is_sent_again(world: World) -> None:
    await complete(world, await begin(world, injects=True), after(direct("root/1", "a"), direct("root/2", "b")))
    await complete(world, await world.claim_one())
    for name in ("root/1", "root/2"):
        with pytest.raises(InvalidData):
            await world.store.redeliver(name, direct("x", "other"), world.clock.now())
    with pytest.raises(NotFound):
        await world.store.redeliver("nothing", direct("x", "other"), world.clock.now())


# Keeping.


@pytest.mark.promise("R7")
async def test_ended_deliveries_go_with_their_retention_and_waiting_ones_stay(store_factory: StoreFactory) -> None:
    world = await store_factory(keep_finished=microseconds(60), keep_sessions=microseconds(DAY))
    claim = await begin(world, injects=True)
    await complete(
        world, claim, after(reminder("root/1", "a"), reminder("root/2", "b"), direct("root/3", "c", block=LOOP))
    )
    used = await complete(world, await world.run("uses", "a"))
    await world.store.set_log_watermark(2**40)
    world.clock.forward(61)
    await world.prune()
    assert [one.injection_id for one in await deliveries(world.store)] == ["root/2"]
    assert await world.store.chain("root") is None
    assert used.turn is not None
    (turn,) = await world.store.history(used.turn, 1_000)
    assert turn.reminders == ("text root/1",), "a turn keeps what it was asked with"
    world.clock.forward(2 * DAY)
    await world.prune()
    assert await world.store.session("a") is None
    assert [one.injection_id for one in (await world.run("takes", "b")).reminders] == ["root/2"]


@pytest.mark.promise("R7", "C3")
async def test_an_undispatched_request_is_kept(store_factory: StoreFactory) -> None:
    world = await store_factory(keep_finished=microseconds(60))
    await fail(world, await begin(world, injects=True))
    world.clock.forward(61)
    await world.prune()
    assert await world.store.unrouted() == ("root",)
    await world.store.deliver("root", after(), world.clock.now())
    await world.prune()
    assert await world.store.get("root") is None


@pytest.mark.promise("R7", "C3")
async def test_a_dead_letter_whose_parent_is_gone_cannot_be_sent_again(store_factory: StoreFactory) -> None:
    world = await store_factory(keep_finished=microseconds(60))
    await complete(world, await begin(world, injects=True), after(direct("root/1", "other")))
    await world.store.set_log_watermark(2**40)
    world.clock.forward(40)
    await fail(world, await world.claim_one())
    world.clock.forward(30)
    await world.prune()
    assert (await delivery(world, "root/1")).state == "failed"
    assert await hops(world, "root/1") == ["root/1"]
    with pytest.raises(NotFound):
        await world.store.redeliver("root/1", direct("root/2", "other"), world.clock.now())
    assert (await delivery(world, "root/1")).state == "failed"


@pytest.mark.promise("C3", "Q3")
async def test_follow_ups_and_deliveries_survive_a_crash_once(world: World) -> None:
    claim = await begin(world, injects=True)
    follow_ups = (direct("root/1", "a"), reminder("root/2", "b"), direct("root/3", "c", block=LOOP))
    await complete(world, claim, after(*follow_ups))
    before = await deliveries(world.store)
    await world.crash()
    assert await deliveries(world.store) == before
    assert await world.claim_ids(OFFER) == ["root/1"]
    await world.crash()
    assert await world.claim_ids(OFFER) == ["root/1"]
