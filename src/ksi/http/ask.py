"""One completion by HTTP: its submission, its pieces, its end; and its cancel if the client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from ksi.completion.completion_service import CompletionService
from ksi.completion.notify.announcer import Announcer
from ksi.errors import KsiError
from ksi.events.bus import News
from ksi.events.completions import CancelData, CompletionData, RequestReply, WaitData
from ksi.http.errors import Refusal
from ksi.providers.base import Frame, Piece
from ksi.request import Attempt, State


class Done(msgspec.Struct, frozen=True):
    """The request ended; `attempt` is the one that answered, if it ran here."""

    reply: RequestReply
    attempt: Attempt | None = None


class Attempted(msgspec.Struct, frozen=True):
    """A piece or a frame, and the attempt that it is of."""

    attempt: int
    item: Piece | Frame


Item = Attempted | Done | Refusal


class Answer:
    """The items of one request, in order."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._items: asyncio.Queue[Item] = asyncio.Queue()
        self._attempt: Attempt | None = None
        self.kept = False
        """True if the request continues without a follower."""
        self.over = False
        """True when its end or its refusal is among the items."""

    async def next(self, seconds: float | None = None) -> Item | None:
        """The next item; None if there was none for the given seconds."""
        try:
            async with asyncio.timeout(seconds):
                return await self._items.get()
        except TimeoutError:
            return None

    async def end(self) -> Done:
        """The end, whatever comes before it.

        Raises:
            Refusal: it ended without an answer, or was not taken.
        """
        while True:
            item = await self.next()
            if isinstance(item, Refusal):
                raise item
            if isinstance(item, Done):
                return item

    def push(self, line: bytes) -> None:
        """See `Listener`. The text is also sent in pieces."""

    def news(self, news: News) -> None:
        """See `Listener`."""

    def piece(self, attempt: int, piece: Piece) -> None:
        """See `Watcher`."""
        self._items.put_nowait(Attempted(attempt, piece))

    def frame(self, attempt: int, frame: Frame) -> None:
        """See `Watcher`."""
        self._items.put_nowait(Attempted(attempt, frame))

    def answered(self, attempt: Attempt) -> None:
        """See `Watcher`."""
        self._attempt = attempt

    def ended(self, reply: RequestReply) -> None:
        """The request's end. Its watch and its wait both tell of it: the first one counts."""
        if self.over:
            return
        self.over = True
        if reply.status == State.COMPLETED.value:
            self._items.put_nowait(Done(reply, self._attempt))
        else:
            self._items.put_nowait(Refusal.of_reply(reply))

    def refused(self, error: Exception) -> None:
        """The daemon stops before its end."""
        if self.over:
            return
        self.over = True
        if isinstance(error, KsiError):
            self._items.put_nowait(Refusal.of(error, self.request_id))
        else:
            message = "a defect of the daemon; its log has the trace"
            self._items.put_nowait(Refusal(500, "internal_error", message, request_id=self.request_id))


@asynccontextmanager
async def asking(
    completions: CompletionService, announcer: Announcer, data: CompletionData, *, keep: bool
) -> AsyncIterator[Answer]:
    """Submit a request, which must have an id, and follow it. A client that disconnects before its end cancels it,
    unless `keep` is set.

    Raises:
        KsiError: it was not taken.
    """
    request_id = data.request_id or ""
    answer = Answer(request_id)
    answer.kept = keep
    leave = announcer.watch(request_id, answer)
    try:
        try:
            reply = await completions.request(data, answer, answer.ended, answer.refused)
        except KsiError:
            answer.over = True
            raise
        if reply is not None:
            answer.ended(reply)
        yield answer
    finally:
        leave()
        announcer.forget(answer)
        if not answer.over and not answer.kept:
            await asyncio.shield(completions.cancel(CancelData(request_id=request_id)))


@asynccontextmanager
async def following(completions: CompletionService, announcer: Announcer, request_id: str) -> AsyncIterator[Answer]:
    """Follow an earlier request: the existing part of its answer comes first. It continues if the client disconnects.

    Raises:
        KsiError: there is no such request.
    """
    answer = Answer(request_id)
    attempt, pieces = completions.pieces_so_far(request_id)
    for piece in pieces:
        answer.piece(attempt, piece)
    leave = announcer.watch(request_id, answer)
    try:
        reply = await completions.wait(WaitData(request_id=request_id), answer, answer.ended, answer.refused)
        if reply is not None:
            answer.ended(reply)
        yield answer
    finally:
        leave()
        announcer.forget(answer)
