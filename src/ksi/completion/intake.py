"""Makes a normalised request of an event's data. All checks that need no state are made here."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ksi.clock import Chance, Moment, microseconds
from ksi.content.blocks import (
    Content,
    Message,
    as_blocks,
    check_blocks,
    check_tools,
    compact,
    gathered,
    is_blank,
    text_of,
    tool_answers,
    tool_calls,
)
from ksi.content.features import Features
from ksi.errors import InvalidData
from ksi.events.common import Json
from ksi.events.completions import CompletionData, MessageData, RetryData
from ksi.events.specs import check_depth, conversation_name, parse_priority
from ksi.request import HeadStarts, OnBusy, Priority, RequestBody, RetryBody, decode_body, encode_body
from ksi.store.values import NewRequest, RequestView


class Intake:
    """Turns completion data into a request; knows head starts and the default model, no state."""

    def __init__(self, head_starts: HeadStarts, chance: Chance) -> None:
        self._head_starts = head_starts
        self._chance = chance

    def request_id(self, now: Moment) -> str:
        """An id for a request that came without one."""
        return self._chance.identifier("req", now)

    def new_request(self, data: CompletionData, body: RequestBody, model: str, route: str, now: Moment) -> NewRequest:
        """The request to enqueue, of a normalised body, for a model whose route is known.

        Raises:
            InvalidData: with the field's path.
        """
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
        """Make a new request with the content of an old one. Its delay and time to live are not taken over."""
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
    """Return the time at which a delayed request may run, in microseconds of wall time.

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
    for name, value in (
        ("mcp_config", data.mcp_config), ("metadata", data.metadata), ("provider_options", data.provider_options),
    ):  # fmt: skip
        if value is not None:
            check_depth(name, value)
    system, messages = _dialogue(data) if data.native is None else _native(data)
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
        tools=_tools(data),
        tool_choice=_tool_choice(data),
        parallel_tool_calls=data.parallel_tool_calls,
        response_format=_response_format(data),
        reasoning=_reasoning(data),
        top_p=data.top_p,
        top_k=data.top_k,
        seed=data.seed,
        service_tier=data.service_tier,
        drop_unsupported=data.drop_unsupported,
        native=data.native,
        priority=int(parse_priority(data.priority)),
        on_busy=data.on_busy,
        fork=data.fork,
        hold_on_retry=data.hold_on_retry,
        hold=data.hold,
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


def _dialogue(data: CompletionData) -> tuple[Content | None, tuple[Message, ...]]:
    """The system text, and the messages without leading system ones."""
    if (data.prompt is None) == (data.messages is None):
        raise InvalidData("give prompt or messages, one of them", path="prompt")
    own = _content(data.system, "system") if data.system else None
    if data.prompt is not None:
        if not data.prompt.strip():
            raise InvalidData("prompt: must not be empty", path="prompt")
        return own, ()
    messages = [_message(m, f"messages[{number}]") for number, m in enumerate(data.messages or ())]
    leading = 0
    while leading < len(messages) and messages[leading].role == "system":
        leading += 1
    system = [own] if own else []
    system += [m.content for m in messages[:leading]]
    rest = messages[leading:]
    for number, message in enumerate(rest, leading):
        if message.role == "system":
            raise InvalidData(f"messages[{number}]: system messages come first", path=f"messages[{number}].role")
    if not rest or rest[-1].role != "user" or is_blank(rest[-1].content):
        raise InvalidData("messages: the last one must be from the user and not empty", path="messages")
    rest = gathered(rest)
    _check_calls(rest, data.session_id or data.conversation_id)
    return _joined(system), tuple(rest)


def _joined(contents: Sequence[Content]) -> Content | None:
    if all(isinstance(content, str) for content in contents):
        return "\n\n".join(text_of(content) for content in contents) or None
    return tuple(block for content in contents for block in as_blocks(content))


def _message(message: MessageData, path: str) -> Message:
    """A message in the normal form: results of tools are the user's, and a developer's word is the system's."""
    role = {"developer": "system", "tool": "user"}.get(message.role, message.role)
    if message.role == "tool" and message.tool_call_id is not None:
        if not isinstance(message.content, str):
            check_blocks(message.content, f"{path}.content")
        return Message(
            role, ({"type": "tool_result", "tool_use_id": message.tool_call_id, "content": message.content},)
        )
    content = _content(message.content, f"{path}.content")
    if message.role == "tool" and (isinstance(content, str) or not tool_answers(content)):
        raise InvalidData(f"{path}: a message of a tool has a tool_call_id, or blocks of type tool_result", path=path)
    return Message(role, content)


def _content(content: str | list[Json], path: str) -> Content:
    if isinstance(content, str):
        return content
    blocks = [{"type": "text", **block} if "text" in block else block for block in content]
    check_blocks(blocks, path)
    check_depth(path, blocks)
    return compact(blocks)


def _check_calls(messages: Sequence[Message], session: str | None) -> None:
    """See that the dialogue answers each call of a tool in the next message, and nothing else. Its first message may
    answer calls of the conversation's last turn.

    Raises:
        InvalidData: it does not.
    """
    called: frozenset[str] | None = None if session is not None else frozenset()
    for message in messages:
        calls, results = tool_calls(message.content), tool_answers(message.content)
        if (calls and message.role != "assistant") or (results and message.role != "user"):
            raise InvalidData("messages: calls of tools are the assistant's, their results the user's", path="messages")
        missing = (called or frozenset()) - results
        if missing:
            raise InvalidData(f"messages: {_shown(missing)} has no result in the message behind it", path="messages")
        if called is not None and results - called:
            raise InvalidData(
                f"messages: {_shown(results - called)} is no call of the message before its result", path="messages"
            )
        called = calls


def _shown(ids: frozenset[str]) -> str:
    return ", ".join(sorted(ids))[:200]


def _native(data: CompletionData) -> tuple[None, tuple[Message, ...]]:
    """See that a native request says all by itself."""
    for name in ("prompt", "messages", "system", *Features.__struct_fields__):
        if getattr(data, name) is not None:
            raise InvalidData(f"{name}: a native request says this in its body", path=name)
    check_depth("native", data.native.body if data.native is not None else None)
    return None, ()


def _tool_choice(data: CompletionData) -> Json | None:
    choice = data.tool_choice
    if choice is None:
        return None
    if isinstance(choice, str):
        return {"type": choice}
    if choice.type == "tool" and not any(tool.get("name") == choice.name for tool in data.tools or ()):
        raise InvalidData("tool_choice.name: none of the tools has this name", path="tool_choice.name")
    return _given(choice)


def _tools(data: CompletionData) -> tuple[Json, ...]:
    if not data.tools:
        return ()
    check_tools(data.tools or (), "tools")
    check_depth("tools", data.tools)
    return tuple(data.tools or ())


def _given(of: msgspec.Struct) -> Json:
    fields: Json = msgspec.to_builtins(of)
    return {name: value for name, value in fields.items() if value is not None}


def _response_format(data: CompletionData) -> Json | None:
    form = data.response_format
    if form is None or form.type == "text":
        return None
    if (form.type == "json_schema") != (form.json_schema is not None):
        raise InvalidData("response_format: type json_schema and the json_schema go together", path="response_format")
    if form.json_schema is None:
        return {"type": form.type}
    return {"type": form.type, "json_schema": {"name": form.json_schema.name, **_given(form.json_schema)}}


def _reasoning(data: CompletionData) -> Json | None:
    if data.reasoning is None:
        return None
    if (data.reasoning.effort is None) == (data.reasoning.budget_tokens is None):
        raise InvalidData("reasoning: give an effort or budget_tokens, one of them", path="reasoning")
    return _given(data.reasoning)


def _retry(wish: RetryData | None) -> RetryBody | None:
    """A wish that names nothing is none."""
    if wish is None:
        return None
    body = RetryBody(**msgspec.structs.asdict(wish))
    return body if body != RetryBody() else None
