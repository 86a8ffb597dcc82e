"""A machine that drives the reference and the SQLite store with the same steps and compares every answer."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ksi.clock import microseconds
from ksi.request import Attempt, OnBusy, Outcome, Priority, State, Usage
from ksi.store.questions import Question, QuestionKind
from ksi.store.values import (
    NO_PAUSE,
    Acquired,
    Enqueued,
    Finish,
    GiveBack,
    Offer,
    Paused,
    Retry,
    StoreRules,
    Verdict,
)
from tests.conformance.world import Home, RedisHome, SqliteHome, World
from tests.effort import effort
from tests.redis_server import RedisServer
from tests.stateful.pair import Pair, Twins

CONVERSATIONS = ["talk 0", "talk 1", "talk 2", "talk 3"]
SESSIONS = ["s1", "s2", "s3"]
"""Provider sessions; a request may name one as its conversation, and then it is one."""
LOCKS = [f"l{n}" for n in range(4)]
ROUTES = ["one,two", "two"]

SHORT = StoreRules(
    max_queued=9,
    lock_expiry=microseconds(20),
    keep_finished=microseconds(60),
    keep_sessions=microseconds(120),
    position_limit=2,
    node_timeout=microseconds(30),
)
FOREVER = 10**15
"""A lease that no test outlives: here machines are silent, no daemons die."""
RULES = [SHORT, StoreRules(max_interruptions=2), StoreRules(fail_interrupted=True, lock_expiry=microseconds(20))]

conversations = st.sampled_from([*CONVERSATIONS, *CONVERSATIONS, *CONVERSATIONS, *SESSIONS])
priorities = st.sampled_from([Priority.NORMAL, *Priority])
places = st.integers(0, 50)
locks = st.sampled_from(LOCKS)
offers = st.lists(
    st.builds(
        lambda route, provider, limit: Offer(route, provider, limit, provider == "one"),
        st.sampled_from(ROUTES),
        st.sampled_from(["one", "two"]),
        st.sampled_from([0, 1, 2, 9]),
    ),
    max_size=3,
)
"""`one` runs as processes, so that each machine has its own slots there."""
PLENTY = [Offer("one,two", "one", 9, by_node=True), Offer("two", "two", 9)]
plenty = st.just(PLENTY)
offered = plenty | plenty | offers
seldom = st.sampled_from([None, None, None, None, None, None, "talk 0", "s1", "nobody"])

usages = st.sampled_from([None, Usage(), Usage(input_tokens=3, output_tokens=2, cost_usd=0.5)])
texts = st.sampled_from([None, "", "short", "long " * 30])


@st.composite
def wishes(draw: st.DrawFn) -> dict[str, Any]:
    """What varies between requests; times in seconds from now."""
    return {
        "route": draw(st.sampled_from(ROUTES)),
        "priority": draw(priorities),
        "due": draw(st.sampled_from([None, None, None, None, None, -1.0, 5.0, 60.0])),
        "expires": draw(st.sampled_from([None, None, None, None, 0.0, 4.0, 30.0])),
        "on_busy": draw(st.sampled_from([OnBusy.ENQUEUE, OnBusy.ENQUEUE, OnBusy.ENQUEUE, *OnBusy])),
        "hold_on_retry": draw(st.booleans()),
        "agent_id": draw(st.sampled_from([None, "ann", "bob"])),
        "fork_of": draw(seldom),
    }


Batch = list[tuple[str, dict[str, Any]]]
batches = st.lists(st.tuples(conversations, wishes()), min_size=1, max_size=4)


class Ending(msgspec.Struct, frozen=True):
    """How a run ends; a retry's time is counted from then."""

    verdict: Verdict
    outcome: Outcome
    fields: dict[str, Any]


@st.composite
def endings(draw: st.DrawFn) -> Ending:
    """Any end of a run, an answer more often than another."""
    fields: dict[str, Any] = {"usage": draw(usages), "text": draw(texts)}
    match draw(
        st.sampled_from(["answer", "answer", "answer", "fault", "cancel", "retry", "retry", "park", "give back"])
    ):
        case "answer":
            fields["provider_session"] = draw(st.sampled_from([None, *SESSIONS]))
            fields["last_message"] = draw(st.sampled_from([None, "m1"]))
            fields["fork"] = draw(st.sampled_from([None, None, None, "new_session", "foreign_turn", "node_lost"]))
            fields["node"] = draw(st.sampled_from([None, "here", "here", "away"]))
            return Ending(Finish(state=State.COMPLETED), Outcome.COMPLETED, fields)
        case "fault":
            return Ending(Finish(state=State.FAILED, error="timeout", message="slow"), Outcome.FAILED, fields)
        case "cancel":
            return Ending(Finish(state=State.CANCELLED, error="cancelled"), Outcome.CANCELLED, fields)
        case "give back":
            return Ending(GiveBack(), Outcome.SHUTDOWN, fields)
        case wait:
            fields["error"] = "overloaded"
            verdict = Retry(
                at=microseconds(draw(st.sampled_from([-1.0, 0.0, 3.0, 40.0]))),
                route=draw(st.sampled_from([None, None, *ROUTES])),
                parked=wait == "park",
                error="overloaded",
                message="busy",
            )
            return Ending(verdict, Outcome.FAILED, fields)


class StoresAgree(RuleBasedStateMachine):
    """Both stores, and every step that a daemon could take."""

    shared = False
    """Whether several machines can have the store."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.pair: Pair | None = None
        self.names: list[str] = []
        self.paused = NO_PAUSE

    @property
    def both(self) -> Pair:
        assert self.pair is not None
        return self.pair

    def other(self) -> Home:
        """Where the store that is compared with the reference keeps its data."""
        return SqliteHome(Path(self.folder.name), "normal")

    @initialize(rules=st.sampled_from(RULES))
    def begin(self, rules: StoreRules) -> None:
        self.pair = Pair(rules, self.other(), shared=self.shared)

    def teardown(self) -> None:
        if self.pair is not None:
            self.pair.close()
        self.folder.cleanup()

    # -- requests -----------------------------------------------------------------------------------------------------

    @rule(batch=batches, offers=offered)
    def enqueue(self, batch: Batch, offers: Sequence[Offer]) -> None:
        for conversation, wish in batch:
            name = f"r{len(self.names)}"
            self.names.append(name)
            self._enqueue(name, conversation, wish, offers)

    @rule(batch=batches, ends=st.lists(endings(), max_size=4), seconds=st.sampled_from([0.0, 1.0, 5.0]))
    def enqueue_and_work(self, batch: Batch, ends: list[Ending], seconds: float) -> None:
        self.enqueue(batch, [])
        self.work(ends, seconds)

    @precondition(lambda self: self.names)
    @rule(
        place=places, lock=st.none() | st.none() | locks, conversation=conversations, wish=wishes(), other=st.booleans()
    )
    def enqueue_again(self, place: int, lock: str | None, conversation: str, wish: dict[str, Any], other: bool) -> None:
        body = {"body": b"{}"} if other else {}
        self._enqueue(lock or self._name(place), conversation, wish | body, [])

    def _enqueue(
        self, name: str, conversation: str, wish: dict[str, Any], offers: Sequence[Offer], *, away: bool = False
    ) -> None:
        fields = dict(wish)
        for field in ("due", "expires"):
            if fields[field] is not None:
                fields[field] = self.both.clock.wall + microseconds(fields[field])
        paused = self.paused

        def enqueue(world: World) -> Awaitable[Enqueued]:
            new = world.new(name, conversation, **fields)
            return world.store.enqueue(new, offers, world.clock.now(), paused=paused)

        self.both.do(enqueue, away=away)

    def _name(self, place: int) -> str:
        """A request that was enqueued once, a late one rather than an early one."""
        return self.names[-1 - place % len(self.names)]

    @rule(offers=offered, limit=st.sampled_from([0, 1, 2, 50]))
    def claim(self, offers: Sequence[Offer], limit: int) -> None:
        paused = self.paused
        self.both.do(lambda world: world.store.claim(offers, limit, world.clock.now(), paused))

    @rule(
        agents=st.sets(st.sampled_from(["ann", "bob"])),
        conversations=st.sets(st.sampled_from([*CONVERSATIONS[:2], "nobody"])),
        priorities=st.sets(priorities, max_size=2),
        claimed=st.booleans(),
    )
    def pause(self, agents: set[str], conversations: set[str], priorities: set[Priority], claimed: bool) -> None:
        """More is paused than before. Which of it a claim sets aside is the store's affair: `resume` brings it back."""
        before = self.paused
        self.paused = Paused(
            before.agents | agents, before.conversations | conversations, before.priorities | priorities
        )
        self.both.set_aside = True
        if claimed:
            self.claim(PLENTY, 50)

    @rule(all_of_it=st.booleans(), limit=st.sampled_from([1, 2, 500]), away=st.booleans())
    def resume(self, all_of_it: bool, limit: int, away: bool) -> None:
        """What is not paused any more is brought back, in steps."""
        if all_of_it:
            self.paused = NO_PAUSE
        paused = self.paused

        async def bring_back(world: World) -> None:
            after = await world.store.bring_back(paused, world.clock.now(), None, limit)
            while after is not None:
                after = await world.store.bring_back(paused, world.clock.now(), after, limit)

        self.both.do(bring_back, away=away and self.shared)

    @rule(ends=st.lists(endings(), max_size=6), seconds=st.sampled_from([0.0, 1.0, 5.0, 60.0]))
    def work(self, ends: list[Ending], seconds: float) -> None:
        """Some time later: claim what can run, and end some of all that runs."""
        self.time_passes(seconds, told=True)
        self.claim(PLENTY, 50)
        for ending in ends:
            if self.both.running:
                self.end_a_run(0, ending)

    @precondition(lambda self: self.pair is not None and self.pair.running)
    @rule(place=places, ending=endings())
    def end_a_run(self, place: int, ending: Ending) -> None:
        claims = self.both.running.pop(place % len(self.both.running))
        self._settle(claims, ending)

    @precondition(lambda self: self.pair is not None and self.pair.claims)
    @rule(place=places, ending=endings())
    def end_any_run_whatever_became_of_it(self, place: int, ending: Ending) -> None:
        claims = self.both.claims[place % len(self.both.claims)]
        if claims in self.both.running:
            self.both.running.remove(claims)
        self._settle(claims, ending)

    def _settle(self, claims: Twins, ending: Ending, *, away: bool = False) -> None:
        verdict = ending.verdict
        if isinstance(verdict, Retry):
            verdict = msgspec.structs.replace(verdict, at=self.both.clock.wall + verdict.at)
        attempt = Attempt(
            number=claims.of[0].attempt,
            provider=claims.of[0].provider,
            outcome=ending.outcome,
            started_at=claims.of[0].started_at,
            finished_at=self.both.clock.wall,
            **ending.fields,
        )
        self.both.settle(claims, attempt, verdict, away=away)

    @precondition(lambda self: self.names)
    @rule(place=places, lock=st.none() | st.none() | locks, by=st.sampled_from([None, "r0"]))
    def cancel(self, place: int, lock: str | None, by: str | None) -> None:
        name = lock or self._name(place)
        self.both.do(lambda world: world.cancel(name, by))

    # -- questions ----------------------------------------------------------------------------------------------------

    @rule(conversation=conversations, wish=wishes(), timed=st.booleans(), offers=offered)
    def hold(self, conversation: str, wish: dict[str, Any], timed: bool, offers: Sequence[Offer]) -> None:
        """A request comes that waits for a person's answer."""
        expires = self.both.clock.wall + microseconds(30) if timed else None
        asked = Question(
            kind=QuestionKind.APPROVAL, asked_at=self.both.clock.wall, text=f"may {conversation}?", expires=expires
        )
        name = f"r{len(self.names)}"
        self.names.append(name)
        self._enqueue(name, conversation, wish | {"question": asked, "fork_of": None}, offers)

    @precondition(lambda self: self.pair is not None and self.pair.running)
    @rule(place=places, seconds=st.sampled_from([5.0, 60.0]))
    def ask_in_a_run(self, place: int, seconds: float) -> None:
        """A run ends, and its request waits for a person's answer."""
        claims = self.both.running.pop(place % len(self.both.running))
        asked = Question(kind=QuestionKind.PERMISSION, asked_at=self.both.clock.wall, text="may it?", tool="Bash")
        verdict = Retry(at=microseconds(seconds), parked=True, question=asked)
        self._settle(claims, Ending(verdict, Outcome.PARKED, {}))

    @precondition(lambda self: self.names)
    @rule(place=places, yes=st.booleans(), later=st.booleans(), other=st.booleans())
    def answer(self, place: int, yes: bool, later: bool, other: bool) -> None:
        """A person answers what a request asks, or what it asked before, or what it never asked."""
        name = self._name(place)
        view = self.both.views.get(name)
        asked = view.question if view is not None else None
        if asked is None or other:
            asked = Question(kind=QuestionKind.HOLD, asked_at=0, text="what nobody asked")
        told = msgspec.structs.replace(asked, answer="yes" if yes else "no", by="ada")
        due = self.both.clock.wall + microseconds(20) if later else None
        end = None if yes else Finish(state=State.CANCELLED, error="rejected", message="ada said no")
        self.both.do(
            lambda world: world.store.answer(name, asked, told, world.clock.now(), end=end, due=due, expires=due)
        )

    # -- locks --------------------------------------------------------------------------------------------------------

    @rule(
        name=locks,
        conversation=st.sampled_from([*CONVERSATIONS[:2], *CONVERSATIONS[:2], "s1", "s2"]),
        priority=priorities,
        wait=st.sampled_from([True, True, True, False]),
        timeout=st.sampled_from([None, 0.0, 5.0, 30.0]),
        metadata=st.sampled_from([None, b"{}"]),
    )
    def acquire(
        self,
        name: str,
        conversation: str,
        priority: Priority,
        wait: bool,
        timeout: float | None,
        metadata: bytes | None,
    ) -> None:
        def wish(world: World) -> Awaitable[Acquired]:
            return world.acquire(name, conversation, priority=priority, wait=wait, timeout=timeout, metadata=metadata)

        self.both.do(wish)

    @precondition(lambda self: self.pair is not None and self.pair.grants)
    @rule(
        place=places,
        fence=st.sampled_from([None, "right", "right", "wrong"]),
        what=st.sampled_from(["renew", "release", "release", "withdraw"]),
    )
    def use_a_lock(self, place: int, fence: str | None, what: str) -> None:
        """Of the outside holders that there were one does something; some of them hold nothing any more."""
        names = list(self.both.grants)
        name = names[place % len(names)]
        number = None if fence is None else self.both.grants[name] + (fence == "wrong")
        self._use(name, what, number)

    @rule(place=places, lock=locks, what=st.sampled_from(["acquire", "renew", "release", "withdraw", "withdraw"]))
    def take_anything_for_a_lock(self, place: int, lock: str, what: str) -> None:
        self._use(self._name(place) if self.names and place else lock, what, None)

    def _use(self, name: str, what: str, fence: int | None) -> None:
        match what:
            case "acquire":
                self.both.do(lambda world: world.acquire(name, "talk 2"))
            case "renew":
                self.both.do(lambda world: world.renew_lock(name, fence))
            case "release":
                self.both.do(lambda world: world.release(name, fence))
            case _:
                self.both.do(lambda world: world.withdraw(name))

    # -- owners' hands ------------------------------------------------------------------------------------------------

    @rule(conversation=conversations, name=conversations, how=st.sampled_from(["rename", "delete", "delete"]))
    def own(self, conversation: str, name: str, how: str) -> None:
        if how == "rename":
            before = self.both.do(lambda world: world.store.rename(conversation, name, world.clock.now()))
            for request_id, view in self.both.views.items():
                if view.conversation == before:
                    self.both.views[request_id] = msgspec.structs.replace(view, conversation=name)
        elif self.both.do(lambda world: world.store.delete(conversation, world.clock.now())) is not None:
            for world in self.both.worlds:
                world.pruned = True

    # -- time and upkeep ----------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.000_001, 1.0, 5.0, 20.0, 60.0, 120.0]), told=st.sampled_from([True, True, False]))
    def time_passes(self, seconds: float, told: bool) -> None:
        self.both.clock.forward(seconds)
        if told:
            self.both.do(lambda world: world.expire())

    @rule(
        how=st.sampled_from(["prune", "steps", "wall", "crash", "prune", "steps", "reboot", "restart", "prune"]),
        place=places,
    )
    def upkeep(self, how: str, place: int) -> None:
        match how:
            case "steps":
                self._expire_in_steps(1 + place % 2)
            case "wall":
                self.both.clock.step_wall([-100.0, -3.0, 3.0, 100.0][place % 4])
            case "prune":
                self.both.set_watermark(place if place % 2 else None)
                self.both.clock.forward([0.0, 60.0, 200.0, 200.0][place % 4])
                if self.shared:
                    # Of a daemon that is not heard of any more, nothing waits for its log.
                    self.both.do(lambda world: world.renew(), away=True)
                self.both.do(lambda world: world.prune())
            case _:
                self._begin_again(how)

    def _expire_in_steps(self, limit: int) -> None:
        more = True
        while more:
            more = self.both.do(lambda world: world.expire(limit)).more

    def _begin_again(self, how: str) -> None:
        self.both.running.clear()
        if how == "reboot":
            self.both.clock.mono = microseconds(7)
        self.both.do(lambda world: world.restart() if how == "restart" else world.crash())

    # -- after every step ---------------------------------------------------------------------------------------------

    @invariant()
    def all_is_alike(self) -> None:
        if self.pair is not None:
            self.pair.compare_all(self.names, [*CONVERSATIONS, *SESSIONS])
            self.pair.check()


class RedisAgrees(StoresAgree):
    """The same with the store on a server, and a second machine that gives signs of life, or none for a while."""

    shared = True

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url

    def other(self) -> Home:
        return RedisHome(self._url, lease=FOREVER)

    @rule(away=st.booleans(), seconds=st.sampled_from([0.0, 10.0, 60.0]))
    def give_a_sign_of_life(self, away: bool, seconds: float) -> None:
        self.both.clock.forward(seconds)
        self.both.do(lambda world: world.renew(), away=away)

    @rule(offers=offered, ends=st.lists(endings(), min_size=1, max_size=4))
    def work_on_the_other_machine(self, offers: Sequence[Offer], ends: list[Ending]) -> None:
        """What it claims ends at once: no run of its is there when a daemon here begins again."""
        before = len(self.both.running)
        paused = self.paused
        self.both.do(lambda world: world.store.claim(offers, len(ends), world.clock.now(), paused), away=True)
        begun = self.both.running[before:]
        del self.both.running[before:]
        for claims, ending in zip(begun, ends, strict=False):
            self._settle(claims, ending, away=True)

    @rule(batch=batches, offers=offered, ending=endings())
    def enqueue_on_the_other_machine(self, batch: Batch, offers: Sequence[Offer], ending: Ending) -> None:
        for conversation, wish in batch:
            self.names.append(f"r{len(self.names)}")
            before = len(self.both.running)
            self._enqueue(self.names[-1], conversation, wish, offers, away=True)
            for claims in self.both.running[before:]:
                self._settle(claims, ending, away=True)
            del self.both.running[before:]


TestStoresAgree = StoresAgree.TestCase
TestStoresAgree.settings = settings(
    max_examples=effort(40, 400),
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
)
TestStoresAgree = pytest.mark.timeout(600)(
    pytest.mark.promise("Q3", "Q8", "L1", "L2", "L8", "F8", "F10")(TestStoresAgree)
)


@pytest.mark.timeout(600)
@pytest.mark.promise("D1", "Q3", "Q8", "L1", "L2", "L8", "F8", "F10")
def test_the_store_on_a_server_agrees(redis_server: RedisServer) -> None:
    class Machine(RedisAgrees):
        def __init__(self) -> None:
            super().__init__(redis_server.url)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=effort(20, 200),
            stateful_step_count=40,
            deadline=None,
            print_blob=True,
        ),
    )
