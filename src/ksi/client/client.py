"""The asyncio client: events and their replies, completions, submitted requests, pushed events, locks."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack
from weakref import WeakValueDictionary

from ksi.client.channel import Channel, Event
from ksi.client.fields import IDENTIFIED, REPEATABLE, CompletionFields
from ksi.client.handle import Handle, completed, read_reply
from ksi.client.link import Connect
from ksi.client.lock import Lock
from ksi.client.subscription import Subscription
from ksi.client.ways import TOKEN, HttpWay, by_http, by_socket_or_http, named_way, told_way
from ksi.clock import Chance, Clock, SystemClock
from ksi.errors import ConnectionFailed, KsiError
from ksi.events.completions import CancelReply, RequestReply
from ksi.protocol import MAX_LINE
from ksi.request import FINAL_STATES

MAX_UNREAD = 64 * 1024 * 1024
_FINAL = frozenset(state.value for state in FINAL_STATES)


class Client:
    """A connection to the daemon that comes back when it is lost.

    `async with ksi.Client() as client: print((await client.complete("Hello")).result)`

    Args:
        socket_path: the daemon's socket; without it the configuration of `home` names it.
        home: KSI's home; without it KSI_HOME, the nearest folder upward with a ksi.toml, or the user's data folder.
        url, token: the daemon's address by HTTP and its token; then no socket is tried. Without `token` it is
            KSI_TOKEN. Without `url`, HTTP is tried if the socket cannot be reached: at the address in a file next to
            the socket, or, if no home and no socket were named, at KSI_URL.
        patience: seconds for which a lost connection is retried before pending calls fail. max_line: bytes in one
        event, both ways. max_unread: bytes of events that a subscription holds for a slow reader. clock, chance,
        connect: time, randomness and how a connection is made, for tests. on_lost: called when the connection is lost,
        before it is tried again.

    Completions get a `request_id` from here where the caller gives none, so that asking again after a lost connection
    finds the same request and never starts a second. Letting a client go cancels nothing.
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
        max_unread: int = MAX_UNREAD,
        clock: Clock | None = None,
        chance: Chance | None = None,
        connect: Connect | None = None,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        self.socket_path, way = _ways(socket_path, home, url, token)
        self._clock = clock if clock is not None else SystemClock()
        self._chance = chance if chance is not None else Chance()
        self._max_unread = max_unread
        self._on_lost = on_lost
        self._channel = Channel(
            self.socket_path,
            self,
            connect=connect if connect is not None else way,
            clock=self._clock,
            chance=self._chance,
            patience=patience,
            max_line=max_line,
        )
        # Weak: a handle that its owner dropped needs no answer any more.
        self._handles: WeakValueDictionary[str, Handle] = WeakValueDictionary()
        self._subscriptions: set[Subscription] = set()
        self._patterns: Counter[str] = Counter()
        self._waiting: dict[str, Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Connect, at once or not at all.

        Raises:
            ConnectionFailed: no daemon listens there.
        """
        await self._channel.open()

    async def close(self) -> None:
        """Close the connection; pending calls fail with ConnectionFailed. Again is harmless."""
        await self._channel.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self.on_down(ConnectionFailed("the client was closed"))

    async def send_event(
        self, name: str, data: Mapping[str, Any] | None = None, *, timeout: float | None = None
    ) -> dict[str, Any]:
        """Send an event and return its reply's data, exactly as the daemon sent it.

        Args:
            name: as `completion:status`.
            data: the event's fields.
            timeout: seconds to wait for the reply.

        Raises:
            RemoteError: the daemon answered with an error; see `code`, `message`, `details`, `retryable`.
            WaitTimeout: no reply in time.
            ConnectionFailed: the daemon is gone; or it was lost before the reply to an event that must not be sent
                twice (see `ksi.client.fields.ONCE`; events unknown to this client count as such).
            PayloadTooLarge, InvalidData: the event cannot be sent.
        """
        fields = dict(data or {})
        if name in IDENTIFIED and fields.get("request_id") is None:
            fields["request_id"] = self._new_id("req")
        return await self._channel.call(name, fields, repeatable=name in REPEATABLE, timeout=timeout)

    async def complete(self, prompt: str | None = None, **fields: Unpack[CompletionFields]) -> RequestReply:
        """Ask for a completion and wait for it; the text is in `.result`.

        To stop waiting after some time, use `asyncio.timeout`, or `submit` and `Handle.result`: the request continues.
        The field `timeout` is the provider's.

        Raises:
            RemoteError: the request failed, was cancelled or blocked, or expired; `code` says why.
            As `send_event`.
        """
        data = await self.send_event("completion:request", _request(prompt, fields))
        return completed(read_reply(data, RequestReply))

    async def submit(self, prompt: str | None = None, **fields: Unpack[CompletionFields]) -> Handle:
        """Put a completion request into the queue and return as soon as the daemon has it.

        With `stream=True` the answer's text can be read as it comes, by `Handle.stream`.

        Raises:
            As `send_event`.
        """
        data = _request(prompt, fields)
        data.setdefault("request_id", self._new_id("req"))
        handle, known = self._handle(data["request_id"])
        replay = self._ask_stream(handle, bool(data.get("stream"))) and known
        connection = self._channel.generation
        try:
            reply = await self.send_event("completion:async", data)
        except BaseException:
            if not known:
                self._handles.pop(handle.request_id, None)
            raise
        handle.submitted = reply
        handle.session_id = reply.get("session_id", handle.session_id)
        if reply.get("state", reply.get("status")) in _FINAL or connection != self._channel.generation or replay:
            # It was there already, or its result may have been sent to a connection that is gone.
            self._follow(handle, again=replay)
        return handle

    def attach(self, request_id: str, *, stream: bool = False) -> Handle:
        """A handle on a request that was submitted elsewhere or before; an unknown id shows in its `result`."""
        handle, known = self._handle(request_id)
        replay = self._ask_stream(handle, stream)
        if replay or not known:
            self._follow(handle, again=replay)
        return handle

    async def get(self, request_id: str) -> RequestReply:
        """A request as it stands, with its result once it has one.

        Raises:
            As `send_event`; RemoteError `not_found` for an unknown id.
        """
        return read_reply(await self.send_event("completion:get", {"request_id": request_id}), RequestReply)

    async def cancel(self, request_id: str) -> CancelReply:
        """Stop a request that is not final, and the provider's work for it. Repeating the call is harmless.

        Raises:
            As `send_event`; RemoteError `not_found` for an unknown id.
        """
        return read_reply(await self.send_event("completion:cancel", {"request_id": request_id}), CancelReply)

    def subscribe(self, *patterns: str) -> Subscription:
        """The pushed events whose name fits a pattern (`*` stands for anything); all without a pattern."""
        return Subscription(patterns or ("*",), self._subscribe, self._unsubscribe, self._max_unread)

    def pushes(self) -> Subscription:
        """The pushes that this connection gets anyhow; sends no event.

        These are results and chunks of this connection's requests, and the events subscribed to by `send_event`.
        """
        return Subscription(("*",), self._listen, self._ignore, self._max_unread)

    def lock(
        self,
        conversation_id: str,
        *,
        request_id: str | None = None,
        wait: bool = True,
        timeout: float | None = None,
        priority: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Lock:
        """A conversation's lock for work outside KSI: `async with client.lock("name") as lock: ...`.

        Args:
            conversation_id: the conversation.
            request_id: the holder's name; without it one is made.
            wait: join the wait queue if the conversation is taken, instead of failing with ConversationBusy. timeout:
                seconds to wait in the queue. priority: the priority in the queue. metadata: shown in
                `conversation:lock_status`.
        """
        return Lock(
            self,
            self._clock,
            conversation_id,
            request_id or self._new_id("lock"),
            wait=wait,
            timeout=timeout,
            priority=priority,
            metadata=metadata,
        )

    # -- used by the parts -------------------------------------------------------------------------------------------

    def on_event(self, event: Event, size: int) -> None:
        """A pushed event came: to the handle, the waiting lock and the subscriptions that it concerns."""
        request_id = event.data.get("request_id")
        if isinstance(request_id, str):
            handle = self._handles.get(request_id)
            if event.event == "completion:chunk" and handle is not None:
                handle.accept_chunk(event.data)
            elif event.event == "completion:result" and handle is not None:
                handle.accept_end(event.data)
            elif event.event == "conversation:locked" and request_id in self._waiting:
                self._waiting[request_id].granted(event.data)
        for subscription in list(self._subscriptions):
            subscription.offer(event, size)

    def on_lost(self) -> None:
        """The connection is gone, and is tried again."""
        if self._on_lost is not None:
            self._on_lost()

    def on_reconnect(self) -> None:
        """The connection is new: subscribe, follow and wait in line again."""
        for subscription in self._subscriptions:
            subscription.gaps += 1
        if self._patterns:
            self.start(self._resubscribe())
        for handle in list(self._handles.values()):
            if handle.submitted and not handle.done:
                self._follow(handle)
        for lock in self._waiting.values():
            if lock.in_line:
                self.start(lock.rejoin())

    def on_down(self, error: ConnectionFailed) -> None:
        """The daemon did not come back: nothing more will come for anybody."""
        for handle in list(self._handles.values()):
            handle.fail(error)
        for subscription in self._subscriptions:
            subscription.fail(error)
        for lock in self._waiting.values():
            lock.fail(error)

    def expect_lock(self, lock: Lock) -> None:
        """Tell it when the daemon gives it the lock."""
        self._waiting[lock.request_id] = lock

    def forget_lock(self, lock: Lock) -> None:
        """Tell it no longer."""
        self._waiting.pop(lock.request_id, None)

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Do some work apart, at most as long as the client is open."""
        task = asyncio.get_running_loop().create_task(work, name="ksi-client-work")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _handle(self, request_id: str) -> tuple[Handle, bool]:
        """The handle of a request that is waited for, else a new one; and whether it was there."""
        handle = self._handles.get(request_id)
        if handle is not None and not handle.done:
            return handle, True
        handle = Handle(self, request_id)
        self._handles[request_id] = handle
        return handle, False

    def _ask_stream(self, handle: Handle, stream: bool) -> bool:
        """Note that the text is wanted in pieces; returns True if that is new."""
        new = stream and not handle.streamed
        handle.streamed = handle.streamed or stream
        return new

    def _follow(self, handle: Handle, *, again: bool = False) -> None:
        if again or not handle.following:
            handle.following = True
            self.start(self._wait_for(handle))

    async def _wait_for(self, handle: Handle) -> None:
        data: dict[str, Any] = {"request_id": handle.request_id}
        if handle.streamed:
            # From the first piece on: the present attempt is not known here, and duplicates are skipped.
            data.update(stream=True, after_seq=-1)
        try:
            reply = await self.send_event("completion:wait", data)
        except KsiError as error:
            handle.fail(error)
        else:
            handle.accept_end(reply)

    async def _listen(self, subscription: Subscription) -> None:
        self._subscriptions.add(subscription)

    async def _ignore(self, subscription: Subscription) -> None:
        self._subscriptions.discard(subscription)

    async def _subscribe(self, subscription: Subscription) -> None:
        await self._listen(subscription)
        self._patterns.update(subscription.patterns)
        try:
            await self.send_event("monitor:subscribe", {"patterns": list(subscription.patterns)})
        except BaseException:
            self._forget(subscription)
            raise

    async def _unsubscribe(self, subscription: Subscription) -> None:
        gone = self._forget(subscription)
        if gone and self._channel.connected:
            # If the connection is gone, the daemon's side of it is gone too.
            with contextlib.suppress(ConnectionFailed):
                await self.send_event("monitor:unsubscribe", {"patterns": gone})

    def _forget(self, subscription: Subscription) -> list[str]:
        """Take a subscription away; returns the patterns that no other has."""
        if subscription not in self._subscriptions:
            return []
        self._subscriptions.discard(subscription)
        self._patterns.subtract(subscription.patterns)
        self._patterns = +self._patterns
        return [pattern for pattern in dict.fromkeys(subscription.patterns) if pattern not in self._patterns]

    async def _resubscribe(self) -> None:
        try:
            await self.send_event("monitor:subscribe", {"patterns": list(self._patterns)})
        except KsiError as error:
            for subscription in self._subscriptions:
                subscription.fail(error)

    def _new_id(self, prefix: str) -> str:
        return self._chance.identifier(prefix, self._clock.now())


def _request(prompt: str | None, fields: CompletionFields) -> dict[str, Any]:
    """The data of a completion request; arguments that are None are left out."""
    data = {name: value for name, value in fields.items() if value is not None}
    if prompt is not None:
        data["prompt"] = prompt
    return data


def _ways(
    socket_path: str | os.PathLike[str] | None, home: str | os.PathLike[str] | None, url: str | None, token: str | None
) -> tuple[Path, Connect]:
    """The daemon's address, and the way to connect to it."""
    if url is not None:
        return Path(url), by_http(HttpWay(url, token or os.environ.get(TOKEN, ""), ""))
    if socket_path is not None:
        path = Path(socket_path)
        return path, by_socket_or_http(lambda: told_way(path.parent))
    from ksi.config.reader import find_home, load  # not needed by who names the socket

    config = load(find_home(os.fspath(home) if home is not None else None, os.environ, Path.cwd()))
    named = home is not None
    return config.socket_path, by_socket_or_http(lambda: told_way(config.run_dir) or (None if named else named_way()))
