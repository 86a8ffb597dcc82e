"""A conversation's lock held for work outside KSI, renewed while it is held."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from ksi.clock import Clock
from ksi.errors import ConnectionFailed, ConversationBusy, KsiError, NotLockHolder, RemoteError, WaitTimeout

RENEWALS = 3
"""How often a lock is renewed within its time."""


class LockClient(Protocol):
    """The part of its client that a lock uses."""

    async def send_event(
        self, name: str, data: Mapping[str, Any] | None = None, *, timeout: float | None = None
    ) -> dict[str, Any]:
        """Send an event."""
        ...

    def expect_lock(self, lock: Lock) -> None:
        """Call its `granted` when the daemon says so, and its `rejoin` after a lost connection."""
        ...

    def forget_lock(self, lock: Lock) -> None:
        """Do so no longer."""
        ...

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Do some work apart, at most as long as the client is open."""
        ...


class Lock:
    """`async with client.lock("conversation") as lock:` waits for the lock, renews it, and gives it back."""

    def __init__(
        self,
        client: LockClient,
        clock: Clock,
        conversation_id: str,
        request_id: str,
        *,
        wait: bool,
        timeout: float | None,
        priority: str | None,
        metadata: Mapping[str, Any] | None,
    ) -> None:
        self.conversation_id = conversation_id
        self.request_id = request_id
        """The holder's name."""
        self.fence: int | None = None
        self.lost = False
        """True if a renewal was refused because another holds the lock or it has expired: stop writing."""
        self.in_line = False
        """True while it waits for another holder to release the lock."""
        self._client = client
        self._clock = clock
        self._timeout = timeout
        self._wish: dict[str, Any] = {"request_id": request_id, "conversation_id": conversation_id, "wait": wait}
        if timeout is None:
            self._wish["while_connected"] = True
        for name, value in (("timeout", timeout), ("priority", priority), ("metadata", metadata)):
            if value is not None:
                self._wish[name] = value
        self._renewer: asyncio.Task[None] | None = None
        self._granted: asyncio.Future[Mapping[str, Any]] | None = None

    async def __aenter__(self) -> Self:
        """Take the lock.

        Raises:
            WaitTimeout: it did not become free within `timeout` seconds.
            ConversationBusy: it is taken, and `wait` is false.
            RemoteError: the daemon said no.
        """
        reply: Mapping[str, Any]
        self._granted = asyncio.get_running_loop().create_future()
        self._client.expect_lock(self)
        try:
            reply = await self._client.send_event("conversation:acquire_lock", self._wish)
            if not reply["acquired"]:
                if reply["state"] != "queued":
                    raise self._busy(reply.get("holder"))
                self.in_line = True
                reply = await self._await(self._granted)
        finally:
            self.in_line = False
            self._client.forget_lock(self)
        self._held(reply)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give it back.

        Raises:
            NotLockHolder: it had been lost; work done under it may conflict with another writer's.
        """
        if self._renewer is not None:
            self._renewer.cancel()
            await asyncio.wait([self._renewer])
        try:
            await self._release()
        except KsiError as failure:
            if error is None:
                raise
            error.add_note(f"and the lock of {self.conversation_id} could not be given back: {failure}")

    def granted(self, data: Mapping[str, Any]) -> None:
        """It has the lock, the daemon says."""
        if self._granted is not None and not self._granted.done():
            self._granted.set_result(data)

    def fail(self, error: KsiError) -> None:
        """It will not hear whether it gets the lock."""
        if self._granted is not None and not self._granted.done():
            self._granted.set_exception(error)
            self._granted.exception()  # read here too: the wait may not have begun

    async def rejoin(self) -> None:
        """Ask again over a new connection: the daemon drops who waits as long as the old one lasts."""
        try:
            reply = await self._client.send_event("conversation:acquire_lock", self._wish)
        except KsiError as error:
            self.fail(error)
        else:
            if reply["acquired"]:
                self.granted(reply)

    async def _await(self, granted: asyncio.Future[Mapping[str, Any]]) -> Mapping[str, Any]:
        try:
            async with asyncio.timeout(self._timeout):
                return await granted
        except TimeoutError:
            await self._leave_line()
            raise WaitTimeout(
                f"conversation {self.conversation_id} did not become free within {self._timeout or 0:g} s"
            ) from None
        except asyncio.CancelledError:
            self._client.start(self._leave_line())
            raise

    async def _leave_line(self) -> None:
        """Wait no longer, and hold nothing should the lock have come at this moment."""
        # Nothing is lost if the daemon does not get it: it drops a waiter with its connection or after its timeout.
        with contextlib.suppress(ConnectionFailed, RemoteError):
            await self._client.send_event("completion:cancel", {"request_id": self.request_id})

    def _held(self, reply: Mapping[str, Any]) -> None:
        self.fence = reply.get("fence")
        expires_at = reply.get("expires_at")
        if expires_at is not None:
            lifetime = max(0.0, expires_at - self._clock.now().unix)
            self._renewer = asyncio.get_running_loop().create_task(
                self._renew(lifetime / RENEWALS), name=f"ksi-client-renew-{self.request_id}"
            )

    async def _renew(self, every: float) -> None:
        while not self.lost:
            await self._clock.sleep(every)
            try:
                await self._client.send_event("conversation:renew_lock", self._holder())
            except KsiError as error:
                # Retryable errors are retried: the lock lasts longer than one renewal.
                self.lost = not error.retryable

    async def _release(self) -> None:
        try:
            await self._client.send_event("conversation:release_lock", self._holder())
        except ConnectionFailed:
            # The outcome is unknown: ask once more, and a "not yours" then means that it was released.
            try:
                await self._client.send_event("conversation:release_lock", self._holder())
            except RemoteError as error:
                if self.lost or error.code != NotLockHolder.code:
                    raise

    def _busy(self, holder: str | None) -> ConversationBusy:
        return ConversationBusy(
            f"conversation {self.conversation_id} is held by {holder}; wait for it or ask later",
            conversation_id=self.conversation_id,
            holder=holder,
        )

    def _holder(self) -> dict[str, Any]:
        holder: dict[str, Any] = {"request_id": self.request_id}
        return holder if self.fence is None else {**holder, "fence": self.fence}
