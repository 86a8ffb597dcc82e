"""The way of Claude Code to an answer as blocks: its thinking, the tools that it ran, and their results. Pure.

The program itself executes these calls, and no client must: so they are `server_tool_use`, and their results are
`server_tool_result`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ksi.content.blocks import Block

LONGEST = 20_000
"""Characters of one tool's result that are kept."""
MOST = 1_000
"""Blocks that are kept of one turn; its first ones."""
_ANSWERING = "StructuredOutput"
"""The tool by which the program has the model answer by a schema: no work."""


class Trail:
    """Collects the blocks of a turn, in order."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._answering: set[str] = set()
        self.more = 0
        """How many blocks were not kept."""

    def add(self, blocks: Sequence[Block]) -> None:
        """Take blocks of the program's messages in, as the API names them."""
        for block in blocks:
            read = self._read(block)
            if read is not None and len(self._blocks) < MOST:
                self._blocks.append(read)
            elif read is not None:
                self.more += 1

    def _read(self, block: Block) -> Block | None:
        match block.get("type"):
            case "thinking" if str(block.get("thinking") or "").strip():
                return {name: block[name] for name in ("type", "thinking", "signature") if name in block}
            case "tool_use":
                if block.get("name") == _ANSWERING:
                    self._answering.add(str(block.get("id")))
                    return None
                return {**{name: block.get(name) for name in ("id", "name", "input")}, "type": "server_tool_use"}
            case "tool_result" if block.get("tool_use_id") not in self._answering:
                return {
                    "type": "server_tool_result",
                    "tool_use_id": block.get("tool_use_id"),
                    "content": _cut(block.get("content") or ""),
                    "is_error": bool(block.get("is_error")),
                }
        return None

    def content(self, answer: str) -> tuple[Block, ...]:
        """The answer's blocks; none if it is nothing but its text."""
        if not self._blocks:
            return ()
        return (*self._blocks, {"type": "text", "text": answer})


def _cut(content: Any) -> str:
    """A result as text, at most so long; images in it are named."""
    if not isinstance(content, str):
        parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
        content = "\n".join(
            str(part.get("text")) if part.get("type") == "text" else f"[{part.get('type')}]" for part in parts
        )
    over = len(content) - LONGEST
    return f"{content[:LONGEST]}\n[{over} more characters were not kept]" if over > 0 else content
