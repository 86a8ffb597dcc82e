"""The client for scripts without asyncio: each call waits. An asyncio client does the work, on a thread of its own."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from ksi.client.channel import Event
from ksi.client.client import Client
from ksi.client.fields import CompletionFields
from ksi.client.handle import Chunk, Handle
from ksi.client.lock import Lock
from ksi.errors import ConnectionFailed
from ksi.events.completions import CancelReply, RequestReply
from ksi.protocol import MAX_LINE

T = TypeVar("T")


class BlockingClient:
    """`with ksi.BlockingClient() as client: print(client.complete("Hello").result)`

    It takes the arguments of `Client`, and its methods have the same meaning and errors. May be used by several
    threads. Ctrl-C interrupts the wait, not the request.
    """

    def __init__(
        self,
        socket_path: str | os.PathLike[str] | None = None,
        *,
        home: str | os.PathLike[str] | None = None,
        url: str | None = None,
        token: str | None = None,
        patience: float = 30.0,
        max_line: int = MAX_LINE,
    ) -> None:
        self._client = Client(socket_path, home=home, url=url, token=token, patience=patience, max_line=max_line)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Connect, at once or not at all.

        Raises:
            ConnectionFailed: no daemon listens there.
        """
        if self._loop is not None:
            return
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ksi-client", daemon=True)
        self._thread.start()
        try:
            self.run(self._client.open())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let the connection go. Again is harmless."""
        loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        try:
            self.run(self._client.close())
        finally:
            self._loop = self._thread = None
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    def send_event(
        self, name: str, data: Mapping[str, Any] | None = None, *, timeout: float | None = None
    ) -> dict[str, Any]:
        """See `Client.send_event`."""
        return self.run(self._client.send_event(name, data, timeout=timeout))

    def complete(self, prompt: str | None = None, **fields: Unpack[CompletionFields]) -> RequestReply:
        """See `Client.complete`."""
        return self.run(self._client.complete(prompt, **fields))

    def submit(self, prompt: str | None = None, **fields: Unpack[CompletionFields]) -> BlockingHandle:
        """See `Client.submit`."""
        return BlockingHandle(self, self.run(self._client.submit(prompt, **fields)))

    def attach(self, request_id: str, *, stream: bool = False) -> BlockingHandle:
        """See `Client.attach`."""

        async def attach() -> Handle:
            return self._client.attach(request_id, stream=stream)

        return BlockingHandle(self, self.run(attach()))

    def get(self, request_id: str) -> RequestReply:
        """See `Client.get`."""
        return self.run(self._client.get(request_id))

    def cancel(self, request_id: str) -> CancelReply:
        """See `Client.cancel`."""
        return self.run(self._client.cancel(request_id))

    @contextmanager
    def subscribe(self, *patterns: str) -> Iterator[Iterator[Event]]:
        """See `Client.subscribe`: `with client.subscribe("completion:*") as events: for event in events: ...`"""

        async def subscribe() -> AsyncIterator[Event]:
            return await subscription.__aenter__()

        subscription = self._client.subscribe(*patterns)
        events = self.run(subscribe())
        try:
            yield self.iterate(events)
        finally:
            self.run(subscription.close())

    @contextmanager
    def lock(self, conversation_id: str, **options: Any) -> Iterator[Lock]:
        """See `Client.lock`: `with client.lock("name") as lock: ...`; renewed in the background."""
        lock = self._client.lock(conversation_id, **options)
        self.run(lock.__aenter__())
        try:
            yield lock
        except BaseException as error:
            self.run(lock.__aexit__(type(error), error, error.__traceback__))
            raise
        else:
            self.run(lock.__aexit__(None, None, None))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something on the client's loop and wait for it."""
        if self._loop is None:
            work.close()
            raise ConnectionFailed("the client is not open; use it inside `with ksi.BlockingClient() as client:`")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C: stop waiting there too
            raise

    def iterate(self, source: AsyncIterator[T]) -> Iterator[T]:
        """An asynchronous iterator as a plain one."""
        end = object()

        async def step() -> T | object:
            return await anext(source, end)

        while (item := self.run(step())) is not end:
            yield item  # type: ignore[misc]


class BlockingHandle:
    """A submitted request; see `Handle`."""

    def __init__(self, client: BlockingClient, handle: Handle) -> None:
        self._client = client
        self._handle = handle

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self._handle.request_id

    @property
    def session_id(self) -> str | None:
        """The conversation's name."""
        return self._handle.session_id

    @property
    def submitted(self) -> Mapping[str, Any]:
        """The daemon's answer to the submission."""
        return self._handle.submitted

    @property
    def done(self) -> bool:
        """True if its end is known here."""
        return self._handle.done

    def wait(self, timeout: float | None = None) -> RequestReply:
        """See `Handle.wait`."""
        return self._client.run(self._handle.wait(timeout))

    def result(self, timeout: float | None = None) -> RequestReply:
        """See `Handle.result`."""
        return self._client.run(self._handle.result(timeout))

    def cancel(self) -> CancelReply:
        """See `Handle.cancel`."""
        return self._client.run(self._handle.cancel())

    def chunks(self) -> Iterator[Chunk]:
        """See `Handle.chunks`."""
        return self._client.iterate(self._handle.chunks())

    def stream(self) -> Iterator[str]:
        """See `Handle.stream`."""
        return self._client.iterate(self._handle.stream())
