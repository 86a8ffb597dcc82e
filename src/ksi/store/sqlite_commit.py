"""Group commit: the operations of one turn of the event loop share a transaction, and are answered after its commit."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import apsw

from ksi.errors import ServiceError, StoreFull, StoreUnavailable
from ksi.store.sqlite_ledger import Ledger

T = TypeVar("T")

BATCH = 256
"""Operations in one transaction, so that none waits long for its commit."""

SLOW_COMMIT = 0.004
"""Seconds: above this a commit is made off the loop, so that streams and renewals do not stall."""


class _Operation(NamedTuple):
    """What to do, whose answer it is, and whether that answer is a promise that outlives a loss of power."""

    do: Callable[[], Any]
    future: asyncio.Future[Any]
    lasting: bool


class Committer:
    """Runs operations on the writing connection, in the order they come.

    With `durable`, a transaction with a lasting operation is synced to the disk before it is answered, and with it all
    that was committed before it. One without is in the log, and so outlives this process, but is not waited for.
    """

    def __init__(
        self, connection: apsw.Connection, ledger: Ledger, *, between: Callable[[], None], durable: bool
    ) -> None:
        self._connection = connection
        self._cursor = connection.cursor()
        self._ledger = ledger
        self._between = between
        self._durable = durable
        self._syncs: bool | None = None
        """How the connection commits now."""
        self._unsynced = False
        """Whether something committed is not known to be on the disk."""
        self._wary = False
        """Whether the last fault is not followed by a sync yet: on a disk that fails, nothing is begun unsynced."""
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Operation] = deque()
        self._long: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._scheduled = False
        self._committing: asyncio.Future[Any] | None = None
        self._commit_time = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ksi-commit")
        self._closed = False

    def submit(self, operation: Callable[[], T], *, lasting: bool = True) -> asyncio.Future[T]:
        """Run an operation in the next transaction; the future has its result once that is committed.

        `lasting`: false where nobody is promised anything by its answer; `Ledger.must_last` takes that back.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        if self._closed:
            future.set_exception(StoreUnavailable("the store is closed"))
            return future
        self._waiting.append(_Operation(operation, future, lasting))
        self._schedule()
        return future

    def submit_alone(self, operation: Callable[[], T]) -> asyncio.Future[T]:
        """Run a long operation in a transaction of its own, off the loop: what is submitted meanwhile waits.

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
        """Whether something submitted is not answered yet."""
        return bool(self._waiting or self._long) or self._scheduled or self._committing is not None

    async def close(self) -> None:
        """Finish what was submitted, then take no more."""
        while self.busy:
            # Its own fault, where the database takes nothing any more, is nobody's.
            await asyncio.gather(self.submit(lambda: None), return_exceptions=True)
        self._closed = True
        self._thread.shutdown(wait=False)

    def _schedule(self) -> None:
        if not self._scheduled and self._committing is None:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """One transaction."""
        self._scheduled = False
        self._between()
        if self._long:
            self._begin_long(*self._long.popleft())
            return
        batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
        if not batch:
            return
        try:
            answers = self._run(batch)
            if self._commit_time > SLOW_COMMIT:
                self._commit_off_loop(batch, answers)
                return
            self._commit()
        except Exception as error:  # noqa: BLE001 - whatever it is, the transaction must not stay open
            self._one_by_one(batch, error)
            return
        self._answer(batch, answers)

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
            # Only what writes is synced; and an answer may tell of what was written before it.
            self._ledger.touch()
        return answers

    def _begin(self, *, lasting: bool) -> None:
        syncs = lasting and self._durable
        if syncs is not self._syncs:
            self._cursor.execute(f"PRAGMA synchronous = {'FULL' if syncs else 'NORMAL'}")
            self._syncs = syncs
        self._cursor.execute("BEGIN IMMEDIATE")
        self._ledger.begin()

    def _commit(self) -> None:
        begun = time.perf_counter()
        self._cursor.execute("COMMIT")
        self._committed()
        # A moving average: one slow sync among many fast ones moves nothing off the loop.
        self._commit_time += (time.perf_counter() - begun - self._commit_time) * 0.1

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
        self._committing = self._loop.run_in_executor(self._thread, self._run_long, operation)
        self._committing.add_done_callback(lambda done: self._after_long(done, future))

    def _run_long(self, operation: Callable[[], Any]) -> Any:
        try:
            self._begin(lasting=True)
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
            self._fail(future, error)
        elif not future.done():
            future.set_result(done.result())
        if self._waiting or self._long:
            self._schedule()

    def _answer(self, batch: list[_Operation], answers: list[Any]) -> None:
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
            if len(left) == 1:
                self._fail(left.popleft().future, cause)
            while left:
                self._run_alone(left[0])
                left.popleft()
        except Exception as error:  # noqa: BLE001 - it cannot even be rolled back: nobody must wait for ever
            for operation in left:
                self._fail(operation.future, error)
        if self._waiting:
            self._schedule()

    def _run_alone(self, operation: _Operation) -> None:
        """A transaction for one."""
        try:
            answers = self._run([operation])
            self._commit()
        except Exception as error:  # noqa: BLE001 - answered to whom it belongs
            self._roll_back()
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
    full = isinstance(error, apsw.FullError)
    if full:
        return StoreFull("no room left where the database is; free some space and try again")
    return StoreUnavailable(f"the database could not be used: {error}", reason=type(error).__name__)
