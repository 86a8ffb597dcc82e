"""From a line to a service call and back: finds the event, checks its data, answers.

A `Form` says how lines look. There are two: today's, and that of version 1 (`ksi.transports.v1_form`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal, Protocol

import msgspec
import structlog

from ksi.clock import Clock
from ksi.errors import LONGEST_QUOTE, InternalError, InvalidDirection, InvalidEnvelope, KsiError, UnknownEvent
from ksi.events.bus import Listener, Voice
from ksi.events.specs import SPECS, EventSpec
from ksi.protocol import (
    Envelope,
    convert,
    decode_envelope,
    encode_error,
    encode_reply,
    nearest,
    unknown_fields,
)

FormName = Literal["v1", "v2"]

LATER: Any = None
"""Returned by a handler whose answer is sent by `Exchange.answer` or `Exchange.refuse` afterwards."""


class Connection(Listener, Protocol):
    """The origin of an exchange."""

    def answer(self, line: bytes) -> None:
        """Take the answer that is owed to one of its lines."""
        ...


class Form(Protocol):
    """A form of the wire: the events that it has, and how requests are read and answers written."""

    @property
    def specs(self) -> Mapping[str, EventSpec]:
        """The events by name."""
        ...

    @property
    def handlers(self) -> Mapping[str, Handler]:
        """A handler for each incoming event."""
        ...

    def read(self, envelope: Envelope) -> tuple[Envelope, list[str]]:
        """The envelope as the handlers know it, and warnings about fields that have no effect."""
        ...

    def reply(self, event: str, data: Any, correlation_id: str | int | None, timestamp: float) -> bytes:
        """A reply as one line."""
        ...

    @property
    def voice(self) -> Voice:
        """The form and the sending of pushes to its clients."""
        ...

    def error(self, event: str | None, error: KsiError, correlation_id: str | int | None, timestamp: float) -> bytes:
        """An error answer as one line."""
        ...


class PlainForm(msgspec.Struct, frozen=True):
    """Today's form: data goes over the wire as its type says."""

    handlers: Mapping[str, Handler]
    specs: Mapping[str, EventSpec]
    voice: Voice = Voice()

    def read(self, envelope: Envelope) -> tuple[Envelope, list[str]]:
        """See `Form`."""
        return envelope, []

    def reply(self, event: str, data: Any, correlation_id: str | int | None, timestamp: float) -> bytes:
        """See `Form`."""
        return encode_reply(event, data, correlation_id, timestamp)

    def error(self, event: str | None, error: KsiError, correlation_id: str | int | None, timestamp: float) -> bytes:
        """See `Form`."""
        return encode_error(event, error, correlation_id, timestamp)


class Exchange:
    """One event that wants an answer."""

    def __init__(
        self,
        connection: Connection,
        clock: Clock,
        form: Form,
        event: str | None = None,
        correlation_id: str | int | None = None,
    ) -> None:
        self.connection = connection
        self._clock = clock
        self._form = form
        self._event = event
        self._correlation_id = correlation_id
        self._warnings: list[str] = []

    def time(self) -> float:
        """Now, in Unix seconds."""
        return self._clock.unix()

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
        self._send(self._form.reply(self._event or "", data, self._correlation_id, self._clock.unix()))

    def refuse(self, error: Exception) -> None:
        """Send an error."""
        known = error if isinstance(error, KsiError) else InternalError("a defect of the daemon; its log has the trace")
        self._send(self._form.error(self._event, known, self._correlation_id, self._clock.unix()))

    def _send(self, line: bytes) -> None:
        self.connection.answer(line)


class HeldExchange(Exchange):
    """An exchange whose answer is not sent, but comes to the one who holds it."""

    def __init__(self, held: Exchange) -> None:
        super().__init__(held.connection, held._clock, held._form)
        self.outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def answer(self, data: Any) -> None:
        """See `Exchange`."""
        if not self.outcome.done():
            self.outcome.set_result(data)

    def refuse(self, error: Exception) -> None:
        """See `Exchange`."""
        if not self.outcome.done():
            self.outcome.set_exception(error)


Handler = Callable[[Any, Exchange], Awaitable[Any]]

Speak = Callable[[Listener, Voice], None]
"""Switch the pushes to a listener to another form."""


class Dispatcher:
    """Serves lines, each in the form that it asks for."""

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        clock: Clock,
        specs: Mapping[str, EventSpec] = SPECS,
        *,
        v1: Form | None = None,
        default: FormName = "v2",
        speak: Speak | None = None,
    ) -> None:
        """Args:
        v1: version 1's form, if it is served. default: the form of lines that name none. speak: is called with the form
        that a connection has asked for.
        """
        plain = PlainForm(handlers, specs)
        self._forms: Mapping[FormName, Form] = {"v2": plain} if v1 is None else {"v1": v1, "v2": plain}
        for form in self._forms.values():
            missing = {name for name, spec in form.specs.items() if spec.incoming} ^ form.handlers.keys()
            if missing:
                raise InternalError(f"events and handlers do not match: {sorted(missing)}")
        self._default = self._forms[default]
        self._speak = speak
        self._clock = clock
        self._log = structlog.get_logger("ksi.dispatch")

    async def serve(self, line: bytes, connection: Connection) -> None:
        """Answer one line. Whatever it is, the connection lives on."""
        exchange = Exchange(connection, self._clock, self._default)
        try:
            envelope = decode_envelope(line)
            form = self._form_of(envelope, connection)
            exchange = Exchange(connection, self._clock, form, envelope.event[:LONGEST_QUOTE], envelope.correlation_id)
            reply = await call(form, envelope, exchange)
            if reply is not LATER:
                exchange.answer(reply)
        except KsiError as error:
            exchange.refuse(error)
        except Exception as error:  # noqa: BLE001 - a defect: the client hears of it, the log has it
            self._log.exception("handler failed", line=line[:200])
            exchange.refuse(error)

    def _form_of(self, envelope: Envelope, connection: Connection) -> Form:
        """The form that a line asks for. Later pushes to its connection come in that form."""
        if envelope.replies is None:
            return self._default
        form = self._forms.get(envelope.replies)
        if form is None:
            raise InvalidEnvelope(f"replies: this daemon does not answer in form {envelope.replies}", path="replies")
        if self._speak is not None:
            self._speak(connection, form.voice)
        return form


async def call(form: Form, envelope: Envelope, exchange: Exchange) -> Any:
    """Have an event's handler called; returns its reply, or LATER.

    Raises:
        KsiError: there is no such event, its data do not fit, or its service said no.
    """
    envelope, ineffective = form.read(envelope)
    spec = form.specs.get(envelope.event)
    if spec is None:
        guess = nearest(envelope.event, form.specs)
        hint = f"; did you mean {guess!r}?" if guess else "; `system:discover` lists all"
        raise UnknownEvent(f"no event {envelope.event[:100]!r}{hint}", nearest=guess)
    if spec.request is None:
        raise InvalidDirection(f"{spec.name} is only sent by the daemon; subscribe to it with monitor:subscribe")
    data = convert(envelope.data, spec.request)
    warnings = [*ineffective, *unknown_fields(envelope.data, spec.request)]
    if warnings:
        exchange.warn(warnings)
    return await form.handlers[spec.name](data, exchange)
