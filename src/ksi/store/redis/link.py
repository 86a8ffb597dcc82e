"""One connection to a Redis or Valkey server: calls of one turn of the event loop go out together, in order.

Changes go in bundles, each one call of a function: while some are under way, the next one gathers. A call without an
answer is sent again when the server is back, until its answer is known: the function remembers its answers.
"""

from __future__ import annotations

import asyncio
import math
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import hiredis
import structlog
from redis import exceptions
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    TryAgainError,
)

from ksi.errors import InternalError, KsiError, StoreFull, StoreUnavailable
from ksi.store.redis.address import CONNECT_TIME, Address
from ksi.store.redis.library import Library
from ksi.store.redis.wire import Wire

UNDER_WAY = 256
"""Calls that are sent before the first one's answer has come."""

BUNDLES = 3
"""Bundles among them: the server has one in work, and at least one more waits there."""

BUNDLE = 32
"""Maximum number of changes in one bundle: the server serves no other call meanwhile."""

BUNDLE_BYTES = 262_144
"""A bundle that is as large takes no more."""

QUIET = 0.05
"""Seconds of silence, while it owes answers, after which a server gets no more calls: unsent ones can be refused."""

ANSWER_TIME = 10.0
"""Seconds in which a server answers something; then the connection is taken for dead."""

PATIENCE = 10.0
"""Seconds for which a call that was not sent yet waits for the server. One that was sent waits for its answer."""

WRONG = "is it a Redis or Valkey server, and does store.url ask for TLS (rediss://) exactly if it has TLS?"
"""Advice if a server never answered."""

_PAUSES = (0.0, 0.05, 0.1, 0.2, 0.5)
"""Seconds between tries to connect; the last one is repeated."""

_GONE = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.InvalidResponse,
    hiredis.ProtocolError,
    OSError,
    TimeoutError,
)
_ELSEWHERE = (AskError, ClusterDownError, MasterDownError, ReadOnlyError, TryAgainError)
_BROKEN_OFF = (ssl.SSLEOFError, ssl.SSLSyscallError, ssl.SSLZeroReturnError)


class Call:
    """One command on its way."""

    __slots__ = ("command", "future", "sent", "until")

    def __init__(self, command: tuple[Any, ...], future: asyncio.Future[Any], until: float) -> None:
        self.command = command
        self.future = future
        self.until = until
        self.sent = 0
        """How often it may have been served."""

    @property
    def wanted(self) -> bool:
        """True if it is still to be sent: the answer of a cancelled call is of no use."""
        return self.sent > 0 or not self.future.cancelled()

    def answered(self, answer: Any) -> None:
        """Resolve the future with the server's answer."""
        if not self.future.done():
            self.future.set_result(answer)

    def failed(self, error: KsiError) -> None:
        """Fail the future: there is no answer."""
        if not self.future.done():
            self.future.set_exception(error)


class Change:
    """A request for a bundle: its verb, and its arguments as the function takes them."""

    __slots__ = ("future", "parts", "until", "verb")

    def __init__(self, verb: str, parts: Sequence[bytes | str], future: asyncio.Future[Any], until: float) -> None:
        self.verb = verb
        self.parts = parts
        self.future = future
        self.until = until

    def answered(self, answer: Any) -> None:
        """Resolve the future with its part of the server's answer."""
        if self.future.done():
            return
        if isinstance(answer, Exception):
            self.future.set_exception(InternalError(f"the server's answer: {answer}"))
        else:
            self.future.set_result(answer)

    def failed(self, error: KsiError) -> None:
        """Fail the future: there is no answer."""
        if not self.future.done():
            self.future.set_exception(error)


class Bundle(Call):
    """Changes that are one call. It stays as it is, whenever it is sent: the function knows it by its number."""

    __slots__ = ("changes",)

    def __init__(self, command: tuple[Any, ...], changes: Sequence[Change], future: asyncio.Future[Any]) -> None:
        super().__init__(command, future, min(change.until for change in changes))
        self.changes = changes

    def answered(self, answer: Any) -> None:
        """Give each its own."""
        for change, own in zip(self.changes, answer, strict=True):
            change.answered(own)

    def failed(self, error: KsiError) -> None:
        """Tell all."""
        for change in self.changes:
            change.failed(error)


Bundling = Callable[[Sequence[Change]], tuple[bytes | str, ...]]
"""Makes the key and the arguments of the function `change`."""


class Link:
    """Sends commands and brings answers, over one server's restart or many."""

    def __init__(self, address: Address, library: Library, name: str, bundling: Bundling) -> None:
        self._address = address
        self._library = library
        self._name = name
        self._bundling = bundling
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Call] = deque()
        """Calls to send, before all changes that are in no bundle yet."""
        self._changes: deque[Change] = deque()
        self._flying: deque[Call] = deque()
        """Calls in flight: sent and not answered."""
        self._bundles = 0
        """How many of those are bundles."""
        self._missing: list[Call] = []
        """Calls rejected because the library was not loaded."""
        self._unsure: list[Call] = []
        """Calls that the server rejects and may have executed before. All else waits for these: it keeps few
        answers."""
        self._wire: Wire | None = None
        self._wake = asyncio.Event()
        self._arranged = False
        self._heard = 0.0
        """When the server last said something, or was asked while it owed nothing."""
        self._failures = 0
        self._met = False
        """True if it ever answered."""
        self._hurry: float | None = None
        """How long a server that is away is waited for, now that the end has come."""
        self._hurried_at = 0.0
        self._closed = False
        self._log = structlog.get_logger("ksi.redis")
        self._task = asyncio.create_task(self._serve(), name=f"ksi-redis-{name}")
        self.trouble = ""
        """Why the server was away when that was last noticed."""

    @property
    def away(self) -> str | None:
        """The reason why the server cannot be reached now; None if it can, as far as is known."""
        return self._away().message if self._wire is None and self._failures else None

    def submit(self, *command: Any) -> asyncio.Future[Any]:
        """Send a command with the next batch.

        The future raises StoreUnavailable if the server is away, StoreFull if it is full.
        """
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._closed:
            future.set_exception(StoreUnavailable("the store is closed"))
        else:
            self._queue.append(Call(command, future, self._loop.time() + PATIENCE))
            self._arrange()
        return future

    def fcall(self, verb: str, namespace: str, *args: bytes | str) -> asyncio.Future[Any]:
        """Call one of the library's functions."""
        return self.submit("FCALL", self._library.function(verb), 1, namespace, *args)

    def change(self, verb: str, *parts: bytes | str) -> asyncio.Future[Any]:
        """Let the function `change` serve this, with others. The future raises the same errors as `submit`."""
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._closed:
            future.set_exception(StoreUnavailable("the store is closed"))
        else:
            self._changes.append(Change(verb, parts, future, self._loop.time() + PATIENCE))
            self._arrange()
        return future

    def hurry(self, seconds: float) -> None:
        """The stop is near: give up calls that a server has owed for this long."""
        self._hurry, self._hurried_at = seconds, self._loop.time()
        self._loop.call_later(seconds, self._hurried)

    def _hurried(self) -> None:
        if self._wire is None:
            self._let_go(self._away(), self._loop.time())
        elif self._flying and self._loop.time() - self._heard >= QUIET:
            self._over(TimeoutError("no answer"))

    async def close(self) -> None:
        """Accept no more calls, and disconnect. Calls in flight are not awaited."""
        self._closed = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._take_back()
        closed = StoreUnavailable("the store is closed")
        waiting: tuple[Call | Change, ...] = (*self._queue, *self._unsure, *self._changes)
        for one in waiting:
            one.failed(closed)
        self._queue.clear()
        self._unsure.clear()
        self._changes.clear()

    # -- sending ------------------------------------------------------------------------------------------------------

    def _arrange(self) -> None:
        """Send when this turn of the loop is over."""
        if self._wire is None:
            self._wake.set()
        elif not self._arranged:
            self._arranged = True
            self._loop.call_soon(self._send)

    def _send(self) -> None:
        """Send the calls that may go now."""
        self._arranged = False
        wire = self._wire
        if wire is None or wire.full or self._unsure:
            return
        if self._missing and not self._flying:
            self._queue.extendleft(reversed(self._missing))
            self._missing.clear()
            nobody: asyncio.Future[Any] = self._loop.create_future()
            nobody.set_result(None)
            self._queue.appendleft(Call(("FUNCTION", "LOAD", "REPLACE", self._library.text), nobody, 0.0))
        if self._missing:
            return
        now = self._loop.time()
        if not self._flying:
            self._heard = now
        elif now - self._heard >= QUIET:
            return
        packed = []
        while len(self._flying) < UNDER_WAY and (call := self._next()) is not None:
            call.sent += 1
            self._bundles += isinstance(call, Bundle)
            self._flying.append(call)
            packed.append(hiredis.pack_command(call.command))
        if packed:
            wire.write(b"".join(packed))

    def _next(self) -> Call | None:
        """The calls to send now; None if there are none, or a bundle waits until others were answered."""
        while self._queue:
            call = self._queue.popleft()
            if call.wanted:
                return call
        if not self._changes or self._bundles >= BUNDLES:
            return None
        found: list[Change] = []
        size = 0
        while self._changes and len(found) < BUNDLE and size < BUNDLE_BYTES:
            change = self._changes.popleft()
            if not change.future.cancelled():
                found.append(change)
                size += sum(map(len, change.parts))
        if not found:
            return None
        command = ("FCALL", self._library.function("change"), 1, *self._bundling(found))
        return Bundle(command, found, self._loop.create_future())

    # -- answers ------------------------------------------------------------------------------------------------------

    def _answer(self, answer: Any) -> None:
        """The server said something: to the call that waits longest."""
        if not isinstance(answer, Exception):
            self._landed().answered(answer)
        elif isinstance(answer, (MovedError, *_ELSEWHERE, exceptions.ConnectionError)):
            self._over(answer)
        elif self._flying[0].command[0] == "FUNCTION":
            self._landed()
            self._over(StoreUnavailable(f"{self._address} does not take KSI's functions: {answer}"))
        elif "function not found" in str(answer).lower():
            call = self._landed()
            call.sent -= 1
            self._missing.append(call)
        else:
            self._refusal(self._landed(), answer)

    def _refusal(self, call: Call, answer: Exception) -> None:
        """The server refuses a call. If it may have served it before, only its answer can say."""
        refusal = _as_ksi_error(answer)
        if call.sent == 1 or isinstance(refusal, InternalError):
            call.failed(refusal)
            return
        self.trouble = str(answer)
        if call.sent == 2:
            self._log.warning("the server refuses a call that it may have executed; retrying", error=self.trouble)
        if not self._unsure:
            self._loop.call_later(_PAUSES[-1], self._ask_on)
        self._unsure.append(call)

    def _ask_on(self) -> None:
        self._queue.extendleft(reversed(self._unsure))
        self._unsure.clear()
        self._arrange()

    def _landed(self) -> Call:
        call = self._flying.popleft()
        self._bundles -= isinstance(call, Bundle)
        return call

    def _over(self, error: Exception) -> None:
        if self._wire is not None:
            self._wire.fail(error)

    def _ready(self) -> None:
        """Answers came: there is room for more."""
        self._heard = self._loop.time()
        self._met = True
        self._failures = 0
        if self._queue or self._changes or self._missing:
            self._arrange()

    def _take_back(self) -> None:
        """Send unanswered calls again first."""
        self._queue.extendleft(reversed((*self._flying, *self._missing)))
        self._flying.clear()
        self._missing.clear()
        self._bundles = 0

    # -- the loop -----------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue or self._changes:
                await self._deliver()

    async def _deliver(self) -> None:
        """Send and take answers until the connection is over."""
        try:
            raise await self._exchange()
        except KsiError as error:
            await self._refused(error)
        except MovedError as moved:
            self._address.moved(moved.host, moved.port)
        except (*_GONE, *_ELSEWHERE) as error:
            await self._lost(error)

    async def _exchange(self) -> BaseException:
        """Serve over one connection; why it is over."""
        self._wire = wire = await self._connected()
        try:
            self._send()
            while True:
                rest = patience = ANSWER_TIME if self._hurry is None else min(self._hurry, ANSWER_TIME)
                if self._flying:
                    rest -= self._loop.time() - self._heard
                if rest <= 0:
                    return TimeoutError(f"no answer for {patience:g} s")
                done, _ = await asyncio.wait({wire.lost}, timeout=rest)
                if done:
                    return wire.lost.result()
        finally:
            self._wire = None
            self._take_back()
            await self._disconnect(wire)

    # -- the connection -------------------------------------------------------------------------------------------

    async def _connected(self) -> Wire:
        try:
            connection = await self._address.connect()
        except exceptions.ConnectionError as error:
            advice = _advice(error)
            if advice is None:
                raise
            self.trouble = advice
            raise StoreUnavailable(f"{self._address}: {advice}") from None
        if self._failures:
            try:
                # Unsent calls must not be tied to a server that accepts connections and stays silent.
                await self._ping(connection)
            except BaseException:
                await connection.disconnect(nowait=True)
                raise
            self._log.info("the server is back", link=self._name, server=str(self._address))
        return Wire(connection, self._answer, self._ready)

    async def _ping(self, connection: AbstractConnection) -> None:
        async with asyncio.timeout(CONNECT_TIME):
            await connection.send_command("PING")
            await connection.read_response(timeout=math.inf)

    async def _disconnect(self, wire: Wire) -> None:
        try:
            await wire.close()
        except (RedisError, OSError) as error:
            self._log.debug("connection not closed in order", error=str(error))

    async def _lost(self, error: BaseException) -> None:
        """The server is away: fail calls that have waited too long, and pause before the next try."""
        self._address.lost()
        self.trouble = _word(error)
        if self._failures == 0:
            self._log.error(
                "the server is away, trying again", link=self._name, server=str(self._address), error=self.trouble
            )
        pause = _PAUSES[min(self._failures, len(_PAUSES) - 1)]
        self._failures += 1
        self._let_go(self._away(), self._loop.time())
        await asyncio.sleep(pause)

    def _away(self) -> StoreUnavailable:
        advice = "try again when it is back" if self._met else WRONG
        return StoreUnavailable(f"{self._address} is away ({self.trouble}); {advice}")

    async def _refused(self, error: KsiError) -> None:
        """The server will not have us. Calls that it may have executed are kept and retried."""
        self._let_go(error)
        if self._queue:
            self._failures += 1
            await asyncio.sleep(_PAUSES[-1])

    def _let_go(self, error: KsiError, now: float | None = None) -> None:
        """Fail unsent calls: those past their deadline, or all if `now` is None. At the stop, fail sent ones too."""

        def kept(one: Call | Change) -> bool:
            if self._hurry is not None:
                born = one.until - PATIENCE
                return now is not None and now < max(born, self._hurried_at) + self._hurry
            return (isinstance(one, Call) and one.sent > 0) or (now is not None and now < one.until)

        waiting: tuple[Call | Change, ...] = (*self._queue, *self._changes)
        self._queue = deque(call for call in self._queue if kept(call))
        self._changes = deque(change for change in self._changes if kept(change))
        for one in waiting:
            if not kept(one):
                one.failed(error)


def _word(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _advice(error: exceptions.ConnectionError) -> str | None:
    """Advice about a server that rejects us or cannot be trusted; None if it is just away."""
    # All of this comes wrapped as a lost connection.
    reason = error.__cause__ or error.__context__ or error
    if isinstance(reason, AuthenticationError):
        return f"{reason} Put user and password into store.url"
    if isinstance(reason, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not trusted ({reason.verify_message}). Add ?ssl_ca_certs=/path to store.url with the "
            "authority that signed it, and call the server by a name that the certificate has"
        )
    if isinstance(reason, ssl.SSLError) and not isinstance(reason, _BROKEN_OFF):
        return f"no TLS connection ({_word(reason)}). If it has no TLS, store.url must begin with redis:// instead"
    return None


def _as_ksi_error(error: Exception) -> KsiError:
    if isinstance(error, OutOfMemoryError):
        return StoreFull(f"the server has no room left ({error}); raise its maxmemory or shorten [retention]")
    word = str(error)
    if word.startswith(("MISCONF", "NOREPLICAS", "NOPERM", "NOAUTH", "BUSY")):
        return StoreUnavailable(f"the server refuses: {word}")
    return InternalError(f"the server's answer: {word}")
