"""Writes an answer as a stream of server-sent events while it is made, in the form of a dialect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from aiohttp import web

from ksi.events.completions import RequestReply
from ksi.http.ask import Answer, Attempted, Done, Item
from ksi.http.errors import Refusal
from ksi.providers.base import Frame, Piece

SIGN_OF_LIFE = 15.0
"""Seconds between signs of life while nothing comes."""


class Writer(Protocol):
    """A dialect's stream."""

    said: bool
    """True if any part of an answer was written."""

    def waits(self) -> Iterator[bytes]:
        """A sign of life."""
        ...

    def piece(self, piece: Piece) -> Iterator[bytes]:
        """The events of one piece."""
        ...

    def frame(self, frame: Frame) -> Iterator[bytes]:
        """An event of another stream of the same dialect."""
        ...

    def end(self, reply: RequestReply) -> Iterator[bytes]:
        """The end after the last piece, or the whole answer without pieces."""
        ...

    def end_of_frames(self) -> Iterator[bytes]:
        """The part that is missing after the last frame."""
        ...

    def refused(self, refusal: Refusal) -> Iterator[bytes]:
        """The end without an answer."""
        ...


async def opened(request: web.Request, headers: dict[str, str]) -> web.StreamResponse:
    """A stream of events that has begun."""
    usual = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
    response = web.StreamResponse(headers={**usual, **headers})
    await response.prepare(request)
    return response


async def write_answer(
    response: web.StreamResponse, answer: Answer, first: Item | None, writer: Writer
) -> Refusal | None:
    """Write a request's items to its end; `first` came before the stream began.

    Returns the reason if there is no answer.
    """
    native: bool | None = None
    attempt: int | None = None
    item = first
    while True:
        events: Iterator[bytes] = iter(())
        match item:
            case None:
                events = writer.waits()
            case Done(reply):
                events = writer.end_of_frames() if native and writer.said else writer.end(reply)
            case Attempted() if writer.said and attempt != item.attempt:
                # Sent text cannot be withdrawn, and the new attempt sends it again.
                item = Refusal(529, "overloaded", "the answer broke off and starts over; ask again", retry=True)
                events = writer.refused(item)
            case Attempted(attempt, Frame() as frame):
                native = True if native is None else native
                events = writer.frame(frame) if native else events
            case Attempted(attempt, piece):
                native = False if native is None else native
                events = events if native or isinstance(piece, Frame) else writer.piece(piece)
            case Refusal():
                events = writer.refused(item)
        if data := b"".join(events):
            await response.write(data)
        if isinstance(item, Done | Refusal):
            return item if isinstance(item, Refusal) else None
        item = await answer.next(SIGN_OF_LIFE)
