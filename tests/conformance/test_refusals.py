"""A refusal has the same message and the same details on every store."""

from __future__ import annotations

from collections.abc import Awaitable

import pytest

from ksi.clock import microseconds
from ksi.errors import KsiError
from ksi.request import OnBusy
from ksi.store.rules import refusals
from ksi.store.values import Listing
from tests.conformance.chain_parts import after, begin, born, complete, direct, fail, member
from tests.conformance.conftest import StoreFactory
from tests.conformance.world import World


async def expect(deed: Awaitable[object], refusal: KsiError) -> None:
    """The deed is refused in these words, with these details."""
    with pytest.raises(type(refusal)) as caught:
        await deed
    assert (caught.value.message, caught.value.details) == (refusal.message, refusal.details)
    assert refusal.details


async def pruned(world: World) -> None:
    """Ended requests, and answers in the response log, are past their retention."""
    await world.store.set_log_watermark(2**40)
    world.clock.forward(61)
    await world.prune()


async def test_an_unknown_request_is_refused_by_its_id(world: World) -> None:
    await expect(world.cancel("nobody"), refusals.unknown_request("nobody"))


async def test_a_late_answer_names_its_request(store_factory: StoreFactory) -> None:
    world = await store_factory(keep_finished=microseconds(60))
    claim = await world.run("a")
    await world.complete(claim)
    await pruned(world)
    await expect(world.complete(claim), refusals.late_answer("a"))


async def test_a_taken_id_is_refused_with_its_owner(world: World) -> None:
    await world.acquire("lock")
    await world.run("a", "other")
    await expect(world.enqueue("lock"), refusals.names_a_lock("lock"))
    await expect(world.enqueue("a", body=b'{"prompt":"else"}'), refusals.names_another_request("a"))
    await expect(world.acquire("a"), refusals.lock_names_a_request("a"))
    await expect(world.acquire("lock", "other"), refusals.lock_of_another("lock"))
    await expect(world.release("a"), refusals.not_a_lock("a"))


async def test_an_unknown_fork_names_its_conversation(world: World) -> None:
    await expect(world.enqueue("a", fork_of="nowhere"), refusals.unknown_fork("nowhere"))


async def test_full_lines_say_their_limit(store_factory: StoreFactory) -> None:
    world = await store_factory(max_queued=1)
    await world.enqueue("a")
    await expect(world.enqueue("b"), refusals.queue_full(1))
    await world.acquire("c", "other")
    await world.acquire("d", "other")
    await expect(world.acquire("e", "other"), refusals.waiters_full(1))


async def test_a_taken_conversation_says_by_whom_since_when_and_how_many_wait(world: World) -> None:
    await world.run("a")
    since = world.clock.wall
    world.clock.forward(5.0)
    await world.enqueue("b")
    await expect(world.enqueue("c", on_busy=OnBusy.REJECT), refusals.conversation_busy("talk", "a", since, position=1))


async def test_a_lock_that_is_not_held_is_distinguished_from_one_of_another_fence(world: World) -> None:
    await expect(world.release("lock"), refusals.holds_no_lock("lock"))
    await world.acquire("lock")
    held = (await world.look()).fence
    assert held is not None
    await expect(world.release("lock", held + 1), refusals.wrong_fence("lock", held + 1))
    await expect(world.renew_lock("lock", held + 1), refusals.wrong_fence("lock", held + 1))
    await world.acquire("waiter")
    await expect(world.renew_lock("waiter"), refusals.holds_no_lock("waiter"))


async def test_unknown_chains_and_parents_are_named(world: World) -> None:
    await expect(world.enqueue("a", chain=member("nobody")), refusals.unknown_parent("nobody"))
    await expect(world.store.close_chain("nothing", world.clock.now()), refusals.unknown_chain("nothing"))
    await expect(world.store.reset_chain("nothing", world.clock.now()), refusals.unknown_chain("nothing"))


async def test_a_delivery_that_cannot_be_sent_again_says_why(world: World) -> None:
    again = direct("again")
    now = world.clock.now
    await expect(world.store.redeliver("nothing", again, now()), refusals.unknown_delivery("nothing"))
    root = await world.run("root", chain=member())
    await complete(world, root, after(direct("sent", "other", parent="root")))
    await expect(world.store.redeliver("sent", again, now()), refusals.not_a_dead_letter("sent", "queued"))


async def test_a_delivery_whose_result_is_gone_names_its_request(store_factory: StoreFactory) -> None:
    world = await store_factory(keep_finished=microseconds(60))
    await complete(world, await begin(world, injects=True), after(direct("root/1", "other")))
    await world.store.set_log_watermark(2**40)
    world.clock.forward(40)
    await fail(world, await world.claim_one())
    world.clock.forward(30)
    await world.prune()
    again = world.store.redeliver("root/1", direct("root/2", "other"), world.clock.now())
    await expect(again, refusals.result_is_gone("root"))


async def test_a_chain_s_name_that_is_taken_is_named(store_factory: StoreFactory) -> None:
    world = await store_factory(keep_finished=microseconds(60))
    await complete(world, await begin(world))
    await born(world, "child", "root")
    await pruned(world)
    await expect(world.enqueue("root", chain=member()), refusals.names_an_older_chain("root"))


async def test_a_cursor_of_another_list_is_refused(world: World) -> None:
    await expect(world.store.requests(Listing.READY, 1, "nonsense"), refusals.foreign_cursor())
    await expect(world.store.sessions(1, "nonsense"), refusals.foreign_cursor())
