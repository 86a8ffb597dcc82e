"""The check of a token's scope against an event: `submit` reaches its holder's own requests only."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from ksi.completion.completion_service import CompletionService, not_found
from ksi.errors import Forbidden
from ksi.events.completions import GetData
from ksi.events.specs import SCOPES
from ksi.http.doors import agent_of
from ksi.http.responses_wire import request_id
from ksi.http.tokens import OWNER, Identity, Scope
from ksi.protocol import Envelope
from ksi.request import ORIGINATING
from ksi.store.base import Store

SESSION = "x-ksi-session"

_ASK = frozenset({"completion:request", "completion:async"})
_LOOK = frozenset({"completion:get", "completion:wait"})
_ANSWER = frozenset({"completion:release", "completion:approve", "completion:reject"})
_OPERATORS_ONLY = {
    "mcp_config": "starts programs on the daemon's machine",
    "provider_options": "sets the permissions of a provider on the daemon's machine",
}
"""Fields of a request that reach beyond one's own requests, and why."""

_NOT_BY_THE_PAGE = _ASK | {
    "conversation:acquire_lock",
    "checkpoint:collect",
    "checkpoint:restore",
    "token:create",
    "token:renew",
}
"""Events that a session of the page may not send. A thief of one cannot start programs or write files, nor get anything
that lasts longer than the session."""


class Ownership:
    """Knows the owners of requests and conversations. A token's requests are those on its name's account, or on that of
    an agent behind it."""

    def __init__(self, store: Store, completions: CompletionService) -> None:
        self._store = store
        self._completions = completions

    async def check_event(self, envelope: Envelope, identity: Identity) -> Envelope:
        """The event in the form allowed to its sender: the token's agent is written into a request.

        Raises:
            Forbidden: its token does not allow it.
            NotFound: it is about a request that is not the sender's.
        """
        needed = SCOPES.get(envelope.event)
        if needed is not None and identity.scope < needed:
            raise forbidden(identity, envelope.event, needed)
        if identity.page and envelope.event in _NOT_BY_THE_PAGE:
            raise Forbidden(f"a session of the page cannot send {envelope.event}; the command `ksi` and programs can")
        if envelope.event in _ASK:
            await self._check_ask(envelope, identity)
            asked = _asked_by(envelope.data, identity)
            return Envelope(envelope.event, asked, envelope.correlation_id, envelope.replies)
        if envelope.event in _ANSWER:
            return await self._answer(envelope, identity)
        named = envelope.data.get("request_id")
        if envelope.event == "completion:cancel" and identity.scope < Scope.OPERATE:
            if envelope.data.get("chain_id") is not None:
                raise forbidden(identity, "to cancel a whole chain", Scope.OPERATE)
            await self._check_request(named, identity)
        elif envelope.event in _LOOK:
            await self.check_request(named, identity)
        return envelope

    async def _answer(self, envelope: Envelope, identity: Identity) -> Envelope:
        """A person's answer is accounted to the token that brings it, whatever name it gives."""
        await self.check_request(envelope.data.get("request_id"), identity)
        owner = identity.name == OWNER and envelope.data.get("by")
        given = envelope.data if owner else {**envelope.data, "by": identity.name}
        return Envelope(envelope.event, given, envelope.correlation_id, envelope.replies)

    async def check_http(self, request: web.Request, identity: Identity) -> None:
        """Check that the request's path and headers name only its sender's own things. Raises as `check_event`."""
        if identity.scope is Scope.OPERATE:
            return
        await self.check_session(request.headers.get(SESSION), identity)
        name = request.match_info.get("id")
        if name is None:
            return
        if request.path.startswith("/v1/responses/"):
            check = self.check_request if request.method == "GET" else self._check_request
            await check(request_id(name), identity)
        elif request.path.startswith("/v1/conversations/") and identity.scope is Scope.SUBMIT:
            await self.check_session(name, identity)

    async def check_request(self, name: Any, identity: Identity) -> None:
        """Check that a request is the sender's own, if its token is limited to those.

        Raises:
            NotFound: it is not, or there is none; the error does not distinguish the two.
        """
        if identity.scope is Scope.SUBMIT:
            await self._check_request(name, identity)

    async def _check_request(self, name: Any, identity: Identity) -> None:
        if not isinstance(name, str) or not name:
            return  # no request has such an id, and its type will say so
        view = await self._completions.get(GetData(request_id=name))
        if not _owns(identity, view.agent_id):
            raise not_found(name)

    async def check_session(self, name: Any, identity: Identity) -> None:
        """That a conversation is new, or one that the sender has asked in before.

        Raises:
            Forbidden: it is another's.
        """
        if identity.scope is Scope.OPERATE or not isinstance(name, str) or not name:
            return
        session = await self._store.session(name)
        if session is not None and not any(_owns(identity, agent) for agent in session.agents):
            raise Forbidden(f"the conversation {name[:100]!r} is not one of the token {identity.name!r}")

    async def _check_ask(self, envelope: Envelope, identity: Identity) -> None:
        if identity.scope is Scope.OPERATE:
            return
        data = envelope.data
        for name, why in _OPERATORS_ONLY.items():
            if data.get(name) is not None:
                raise forbidden(identity, f"{envelope.event} with {name}, which {why},", Scope.OPERATE)
        for name in ("session_id", "conversation_id"):
            await self.check_session(data.get(name), identity)
        injection = data.get("injection_config")
        targets = injection.get("target_sessions") if isinstance(injection, dict) else None
        for target in targets if isinstance(targets, list) else ():
            if target != ORIGINATING:
                await self.check_session(target, identity)
        chain = data.get("circuit_breaker_config")
        if isinstance(chain, dict):
            await self._check_request(chain.get("parent_request_id"), identity)


def forbidden(identity: Identity, what: str, needed: Scope) -> Forbidden:
    """The refusal of an event outside a token's scope."""
    return Forbidden(
        f"the token {identity.name!r} has the scope {identity.scope.word}; {what} needs {needed.word}",
    )


def _owns(identity: Identity, agent: str | None) -> bool:
    return agent is not None and (agent == identity.name or agent.startswith(f"{identity.name}/"))


def _asked_by(data: dict[str, Any], identity: Identity) -> dict[str, Any]:
    """A request's data with the account and priority of its token."""
    agent, found = data.get("agent_id"), dict(data)
    if agent is None or isinstance(agent, str):
        account = agent_of(identity, agent or None)
        if account is not None:
            found["agent_id"] = account
    if identity.priority is not None and found.get("priority") is None:
        found["priority"] = identity.priority
    return found
