"""From a line to a service call and back: finds the event, checks its data, answers (S1)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import msgspec
import structlog

from ksi.clock import Clock
from ksi.errors import InternalError, InvalidDirection, KsiError, UnknownEvent
from ksi.event_bus import Listener
from ksi.events import SPECS, EventSpec
from ksi.protocol import (
    Envelope,
    convert,
    decode_envelope,
    encode_error,
    encode_reply,
    nearest,
    unknown_fields,
)

LATER: Any = object()
"""What a handler returns when its answer is sent by `Exchange.answer` or `Exchange.refuse` afterwards."""


class Connection(Listener, Protocol):
    """Where an exchange came from."""

    def settle(self) -> None:
        """An owed answer was sent."""
        ...


class Exchange:
    """One event that wants an answer."""

    def __init__(
        self, connection: Connection, clock: Clock, event: str | None, correlation_id: str | int | None
    ) -> None:
        self.connection = connection
        self._clock = clock
        self._event = event
        self._correlation_id = correlation_id
        self._warnings: list[str] = []

    def warn(self, warnings: list[str]) -> None:
        """Say this with the answer, too."""
        self._warnings = [*self._warnings, *warnings]

    def answer(self, data: Any) -> None:
        """Send the reply. Never called twice."""
        if self._warnings:
            if isinstance(data, dict):
                data = {**data, "warnings": self._warnings}
            elif hasattr(data, "warnings"):
                # A copy: others who wait for the same answer have warnings of their own.
                data = msgspec.structs.replace(data, warnings=self._warnings)
        self._send(encode_reply(self._event or "", data, self._correlation_id, self._clock.unix()))

    def refuse(self, error: Exception) -> None:
        """Send an error."""
        known = error if isinstance(error, KsiError) else InternalError("a defect of the daemon; its log has the trace")
        self._send(encode_error(self._event, known, self._correlation_id, self._clock.unix()))

    def _send(self, line: bytes) -> None:
        self.connection.push(line)
        self.connection.settle()


Handler = Callable[[Any, Exchange], Awaitable[Any]]


class Dispatcher:
    """The events' handlers by name."""

    def __init__(self, handlers: Mapping[str, Handler], clock: Clock, specs: Mapping[str, EventSpec] = SPECS) -> None:
        missing = {name for name, spec in specs.items() if spec.incoming} ^ handlers.keys()
        if missing:
            raise InternalError(f"events and handlers do not match: {sorted(missing)}")
        self._handlers = handlers
        self._specs = specs
        self._clock = clock
        self._log = structlog.get_logger("ksi.dispatch")

    async def serve(self, line: bytes, connection: Connection) -> None:
        """Answer one line. Whatever it is, the connection lives on."""
        exchange = Exchange(connection, self._clock, None, None)
        try:
            envelope = decode_envelope(line)
            exchange = Exchange(connection, self._clock, envelope.event, envelope.correlation_id)
            reply = await self._call(envelope, exchange)
            if reply is not LATER:
                exchange.answer(reply)
        except KsiError as error:
            exchange.refuse(error)
        except Exception as error:  # noqa: BLE001 - a defect: the client hears of it, the log has it
            self._log.exception("handler failed", line=line[:200])
            exchange.refuse(error)

    async def _call(self, envelope: Envelope, exchange: Exchange) -> Any:
        spec = self._specs.get(envelope.event)
        if spec is None:
            guess = nearest(envelope.event, self._specs)
            hint = f"; did you mean {guess!r}?" if guess else "; `system:discover` lists all"
            raise UnknownEvent(f"no event {envelope.event[:100]!r}{hint}", nearest=guess)
        if spec.request is None:
            raise InvalidDirection(f"{spec.name} is only sent by the daemon; subscribe to it with monitor:subscribe")
        data = convert(envelope.data, spec.request)
        warnings = unknown_fields(envelope.data, spec.request)
        if warnings:
            exchange.warn(warnings)
        return await self._handlers[spec.name](data, exchange)
