"""A submitted request, held by its id: its answer, its text as it comes, its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol, TypeVar

import msgspec

from ksi.errors import FailureClass, InvalidData, KsiError, RemoteError, WaitTimeout
from ksi.events.completions import CancelReply, ChunkPush, RequestReply, ToolPieceBody
from ksi.protocol import MAX_LINE

T = TypeVar("T")


class Chunk(msgspec.Struct, frozen=True):
    """A piece of a running answer.

    `seq` counts from 0 in each attempt. If `restarted` is true, all text before it is void: another attempt began.
    """

    text: str
    attempt: int
    seq: int
    restarted: bool = False
    thinking: str = ""
    """A piece of the model's thinking; `text` is empty then."""
    tool_use: ToolPieceBody | None = None
    """A piece of a call of a tool; `text` is empty then."""


class Canceller(Protocol):
    """The part of its client that a handle uses."""

    async def cancel(self, request_id: str) -> CancelReply:
        """Stop a request."""
        ...


class Handle:
    """One request that was submitted or attached to.

    It stays good over lost connections: the client asks for the request again by its id. Letting it go changes nothing
    at the daemon.
    """

    def __init__(self, client: Canceller, request_id: str) -> None:
        self._client = client
        self._outcome: asyncio.Future[RequestReply] = asyncio.get_running_loop().create_future()
        self._attempt = 0
        self._pieces: list[ChunkPush] = []
        self._held = 0
        self._more = asyncio.Event()
        self.request_id = request_id
        self.session_id: str | None = None
        """The conversation's name; send it to continue the conversation. None until the daemon said it."""
        self.streamed = False
        """True if the text was requested in pieces; otherwise `stream()` gives it in one."""
        self.submitted: Mapping[str, Any] = {}
        """The daemon's answer to the submission: `status`, `position`, `holder`, `warnings`..."""
        self.following = False
        """True if the client waits for the end by a `completion:wait` of its own."""

    @property
    def done(self) -> bool:
        """True if its end is known here."""
        return self._outcome.done()

    async def wait(self, timeout: float | None = None) -> RequestReply:
        """The request as it ended, however that was.

        Raises:
            WaitTimeout: it did not end within `timeout` seconds; it continues.
            RemoteError: the daemon does not know it any more.
            ConnectionFailed: the daemon was lost and did not come back in time.
        """
        try:
            async with asyncio.timeout(timeout):
                # Shielded: others wait for the same end.
                return await asyncio.shield(self._outcome)
        except TimeoutError:
            raise WaitTimeout(
                f"request {self.request_id} did not end within {timeout or 0:g} s; it continues, wait again",
                request_id=self.request_id,
            ) from None

    async def result(self, timeout: float | None = None) -> RequestReply:
        """The completed request; its text is in `.result`.

        Raises:
            RemoteError: it ended otherwise; `code` is the failure's class, or `cancelled`, `blocked`, `expired`.
            WaitTimeout, ConnectionFailed: as for `wait`.
        """
        return completed(await self.wait(timeout))

    async def cancel(self) -> CancelReply:
        """Stop the request and the provider's work for it. Stopping a request that has ended is harmless."""
        return await self._client.cancel(self.request_id)

    async def chunks(self) -> AsyncIterator[Chunk]:
        """The answer's pieces from the first on, until the request completed. Several may read at once.

        If a new attempt voids the earlier pieces, its first piece has `restarted`. All text together, since the last
        restart, is the result's.

        Raises:
            RemoteError, ConnectionFailed: as for `result`, at the end.
        """
        attempt, seq, given = 0, 0, ""
        restarted = False
        while True:
            if self._attempt != attempt:
                restarted = bool(given)
                attempt, seq, given = self._attempt, 0, ""
            while seq < len(self._pieces) and attempt == self._attempt:
                piece = self._pieces[seq]
                yield Chunk(piece.text, attempt, seq, restarted, piece.thinking or "", piece.tool_use or None)
                restarted = False
                given += piece.text
                seq += 1
            if attempt != self._attempt:
                continue
            if self.done:
                break
            self._more.clear()
            await self._more.wait()
        text = (await self.result()).result or ""
        if text.startswith(given) and not restarted:
            if len(text) > len(given):
                yield Chunk(text[len(given) :], attempt or 1, seq)
        else:
            yield Chunk(text, attempt + 1, 0, restarted=True)

    async def stream(self) -> AsyncIterator[str]:
        """The answer's text, piece by piece. A piece of a new attempt looks like any other: see `chunks`."""
        async for chunk in self.chunks():
            if chunk.text:
                yield chunk.text

    def accept_chunk(self, data: Mapping[str, Any]) -> None:
        """Take a pushed piece. One that was there already is passed over; after a gap the result brings the rest."""
        try:
            piece = msgspec.convert(data, ChunkPush)
        except msgspec.ValidationError:
            return  # as a gap: the result brings the text
        if self.done or piece.attempt < self._attempt:
            return
        if piece.attempt > self._attempt:
            self._attempt = piece.attempt
            self._pieces = []
            self._held = 0
        size = len(piece.text) + len(piece.thinking or "") + (len(piece.tool_use.partial_json) if piece.tool_use else 0)
        if piece.seq == len(self._pieces) and self._held + size <= MAX_LINE:
            self._pieces.append(piece)
            self._held += size
        self._more.set()

    def accept_end(self, data: Mapping[str, Any]) -> None:
        """Take the request's final state; a second one changes nothing."""
        if self.done:
            return
        try:
            reply = read_reply(data, RequestReply)
        except InvalidData as error:
            self.fail(error)
            return
        self.session_id = reply.session_id
        self._outcome.set_result(reply)
        self._more.set()

    def fail(self, error: KsiError) -> None:
        """Its end will not be known here."""
        if self.done:
            return
        self._outcome.set_exception(error)
        self._outcome.exception()  # nobody need be waiting
        self._more.set()


def read_reply(data: Mapping[str, Any], kind: type[T]) -> T:
    """A reply's data as its type.

    Raises:
        InvalidData: it is not of that type: the daemon's version does not go with this client's.
    """
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise InvalidData(
            f"the daemon's answer is not understood ({error}); restart the daemon if KSI was updated"
        ) from None


def completed(reply: RequestReply) -> RequestReply:
    """The reply, if its request completed.

    Raises:
        RemoteError: it did not; `details` names the request, its state and its conversation.
    """
    if reply.status == "completed":
        return reply
    code = reply.error.code if reply.error is not None else reply.status
    message = reply.error.message if reply.error is not None else f"the request ended {reply.status}"
    details = {"request_id": reply.request_id, "status": reply.status, "session_id": reply.session_id}
    retryable = code in set(FailureClass) and FailureClass(code).retryable
    raise RemoteError(code, message, details, retryable=retryable)
