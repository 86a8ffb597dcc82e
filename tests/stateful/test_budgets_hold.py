"""A machine that spends under budgets and holds their sums against the usage rows, over SQLite and by two daemons of
one Redis."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections import Counter
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

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

from ksi.budgets.rules import NOTHING, UNUSED, Amount, Budget, Cap, Caps, Raise, Unit
from ksi.budgets.settings import budget_of
from ksi.clock import microseconds
from ksi.completion.budget.book import BudgetBook, Kept
from ksi.completion.usage.prices import Prices
from ksi.config.schema import PriceConfig
from ksi.errors import BudgetExceeded, NotFound
from ksi.events.bus import EventBus
from ksi.request import Attempt, Outcome, State, Usage
from ksi.store.sqlite import budget_figures
from ksi.store.usage import UsageBy, UsageQuery
from ksi.store.values import Claimed, Finish, GiveBack, Listing, Offer, Retry, Settled, StoreRules, Verdict
from tests.conformance.world import Home, RedisHome, SqliteHome, World, items
from tests.effort import effort
from tests.redis_server import RedisServer
from tests.stateful.budget_model import INPUT_RATE, OUTPUT_RATE, UNASKED, Book, Call, Wish, binding, least

T = TypeVar("T")

OFFERS = (Offer("one", "one", 1_000), Offer("two", "two", 1_000))
FOREVER = 10**15
"""A lease that no test outlives: daemons die only when they are killed."""
LONGEST = microseconds(50 * 86_400)
"""No test lasts longer: figures are kept for two months."""
PRICES = {"one/*": PriceConfig(input=INPUT_RATE / 1_000, output=OUTPUT_RATE / 1_000)}


def budget(name: str, scope: str, per: str = "day", **fields: Any) -> Budget:
    """A budget in UTC."""
    defaults: dict[str, Any] = dict.fromkeys(("usd", "tokens", "requests"))
    defaults |= {"time_zone": "UTC", "on_exceed": "wait", "warn_at": (0.5,), "unpriced": 0.02}
    return budget_of(name, scope=scope, per=per, **(defaults | fields))


EACH = budget("each", "agent:*", "hour", tokens=10**12)
"""It is never reached, and counts all that is used by each agent."""
BUDGETS = [
    budget("all", "all", tokens=4_000),
    budget("calls", "all", "hour", requests=7),
    budget("agents", "agent:*", tokens=1_500),
    budget("family", "agent:a*", "month", usd=0.000_09),
    budget("money", "provider:one", "week", usd=0.000_06),
    budget("model", "model:two/m", usd=0.000_05, unpriced="refuse"),
    budget("talks", "session:*", "hour", tokens=900),
    budget("strict", "all", tokens=5_000, on_exceed="refuse"),
]

wishes = st.builds(
    Wish,
    name=st.just(""),
    conversation=st.sampled_from([f"talk {number}" for number in range(5)]),
    agent=st.sampled_from(["ann", "abe", "bob", None]),
    provider=st.sampled_from(["one", "one", "two"]),
    input=st.integers(1, 300),
    output=st.sampled_from([1, 40, 200, 700, 3_000]),
    fixed=st.booleans(),
)
places = st.integers(0, 30)


class Ending(msgspec.Struct, frozen=True):
    """How a run ends; its usage as shares of what was set aside."""

    kind: str
    shares: tuple[float, float] | None = None
    text: str | None = None


shares = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])
texts = st.sampled_from([None, "", "short", "long " * 30])
endings = st.builds(
    Ending,
    st.sampled_from(["answer", "answer", "answer", "fault", "timeout", "unasked", "cancel", "retry", "give back"]),
    st.none() | st.tuples(shares, shares) | st.tuples(shares, shares),
    texts,
)


class BudgetsHold(RuleBasedStateMachine):
    """One store, its daemons, and what they should have counted."""

    daemons = 1

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.patch = pytest.MonkeyPatch()
        self.runner = asyncio.Runner()
        self.model = Book()
        self.wishes: dict[str, Wish] = {}
        self.contexts: Counter[str] = Counter()
        """Tokens of each conversation so far."""
        self.told: Counter[Any] = Counter()
        self.worlds: list[World] = []
        self.every = 1
        self.steps = 0

    def homes(self) -> list[Home]:
        """A place for each daemon's store."""
        return [SqliteHome(Path(self.folder.name), "normal")]

    @initialize(
        configured=st.lists(st.sampled_from(BUDGETS), unique=True, min_size=1, max_size=5),
        every=st.sampled_from([1, 6]),
        fold=st.sampled_from([1, 5, budget_figures.FOLD]),
    )
    def begin(self, configured: list[Budget], every: int, fold: int) -> None:
        """`every`: steps after which a reader asks for the figures, as SQLite adds them up when somebody asks; `fold`:
        steps after which SQLite writes them."""
        self.every = every
        self.patch.setattr(budget_figures, "FOLD", fold)
        rules = StoreRules(max_interruptions=2)
        self.worlds = [World(home, rules) for home in self.homes()]
        self.clock = self.worlds[0].clock
        self.start = self.clock.wall
        for world in self.worlds:
            world.clock = self.clock
            self.do(world.open())
        self.prices = Prices(PRICES, {})
        clock: Any = self.clock
        self.book = BudgetBook([EACH], self.prices, {}, EventBus(clock), clock)
        self.change(tuple(configured), ())

    def teardown(self) -> None:
        for world in self.worlds:
            self.do(world.store.close())
        self.patch.undo()
        self.runner.close()
        self.folder.cleanup()

    def do(self, work: Awaitable[T]) -> T:
        async def waited() -> T:
            return await work

        return self.runner.run(waited())

    @property
    def caps(self) -> Caps:
        return self.book.caps(self.clock.wall)

    # -- requests -----------------------------------------------------------------------------------------------------

    @rule(wanted=st.lists(wishes, min_size=1, max_size=4), at_once=st.booleans(), bounded=st.booleans(), machine=places)
    def come(self, wanted: list[Wish], at_once: bool, bounded: bool, machine: int) -> None:
        """Requests come; some while nobody knew of a budget, or with none that is known to their daemon."""
        number = machine % self.daemons
        world = self.worlds[number]
        for wish in wanted:
            sent = msgspec.structs.replace(wish, name=f"r{len(self.wishes)}")
            new = world.new(
                sent.name,
                sent.conversation,
                route=sent.provider,
                model=f"{sent.provider}/m",
                agent_id=sent.agent,
                demand=(sent.ask,),
            )
            # What comes without caps runs under none: it is only queued then.
            offers, caps = (OFFERS if at_once and bounded else (), self.caps if bounded else ())
            entered = None
            with contextlib.suppress(BudgetExceeded):
                entered = self.do(world.store.enqueue(new, offers, self.clock.now(), caps=caps))
            if entered is None:
                assert not self.fits(sent), f"{sent} is refused though there is room"
                continue
            self.wishes[sent.name] = sent
            if entered.claim is not None:
                self.began(entered.claim, number)

    @rule(machine=places)
    def claim(self, machine: int) -> None:
        """A daemon takes all that may run. Nothing that has room is left."""
        number = machine % self.daemons
        more = True
        while more:
            found = self.do(self.worlds[number].store.claim(OFFERS, 3, self.clock.now(), caps=self.caps))
            for claim in found.started:
                self.began(claim, number)
            for notice in found.notices:
                self.hear(notice)
            more = bool(found.started or found.blocked or found.more)
        world = self.worlds[number]
        for row in self.do(_rows(world)):
            wish = self.wishes[row.request_id]
            assert not self.fits(wish), f"{wish} waits though there is room"

    def began(self, claim: Claimed, machine: int) -> None:
        """A call began: all that it may use fits into what was left."""
        wish = self.wishes[claim.request_id]
        bound = binding(self.caps, wish)
        call = Call(wish, claim, self.contexts[wish.conversation], bound, machine)
        figures = self.model.figures([cap.name for cap, _ in bound])
        for cap, subject in bound:
            used, held = figures.get((cap.name, subject, cap.start), (NOTHING, NOTHING))
            mine = call.held((cap.name, subject, cap.start)).of(cap.unit)
            room = cap.limit_of(subject) - used.of(cap.unit) - held.of(cap.unit)
            assert mine <= room or not mine, f"{cap.name} of {subject} has {room}, {mine} was set aside"
            assert cap.unit is not Unit.USD or wish.provider == "one" or cap.unpriced is not None
        assert call.output >= (wish.output if wish.fixed else min(wish.output, 1_024))
        self.model.calls.append(call)

    def fits(self, wish: Wish) -> bool:
        """Whether all budgets that bind a request have room for it."""
        bound = binding(self.caps, wish)
        figures = self.model.figures([cap.name for cap, _ in bound])
        return all(self._fits(cap, subject, wish, figures) for cap, subject in bound)

    def _fits(self, cap: Cap, subject: str, wish: Wish, figures: Any) -> bool:
        if cap.unit is Unit.USD and wish.provider == "two" and cap.unpriced is None:
            return False
        used, held = figures.get((cap.name, subject, cap.start), (NOTHING, NOTHING))
        wanted = least(cap, wish, self.contexts[wish.conversation])
        return not wanted or used.of(cap.unit) + held.of(cap.unit) + wanted <= cap.limit_of(subject)

    @precondition(lambda self: self.model.running())
    @rule(place=places, ending=endings)
    def end(self, place: int, ending: Ending) -> None:
        running = self.model.running()
        self.settle(running[place % len(running)], ending)

    @rule(ends=st.lists(endings, min_size=1, max_size=5), machine=places)
    def work(self, ends: list[Ending], machine: int) -> None:
        """What runs comes to its end, and the next begins."""
        for ending in ends:
            if self.model.running():
                self.settle(self.model.running()[0], ending)
        self.claim(machine)

    def settle(self, call: Call, ending: Ending) -> Settled:
        """A run ends, as its daemon reports it."""
        attempt, verdict = self._ended(call, ending)
        spent = self.book.spent(attempt, asked=attempt.error != UNASKED)
        settled = self.do(
            self.worlds[call.machine].store.settle(
                call.claim, attempt, verdict, self.clock.now(), None, spent, self.caps
            )
        )
        if not settled.fenced or self.daemons > 1:
            # On a shared store a late report takes the estimate's place, if it says anything.
            call.attempt = attempt if not settled.fenced or spent is not None else None
        call.ended = True
        for notice in settled.notices:
            self.hear(notice)
        if settled.turn is not None:
            usage = attempt.usage or Usage()
            self.contexts[call.wish.conversation] = usage.input_tokens + usage.output_tokens
        return settled

    def _ended(self, call: Call, ending: Ending) -> tuple[Attempt, Verdict]:
        outcome = Outcome.FAILED
        error = ending.kind if ending.kind in ("timeout", UNASKED) else None
        verdict: Verdict = Finish(state=State.FAILED, error="provider_error")
        match ending.kind:
            case "answer":
                outcome, verdict = Outcome.COMPLETED, Finish(state=State.COMPLETED)
            case "cancel":
                outcome, verdict = Outcome.CANCELLED, Finish(state=State.CANCELLED, error="cancelled")
            case "retry":
                verdict = Retry(at=self.clock.wall + microseconds(5), error="overloaded")
            case "give back":
                outcome, verdict = Outcome.SHUTDOWN, GiveBack()
        asked = ending.kind != "unasked"
        usage = None
        if ending.shares is not None and asked:
            given, made = ending.shares
            usage = Usage(input_tokens=int(call.input * given), output_tokens=int(call.output * made))
        attempt = Attempt(
            number=call.claim.attempt,
            provider=call.claim.provider,
            asked=f"{call.claim.provider}/m",
            outcome=outcome,
            started_at=call.claim.started_at,
            finished_at=self.clock.wall,
            error=error,
            usage=usage,
            text=ending.text[: call.output * 4] if ending.text is not None and asked else None,
        )
        return attempt, verdict

    @precondition(lambda self: self.wishes)
    @rule(place=places, machine=places)
    def cancel(self, place: int, machine: int) -> None:
        names = list(self.wishes)
        with contextlib.suppress(NotFound):  # it may be pruned
            self.do(self.worlds[machine % self.daemons].cancel(names[-1 - place % len(names)]))

    # -- operators ----------------------------------------------------------------------------------------------------

    @rule(place=places, by=st.sampled_from([0.5, 1.0, 3.0]), seconds=st.sampled_from([60, 7_200, 200_000]), one=places)
    def raise_a_budget(self, place: int, by: float, seconds: int, one: int) -> None:
        kept = self.book.kept
        if not kept.budgets:
            return
        chosen = kept.budgets[place % len(kept.budgets)]
        subject = "" if chosen.named != "*" or one % 2 else f"{chosen.kind}:{['ann', 'bob', 'talk 0'][one % 3]}"
        raised = Raise(
            budget=chosen.name,
            subject=subject,
            amount=int(chosen.limit * by),
            until=self.clock.wall + microseconds(seconds),
            at=self.clock.wall,
        )
        self.change(kept.budgets, (*kept.raises, raised))

    @rule(changed=st.lists(st.sampled_from(BUDGETS), unique=True, max_size=5), by=st.sampled_from([0.5, 1.0, 2.0]))
    def set_budgets(self, changed: list[Budget], by: float) -> None:
        """Budgets are set, changed and dropped, also with spending behind them."""
        budgets = tuple(msgspec.structs.replace(one, limit=int(one.limit * by)) for one in changed)
        self.change(budgets, self.book.kept.raises)

    def change(self, budgets: tuple[Budget, ...], raises: tuple[Raise, ...]) -> None:
        self.book.take(Kept(budgets=budgets, raises=raises))
        self.told.clear()
        while self.do(self.worlds[0].store.reconsider(None, self.clock.now(), 2)):
            pass

    def hear(self, notice: Any) -> None:
        """Each is told once, as long as no limit changes."""
        key = (notice.name, notice.subject, notice.start, notice.limit, notice.threshold)
        self.told[key] += 1
        assert self.told[key] == 1, f"told twice: {key}"

    # -- time and faults ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.clock.wall - self.start < LONGEST)
    @rule(seconds=st.sampled_from([1.0, 5.0, 600.0, 3_600.0, 30_000.0, 86_400.0, 800_000.0]))
    def time_passes(self, seconds: float) -> None:
        """Windows end, and raises lapse."""
        before = [cap.limit_of(subject) for cap in self.caps for subject in ("", *cap.raised)]
        self.clock.forward(seconds)
        if before != [cap.limit_of(subject) for cap in self.caps for subject in ("", *cap.raised)]:
            self.told.clear()
        for world in self.worlds:
            while self.do(world.expire(3)).more:
                pass

    @rule(machine=places, killed=st.booleans())
    def begin_again(self, machine: int, killed: bool) -> None:
        """A daemon is killed, or stops without settling what runs."""
        number = machine % self.daemons
        self.do(self.worlds[number].crash() if killed else self.worlds[number].restart())
        self.model.die(number)

    @rule(machine=places)
    def prune(self, machine: int) -> None:
        self.do(self.worlds[machine % self.daemons].prune())

    # -- after every step ---------------------------------------------------------------------------------------------

    @invariant()
    def figures_are_the_sums_over_the_calls(self) -> None:
        self.steps += 1
        if not self.worlds or self.steps % self.every:
            return
        names = [EACH.name, *(one.name for one in BUDGETS)]
        found = {
            (name, use.subject, use.start): (use.use.used, use.use.held)
            for name in names
            for use in self.do(self.worlds[-1].store.budget_uses(name, 0))
            if use.use != UNUSED
        }
        empty = (Amount(), Amount())
        wanted = self.model.figures(names)
        for place in found.keys() | wanted.keys():
            assert found.get(place, empty) == wanted.get(place, empty), place
        self._against_the_usage_rows({place: figures for place, figures in found.items() if place[0] == EACH.name})

    def _against_the_usage_rows(self, found: Any) -> None:
        """What each agent's budget counted is what the report on usage says, and the estimates of what it does not."""
        counted: Counter[str] = Counter()
        for (_, subject, _), (used, _) in found.items():
            counted[subject] += used.tokens
        counted.subtract(self.model.guessed_tokens(EACH.name))
        query = UsageQuery(since=0, until=self.clock.wall, groups=(UsageBy.AGENT,))
        report = self.do(self.worlds[0].store.usage(query, self.prices.tariff))
        rows = {f"agent:{row.key or ''}": row.sums.total_tokens for row in report.groups[UsageBy.AGENT].rows}
        assert {key: tokens for key, tokens in counted.items() if tokens} == {
            key: tokens for key, tokens in rows.items() if tokens
        }


async def _rows(world: World) -> list[Any]:
    return [row async for row in items(lambda cursor: world.store.requests(Listing.READY, 50, cursor))]


class TwoDaemonsHold(BudgetsHold):
    """The same by two daemons of one store; a report may come after its daemon was thought dead."""

    daemons = 2

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url

    def homes(self) -> list[Home]:
        here = RedisHome(self._url, lease=FOREVER)
        return [here, here.beside("away")]

    @precondition(lambda self: self.model.lost())
    @rule(place=places, shares=st.tuples(shares, shares), text=texts)
    def report_late(self, place: int, shares: tuple[float, float], text: str | None) -> None:
        """Where it reports, its usage takes the estimate's place."""
        lost = self.model.lost()
        assert self.settle(lost[place % len(lost)], Ending("answer", shares, text)).fenced


def _settings(examples: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=40,
        deadline=None,
        print_blob=True,
    )


TestBudgetsHold = BudgetsHold.TestCase
TestBudgetsHold.settings = _settings(effort(30, 400))
TestBudgetsHold = pytest.mark.timeout(600)(pytest.mark.promise("B1", "T1")(TestBudgetsHold))


@pytest.mark.timeout(600)
@pytest.mark.promise("B1", "D1", "T1")
def test_two_daemons_of_one_store_hold_their_budgets(redis_server: RedisServer) -> None:
    class Machine(TwoDaemonsHold):
        def __init__(self) -> None:
            super().__init__(redis_server.url)

    run_state_machine_as_test(Machine, settings=_settings(effort(15, 200)))
