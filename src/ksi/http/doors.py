"""The common part of all completion APIs: reading a request, its headers, its model, and its sender."""

from __future__ import annotations

import asyncio
import fnmatch
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from aiohttp import web

from ksi.clock import Chance, Clock
from ksi.completion.approval.service import ApprovalService
from ksi.completion.budget.service import BudgetService
from ksi.completion.completion_service import CompletionService
from ksi.completion.conversations import Conversations
from ksi.completion.notify.announcer import Announcer
from ksi.completion.token_tracker import TokenTracker
from ksi.config.schema import Config
from ksi.content.features import Dialect, Native
from ksi.conversation.conversation_lock import ConversationLocks
from ksi.events.completions import CompletionData
from ksi.events.reports import HealthReply
from ksi.http.errors import Refusal
from ksi.http.guard import require
from ksi.http.tokens import Identity, Scope
from ksi.request import ChainConfig, PatternsConfig
from ksi.store.base import Store

KEEP = "x-ksi-keep"
"""With `1`, a request continues although its client disconnects."""

_NOT_JUDGED = PatternsConfig(enabled=False)
"""The turns of one agent that uses tools are much alike without being a runaway: the pattern checks are for dialogues
of agents."""

LONGEST_TRACEPARENT = 200
"""Characters from which a text is none."""

BODY_TIMEOUT = 60.0
"""Seconds that a client has to send a request's body."""

_KINDS: Mapping[Dialect, str] = {"anthropic": "anthropic", "chat": "openai"}


class Doors(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of the daemon that the doors need."""

    completions: CompletionService
    announcer: Announcer
    conversations: Conversations
    locks: ConversationLocks
    tracker: TokenTracker
    approvals: ApprovalService
    budgets: BudgetService
    store: Store
    health: Callable[[], Awaitable[HealthReply]]
    version: str
    config: Config
    clock: Clock
    chance: Chance

    def model(self, name: str, dialect: Dialect) -> str:
        """The full name of a model that a client named in its vendor's way.

        A name with a slash is KSI's own. Of the others, `[http.models]` decides first, by pattern; then the first
        provider of the vendor's kind serves it.

        Raises:
            Refusal: nothing says whose model it is.
        """
        if "/" in name:
            return name
        for pattern, full in self.config.http.models.items():
            if fnmatch.fnmatchcase(name, pattern):
                return full
        for provider, entry in self.config.providers.items():
            if entry.enabled and entry.kind == _KINDS[dialect]:
                return f"{provider}/{name}"
        raise Refusal(
            404,
            "unknown_model",
            f"no provider of the kind {_KINDS[dialect]!r} is configured that could have {name[:100]!r}; name a "
            "model as provider/model, or define the name under [http.models] in ksi.toml",
        )


async def body_of(request: web.Request) -> bytes:
    """A request's body.

    Raises:
        Refusal: it does not come.
    """
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            return await request.read()
    except TimeoutError:
        raise Refusal(408, "wait_timeout", f"the body was not here after {BODY_TIMEOUT:g} s") from None


async def read_object(request: web.Request) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises:
        Refusal: there is none.
    """
    data = await body_of(request)
    try:
        body = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, "invalid_json", f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refusal(400, "invalid_json", "the body must be a JSON object")
    return body


def text_field(body: Mapping[str, Any], name: str) -> str:
    """A field that must be a text.

    Raises:
        Refusal: it is none.
    """
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise Refusal(400, "invalid_data", f"{name}: expected a string")
    return value


def number_header(request: web.Request, name: str) -> float | None:
    """A header that is a number.

    Raises:
        Refusal: it is none.
    """
    given = request.headers.get(name)
    if given is None:
        return None
    try:
        return float(given)
    except ValueError:
        raise Refusal(400, "invalid_data", f"{name}: {given[:50]!r} is no number") from None


def completion(
    request: web.Request,
    native: Native,
    *,
    request_id: str,
    model: str,
    agent: str | None,
    stream: bool,
    priority: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    chain: ChainConfig | None = None,
) -> CompletionData:
    """A request to the queue, with the settings in its headers.

    Raises:
        Refusal: a header cannot be read, or its token does not allow to ask.
    """
    identity = require(request, Scope.SUBMIT)
    headers = request.headers
    return CompletionData(
        native=native,
        model=model,
        request_id=request_id,
        agent_id=agent_of(identity, headers.get("x-ksi-agent") or agent),
        session_id=headers.get("x-ksi-session") or None,
        priority=headers.get("x-ksi-priority") or priority or identity.priority,
        ttl=number_header(request, "x-ksi-ttl"),
        timeout=number_header(request, "x-ksi-timeout"),
        drop_unsupported=headers.get("x-ksi-drop-unsupported") == "1",
        stream=stream,
        circuit_breaker_config=chain,
        patterns=_NOT_JUDGED if chain is not None else None,
        metadata={"door": native.dialect, "token": identity.name, **(metadata or {})},
        traceparent=traceparent_of(request),
    )


def traceparent_of(request: web.Request) -> str | None:
    """The span that a client asks from within; what is too long to be one is none."""
    return short_traceparent(request.headers.get("traceparent"))


def short_traceparent(given: object) -> str | None:
    """What may be a `traceparent`, as a request takes it."""
    return given if isinstance(given, str) and len(given) <= LONGEST_TRACEPARENT else None


def chain_of(request: web.Request, config: Config, parent: str | None) -> ChainConfig | None:
    """The chain of a request: that of its parent, or one of its own if its headers name limits. Limits that they do not
    name are the daemon's own.

    Raises:
        Refusal: a header cannot be read.
    """
    parent = request.headers.get("x-ksi-parent") or parent
    depth = number_header(request, "x-ksi-max-depth")
    tokens = number_header(request, "x-ksi-token-budget")
    seconds = number_header(request, "x-ksi-time-window")
    if parent is None and depth is None and tokens is None and seconds is None:
        return None
    fields = {
        "max_depth": config.chain.max_depth if depth is None else int(depth),
        "token_budget": config.chain.token_budget if tokens is None else int(tokens),
        "time_window": config.chain.time_window if seconds is None else seconds,
        "parent_request_id": parent,
    }
    try:
        return msgspec.convert(fields, ChainConfig)
    except msgspec.ValidationError as error:
        raise Refusal(400, "invalid_data", f"the limits of the chain: {error}") from None


def agent_of(identity: Identity, agent: str | None) -> str | None:
    """The agent whose account a request is on: a name given by a token's holder stays within the token's name."""
    if identity.scope is Scope.OPERATE:
        return agent
    return f"{identity.name}/{agent}" if agent else identity.name


def keeps(request: web.Request) -> bool:
    """True if a request continues without its client."""
    return request.headers.get(KEEP) == "1"
