"""Provider sessions bound to one machine: the daemons that may continue them, and their requests when that machine is
gone (D4). Over every store that several machines can share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from ksi.clock import microseconds
from ksi.request import OnBusy, Priority
from ksi.store.values import Claimed, Listing, Offer, Settled, StoreRules
from tests.conformance.world import MemoryHome, RedisHome, SharedHome, World, check, items

pytestmark = pytest.mark.promise("D4")

CLAUDE = Offer("claude", "claude", 9, by_node=True)
EITHER = Offer("claude,team", "claude", 9, by_node=True)
ELSEWHERE = Offer("claude,team", "team", 9)
TEAM = Offer("team", "team", 9)
NODE_TIMEOUT = 60.0
FOREVER = 10**15
"""A lease that no test outlives: here machines are silent, no daemons die."""


class Machine(World):
    """One machine's daemon, with short verbs for a conversation."""

    node = "here"

    async def begin(self, request_id: str, conversation: str = "talk", **fields: Any) -> Claimed:
        """Enqueue a request that must run here at once."""
        fields.setdefault("route", "claude")
        enqueued = await self.enqueue(request_id, conversation, [CLAUDE, EITHER, TEAM], **fields)
        assert enqueued.claim is not None
        return enqueued.claim

    async def turn(self, request_id: str, conversation: str = "talk", **fields: Any) -> Settled:
        """A turn whose provider session lives here."""
        return await self.answer(await self.begin(request_id, conversation, **fields))

    async def answer(self, claim: Claimed, **fields: Any) -> Settled:
        """The run brought an answer, and a provider session that lives here."""
        given = {"provider_session": f"{claim.conversation} at {self.node}", "node": self.node}
        return await self.complete(claim, **(given | fields))

    async def wait(self, request_id: str, conversation: str = "talk", **fields: Any) -> None:
        """Enqueue a request that must not run here at once, though there is room."""
        fields.setdefault("route", "claude")
        enqueued = await self.enqueue(request_id, conversation, [CLAUDE, EITHER, ELSEWHERE, TEAM], **fields)
        assert enqueued.claim is None

    async def takes(self, *offers: Offer, limit: int = 100) -> list[str]:
        """The requests that a claim starts here, by default with room for all."""
        return await self.claim_ids(*(offers or (CLAUDE, EITHER, TEAM)), limit=limit)


class Team:
    """Two machines, and the time that passes for both."""

    def __init__(self, home: SharedHome, rules: StoreRules) -> None:
        self.here = Machine(home, rules)
        self.away = Machine(home.beside("away"), rules, seed=2)
        self.away.node = "away"
        self.away.clock = self.here.clock

    async def silent(self, seconds: float = NODE_TIMEOUT) -> None:
        """Time passes in which only `away` gives signs of life."""
        self.here.clock.forward(seconds)
        await self.away.renew()


@pytest_asyncio.fixture(params=["memory", "redis"])
async def team(request: pytest.FixtureRequest) -> AsyncIterator[Team]:
    """Two machines on one store; the invariants must hold in the end."""
    home: SharedHome = MemoryHome()
    if request.param == "redis":
        home = RedisHome(request.getfixturevalue("redis_server").url, lease=FOREVER)
    made = Team(home, StoreRules(node_timeout=microseconds(NODE_TIMEOUT)))
    await made.here.open()
    await made.away.open()
    yield made
    await check(made.here.store, made.here.pruned)
    await made.away.store.close()
    await made.here.store.close()


# -- while the machine is there ----------------------------------------------------------------------------------------


async def test_a_turn_of_a_bound_conversation_runs_on_its_machine_alone(team: Team) -> None:
    await team.here.turn("a")
    await team.away.wait("b")
    assert await team.away.takes() == []
    assert await team.here.takes() == ["b"]


async def test_a_bound_turn_runs_at_once_on_its_machine(team: Team) -> None:
    await team.here.turn("a")
    claim = await team.here.begin("b")
    assert claim.provider == "claude"


async def test_a_provider_session_without_a_machine_binds_none(team: Team) -> None:
    await team.here.answer(await team.here.begin("a"), node=None)
    assert (await team.away.begin("b")).request_id == "b"


async def test_an_answer_without_a_provider_session_binds_none(team: Team) -> None:
    await team.here.answer(await team.here.begin("a"), provider_session=None)
    assert (await team.away.begin("b")).request_id == "b"


async def test_a_session_that_is_another_conversation_s_binds_none(team: Team) -> None:
    await team.here.turn("a", "one")
    await team.here.answer(await team.here.begin("b", "two"), provider_session="one at here")
    assert (await team.away.begin("c", "two")).request_id == "c"


@pytest.mark.parametrize("route", ["claude,team", "team,~claude", "team,claude=claude/haiku", "~claude=x,team"])
async def test_a_route_that_has_the_session_s_provider_at_all_is_bound(team: Team, route: str) -> None:
    await team.here.turn("a")
    await team.away.wait("b", route=route)
    assert await team.away.takes(Offer(route, "team", 9)) == [], "its fallback may be asked by its machine alone"
    assert await team.here.takes(Offer(route, "team", 9)) == ["b"]


@pytest.mark.parametrize("route", ["team", "claude-two", "team=claude,other"])
async def test_a_route_without_the_session_s_provider_runs_anywhere(team: Team, route: str) -> None:
    await team.here.turn("a")
    enqueued = await team.away.enqueue("b", "talk", [Offer(route, "team", 9)], route=route)
    assert enqueued.claim is not None


async def test_a_turn_at_a_provider_without_machines_unbinds_the_conversation(team: Team) -> None:
    await team.here.turn("a")
    claim = await team.away.begin("b", route="team")
    await team.away.complete(claim, provider_session=None)
    assert (await team.away.begin("c")).provider == "claude"


async def test_a_fork_of_a_bound_conversation_is_bound_like_it(team: Team) -> None:
    await team.here.turn("a")
    await team.away.wait("b", "branch", fork_of="talk")
    assert await team.away.takes() == []
    assert await team.here.takes() == ["b"]
    assert (await team.away.look("branch")).node == "here"


async def test_a_machine_takes_its_own_and_everybody_s_in_one_order(team: Team) -> None:
    await team.here.turn("a")
    team.here.clock.forward(1)
    await team.away.enqueue("free", "other", route="claude")
    team.here.clock.forward(1)
    await team.away.wait("own")
    team.here.clock.forward(1)
    await team.away.enqueue("urgent", "third", route="claude", priority=Priority.CRITICAL)
    assert await team.here.takes(limit=1) == ["urgent"]
    assert await team.here.takes(limit=1) == ["free"]
    assert await team.here.takes(limit=1) == ["own"]


async def test_one_machine_s_backlog_is_before_none_elsewhere(team: Team) -> None:
    for number in range(5):
        await team.here.turn(f"a{number}", f"talk {number}")
    for number in range(5):
        await team.away.wait(f"b{number}", f"talk {number}", priority=Priority.CRITICAL)
    claim = await team.away.begin("c", "other")
    assert claim.request_id == "c", "it runs at once: what waits for the other machine is not before it"


async def test_its_own_bound_backlog_stands_before_a_newcomer_on_its_machine(team: Team) -> None:
    await team.here.turn("a")
    await team.away.wait("b", priority=Priority.CRITICAL)
    enqueued = await team.here.enqueue("c", "other", [CLAUDE], route="claude")
    assert enqueued.claim is None
    assert await team.here.takes() == ["b", "c"]


async def test_a_bound_request_that_was_not_started_in_time_is_passed_over(team: Team) -> None:
    await team.here.turn("a")
    await team.here.turn("b", "other")
    await team.away.wait("late", expires=team.here.clock.wall + microseconds(1))
    await team.away.wait("good", "other")
    team.here.clock.forward(2)
    assert await team.here.takes() == ["good"]
    assert [ended.request_id for ended in (await team.away.expire()).ended] == ["late"]


async def test_a_requeued_or_retried_request_and_those_behind_it_wait_for_their_machine(team: Team) -> None:
    await team.here.turn("a")
    await team.here.give_back(await team.here.begin("b"))
    await team.away.wait("c")
    assert await team.away.takes() == []
    (again,) = await team.here.claim(CLAUDE)
    await team.here.retry(again, after=5)
    team.here.clock.forward(5)
    await team.away.expire()
    assert await team.away.takes() == []
    (again,) = await team.here.claim(CLAUDE)
    await team.here.answer(again)
    assert await team.away.takes() == []
    assert await team.here.takes() == ["c"]


async def test_a_delayed_turn_waits_for_its_machine_when_it_is_due(team: Team) -> None:
    await team.here.turn("a")
    await team.away.wait("b", due=team.here.clock.wall + microseconds(5))
    team.here.clock.forward(5)
    assert (await team.away.expire()).woken == 1
    assert await team.away.takes() == []
    assert await team.here.takes() == ["b"]


async def test_an_interruption_from_elsewhere_is_done_on_the_conversation_s_machine(team: Team) -> None:
    await team.here.turn("a")
    running = await team.here.begin("b")
    await team.away.wait("c", on_busy=OnBusy.INTERRUPT)
    await team.here.give_back(running)
    assert await team.away.takes() == []
    assert await team.here.takes() == ["c"]


async def test_cancelled_and_bound_it_leaves_nothing_behind(team: Team) -> None:
    await team.here.turn("a")
    await team.away.wait("b")
    await team.away.cancel("b")
    assert (await team.here.store.waiting_by_route())["claude"] == 0
    assert await team.here.takes() == []


async def test_a_client_gets_the_machine_that_its_request_waits_for(team: Team) -> None:
    await team.here.turn("a")
    await team.away.wait("b")
    await team.away.wait("behind")
    await team.away.enqueue("free", "other", route="claude")
    assert [(await team.away.view(name)).node for name in ("b", "behind", "free")] == ["here", None, None]
    session = await team.away.store.session("talk")
    assert session is not None
    assert (session.node, session.provider_session) == ("here", "talk at here")
    assert (await team.away.look()).node == "here"
    (claim,) = await team.here.claim(CLAUDE, limit=1)
    assert (await team.away.view(claim.request_id)).node is None, "it runs: nobody waits"


async def test_requests_that_wait_for_a_machine_are_listed_and_counted_like_all(team: Team) -> None:
    await team.here.turn("a", "one")
    await team.away.turn("b", "two")
    await team.away.wait("here's", "one")
    await team.here.wait("away's", "two")
    await team.here.enqueue("anybody's", "three", route="claude")
    await team.here.enqueue("team's", "four", route="team")
    pages = items(lambda cursor: team.here.store.requests(Listing.READY, 1, cursor))
    assert [row.request_id async for row in pages] == ["anybody's", "away's", "here's", "team's"]
    waiting = await team.here.store.waiting_by_route()
    assert (waiting["claude"], waiting["team"]) == (3, 1)
    assert all("\n" not in route for route in waiting)


async def test_a_turn_says_on_which_machine_its_session_lives(team: Team) -> None:
    settled = await team.here.turn("a")
    assert settled.turn is not None
    (turn,) = await team.away.store.history(settled.turn, 0)
    assert (turn.node, turn.provider_session) == ("here", "talk at here")
    assert (await team.away.view("a")).attempts[0].node == "here"


# -- when it is gone ---------------------------------------------------------------------------------------------------


async def test_a_silent_machine_s_turn_goes_on_elsewhere_as_a_fork(team: Team) -> None:
    await team.here.turn("a")
    await team.away.wait("b")
    calls = team.away.calls
    await team.silent()
    assert team.away.calls > calls, "somebody is told that there is work"
    (claim,) = await team.away.claim(CLAUDE)
    settled = await team.away.answer(claim, fork="node_lost")
    assert settled.fork is not None
    fork = settled.fork
    assert (fork.kind, fork.parent, fork.child, fork.request_id) == ("node_lost", "talk at here", "talk at away", "b")
    assert fork.at == team.here.clock.wall
    assert (await team.away.store.forks(10, None, "talk")).items == (fork,)
    await team.here.renew()
    await team.here.wait("c")
    assert await team.here.takes() == [], "the machine that comes back is not the conversation's any more"
    assert await team.away.takes() == ["c"]


async def test_a_machine_that_is_not_silent_long_enough_keeps_its_requests(team: Team) -> None:
    await team.here.turn("a")
    await team.away.wait("b")
    await team.silent(NODE_TIMEOUT - 1)
    assert await team.away.takes() == []
    await team.here.renew()
    await team.silent(NODE_TIMEOUT - 1)
    assert await team.away.takes() == []
    assert await team.here.takes() == ["b"]


async def test_a_new_turn_for_a_lost_machine_runs_at_once(team: Team) -> None:
    await team.here.turn("a")
    await team.silent()
    claim = await team.away.begin("b")
    assert claim.head is not None
    assert (await team.away.view("b")).node is None


async def test_a_request_that_arrives_for_a_lost_machine_does_not_wait(team: Team) -> None:
    await team.here.turn("a")
    await team.silent()
    await team.away.enqueue("b", route="claude")
    assert (await team.away.view("b")).node is None
    assert await team.away.takes() == ["b"]


async def test_a_lost_machine_that_comes_back_has_its_other_conversations_again(team: Team) -> None:
    await team.here.turn("a", "one")
    await team.here.turn("b", "two")
    await team.away.wait("let go", "one")
    await team.silent()
    await team.here.renew()
    await team.away.wait("bound", "two")
    assert await team.away.takes() == ["let go"]
    assert await team.here.takes() == ["bound"]


async def test_a_lost_machine_that_comes_back_may_take_released_requests(team: Team) -> None:
    await team.here.turn("a")
    await team.away.wait("b")
    await team.silent()
    await team.here.renew()
    assert await team.here.takes() == ["b"]


async def test_a_long_backlog_of_a_lost_machine_is_released_completely(team: Team) -> None:
    for number in range(250):
        await team.here.turn(f"a{number}", f"talk {number}")
    for number in range(250):
        await team.away.enqueue(f"b{number}", f"talk {number}", route="claude")
    await team.silent()
    assert len(await team.away.takes(Offer("claude", "claude", 999), limit=999)) == 250
    assert (await team.away.store.waiting_by_route())["claude"] == 0


async def test_a_machine_that_was_never_seen_binds_none(team: Team) -> None:
    await team.here.answer(await team.here.begin("a"), node="elsewhere")
    assert (await team.away.begin("b")).request_id == "b"


async def test_a_snapshot_brings_bindings_along_and_gives_their_machines_time(
    team: Team, request: pytest.FixtureRequest
) -> None:
    await team.here.turn("a")
    await team.away.wait("b")
    await team.away.store.close()
    async with aclosing(team.here.store.export(team.here.clock.now())) as pieces:
        records = [record async for piece in pieces for record in piece]
    home: SharedHome = MemoryHome("new")
    if isinstance(team.here.home, RedisHome):
        home = RedisHome(request.getfixturevalue("redis_server").url, node="new", lease=FOREVER)
    new = Machine(home, team.here.rules)
    new.clock = team.here.clock
    await new.open()
    await new.store.load(records, new.clock.now())
    assert (await new.view("b")).node == "here"
    assert await new.takes() == []
    async with aclosing(new.store.export(new.clock.now())) as pieces:
        again = [record async for piece in pieces for record in piece]
    assert [msgspec.json.encode(record) for record in again][1:] == [msgspec.json.encode(r) for r in records][1:]
    new.clock.forward(NODE_TIMEOUT)
    await new.renew()
    assert await new.takes() == ["b"]
    assert (await new.store.waiting_by_route())["claude"] == 0
    await new.store.close()
    await team.away.open()


# -- how many at once --------------------------------------------------------------------------------------------------


async def test_processes_are_limited_on_each_machine_and_calls_over_all(team: Team) -> None:
    process, call = Offer("claude", "claude", 1, by_node=True), Offer("team", "team", 1)
    for number in range(3):
        await team.here.enqueue(f"p{number}", f"process {number}", route="claude")
        await team.here.enqueue(f"c{number}", f"call {number}", route="team")
    here = await team.here.takes(process, call)
    assert sorted(here) == ["c0", "p0"]
    away = await team.away.takes(process, call)
    assert away == ["p1"], "a process here takes no slot there; a call takes the only one of all"
