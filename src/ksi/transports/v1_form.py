"""The form of version 1: its clients' events are understood, and replies have the keys that they read.

Version 1 knew two kinds of lines. At first a reply was the bare data; later the data were in `data`, next to `event`
and `count`. A reply here is both: the envelope, with the data's keys added. Clients of either kind find their keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ksi.errors import KsiError, NotAvailableInV1, NotFound
from ksi.events.bus import Voice
from ksi.events.common import Data, Name, Nothing, PageData, Pattern
from ksi.events.conversations import LockStatusData, SessionStatusData
from ksi.events.service import DiscoverData, QueueStatusData, SubscribeData, TokenUsageData
from ksi.events.specs import EventSpec
from ksi.protocol import Envelope, encode
from ksi.transports import v1_replies
from ksi.transports.dispatch import Exchange, Handler
from ksi.transports.v1_requests import translate

Json = dict[str, Any]

MOST = 1_000
"""Rows of a list that a figure is counted from."""


class _Connection(Data):
    """A client says that it is there."""

    client_id: str | None = None
    action: str | None = None


class _Provider(Data):
    """One provider, or all."""

    provider: Name | None = None


class _Discover(Data):
    """One family of events, or all."""

    namespace: Name | None = None
    event: Name | None = None
    schemas: bool = True
    include_internal: bool = False
    detail: bool = True


class _Help(Data):
    """One event."""

    event: Name


class _Subscribe(SubscribeData):
    """Patterns of event names, for a named client."""

    patterns: list[Pattern] | None = None
    client_id: str | None = None


_OWN = (
    EventSpec(
        name="transport:connection", request=_Connection, doc="A client connects or disconnects. Changes nothing."
    ),
    EventSpec(name="conversation:active", request=Nothing, doc="All conversations that are locked."),
    EventSpec(name="system:help", request=_Help, doc="One event and its fields."),
)
"""Events that only version 1 had."""

_TYPES: Mapping[str, type[msgspec.Struct]] = {
    "completion:provider_status": _Provider,
    "system:discover": _Discover,
    "monitor:subscribe": _Subscribe,
}
"""Requests with other fields than today."""


def _push(event: str, data: Any, at: float) -> bytes:
    """A pushed event in the form of version 1."""
    plain = msgspec.to_builtins(data)
    change = v1_replies.PUSHES.get(event)
    made = change(plain, at) if change is not None else plain
    return encode({"event": event, "data": made, "timestamp": at}) + b"\n"


V1_VOICE = Voice(_push, apart=0.05)
"""Version 1's clients that send one line read once, and expect one answer."""


class V1Form:
    """See `ksi.transports.dispatch.Form`."""

    def __init__(self, handlers: Mapping[str, Handler], specs: Mapping[str, EventSpec]) -> None:
        """`handlers` are today's; their replies are translated."""
        self._today = handlers
        self.specs: Mapping[str, EventSpec] = {
            **{name: _with_type(spec) for name, spec in specs.items()},
            **{spec.name: spec for spec in _OWN},
        }
        self.handlers: Mapping[str, Handler] = {
            **handlers,
            "transport:connection": self._connection,
            "conversation:active": self._active,
            "system:help": self._help,
            "system:discover": self._discover,
            "monitor:subscribe": self._subscribe,
            "completion:status": self._status,
            "completion:queue_status": self._queue_status,
            "completion:session_status": self._session_status,
            "completion:retry_status": self._retry_status,
            "completion:token_usage": self._token_usage,
            "completion:provider_status": self._provider_status,
        }

    @property
    def voice(self) -> Voice:
        """See `Form`."""
        return V1_VOICE

    # -- lines ----------------------------------------------------------------------------------------------------

    def read(self, envelope: Envelope) -> tuple[Envelope, list[str]]:
        """See `Form`."""
        return translate(envelope)

    def reply(self, event: str, data: Any, correlation_id: str | int | None, timestamp: float) -> bytes:
        """See `Form`."""
        plain = msgspec.to_builtins(data)
        change = v1_replies.REPLIES.get(event)
        return _line(event, change(plain, timestamp) if change is not None else plain, correlation_id, timestamp)

    def error(self, event: str | None, error: KsiError, correlation_id: str | int | None, timestamp: float) -> bytes:
        """See `Form`."""
        return _line(event, v1_replies.refusal(event, error), correlation_id, timestamp)

    # -- events that take other fields or several reports ---------------------------------------------------------

    async def _ask(self, event: str, data: Any, exchange: Exchange) -> Json:
        """Today's reply; empty if this service does not have the event."""
        try:
            found = await self._today[event](data, exchange)
        except NotAvailableInV1:
            return {}
        plain: Json = msgspec.to_builtins(found)
        return plain

    async def _connection(self, data: _Connection, _: Exchange) -> Json:
        return {"status": f"{data.action or 'connect'}ed", "client_id": data.client_id}

    async def _active(self, _: Any, exchange: Exchange) -> Json:
        all_locks = await self._ask("conversation:lock_status", LockStatusData(limit=MOST), exchange)
        return v1_replies.active_conversations(v1_replies.locks(all_locks, exchange.time()))

    async def _subscribe(self, data: _Subscribe, exchange: Exchange) -> Json:
        named = SubscribeData(patterns=data.patterns, pattern=data.pattern)
        found = await self._ask("monitor:subscribe", named, exchange)
        return {"status": "subscribed", "client_id": data.client_id, **found}

    async def _discover(self, data: _Discover, exchange: Exchange) -> Json:
        found = await self._ask("system:discover", DiscoverData(event=data.event, schemas=False), exchange)
        own = [{"name": spec.name, "doc": spec.doc} for spec in _OWN if data.event in (None, spec.name)]
        return v1_replies.discovered({"events": found["events"] + own}, data.namespace, self._parameters)

    async def _help(self, data: _Help, _: Exchange) -> Json:
        spec = self.specs.get(data.event)
        if spec is None:
            raise NotFound(f"Event not found: {data.event}", event=data.event)
        return v1_replies.described({"name": spec.name, "doc": spec.doc}, self._parameters(spec.name))

    def _parameters(self, event: str) -> Json:
        """An event's fields as version 1 described them."""
        request = self.specs[event].request
        fields = msgspec.structs.fields(request) if request is not None else ()
        return {field.encode_name: {"type": "Any", "required": field.required} for field in fields}

    async def _status(self, data: Any, exchange: Exchange) -> Json:
        found = await self._ask("completion:status", data, exchange)
        all_locks = await self._all_locks(exchange)
        queue = await self._ask("completion:queue_status", QueueStatusData(), exchange)
        usage = await self._ask("completion:token_usage", TokenUsageData(limit=MOST), exchange)
        retries = await self._ask("completion:retry_status", PageData(), exchange)
        others = {
            **({"providers": await self._providers(exchange)} if all_locks else {}),
            **({"token_usage": v1_replies.usage_summary(usage)} if usage else {}),
            **({"retry_manager": v1_replies.retry_stats(retries)} if retries else {}),
        }
        whole_queue = v1_replies.queue_status(queue, all_locks)
        return v1_replies.status(found, whole_queue, all_locks, others)

    async def _queue_status(self, data: QueueStatusData, exchange: Exchange) -> Json:
        found = msgspec.to_builtins(await self._today["completion:queue_status"](data, exchange))
        return v1_replies.queue_status(found, await self._all_locks(exchange))

    async def _all_locks(self, exchange: Exchange) -> Json:
        return await self._ask("conversation:lock_status", LockStatusData(limit=MOST), exchange)

    async def _session_status(self, data: SessionStatusData, exchange: Exchange) -> Any:
        name = data.session_id or data.conversation_id
        if name is None:
            return await self._today["completion:session_status"](data, exchange)
        held = LockStatusData(conversation_id=name, limit=MOST)
        try:
            found = await self._ask("completion:session_status", data, exchange)
        except NotFound:
            return v1_replies.session(name, None, {})
        return v1_replies.session(name, found, await self._ask("conversation:lock_status", held, exchange))

    async def _retry_status(self, data: PageData, exchange: Exchange) -> Json:
        found = msgspec.to_builtins(await self._today["completion:retry_status"](data, exchange))
        return v1_replies.retries(found, exchange.time())

    async def _token_usage(self, data: TokenUsageData, exchange: Exchange) -> Json:
        found = msgspec.to_builtins(await self._today["completion:token_usage"](data, exchange))
        return v1_replies.usage(found, data.agent_id, data.model, data.hours)

    async def _provider_status(self, data: _Provider, exchange: Exchange) -> Json:
        found = await self._providers(exchange)
        if data.provider is None:
            return found
        if data.provider not in found["providers"]:
            raise NotFound(f"Unknown provider: {data.provider}", provider=data.provider)
        one: Json = found["providers"][data.provider]
        return one

    async def _providers(self, exchange: Exchange) -> Json:
        found = await self._today["completion:provider_status"](Nothing(), exchange)
        return v1_replies.providers(msgspec.to_builtins(found))


def _with_type(spec: EventSpec) -> EventSpec:
    kind = _TYPES.get(spec.name)
    return spec if kind is None else msgspec.structs.replace(spec, request=kind)


def _line(event: str | None, data: Any, correlation_id: str | int | None, timestamp: float) -> bytes:
    """The envelope, with the data's keys added for clients that read the line as the data."""
    envelope: Json = {"event": event, "data": data, "count": 1, "timestamp": timestamp}
    if correlation_id is not None:
        envelope["correlation_id"] = correlation_id
    return encode({**data, **envelope} if isinstance(data, dict) else envelope) + b"\n"
