"""One provider's circuit breaker: its steps, and a machine that compares it with a plainer one."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ksi.clock import microseconds
from ksi.completion.pool.breaker import BreakerState, Change, ProviderBreaker
from ksi.config.schema import BreakerConfig
from tests.effort import effort

CLOSED, OPEN, HALF_OPEN = BreakerState

SLOTS = 8
CONFIG = BreakerConfig(
    failures=3, rate=0.5, window=60.0, open_for=10.0, max_open_for=35.0, probes=1, probes_to_close=2, max_samples=20
)


def at(seconds: float) -> int:
    return microseconds(seconds)


class Watched:
    """A breaker and a clock by hand."""

    def __init__(self, config: BreakerConfig = CONFIG) -> None:
        self.breaker = ProviderBreaker(config)
        self.now = at(1_000)

    def fail(self, times: int = 1) -> Change | None:
        change = None
        for _ in range(times):
            change = self.breaker.failed(self.now, self.breaker.began(), "HTTP 500")
        return change

    def succeed(self, times: int = 1) -> Change | None:
        change = None
        for _ in range(times):
            change = self.breaker.succeeded(self.now, self.breaker.began())
        return change

    def later(self, seconds: float) -> Change | None:
        self.now += at(seconds)
        return self.breaker.tick(self.now)

    @property
    def limit(self) -> int:
        return self.breaker.limit(SLOTS)

    def half_open(self) -> Watched:
        self.fail(self.breaker._config.failures)
        self.later(CONFIG.open_for)
        assert self.breaker.state is HALF_OPEN
        return self


@pytest.mark.promise("F3")
def test_enough_failures_open_it_and_nothing_goes_out() -> None:
    watched = Watched()
    assert watched.fail(2) is None
    assert watched.limit == SLOTS
    change = watched.fail()
    assert change == Change(CLOSED, OPEN, "3 of 3 calls failed, the last: HTTP 500")
    assert watched.limit == 0
    assert watched.breaker.open_until == watched.now + at(10)


@pytest.mark.promise("F3")
def test_failures_among_many_successes_do_not_open_it() -> None:
    watched = Watched()
    watched.succeed(10)
    assert watched.fail(9) is None
    assert watched.fail() is not None, "ten of twenty are the rate"


@pytest.mark.promise("F3")
def test_failures_of_long_ago_count_no_more() -> None:
    watched = Watched()
    watched.fail(2)
    watched.later(60.000001)
    assert watched.fail(2) is None
    assert watched.fail() is not None


@pytest.mark.promise("F3")
def test_only_the_latest_samples_are_held() -> None:
    watched = Watched(msgspec.structs.replace(CONFIG, max_samples=4, failures=4))
    watched.fail(3)
    watched.succeed()
    assert watched.fail(3) is None
    assert watched.fail() is not None


@pytest.mark.promise("F3")
def test_after_its_time_alone_it_is_tried_with_as_many_probes_as_configured() -> None:
    watched = Watched(msgspec.structs.replace(CONFIG, probes=2))
    watched.fail(3)
    assert watched.later(9.999999) is None
    assert watched.limit == 0
    assert watched.later(0.000001) == Change(OPEN, HALF_OPEN, "its time alone is over")
    assert watched.limit == 2
    assert watched.breaker.limit(1) == 1
    assert watched.breaker.open_until is None


@pytest.mark.promise("F3")
def test_enough_probes_in_a_row_close_it_and_it_begins_with_a_clean_record() -> None:
    watched = Watched().half_open()
    assert watched.succeed() is None
    assert watched.succeed() == Change(HALF_OPEN, CLOSED, "2 probes in a row succeeded")
    assert watched.limit == SLOTS
    assert watched.fail(2) is None


@pytest.mark.promise("F3")
def test_a_failed_probe_opens_it_for_twice_as_long_up_to_the_longest() -> None:
    watched = Watched().half_open()
    alone = []
    for _ in range(4):
        watched.succeed()
        change = watched.fail()
        assert change is not None
        assert change.reason == "a probe failed: HTTP 500"
        until = watched.breaker.open_until
        assert until is not None
        alone.append((until - watched.now) / 1e6)
        watched.later(alone[-1])
    assert alone == [20.0, 35.0, 35.0, 35.0]
    watched.succeed(2)
    watched.fail(3)
    assert watched.breaker.open_until == watched.now + at(10), "after closing it begins anew"


@pytest.mark.promise("F3")
def test_a_provider_that_stays_dead_for_months_is_no_trouble() -> None:
    watched = Watched().half_open()
    for _ in range(3_000):
        assert watched.fail() is not None
        watched.later(35.0)
    assert watched.breaker.state is HALF_OPEN


@pytest.mark.promise("F3")
def test_calls_that_hung_since_before_the_opening_judge_nothing_and_take_no_probe_s_place() -> None:
    watched = Watched()
    hanging = [watched.breaker.began() for _ in range(4)]
    watched.half_open()
    assert watched.limit == 4 + 1
    for era in hanging[:2]:
        assert watched.breaker.failed(watched.now, era, "timeout") is None
    assert watched.breaker.succeeded(watched.now, hanging[2]) is None
    assert watched.breaker.state is HALF_OPEN
    assert watched.limit == 1 + 1
    watched.succeed(2)
    assert watched.breaker.state is CLOSED
    watched.fail(2)
    assert watched.breaker.failed(watched.now, hanging[3], "timeout") is None, "not after the closing either"


@pytest.mark.promise("F3")
def test_two_probes_that_fail_together_are_one_reopening() -> None:
    watched = Watched(msgspec.structs.replace(CONFIG, probes=2)).half_open()
    first, second = watched.breaker.began(), watched.breaker.began()
    assert watched.breaker.failed(watched.now, first, "HTTP 500") is not None
    assert watched.breaker.failed(watched.now, second, "HTTP 500") is None
    assert watched.breaker.open_until == watched.now + at(20)


@pytest.mark.promise("F3")
def test_a_failure_that_does_not_concern_the_provider_changes_nothing() -> None:
    watched = Watched()
    watched.fail(2)
    for _ in range(100):
        watched.breaker.dropped(watched.breaker.began())
    assert watched.breaker.state is CLOSED
    assert watched.fail() is not None
    watched.later(10)
    watched.breaker.dropped(watched.breaker.began())
    assert watched.breaker.state is HALF_OPEN
    assert watched.limit == 1


@pytest.mark.promise("F3")
def test_failures_of_one_caller_open_nothing_while_others_are_answered() -> None:
    watched = Watched()
    for _ in range(10):
        watched.breaker.succeeded(watched.now, watched.breaker.began(), caller=1)
        assert watched.breaker.failed(watched.now, watched.breaker.began(), "HTTP 500", caller=2) is None
    assert watched.breaker.state is CLOSED
    change = watched.breaker.failed(watched.now, watched.breaker.began(), "HTTP 500", caller=3)
    assert change is not None, "a second caller meets it, too"


@pytest.mark.promise("F3")
def test_failures_of_one_caller_open_it_if_no_other_is_answered() -> None:
    watched = Watched()
    watched.breaker.succeeded(watched.now, watched.breaker.began(), caller=2)
    for _ in range(2):
        assert watched.breaker.failed(watched.now, watched.breaker.began(), "HTTP 500", caller=2) is None
    assert watched.breaker.failed(watched.now, watched.breaker.began(), "HTTP 500", caller=2) is not None


@pytest.mark.promise("F3")
def test_an_operator_s_reset_forgets_all_of_it() -> None:
    watched = Watched()
    assert watched.breaker.reset() is None
    watched.fail(2)
    watched.breaker.reset()
    assert watched.fail(2) is None
    watched.fail()
    assert watched.breaker.reset() == Change(OPEN, CLOSED, "reset by an operator")
    assert watched.limit == SLOTS
    assert watched.breaker.open_until is None


class PlainBreaker:
    """The same rules, by looking at everything that ever happened."""

    def __init__(self, config: BreakerConfig) -> None:
        self.config = config
        self.state = CLOSED
        self.since = 0
        """The number of the first call that counts now."""
        self.outcomes: list[tuple[int, bool]] = []
        self.good_probes = 0
        self.bad_probes = 0
        self.until = 0

    def end(self, call: int, now: int, good: bool) -> None:
        if call < self.since:
            return
        if self.state is HALF_OPEN and good:
            self.good_probes += 1
            if self.good_probes == self.config.probes_to_close:
                self.state, self.outcomes, self.bad_probes = CLOSED, [], 0
        elif self.state is HALF_OPEN:
            self.bad_probes += 1
            self.open(now)
        else:
            self.outcomes.append((now, good))
            recent = [good for then, good in self.outcomes if then >= now - at(self.config.window)]
            recent = recent[-self.config.max_samples :]
            bad = recent.count(False)
            if not good and bad >= self.config.failures and bad >= self.config.rate * len(recent):
                self.open(now)

    def open(self, now: int) -> None:
        self.state, self.outcomes, self.good_probes = OPEN, [], 0
        self.until = now + at(min(self.config.open_for * 2**self.bad_probes, self.config.max_open_for))
        self.since = 10**9  # until the machine says which call comes next


class Machine(RuleBasedStateMachine):
    """Calls go out as far as the breaker lets them, and end in any order."""

    @initialize(
        config=st.builds(
            BreakerConfig,
            failures=st.integers(1, 4),
            rate=st.sampled_from([0.2, 0.5, 1.0]),
            window=st.sampled_from([5.0, 60.0]),
            max_samples=st.integers(1, 6),
            open_for=st.sampled_from([1.0, 10.0]),
            max_open_for=st.sampled_from([10.0, 35.0]),
            probes=st.integers(1, 3),
            probes_to_close=st.integers(1, 3),
        )
    )
    def begin(self, config: BreakerConfig) -> None:
        self.config = config
        self.breaker = ProviderBreaker(config)
        self.plain = PlainBreaker(config)
        self.now = at(1_000)
        self.calls: dict[int, int] = {}
        """Number and era of those that run."""
        self.number = 0

    def compare(self, change: Change | None, before: BreakerState) -> None:
        assert (change is not None) == (self.plain.state is not before)
        if change is not None:
            assert (change.before, change.after) == (before, self.plain.state)
        if self.plain.since == 10**9:
            self.plain.since = self.number

    @precondition(lambda self: len(self.calls) < self.breaker.limit(SLOTS))
    @rule()
    def call(self) -> None:
        self.calls[self.number] = self.breaker.began()
        self.number += 1

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), good=st.booleans())
    def end(self, data: st.DataObject, good: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.calls)))
        era = self.calls.pop(number)
        before = self.plain.state
        self.plain.end(number, self.now, good)
        change = self.breaker.succeeded(self.now, era) if good else self.breaker.failed(self.now, era, "it failed")
        self.compare(change, before)

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """A bad request, or one that was stopped."""
        self.breaker.dropped(self.calls.pop(data.draw(st.sampled_from(sorted(self.calls)))))

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0, 10.0, 40.0]))
    def wait(self, seconds: float) -> None:
        self.now += at(seconds)
        before = self.plain.state
        if before is OPEN and self.now >= self.plain.until:
            self.plain.state = HALF_OPEN
        self.compare(self.breaker.tick(self.now), before)

    @rule()
    def reset(self) -> None:
        before = self.plain.state
        self.plain = PlainBreaker(self.config)
        self.plain.since = self.number
        self.compare(self.breaker.reset(), before)

    @invariant()
    def they_agree(self) -> None:
        assert self.breaker.state is self.plain.state
        assert self.breaker.open_until == (self.plain.until if self.plain.state is OPEN else None)

    @invariant()
    def as_many_run_as_may(self) -> None:
        fresh = sum(number >= self.plain.since for number in self.calls)
        limit = self.breaker.limit(SLOTS)
        if self.plain.state is OPEN:
            assert limit == 0
        elif self.plain.state is HALF_OPEN:
            assert fresh <= self.config.probes, "more probes than are allowed"
            assert limit == min(SLOTS, len(self.calls) - fresh + self.config.probes)
        else:
            assert limit == SLOTS


TestMachine = pytest.mark.promise("F3")(
    type(
        "TestMachine", (Machine.TestCase,), {"settings": settings(max_examples=effort(80, 800), stateful_step_count=60)}
    )
)
