"""Group commit: the operations of one turn of the event loop share a transaction, and are answered after its commit."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import apsw
import msgspec
import structlog

from ksi.errors import ServiceError, StoreError, StoreFull, StoreUnavailable
from ksi.store.sqlite.ledger import Ledger

T = TypeVar("T")

MUCH = 0.005
"""Seconds of CPU: what took longer to write is so long that its commit is made off the loop, too."""

BATCH = 256
"""Operations in one transaction, so that none waits long for its commit."""

MOST_PUT_OFF = 3
"""Turns of the loop for which a transaction waits while each brings more operations: a commit is dear."""

SLOW_COMMIT = 0.004
"""Seconds: above this a commit is made off the loop, so that streams and renewals do not stall."""

PATIENCE = 1.0
"""Seconds that operations wait while another program holds the database; then they are refused."""

HELD_PAUSE = 0.02
"""Seconds between two tries at a database that another program holds."""

TROUBLE_PAUSE = 1.0
"""Seconds between two looks at a database that takes nothing for another reason."""

_DAMAGE = (apsw.CorruptError, apsw.NotADBError)

_COURSES: dict[type[apsw.Error], str] = {
    apsw.CorruptError: "stop the daemon and restore a backup or a checkpoint",
    apsw.NotADBError: "stop the daemon and restore a backup or a checkpoint",
    apsw.ReadOnlyError: "make it and its folder writable",
    apsw.CantOpenError: "check that its folder exists and is writable",
    apsw.IOError: "look at the disk and the system's log",
}
"""The way out of a fault, by SQLite's kind of it."""


class Trouble(NamedTuple):
    """Why the database takes no changes, and since when on the loop's clock."""

    error: StoreError
    since: float
    held: bool
    """True if another program holds the write lock."""

    def told(self, holders: Iterable[int] = ()) -> str:
        """It in a sentence, with its duration and the holder of the lock, if that is known."""
        pids = ", ".join(str(pid) for pid in holders)
        who = f" (pid {pids})" if pids else ""
        lasted = asyncio.get_running_loop().time() - self.since
        return f"{self.error.message}{who}. No changes have been taken for {lasted:.0f} s"


class _Held(Exception):
    """Another program holds the write lock; the transaction was not begun."""


class _Operation(msgspec.Struct, frozen=True):
    """An operation, its future, and a flag if its answer is a promise that outlives a loss of power."""

    do: Callable[[], Any]
    future: asyncio.Future[Any]
    lasting: bool


class Committer:
    """Runs operations on the writing connection, in the order they come.

    With `durable`, a transaction with a lasting operation is synced to the disk before it is answered, and with it all
    that was committed before it. One without is in the log, and so outlives this process, but is not waited for.
    """

    def __init__(
        self,
        connection: apsw.Connection,
        ledger: Ledger,
        *,
        due: Callable[[], bool],
        between: Callable[[], None],
        lost: Callable[[], str | None],
        on_damage: Callable[[], None],
        durable: bool,
    ) -> None:
        """`between` is called off the loop and between two transactions, as soon as it is `due`. `lost` returns the
        reason if commits would be lost for other readers. `on_damage` is called when the database is found damaged.

        The connection must not wait for locks: that would hold the loop up.
        """
        self.damage: str | None = None
        """The damage found in the database. Nothing mends that while it is open."""
        self.commits = 0
        self.commit_seconds = 0.0
        """How many transactions were committed, and the time that it took."""
        self._connection = connection
        self._cursor = connection.cursor()
        self._ledger = ledger
        self._due = due
        self._between = between
        self._lost = lost
        self._on_damage = on_damage
        self._trouble: Trouble | None = None
        self._told = False
        """True if the log has the present trouble."""
        self._next_look: asyncio.TimerHandle | None = None
        self._log = structlog.get_logger("ksi.store")
        self._durable = durable
        self._syncs: bool | None = None
        """How the connection commits now."""
        self._unsynced = False
        """True if a commit is not known to be on the disk."""
        self._wary = False
        """True if the last fault is not followed by a sync yet: on a failing disk, nothing begins unsynced."""
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Operation] = deque()
        self._long: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._scheduled = False
        self._seen = 0
        """How many operations waited when the transaction was last put off."""
        self._put_off = 0
        self._committing: asyncio.Future[Any] | None = None
        self._commit_time = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ksi-commit")
        self._closed = False

    def submit(self, operation: Callable[[], T], *, lasting: bool = True) -> asyncio.Future[T]:
        """Run an operation in the next transaction; the future has its result once that is committed.

        `lasting`: false if its answer promises nothing; `Ledger.must_last` undoes that.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        if self._closed:
            future.set_exception(StoreUnavailable("the store is closed"))
            return future
        self._waiting.append(_Operation(operation, future, lasting))
        self._schedule()
        return future

    def submit_alone(self, operation: Callable[[], T]) -> asyncio.Future[T]:
        """Run a long operation in a transaction of its own, off the loop: operations submitted meanwhile wait.

        Whatever it raises, nothing of it is kept.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        if self._closed:
            future.set_exception(StoreUnavailable("the store is closed"))
            return future
        self._long.append((operation, future))
        self._schedule()
        return future

    @property
    def busy(self) -> bool:
        """True if a submitted operation is not answered yet."""
        return bool(self._waiting or self._long) or self._committing is not None

    @property
    def trouble(self) -> Trouble | None:
        """The reason why the database accepts no changes at the moment; None if it does, as far as is known."""
        trouble = self._trouble
        if trouble is not None and trouble.held and self._loop.time() - trouble.since < PATIENCE:
            return None
        return trouble

    def take_new_work(self) -> None:
        """Before work is accepted or begun.

        Raises:
            StoreUnavailable: the database is damaged. What runs may still try to write its end.
        """
        if self.damage is not None:
            raise StoreUnavailable(self.damage, reason="damaged", passes=False)

    def look_at_files(self) -> None:
        """Notice now, and not only with the next change, that commits would be lost for other readers."""
        lost = None if self._closed else self._lost()
        if lost is not None:
            self._refuse_all(StoreUnavailable(lost, reason="files_lost"))

    async def close(self) -> None:
        """Finish submitted operations, then accept no more."""
        while self.busy:
            # Faults of its own, if the database accepts nothing any more, belong to no caller.
            await asyncio.gather(self.submit(lambda: None), return_exceptions=True)
        self._closed = True
        if self._next_look is not None:
            self._next_look.cancel()
        self._thread.shutdown(wait=False)

    def _schedule(self) -> None:
        if not self._scheduled and self._committing is None:
            self._scheduled = True
            self._seen, self._put_off = len(self._waiting), 0
            self._loop.call_soon(self._gather)

    def _gather(self) -> None:
        """Begin a transaction when a turn of the loop brought nothing more, or after some turns that did."""
        waiting = len(self._waiting)
        if self._seen < waiting < BATCH and self._put_off < MOST_PUT_OFF:
            self._seen, self._put_off = waiting, self._put_off + 1
            self._loop.call_soon(self._gather)
        else:
            self._flush()

    def _flush(self) -> None:
        """One transaction."""
        self._scheduled = False
        if self._committing is not None or self._closed:
            return
        lost = self._lost()
        if lost is not None:
            self._refuse_all(StoreUnavailable(lost, reason="files_lost"))
            return
        if self._due():
            self._committing = self._loop.run_in_executor(self._thread, self._between)
            self._committing.add_done_callback(self._after_between)
            return
        if self._long:
            self._begin_long(*self._long.popleft())
            return
        batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
        if not batch and self._trouble is not None:
            batch = [self._look()]
        if batch:
            self._transact(batch)

    def _transact(self, batch: list[_Operation]) -> None:
        began = time.thread_time()
        try:
            answers = self._run(batch)
            if self._commit_time > SLOW_COMMIT or time.thread_time() - began > MUCH:
                self._commit_off_loop(batch, answers)
                return
            self._commit()
        except _Held:
            self._waiting.extendleft(reversed(batch))
            self._wait_for_lock()
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, the transaction must not stay open
            self._one_by_one(batch, error)
            return
        self._answer(batch, answers)

    def _after_between(self, done: asyncio.Future[None]) -> None:
        self._committing = None
        if self._waiting or self._long:
            self._schedule()
        done.result()

    # -- when the database takes nothing ------------------------------------------------------------------------------

    def _wait_for_lock(self) -> None:
        """Try again soon, without holding the loop up. Operations that have waited too long are refused, and so are new
        ones."""
        if self._trouble is None or not self._trouble.held:
            error = StoreUnavailable("another program holds the database for writing", reason="held")
            self._trouble = Trouble(error, self._loop.time(), held=True)
        if self._loop.time() - self._trouble.since >= PATIENCE:
            self._refuse_all(self._trouble.error)
        self._look_again(HELD_PAUSE)

    def _refuse_all(self, error: StoreError) -> None:
        """Nothing that waits was begun: refuse it, and look whether the cause goes away."""
        self._note(error)
        refused = [operation.future for operation in self._waiting] + [future for _, future in self._long]
        self._waiting.clear()
        self._long.clear()
        for future in refused:
            self._fail(future, error)
        self._look_again(TROUBLE_PAUSE)

    def _note(self, error: BaseException) -> None:
        """Remember why the database takes nothing, and look again by and by; a fault of one operation is none."""
        if isinstance(error, _DAMAGE):
            self.note_damage(error)
        told = as_ksi_error(error)
        if not isinstance(told, StoreError) or isinstance(error, (apsw.ConstraintError, apsw.SQLError, *_DAMAGE)):
            return
        if self._trouble is None or self._trouble.error.message != told.message:
            since = self._loop.time() if self._trouble is None else self._trouble.since
            self._trouble = Trouble(told, since, held=False)
        self._tell()
        self._look_again(TROUBLE_PAUSE)

    def _tell(self) -> None:
        if not self._told and self.trouble is not None:
            self._told = True
            self._log.error("the database takes no changes", error=self.trouble.error.message)

    def note_damage(self, error: apsw.Error) -> None:
        """Remember that the database is broken, if this fault says so."""
        if isinstance(error, _DAMAGE) and self.damage is None:
            self.damage = f"the database is damaged ({error}). Stop the daemon and restore a backup or a checkpoint"
            self._log.error("the database is damaged", error=str(error))
            self._on_damage()

    def _look_again(self, pause: float) -> None:
        if self._next_look is None and not self._closed:
            self._next_look = self._loop.call_later(pause, self._look_now)

    def _look_now(self) -> None:
        self._next_look = None
        if self._trouble is not None and self._committing is None:
            self._flush()
        if self._trouble is not None:
            self._look_again(TROUBLE_PAUSE)

    def _look(self) -> _Operation:
        """A test write, to see if the database accepts it."""
        nobody: asyncio.Future[Any] = self._loop.create_future()
        nobody.cancel()
        return _Operation(self._ledger.touch, nobody, lasting=True)

    def _well(self) -> None:
        """A transaction was committed."""
        if self._trouble is not None:
            if self._told:
                seconds = round(self._loop.time() - self._trouble.since, 1)
                self._log.info("the database takes changes again", seconds=seconds)
            self._trouble, self._told = None, False

    # -- a transaction ------------------------------------------------------------------------------------------------

    def _run(self, batch: list[_Operation]) -> list[Any]:
        """Each operation's result, or the error that it decided on before it wrote."""
        lasting = self._wary or any(operation.lasting for operation in batch)
        answers = self._run_as(batch, lasting=lasting)
        if self._ledger.must_last and not lasting:
            # How a transaction is committed is settled before it begins.
            self._roll_back()
            answers = self._run_as(batch, lasting=True)
        return answers

    def _run_as(self, batch: list[_Operation], *, lasting: bool) -> list[Any]:
        self._begin(lasting=lasting)
        changes = self._connection.total_changes()
        answers: list[Any] = []
        for operation in batch:
            try:
                answers.append(operation.do())
            except ServiceError as error:
                answers.append(error)
        self._ledger.write_totals()
        if lasting and self._unsynced and self._connection.total_changes() == changes:
            # Only writes are synced; and an answer may depend on an earlier write.
            self._ledger.touch()
        return answers

    def _begin(self, *, lasting: bool) -> None:
        syncs = lasting and self._durable
        if syncs is not self._syncs:
            self._cursor.execute(f"PRAGMA synchronous = {'FULL' if syncs else 'NORMAL'}")
            self._syncs = syncs
        try:
            self._cursor.execute("BEGIN IMMEDIATE")
        except apsw.BusyError:
            raise _Held from None
        self._ledger.begin()

    def _commit(self) -> None:
        begun = time.perf_counter()
        self._cursor.execute("COMMIT")
        self._committed()
        # A moving average: one slow sync among many fast ones moves nothing off the loop.
        taken = time.perf_counter() - begun
        self._commit_time += (taken - self._commit_time) * 0.1
        self.commits += 1
        self.commit_seconds += taken

    def _committed(self) -> None:
        self._ledger.committed()
        self._unsynced = self._durable and not self._syncs
        self._wary = self._wary and not self._syncs

    def _commit_off_loop(self, batch: list[_Operation], answers: list[Any]) -> None:
        self._committing = self._loop.run_in_executor(self._thread, self._commit)
        self._committing.add_done_callback(lambda done: self._after_commit(done, batch, answers))

    def _after_commit(self, done: asyncio.Future[None], batch: list[_Operation], answers: list[Any]) -> None:
        self._committing = None
        error = done.exception()
        if error is None:
            self._answer(batch, answers)
        else:
            self._one_by_one(batch, error)
        if self._waiting or self._long:
            self._schedule()

    def _begin_long(self, operation: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        try:
            self._begin(lasting=True)
        except _Held:
            self._long.appendleft((operation, future))
            self._wait_for_lock()
            return
        except Exception as error:  # noqa: BLE001 - answered to whom it belongs
            self._note(error)
            self._fail(future, error)
            return
        self._committing = self._loop.run_in_executor(self._thread, self._run_long, operation)
        self._committing.add_done_callback(lambda done: self._after_long(done, future))

    def _run_long(self, operation: Callable[[], Any]) -> Any:
        try:
            answer = operation()
            self._ledger.write_totals()
            self._cursor.execute("COMMIT")
            self._committed()
        except BaseException:
            self._roll_back()
            raise
        return answer

    def _after_long(self, done: asyncio.Future[Any], future: asyncio.Future[Any]) -> None:
        self._committing = None
        error = done.exception()
        if error is not None:
            self._note(error)
            self._fail(future, error)
        else:
            self._well()
            if not future.done():
                future.set_result(done.result())
        if self._waiting or self._long:
            self._schedule()

    def _answer(self, batch: list[_Operation], answers: list[Any]) -> None:
        self._well()
        for operation, answer in zip(batch, answers, strict=True):
            if operation.future.done():
                continue
            if isinstance(answer, ServiceError):
                operation.future.set_exception(answer)
            else:
                operation.future.set_result(answer)
        if self._waiting:
            self._schedule()

    def _roll_back(self) -> None:
        if self._connection.in_transaction:
            self._cursor.execute("ROLLBACK")
        self._ledger.rolled_back()

    def _one_by_one(self, batch: list[_Operation], cause: BaseException) -> None:
        """After a fault of the whole: each operation alone, so that only the guilty one fails."""
        left = deque(batch)
        self._wary = self._unsynced = self._durable
        try:
            self._roll_back()
            self._note(cause)
            if len(left) == 1:
                self._fail(left.popleft().future, cause)
            while left:
                self._run_alone(left[0])
                left.popleft()
        except _Held:
            self._waiting.extendleft(reversed(left))
            self._wait_for_lock()
            return
        except Exception as error:  # noqa: BLE001 - it cannot even be rolled back: no caller must wait for ever
            self._note(error)
            for operation in left:
                self._fail(operation.future, error)
        if self._waiting:
            self._schedule()

    def _run_alone(self, operation: _Operation) -> None:
        """A transaction for one."""
        try:
            answers = self._run([operation])
            self._commit()
        except _Held:
            raise
        except Exception as error:  # noqa: BLE001 - answered to whom it belongs
            self._roll_back()
            self._note(error)
            self._fail(operation.future, error)
        else:
            self._answer([operation], answers)

    def _fail(self, future: asyncio.Future[Any], error: BaseException) -> None:
        if not future.done():
            future.set_exception(as_ksi_error(error))


def as_ksi_error(error: BaseException) -> BaseException:
    """An SQLite fault in the terms of the error tree; anything else as it is."""
    if not isinstance(error, apsw.Error):
        return error
    if isinstance(error, apsw.FullError):
        return StoreFull("the disk of the database is full; free some space and try again")
    facts = {"passes": False} if isinstance(error, _DAMAGE) else {}
    course = _COURSES.get(type(error), "see `ksi health`")
    return StoreUnavailable(f"the database could not be used ({error}): {course}", reason=type(error).__name__, **facts)
