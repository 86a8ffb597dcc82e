"""The part of a dialogue's past that can be sent again. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from ksi.content.blocks import KNOWN, REASONING, Block, Content, Message, compact, is_blank, tool_answers, tool_calls

_SERVER_CALLS = frozenset({"server_tool_use", "mcp_tool_use"})
"""Tool calls that the vendor itself executes; their results are in the same message."""

_ID_FIELDS = {"tool_use": "id", "tool_result": "tool_use_id"}
_LONGEST = 2_000
"""Maximum length of a tool's input or result in words, in characters."""


def anybodys(message: Message) -> Message:
    """A message without blocks that only their vendor can read: its reasoning, and blocks of its own."""
    if isinstance(message.content, str):
        return message
    kept = (b for b in message.content if b.get("type") in KNOWN and b.get("type") not in REASONING)
    return Message(message.role, compact(kept))


def in_words(content: Content, can: Callable[[Block], bool]) -> Content:
    """A content in which words stand for the blocks that a provider cannot take."""
    if isinstance(content, str) or all(can(block) for block in content):
        return content
    return compact(block if can(block) else {"type": "text", "text": _words(block)} for block in content)


def _words(block: Block) -> str:
    match block.get("type"):
        case "tool_use":
            given = msgspec.json.encode(block.get("input", {})).decode()
            return f"[called the tool {block.get('name')} with {given[:_LONGEST]}]\n"
        case "tool_result":
            inner = block.get("content") or ""
            said = inner if isinstance(inner, str) else _told(inner)
            return f"[result of the tool: {said[:_LONGEST]}]\n"
        case "document" if block.get("title"):
            return f"[the document {block['title']}, left out here]\n"
    return f"[{str(block.get('type'))[:50]}, left out here]\n"


def _told(blocks: Sequence[Block]) -> str:
    return "".join(str(b.get("text")) if b.get("type") == "text" else _words(b) for b in blocks)


def sendable(turns: Sequence[Sequence[Message]], now: Sequence[Message]) -> list[Message]:
    """The turns without calls of tools that nothing answers, and without results of calls that are not there.

    Endpoints refuse a whole dialogue for one. A turn whose answer or question is nothing but such blocks is left out.
    `now` is said after them, and may answer the last calls.
    """
    kept = list(turns)
    while True:
        cleaned = _cleaned(kept, now)
        good = [number for number, turn in enumerate(cleaned) if _is_good(turn)]
        if len(good) == len(kept):
            return [message for turn in cleaned for message in turn if not is_blank(message.content)]
        kept = [kept[number] for number in good]


def _is_good(turn: Sequence[Message]) -> bool:
    asked = any(m.role == "user" and not is_blank(m.content) for m in turn)
    return asked and not is_blank(turn[-1].content)


def _cleaned(turns: Sequence[Sequence[Message]], now: Sequence[Message]) -> list[list[Message]]:
    flat = [message for turn in turns for message in turn]
    beside: list[Message | None] = [None, *flat, now[0] if now else None]
    cleaned = iter([_clean(m, beside[number], beside[number + 2]) for number, m in enumerate(flat)])
    return [[next(cleaned) for _ in turn] for turn in turns]


def _clean(message: Message, earlier: Message | None, later: Message | None) -> Message:
    if isinstance(message.content, str):
        return message
    asks = message.role == "assistant"
    answered = tool_answers(later.content) if asks and later is not None and later.role == "user" else frozenset()
    called = tool_calls(earlier.content) if not asks and earlier is not None and earlier.role == "assistant" else ()
    served = {block.get("tool_use_id") for block in message.content}

    def stays(block: Block) -> bool:
        kind = block.get("type")
        if kind == "tool_use":
            return block.get("id") in answered
        if kind == "tool_result":
            return block.get("tool_use_id") in called
        return kind not in _SERVER_CALLS or block.get("id") in served

    return Message(message.role, compact(block for block in message.content if stays(block)))


def unique_calls(messages: Sequence[Message], fits: Callable[[str], bool], name: Callable[[int], str]) -> list[Message]:
    """The messages with ids of calls that an endpoint takes: each fits, and none comes twice. `name` makes the id that
    stands for the n-th call's. Some endpoints restart the numbers of their calls in each answer."""
    taken: set[str] = set()
    renamed: dict[str, str] = {}
    written: list[Message] = []
    calls = 0
    for message in messages:
        if isinstance(message.content, str):
            written.append(message)
            continue
        if message.role == "assistant":
            renamed = {}
        blocks: list[Block] = []
        for block in message.content:
            field = _ID_FIELDS.get(str(block.get("type")))
            if field is None:
                blocks.append(block)
                continue
            given = str(block[field])
            if field == "id":
                calls += 1
                renamed[given] = given if fits(given) and given not in taken else name(calls)
                taken.add(renamed[given])
            blocks.append({**block, field: renamed.get(given, given)})
        written.append(Message(message.role, tuple(blocks)))
    return written
