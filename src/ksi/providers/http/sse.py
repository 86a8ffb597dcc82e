"""Server-sent events, bytes in and events out; it knows no socket."""

from __future__ import annotations

import msgspec

DONE = b"[DONE]"
"""The data of an event that ends a stream, in OpenAI's dialect and in others that borrowed it."""
HEARTBEATS = frozenset({"ping", "heartbeat", "keepalive", "keep-alive"})
"""Names of events that keep a connection alive and mean nothing else."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class SseEvent(msgspec.Struct, frozen=True):
    """One dispatched event: its type (`message` if the stream names none) and its data, lines joined by newlines."""

    event: str
    data: bytes


class SseTooLong(ValueError):
    """One event is larger than the parser's limit."""


class SseParser:
    r"""An incremental parser after the WHATWG standard, for `event` and `data`; `id` and `retry` belong to
    reconnecting, which a completion never does, and are left out with all unknown fields.

    Lines end with CR, LF or CRLF, wherever the network cuts them. An event that the stream ends in the middle of is not
    dispatched, as the standard says.
    """

    def __init__(self, limit: int = 16 * 1024 * 1024) -> None:
        """`limit`: the most bytes that one event may take."""
        self._limit = limit
        self._partial: list[bytes] = []
        self._after_cr = False
        self._at_start = True
        self._event = ""
        self._data: list[bytes] = []
        self._held = 0

    def feed(self, chunk: bytes) -> list[SseEvent]:
        """The events that `chunk` completes.

        Raises:
            SseTooLong: an event grew over the limit.
        """
        chunk = self._newlines(chunk)
        if b"\n" not in chunk:
            self._keep(chunk)
            return []
        if self._partial:
            self._held -= sum(map(len, self._partial))
            chunk = b"".join((*self._partial, chunk))
            self._partial.clear()
        lines = chunk.split(b"\n")
        rest = lines.pop()
        if self._at_start:
            lines[0] = lines[0].removeprefix(_BYTE_ORDER_MARK)
            self._at_start = False
        events: list[SseEvent] = []
        for line in lines:
            if line:
                self._field(line)
            else:
                self._dispatch(events)
        self._keep(rest)
        return events

    def _newlines(self, chunk: bytes) -> bytes:
        """CR and CRLF as LF. A CR at the end of a chunk ends the line at once; an LF that follows it is dropped."""
        if self._after_cr and chunk:
            self._after_cr = False
            if chunk.startswith(b"\n"):
                chunk = chunk[1:]
        if b"\r" in chunk:
            self._after_cr = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return chunk

    def _keep(self, rest: bytes) -> None:
        if rest:
            self._partial.append(rest)
            self._hold(len(rest))

    def _hold(self, size: int) -> None:
        self._held += size
        if self._held > self._limit:
            raise SseTooLong(f"one event is larger than {self._limit} bytes")

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            value = value.removeprefix(b" ")
            self._data.append(value)
            self._hold(len(value) + 1)
        elif name == b"event":
            self._event = value.removeprefix(b" ").decode("utf-8", "replace")

    def _dispatch(self, events: list[SseEvent]) -> None:
        if self._data:
            data = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
            events.append(SseEvent(self._event or "message", data))
            self._data.clear()
        self._event = ""
        self._held = 0
