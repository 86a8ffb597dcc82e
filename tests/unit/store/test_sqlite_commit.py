"""Group commit: who shares a transaction, who is answered when, and whom a fault harms."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import apsw
import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from ksi.clock import Chance, Moment
from ksi.errors import KsiError, QueueFull, StoreFull, StoreUnavailable
from ksi.store.sqlite import commit as sqlite_commit
from ksi.store.sqlite.commit import BATCH, MOST_PUT_OFF, Committer, as_ksi_error
from ksi.store.sqlite.ledger import Ledger
from ksi.store.sqlite.store import SqliteStore
from ksi.store.values import Enqueued, NewRequest, Offer, StoreRules
from tests.effort import effort

SCHEMA = """
CREATE TABLE word (id INTEGER PRIMARY KEY, word TEXT NOT NULL UNIQUE);
CREATE TABLE likes (word INTEGER REFERENCES word (id) DEFERRABLE INITIALLY DEFERRED);
"""


class Books:
    """A ledger that only says what it was told."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.broken = 0
        """So many next calls of `rolled_back` fail, as they do where the database cannot be read."""
        self.must_last = False
        self.at_rollback: Callable[[], None] = lambda: None
        """Happens once, when a transaction was rolled back."""

    def begin(self) -> None:
        self.must_last = False
        self.calls.append("begin")

    def touch(self) -> None:
        self.calls.append("touch")

    def write_totals(self) -> None:
        self.calls.append("totals")

    def committed(self) -> None:
        self.calls.append("committed")

    def rolled_back(self) -> None:
        self.calls.append("rolled back")
        happening, self.at_rollback = self.at_rollback, lambda: None
        happening()
        if self.broken:
            self.broken -= 1
            raise apsw.IOError("input/output error")


class Desk:
    """A committer over a database of words, and what it did."""

    def __init__(self, path: str, *, durable: bool = True) -> None:
        self.path = path
        self.connection = apsw.Connection(path)
        self.connection.pragma("journal_mode", "wal")
        self.connection.pragma("foreign_keys", True)
        self.connection.execute(SCHEMA)
        self.reader = apsw.Connection(path) if path != ":memory:" else self.connection
        self.books = Books()
        self.lost: str | None = None
        self.due = False
        self.between: list[str] = []
        """The names of the threads that did what is done between two transactions."""
        self.commits: list[str] = []
        """The names of the threads that committed."""
        self.at_commit: Callable[[], None] = lambda: None
        self.connection.set_commit_hook(self._on_commit)
        self.committer = Committer(
            self.connection,
            cast(Ledger, self.books),
            due=lambda: self.due,
            between=self._between,
            lost=lambda: self.lost,
            on_damage=lambda: self.books.calls.append("damage"),
            durable=durable,
        )

    def _on_commit(self) -> bool:
        self.at_commit()
        self.commits.append(threading.current_thread().name)
        return False

    def _between(self) -> None:
        assert not self.connection.in_transaction
        self.due = False
        self.between.append(threading.current_thread().name)

    def add(self, word: str) -> asyncio.Future[str]:
        """Write a word; a word that is there already is a fault."""

        def operation() -> str:
            self.connection.execute("INSERT INTO word (word) VALUES (?)", (word,))
            return word

        return self.committer.submit(operation)

    def do(self, operation: Callable[[], Any], *, lasting: bool = True) -> asyncio.Future[Any]:
        return self.committer.submit(operation, lasting=lasting)

    def words(self) -> list[str]:
        """What others see, in the order it was written."""
        return [word for (word,) in self.reader.execute("SELECT word FROM word ORDER BY id")]

    @property
    def synced(self) -> bool:
        """Whether the last transaction was on the disk before it was answered."""
        return bool(self.connection.pragma("synchronous") == 2)

    def close(self) -> None:
        self.connection.set_commit_hook(None)
        self.connection.close()
        self.reader.close()


@pytest_asyncio.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    desk = Desk(str(tmp_path / "words.db"))
    yield desk
    await desk.committer.close()
    desk.close()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every commit seems to take a second: the first one shows it, the next ones are made off the loop."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))


def fail(error: Exception) -> Any:
    raise error


async def outcomes(*futures: asyncio.Future[Any]) -> list[Any]:
    return await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 10)


# -- another program holds the database -------------------------------------------------------------------------------


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for long."""
    monkeypatch.setattr(sqlite_commit, "PATIENCE", 0.1)
    monkeypatch.setattr(sqlite_commit, "HELD_PAUSE", 0.005)
    monkeypatch.setattr(sqlite_commit, "TROUBLE_PAUSE", 0.01)


class Holder:
    """Another program's connection."""

    def __init__(self, desk: Desk) -> None:
        self.connection = apsw.Connection(desk.path)

    def hold(self) -> None:
        self.connection.execute("BEGIN IMMEDIATE")

    def let_go(self) -> None:
        self.connection.execute("ROLLBACK")


@pytest.fixture
def holder(desk: Desk) -> Iterator[Holder]:
    holder = Holder(desk)
    yield holder
    holder.connection.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the committer tells nobody of its troubles
            await asyncio.sleep(0)


@pytest.mark.promise("O3")
async def test_operations_while_the_database_is_held_for_a_moment_wait_in_their_order(
    desk: Desk, holder: Holder
) -> None:
    holder.hold()
    waiting = [desk.add("a"), desk.add("b")]
    await until(lambda: desk.committer._trouble is not None)
    waiting.append(desk.add("c"))
    assert desk.committer.trouble is None, "a moment is no trouble"
    holder.let_go()
    assert await outcomes(*waiting) == ["a", "b", "c"]
    assert desk.words() == ["a", "b", "c"]
    assert desk.committer.trouble is None


@pytest.mark.promise("O3")
async def test_while_the_database_is_held_the_loop_continues_and_no_operation_waits_long(
    desk: Desk, holder: Holder, patience: None
) -> None:
    holder.hold()
    turns = 0
    waiting = [desk.add("a"), desk.committer.submit_alone(lambda: "long")]
    while not all(future.done() for future in waiting):
        turns += 1
        await asyncio.sleep(0)
    assert turns > 100, "the loop had its turns meanwhile"
    for outcome in await outcomes(*waiting):
        assert isinstance(outcome, StoreUnavailable)
        assert outcome.message == "another program holds the database for writing"
    trouble = desk.committer.trouble
    assert trouble is not None
    assert trouble.held
    assert "(pid 7, 8). No changes have been taken for" in trouble.told([7, 8])
    assert isinstance((await outcomes(desk.add("b")))[0], StoreUnavailable)
    assert desk.words() == []


@pytest.mark.promise("O3")
async def test_when_the_database_is_free_again_all_goes_on_by_itself(
    desk: Desk, holder: Holder, patience: None
) -> None:
    holder.hold()
    await outcomes(desk.add("a"))
    assert desk.committer.trouble is not None
    with capture_logs() as logs:
        holder.let_go()
        await until(lambda: desk.committer.trouble is None)
    assert [entry["event"] for entry in logs] == ["the database takes changes again"]
    assert await outcomes(desk.add("a"), desk.committer.submit_alone(lambda: "long")) == ["a", "long"]
    assert desk.words() == ["a"]


@pytest.mark.promise("O3")
async def test_a_program_that_comes_between_two_tries_of_a_transaction_costs_nothing(
    desk: Desk, holder: Holder
) -> None:
    """The transaction was rolled back to be made lasting, and another program was faster."""
    held: list[str] = []

    def promise() -> str:
        desk.books.must_last = True
        desk.connection.execute("INSERT INTO word (word) VALUES ('a')")
        if not held:
            held.append("once")
            desk.books.at_rollback = holder.hold
        return "a"

    answer = desk.do(promise, lasting=False)
    await until(lambda: desk.committer._trouble is not None)
    assert not answer.done()
    holder.let_go()
    assert await outcomes(answer) == ["a"]
    assert desk.words() == ["a"]


@pytest.mark.promise("O3")
async def test_a_program_that_comes_after_a_fault_costs_only_the_guilty(desk: Desk, holder: Holder) -> None:
    await outcomes(desk.add("a"))
    desk.books.at_rollback = holder.hold
    waiting = [desk.add("b"), desk.add("a"), desk.add("c")]
    await until(lambda: desk.committer._trouble is not None)
    assert not any(future.done() for future in waiting)
    holder.let_go()
    first, second, third = await outcomes(*waiting)
    assert (first, third) == ("b", "c")
    assert isinstance(second, StoreUnavailable)
    assert desk.words() == ["a", "b", "c"]


@pytest.mark.promise("O2")
async def test_a_write_that_no_other_would_see_is_not_made_and_not_answered(desk: Desk, patience: None) -> None:
    desk.lost = "ksi.db is gone"
    with pytest.raises(StoreUnavailable, match="is gone"):
        await desk.add("a")
    assert desk.committer.trouble is not None
    assert not desk.committer.trouble.held
    assert desk.words() == []
    desk.lost = None
    await until(lambda: desk.committer.trouble is None)
    assert await outcomes(desk.add("a")) == ["a"]


async def test_a_committer_that_is_closed_while_the_database_is_held_ends(
    desk: Desk, holder: Holder, patience: None
) -> None:
    holder.hold()
    waiting = desk.add("a")
    await asyncio.wait_for(desk.committer.close(), 10)
    assert isinstance((await outcomes(waiting))[0], StoreUnavailable)


async def test_a_damaged_database_is_reported_until_the_end(desk: Desk) -> None:
    outcome, *_ = await outcomes(desk.do(lambda: fail(apsw.CorruptError("malformed"))))
    assert isinstance(outcome, StoreUnavailable)
    assert desk.committer.trouble is None, "it takes changes"
    assert await outcomes(desk.add("a")) == ["a"]
    assert desk.committer.damage is not None
    assert "damaged (malformed)" in desk.committer.damage
    await outcomes(desk.do(lambda: fail(apsw.CorruptError("malformed"))))
    assert desk.books.calls.count("damage") == 1


# -- one turn, one transaction ----------------------------------------------------------------------------------------


async def test_operations_of_one_turn_share_a_transaction_in_the_order_they_came(desk: Desk) -> None:
    assert await outcomes(*(desk.add(word) for word in ("a", "b", "c"))) == ["a", "b", "c"]
    assert desk.words() == ["a", "b", "c"]
    assert len(desk.commits) == 1
    assert desk.books.calls == ["begin", "totals", "committed"]


async def test_an_operation_that_comes_alone_waits_for_no_other(desk: Desk) -> None:
    alone = desk.add("a")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert alone.done()


async def test_a_transaction_waits_some_turns_of_the_loop_while_each_brings_more(desk: Desk) -> None:
    loop = asyncio.get_running_loop()
    words = [f"word {number}" for number in range(MOST_PUT_OFF + 3)]
    futures: list[asyncio.Future[str]] = []

    def one_in_each_turn() -> None:
        if len(futures) < len(words):
            loop.call_soon(one_in_each_turn)
            futures.append(desk.add(words[len(futures)]))
        else:
            all_came.set()

    all_came = asyncio.Event()
    one_in_each_turn()
    await all_came.wait()
    await asyncio.gather(*futures)
    assert desk.books.calls.count("begin") == 2
    assert desk.words() == words


async def test_operations_of_two_turns_have_a_transaction_each(desk: Desk) -> None:
    await desk.add("a")
    await desk.add("b")
    assert len(desk.commits) == 2
    assert desk.between == []


@pytest.mark.promise("O9")
async def test_work_due_between_two_transactions_is_done_off_the_loop(desk: Desk) -> None:
    await desk.add("a")
    desk.due = True
    assert await outcomes(desk.add("b"), desk.add("c")) == ["b", "c"]
    assert len(desk.between) == 1
    assert desk.between[0].startswith("ksi-commit")
    assert desk.words() == ["a", "b", "c"]


@pytest.mark.promise("Q3")
async def test_no_operation_is_answered_before_the_commit(desk: Desk) -> None:
    seen: list[list[str]] = []
    futures = [desk.add(word) for word in ("a", "b")]
    for future in futures:
        future.add_done_callback(lambda _: seen.append(desk.words()))
    desk.at_commit = lambda: seen.append([str(future.done()) for future in futures])
    await outcomes(*futures)
    assert seen == [["False", "False"], ["a", "b"], ["a", "b"]]


async def test_a_long_line_is_committed_in_parts_and_in_order(desk: Desk) -> None:
    words = [f"{number:04}" for number in range(2 * BATCH + 1)]
    assert await outcomes(*(desk.add(word) for word in words)) == words
    assert desk.words() == words
    assert len(desk.commits) == 3


async def test_an_operation_submitted_by_an_answer_comes_in_the_next_transaction(desk: Desk) -> None:
    later: list[asyncio.Future[str]] = []
    desk.add("a").add_done_callback(lambda _: later.append(desk.add("c")))
    await desk.add("b")
    await later[0]
    assert desk.words() == ["a", "b", "c"]
    assert len(desk.commits) == 2


async def test_nothing_to_do_is_no_transaction(desk: Desk) -> None:
    await asyncio.sleep(0)
    assert not desk.committer.busy
    assert desk.commits == []


async def test_it_is_busy_from_the_question_to_the_answer(desk: Desk) -> None:
    future = desk.add("a")
    assert desk.committer.busy
    await future
    assert not desk.committer.busy


# -- errors -----------------------------------------------------------------------------------------------------------


async def test_a_domain_error_goes_to_its_caller_and_the_others_are_committed_with_one_transaction(desk: Desk) -> None:
    refused = QueueFull("full", limit=1)
    first, second, third = await outcomes(desk.add("a"), desk.do(lambda: fail(refused)), desk.add("b"))
    assert (first, second, third) == ("a", refused, "b")
    assert desk.words() == ["a", "b"]
    assert "rolled back" not in desk.books.calls
    assert len(desk.commits) == 1


async def test_a_fault_of_the_database_fails_only_the_operation_that_made_it(desk: Desk) -> None:
    await desk.add("b")
    first, second, third = await outcomes(desk.add("a"), desk.add("b"), desk.add("c"))
    assert (first, third) == ("a", "c")
    assert isinstance(second, StoreUnavailable)
    assert second.details["reason"] == "ConstraintError"
    assert desk.words() == ["b", "a", "c"]


async def test_a_fault_that_only_the_commit_shows_fails_only_the_operation_that_made_it(desk: Desk) -> None:
    def orphan() -> None:
        desk.connection.execute("INSERT INTO likes (word) VALUES (999)")

    first, second, third = await outcomes(desk.add("a"), desk.do(orphan), desk.add("b"))
    assert (first, third) == ("a", "b")
    assert isinstance(second, StoreUnavailable)
    assert desk.words() == ["a", "b"]
    assert desk.reader.execute("SELECT count(*) FROM likes").get == 0


async def test_writes_of_a_guilty_operation_before_its_fault_are_not_kept(desk: Desk) -> None:
    def half() -> None:
        desk.connection.execute("INSERT INTO word (word) VALUES ('half')")
        desk.connection.execute("no such statement")

    alone = await outcomes(desk.do(half))
    among = await outcomes(desk.add("a"), desk.do(half))
    assert isinstance(alone[0], StoreUnavailable)
    assert among[0] == "a"
    assert isinstance(among[1], StoreUnavailable)
    assert desk.words() == ["a"]


async def test_a_defect_is_reported_to_its_caller_unchanged(desk: Desk) -> None:
    defect = LookupError("a defect")
    assert await outcomes(desk.add("a"), desk.do(lambda: fail(defect)), desk.add("b")) == ["a", defect, "b"]
    assert desk.words() == ["a", "b"]


async def test_a_full_disk_is_reported_as_such(desk: Desk) -> None:
    (error,) = await outcomes(desk.do(lambda: fail(apsw.FullError("no space"))))
    assert isinstance(error, StoreFull)
    assert error.retryable


async def test_a_database_that_cannot_be_begun_fails_all_of_the_turn_and_the_next_turn_is_served(desk: Desk) -> None:
    other = apsw.Connection(desk.connection.filename)
    other.execute("BEGIN IMMEDIATE")
    errors = await outcomes(desk.add("a"), desk.add("b"))
    assert all(isinstance(error, StoreUnavailable) and error.retryable for error in errors)
    other.execute("ROLLBACK")
    other.close()
    assert await desk.add("c") == "c"
    assert desk.words() == ["c"]


@pytest.mark.parametrize("broken", [1, 2, 3])
async def test_a_fault_of_the_roll_back_leaves_no_operation_without_an_answer(desk: Desk, broken: int) -> None:
    await desk.add("there")
    desk.books.broken = broken
    answers = await outcomes(desk.add("a"), desk.add("there"), desk.add("b"))
    assert all(answer in ("a", "b") or isinstance(answer, StoreUnavailable) for answer in answers)
    assert desk.words() == ["there", *(answer for answer in answers if isinstance(answer, str))]
    assert await asyncio.wait_for(desk.add("later"), 10) == "later"


async def test_a_caller_that_gave_up_withdraws_nothing_and_harms_no_other(desk: Desk) -> None:
    gone, other = desk.add("a"), desk.add("b")
    gone.cancel()
    assert await other == "b"
    assert desk.words() == ["a", "b"]
    gone = desk.add("a")
    gone.cancel()
    assert await desk.add("c") == "c"
    assert desk.words() == ["a", "b", "c"]


KINDS = ("write", "refuse", "fault", "defect", "orphan")


@settings(max_examples=effort(30, 300))
@given(turns=st.lists(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6), max_size=4), off_loop=st.booleans())
async def test_whatever_happens_each_operation_has_its_own_answer_and_the_good_ones_are_there_in_order(
    turns: list[list[str]], off_loop: bool
) -> None:
    desk = Desk(":memory:")
    if off_loop:
        desk.committer._commit_time = 1.0
    operations = {
        "refuse": lambda: fail(QueueFull("full")),
        "fault": lambda: desk.connection.execute("no such statement"),
        "defect": lambda: fail(LookupError("a defect")),
        "orphan": lambda: desk.connection.execute("INSERT INTO likes (word) VALUES (999)"),
    }
    expected = {"refuse": QueueFull, "fault": StoreUnavailable, "defect": LookupError, "orphan": StoreUnavailable}
    written: list[str] = []
    futures: list[asyncio.Future[Any]] = []
    kinds = [kind for turn in turns for kind in turn]
    for turn in turns:
        for kind in turn:
            if kind == "write":
                written.append(str(len(futures)))
                futures.append(desk.add(written[-1]))
            else:
                futures.append(desk.do(operations[kind]))
        await asyncio.sleep(0)
    for kind, answer in zip(kinds, await outcomes(*futures), strict=True):
        assert answer in written if kind == "write" else type(answer) is expected[kind]
    assert desk.words() == written
    await desk.committer.close()
    desk.close()


# -- slow disks -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("slow")
async def test_slow_commits_are_made_off_the_loop_and_the_loop_goes_on(desk: Desk) -> None:
    await desk.add("a")
    syncing, go_on = threading.Event(), threading.Event()

    def sync() -> None:
        syncing.set()
        assert go_on.wait(10)

    desk.at_commit = sync
    first = desk.add("b")
    await asyncio.to_thread(syncing.wait, 10)
    second = desk.add("c")
    for _ in range(10):
        await asyncio.sleep(0)
    assert not first.done() and not second.done()
    assert desk.committer.busy
    assert desk.words() == ["a"]
    go_on.set()
    assert await outcomes(first, second) == ["b", "c"]
    assert desk.words() == ["a", "b", "c"]
    assert [name.startswith("ksi-commit") for name in desk.commits] == [False, True, True]


@pytest.mark.usefixtures("slow")
async def test_a_fault_of_a_commit_off_the_loop_fails_only_the_guilty(desk: Desk) -> None:
    await desk.add("a")

    def orphan() -> None:
        desk.connection.execute("INSERT INTO likes (word) VALUES (999)")

    first, second, third = await outcomes(desk.add("b"), desk.do(orphan), desk.add("c"))
    assert (first, third) == ("b", "c")
    assert isinstance(second, StoreUnavailable)
    assert desk.words() == ["a", "b", "c"]


async def test_fast_commits_stay_on_the_loop_after_a_slow_one(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 0.015])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments, 1.0))
    for word in "abc":
        await desk.add(word)
    assert {name.startswith("ksi-commit") for name in desk.commits} == {False}


# -- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.promise("Q3")
@pytest.mark.parametrize("off_loop", [False, True])
async def test_close_finishes_submitted_operations_and_then_accepts_no_more(desk: Desk, off_loop: bool) -> None:
    if off_loop:
        desk.committer._commit_time = 1.0
    words = [f"{number:04}" for number in range(BATCH + 5)]
    futures = [desk.add(word) for word in words]
    await asyncio.wait_for(desk.committer.close(), 10)
    assert [future.result() for future in futures] == words
    assert desk.words() == words
    with pytest.raises(StoreUnavailable, match="closed"):
        await desk.add("late")
    assert desk.words() == words


async def test_close_with_nothing_to_do_is_over_at_once(desk: Desk) -> None:
    await asyncio.wait_for(desk.committer.close(), 10)
    assert desk.commits == []


async def test_close_ends_if_nothing_can_be_committed_any_more(desk: Desk) -> None:
    other = apsw.Connection(desk.connection.filename)
    other.execute("BEGIN IMMEDIATE")
    lost = desk.add("a")
    await desk.committer.close()
    assert isinstance(lost.exception(), StoreUnavailable)
    other.close()


# -- the store on it --------------------------------------------------------------------------------------------------


def poisoned(name: str, conversation: str, at: int) -> NewRequest:
    """A request; the database refuses the one that is named `bad`."""
    return NewRequest(
        request_id=name, conversation=conversation, body=b"{}", route=f"route-{name}", rank=at, agent_id=f"agent-{name}"
    )


@pytest.mark.promise("Q3", "Q8")
@pytest.mark.parametrize("bad_at", [0, 1, 2])
async def test_a_store_counts_and_knows_only_committed_changes_after_a_fault(tmp_path: Path, bad_at: int) -> None:
    """The batch is done again one by one: what the ledger had in memory of it must be forgotten first."""
    moment = Moment(1_000_000, 1_000_000)
    store = SqliteStore(tmp_path / "ksi.db", StoreRules(), Chance(random.Random(1)))
    await store.open(moment, lambda: None)
    store._writer.execute(
        "CREATE TRIGGER poison BEFORE INSERT ON request WHEN NEW.request_id = 'bad'"
        " BEGIN SELECT RAISE(ABORT, 'poisoned'); END"
    )
    names = ["a", "b"]
    names.insert(bad_at, "bad")
    offers = [Offer(f"route-{name}", "p", 1) for name in names]
    waiting = [store.enqueue(poisoned(name, f"talk-{name}", 1), offers, moment) for name in names]
    waiting.append(store.enqueue(poisoned("bad", "talk-a", 2), [], moment))
    *answers, last = await asyncio.gather(*waiting, return_exceptions=True)
    for name, answer in zip(names, answers, strict=True):
        assert isinstance(answer, StoreUnavailable) if name == "bad" else isinstance(answer, Enqueued)
    assert isinstance(last, StoreUnavailable)
    totals = await store.totals()
    assert (totals.running, totals.queued, totals.conversations, totals.locks) == (1, 1, 2, 1)
    assert set(await store.waiting_by_route()) == {"route-a", "route-b"}
    assert await store.session("talk-bad") is None
    assert (await store.lock("talk-a", 10)) is not None
    store._writer.execute("DROP TRIGGER poison")
    again = await store.enqueue(poisoned("bad", "talk-bad", 1), [], moment)
    assert again.existing is None
    assert set(await store.waiting_by_route()) == {"route-a", "route-b", "route-bad"}
    view = await store.session("talk-bad")
    assert view is not None
    assert view.agents == ("agent-bad",)
    await store.close()


# -- what a loss of power may take -------------------------------------------------------------------------------------


@pytest.mark.promise("Q3")
async def test_a_transaction_is_synced_if_one_of_its_answers_is_a_promise(desk: Desk) -> None:
    await desk.do(lambda: None, lasting=False)
    assert not desk.synced
    await outcomes(desk.do(lambda: None, lasting=False), desk.add("a"), desk.do(lambda: None, lasting=False))
    assert desk.synced


@pytest.mark.promise("Q3")
async def test_a_write_that_turns_out_to_be_a_promise_is_repeated_and_synced(desk: Desk) -> None:
    def operation() -> str:
        desk.connection.execute("INSERT INTO word (word) VALUES ('a')")
        desk.books.must_last = True
        return "a"

    assert await desk.do(operation, lasting=False) == "a"
    assert desk.synced
    assert desk.words() == ["a"]
    assert desk.books.calls == ["begin", "totals", "rolled back", "begin", "totals", "committed"]


@pytest.mark.promise("Q3")
async def test_a_promise_about_an_earlier_write_is_kept_too(desk: Desk) -> None:
    await desk.do(lambda: desk.connection.execute("INSERT INTO word (word) VALUES ('a')"), lasting=False)
    assert "touch" not in desk.books.calls
    await desk.do(lambda: None)
    assert desk.books.calls.count("touch") == 1
    await desk.do(lambda: None)
    await desk.add("b")
    await desk.do(lambda: None)
    assert desk.books.calls.count("touch") == 1


@pytest.mark.promise("Q3")
async def test_after_a_fault_all_is_synced_until_a_sync_succeeds(desk: Desk) -> None:
    await desk.add("a")
    await outcomes(desk.do(lambda: fail(apsw.IOError("input/output error")), lasting=False))
    await desk.do(lambda: None, lasting=False)
    assert desk.synced
    await desk.do(lambda: None, lasting=False)
    assert not desk.synced


async def test_with_durability_normal_nothing_is_synced(tmp_path: Path) -> None:
    desk = Desk(str(tmp_path / "words.db"), durable=False)
    await desk.do(lambda: None, lasting=False)
    await desk.add("a")
    assert not desk.synced
    assert "touch" not in desk.books.calls
    await desk.committer.close()
    desk.close()


@pytest.mark.promise("Q3")
async def test_only_a_request_without_a_promise_that_runs_at_once_is_not_synced(tmp_path: Path) -> None:
    moment, offers = Moment(1_000_000, 1_000_000), [Offer("r", "p", 9)]
    store = SqliteStore(tmp_path / "ksi.db", StoreRules(), Chance(random.Random(1)))
    await store.open(moment, lambda: None)

    async def synced(name: str, *, awaited: bool, talk: str) -> bool:
        new = NewRequest(request_id=name, conversation=talk, body=b"{}", route="r", rank=1)
        await store.enqueue(new, offers, moment, awaited=awaited)
        return bool(store._writer.pragma("synchronous") == 2)

    assert await synced("promised", awaited=False, talk="a")
    assert not await synced("runs", awaited=True, talk="b")
    assert await synced("waits", awaited=True, talk="b")
    assert not await synced("runs too", awaited=True, talk="c")
    log = (tmp_path / "ksi.db-wal").read_bytes()
    assert await synced("runs too", awaited=False, talk="c")
    assert (tmp_path / "ksi.db-wal").read_bytes() != log
    await store.close()


# -- names of errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (apsw.FullError("x"), "store_full"),
        (apsw.IOError("x"), "store_unavailable"),
        (apsw.BusyError("x"), "store_unavailable"),
        (apsw.ReadOnlyError("x"), "store_unavailable"),
        (apsw.CorruptError("x"), "store_unavailable"),
    ],
)
def test_an_sqlite_fault_has_a_code_of_the_error_tree(error: apsw.Error, code: str) -> None:
    known = as_ksi_error(error)
    assert isinstance(known, KsiError)
    assert (known.code, known.retryable) == (code, True)


def test_another_error_is_not_disguised() -> None:
    defect = ZeroDivisionError()
    assert as_ksi_error(defect) is defect
