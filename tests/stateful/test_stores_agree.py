"""A machine that drives the reference and the SQLite store with the same steps and compares every answer."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ksi.clock import microseconds
from ksi.request import Attempt, OnBusy, Outcome, Priority, State, Usage
from ksi.store.base import Finish, GiveBack, Offer, Retry, StoreRules, Verdict
from tests.stateful.pair import Pair

CONVERSATIONS = ["talk 0", "talk 1", "talk 2", "talk 3"]
REQUESTS = [f"r{n}" for n in range(14)]
LOCKS = [f"l{n}" for n in range(4)]
ROUTES = ["x", "y"]

SHORT = StoreRules(
    max_queued=5,
    lock_expiry=microseconds(20),
    keep_finished=microseconds(60),
    keep_sessions=microseconds(120),
    position_limit=2,
)
RULES = [SHORT, StoreRules(max_interruptions=2), StoreRules(fail_interrupted=True, lock_expiry=microseconds(20))]

conversations = st.sampled_from(CONVERSATIONS)
requests = st.sampled_from(REQUESTS)
anybody = st.sampled_from(REQUESTS + LOCKS + ["nobody"])
priorities = st.sampled_from([Priority.NORMAL, *Priority])
places = st.integers(0, 50)
offers = st.lists(
    st.builds(Offer, st.sampled_from(ROUTES), st.sampled_from(["one", "two"]), st.sampled_from([0, 1, 2, 9])),
    max_size=3,
)
plenty = st.just([Offer("x", "one", 9), Offer("y", "two", 9)])
offered = plenty | offers
seldom = st.sampled_from([None, None, None, None, "talk 0", "talk 1", "nobody"])


@st.composite
def wishes(draw: st.DrawFn) -> dict[str, Any]:
    """What varies between requests; times in seconds from now."""
    return {
        "route": draw(st.sampled_from(ROUTES)),
        "priority": draw(priorities),
        "due": draw(st.sampled_from([None, None, None, None, -1.0, 5.0, 60.0])),
        "expires": draw(st.sampled_from([None, None, None, 0.0, 4.0, 30.0])),
        "on_busy": draw(st.sampled_from([OnBusy.ENQUEUE, OnBusy.ENQUEUE, *OnBusy])),
        "hold_on_retry": draw(st.booleans()),
        "agent_id": draw(st.sampled_from([None, "ann", "bob"])),
        "fork_of": draw(seldom),
    }


class StoresAgree(RuleBasedStateMachine):
    """Both stores, and every step that a daemon could take."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.pair: Pair | None = None

    @property
    def both(self) -> Pair:
        assert self.pair is not None
        return self.pair

    @initialize(rules=st.sampled_from(RULES))
    def begin(self, rules: StoreRules) -> None:
        self.pair = Pair(Path(self.folder.name), rules)

    def teardown(self) -> None:
        if self.pair is not None:
            self.pair.close()
        self.folder.cleanup()

    # -- requests -----------------------------------------------------------------------------------------------------

    @rule(name=requests, conversation=conversations, wish=wishes(), offers=offered, other=st.integers(0, 9))
    def enqueue(self, name: str, conversation: str, wish: dict[str, Any], offers: Sequence[Offer], other: int) -> None:
        fields = dict(wish)
        for field in ("due", "expires"):
            if fields[field] is not None:
                fields[field] = self.both.clock.wall + microseconds(fields[field])
        if other == 0:
            fields["body"] = b"{}"
        self.both.do(lambda world: world.enqueue(name, conversation, offers, **fields))

    @rule(offers=offered, limit=st.sampled_from([0, 1, 2, 50]))
    def claim(self, offers: Sequence[Offer], limit: int) -> None:
        self.both.do(lambda world: world.store.claim(offers, limit, world.clock.now()))

    @precondition(lambda self: self.pair is not None and self.pair.claims)
    @rule(
        place=places,
        ending=st.sampled_from(
            ["completed", "completed", "failed", "cancelled", "retry", "retry", "park", "give back"]
        ),
        after=st.sampled_from([-1.0, 0.0, 3.0, 40.0]),
        route=st.sampled_from([None, None, "x", "y"]),
        usage=st.sampled_from([None, Usage(), Usage(input_tokens=3, output_tokens=2, cost_usd=0.5)]),
        text=st.sampled_from([None, "", "short", "long " * 30]),
        session=st.sampled_from([None, "s1", "s2"]),
    )
    def settle(
        self,
        place: int,
        ending: str,
        after: float,
        route: str | None,
        usage: Usage | None,
        text: str | None,
        session: str | None,
    ) -> None:
        claims = self.both.claims[-1 - place % len(self.both.claims)]
        at = self.both.clock.wall + microseconds(after)
        verdicts: dict[str, tuple[Verdict, Outcome]] = {
            "completed": (Finish(state=State.COMPLETED), Outcome.COMPLETED),
            "failed": (Finish(state=State.FAILED, error="timeout", message="slow"), Outcome.FAILED),
            "cancelled": (Finish(state=State.CANCELLED, error="cancelled"), Outcome.CANCELLED),
            "retry": (Retry(at=at, route=route, error="overloaded", message="busy"), Outcome.FAILED),
            "park": (Retry(at=at, route=route, parked=True), Outcome.FAILED),
            "give back": (GiveBack(), Outcome.SHUTDOWN),
        }
        verdict, outcome = verdicts[ending]
        attempt = Attempt(
            number=claims.of[0].attempt,
            provider=claims.of[0].provider,
            outcome=outcome,
            started_at=claims.of[0].started_at,
            finished_at=self.both.clock.wall,
            text=text,
            usage=usage,
            provider_session=session,
            error=None if outcome is Outcome.COMPLETED else "timeout",
        )
        self.both.settle(claims, attempt, verdict)

    @rule(name=anybody, by=st.sampled_from([None, "r0"]))
    def cancel(self, name: str, by: str | None) -> None:
        self.both.do(lambda world: world.cancel(name, by))

    # -- locks --------------------------------------------------------------------------------------------------------

    @rule(
        name=st.sampled_from([*LOCKS, *LOCKS, *REQUESTS[:2]]),
        conversation=conversations,
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
        self.both.do(
            lambda world: world.acquire(
                name, conversation, priority=priority, wait=wait, timeout=timeout, metadata=metadata
            )
        )

    @rule(name=anybody, fence=st.sampled_from([None, None, 0, -1]), what=st.sampled_from(["renew", "release"]))
    def use_lock(self, name: str, fence: int | None, what: str) -> None:
        """`fence` -1 stands for the right one."""
        if fence == -1:
            locks = [self.both.do(lambda world, of=of: world.store.lock(of, 0)) for of in CONVERSATIONS]  # type: ignore[misc]
            fence = next((lock.fence for lock in locks if lock is not None and lock.holder == name), None)
        if what == "renew":
            self.both.do(lambda world: world.renew_lock(name, fence))
        else:
            self.both.do(lambda world: world.release(name, fence))

    @rule(name=anybody)
    def withdraw(self, name: str) -> None:
        self.both.do(lambda world: world.withdraw(name))

    # -- time and upkeep ----------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.000_001, 1.0, 5.0, 20.0, 60.0, 120.0]))
    def time_passes(self, seconds: float) -> None:
        self.both.clock.forward(seconds)

    @rule(seconds=st.sampled_from([-100.0, -3.0, 3.0, 100.0]))
    def wall_clock_steps(self, seconds: float) -> None:
        self.both.clock.step_wall(seconds)

    @rule()
    def expire(self) -> None:
        self.both.do(lambda world: world.expire())

    @rule(limit=st.integers(1, 2))
    def expire_in_small_steps(self, limit: int) -> None:
        more = True
        while more:
            more = self.both.do(lambda world: world.expire(limit)).more

    @rule()
    def prune(self) -> None:
        self.both.do(lambda world: world.prune())

    @rule(turns=places)
    def log_is_written(self, turns: int) -> None:
        self.both.set_watermark(turns)

    @rule(reboot=st.booleans())
    def crash(self, reboot: bool) -> None:
        if reboot:
            self.both.clock.mono = microseconds(7)
        self.both.do(lambda world: world.crash())

    @rule()
    def restart(self) -> None:
        self.both.do(lambda world: world.restart())

    # -- after every step ---------------------------------------------------------------------------------------------

    @invariant()
    def all_is_alike(self) -> None:
        if self.pair is not None:
            self.pair.compare_all(REQUESTS, CONVERSATIONS)
            self.pair.check()


TestStoresAgree = StoresAgree.TestCase
TestStoresAgree.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
TestStoresAgree = pytest.mark.timeout(600)(
    pytest.mark.promise("Q3", "Q8", "L1", "L2", "L8", "F8", "F10")(TestStoresAgree)
)
