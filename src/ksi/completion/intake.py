"""From an event's data to a normalised request: every check that needs no state (S1, Q1, Q4)."""

from __future__ import annotations

import msgspec

from ksi.clock import Chance, Moment, microseconds
from ksi.errors import InvalidData
from ksi.event_types import CompletionData, MessageData, RetryData
from ksi.events import check_depth, conversation_name, parse_priority
from ksi.request import HeadStarts, MessageBody, OnBusy, Priority, RequestBody, RetryBody, decode_body, encode_body
from ksi.store.values import NewRequest, RequestView


class Intake:
    """Turns completion data into a request; knows head starts and the default model, no state."""

    def __init__(self, head_starts: HeadStarts, chance: Chance) -> None:
        self._head_starts = head_starts
        self._chance = chance

    def request_id(self, now: Moment) -> str:
        """An id for a request that came without one."""
        return self._chance.identifier("req", now)

    def new_request(self, data: CompletionData, model: str, route: str, now: Moment) -> NewRequest:
        """The request to enqueue, for a model whose route is known.

        Raises:
            InvalidData: with the field's path.
        """
        body = normalise(data)
        due = due_time(data, now)
        session = body.session_id
        conversation = session if session is not None and not body.fork else self._chance.identifier("conv", now)
        priority = Priority(body.priority)
        return NewRequest(
            request_id=data.request_id or self.request_id(now),
            conversation=conversation,
            body=encode_body(body),
            route=route,
            rank=self._head_starts.rank(priority, max(due or 0, now.wall)),
            priority=priority,
            model=model,
            agent_id=body.agent_id,
            due=due,
            expires=now.wall + microseconds(body.ttl) if body.ttl is not None else None,
            on_busy=OnBusy(body.on_busy),
            hold_on_retry=body.hold_on_retry,
            fork_of=session if body.fork else None,
        )

    def requeue(self, view: RequestView, route: str, now: Moment) -> NewRequest:
        """A new request with an old one's content (F2); delays and times to live were meant for the old one."""
        body = decode_body(view.body)
        return NewRequest(
            request_id=self.request_id(now),
            conversation=view.conversation,
            body=view.body,
            route=route,
            rank=self._head_starts.rank(view.priority, now.wall),
            priority=view.priority,
            model=view.model,
            agent_id=view.agent_id,
            hold_on_retry=body.hold_on_retry,
            requeued_from=view.request_id,
        )


def due_time(data: CompletionData, now: Moment) -> int | None:
    """When a delayed request may run, in microseconds of wall time (Q7).

    Raises:
        InvalidData: both `delay` and `not_before`.
    """
    if data.delay is not None and data.not_before is not None:
        raise InvalidData("give delay or not_before, not both", path="not_before")
    if data.delay is not None:
        return now.wall + microseconds(data.delay)
    return microseconds(data.not_before) if data.not_before is not None else None


def normalise(data: CompletionData) -> RequestBody:
    """The content that counts: aliases resolved, words parsed, text parts joined.

    Raises:
        InvalidData: with the field's path.
    """
    session = conversation_name(data.session_id, data.conversation_id)
    if data.fork and session is None:
        raise InvalidData("fork needs the session_id of the conversation to fork", path="fork")
    check_depth("mcp_config", data.mcp_config)
    check_depth("metadata", data.metadata)
    check_depth("provider_options", data.provider_options)
    system, messages = _dialogue(data)
    return RequestBody(
        prompt=data.prompt,
        messages=messages,
        model=data.model,
        session_id=session,
        agent_id=data.agent_id,
        system=system,
        max_tokens=data.max_tokens,
        temperature=data.temperature,
        stop=(data.stop,) if isinstance(data.stop, str) else tuple(data.stop or ()),
        priority=int(parse_priority(data.priority)),
        on_busy=data.on_busy,
        fork=data.fork,
        hold_on_retry=data.hold_on_retry,
        not_before=data.not_before,
        delay=data.delay,
        ttl=data.ttl,
        timeout=data.timeout,
        retry=_retry(data.retry),
        mcp_config=data.mcp_config,
        injection_config=data.injection_config,
        circuit_breaker_config=data.circuit_breaker_config,
        patterns=data.patterns,
        metadata=data.metadata,
        provider_options=data.provider_options,
    )


def _dialogue(data: CompletionData) -> tuple[str | None, tuple[MessageBody, ...]]:
    """The system text, and the messages without leading system ones."""
    if (data.prompt is None) == (data.messages is None):
        raise InvalidData("give prompt or messages, one of them", path="prompt")
    if data.prompt is not None:
        if not data.prompt.strip():
            raise InvalidData("prompt: must not be empty", path="prompt")
        return data.system or None, ()
    messages = [MessageBody(m.role, _text(m)) for m in data.messages or ()]
    leading = 0
    while leading < len(messages) and messages[leading].role == "system":
        leading += 1
    system = [data.system] if data.system else []
    system += [m.content for m in messages[:leading]]
    rest = messages[leading:]
    for number, message in enumerate(rest, leading):
        if message.role == "system":
            raise InvalidData(f"messages[{number}]: system messages come first", path=f"messages[{number}].role")
    if not rest or rest[-1].role != "user" or not rest[-1].content.strip():
        raise InvalidData("messages: the last one must be from the user and not empty", path="messages")
    return "\n\n".join(system) or None, tuple(rest)


def _retry(wish: RetryData | None) -> RetryBody | None:
    """A wish that names nothing is none."""
    body = RetryBody(**msgspec.structs.asdict(wish)) if wish is not None else RetryBody()
    return body if body != RetryBody() else None


def _text(message: MessageData) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text for part in message.content)
