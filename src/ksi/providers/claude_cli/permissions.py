"""Claude Code asks whether its model may use a tool: the question, the answer, and the turns that wait for one."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import structlog

from ksi.clock import Clock
from ksi.providers.base import Permission, Verdict
from ksi.providers.claude_cli.process import ClaudeProcess
from ksi.providers.claude_cli.sessions import OpenedSession
from ksi.providers.claude_cli.stream import Asks
from ksi.providers.claude_cli.tools import told_call
from ksi.providers.claude_cli.turn import ClaudeTurn
from ksi.providers.json_text import encode_clean

LONGEST_INPUT = 64 * 1024
"""Bytes of a tool's input that a person can be shown. A longer one is denied."""

_sorted = msgspec.json.Encoder(order="sorted")


class AskedError(Exception):
    """The turn stops until a person has answered this."""

    def __init__(self, asks: Asks, permission: Permission) -> None:
        super().__init__(permission.text)
        self.asks = asks
        self.permission = permission


class WaitingTurn(msgspec.Struct, frozen=True, kw_only=True):
    """A turn whose process waits for a person's answer."""

    request_id: str
    conversation: str
    opened: OpenedSession
    turn: ClaudeTurn
    prompt_id: str
    asks: Asks
    must_stay: bool
    """It has used tools with effects, so that it cannot be run again."""


def permission_of(asks: Asks) -> Permission:
    """The program's request."""
    name, given = str(asks.request.get("tool_name")), asks.request.get("input")
    text = _sorted.encode(msgspec.json.decode(encode_clean(given))).decode()
    return Permission(name, text, f"may it use {told_call(name, given)}?")


def response_to(asks: Asks, verdict: Verdict) -> dict[str, Any]:
    """The answer as the program takes it."""
    if verdict.allowed:
        return {"behavior": "allow", "updatedInput": asks.request.get("input") or {}}
    return {"behavior": "deny", "message": verdict.why, "interrupt": False}


def call_id(asks: Asks) -> str:
    """The id of the tool's call."""
    return str(asks.request.get("tool_use_id") or "")


class WaitingTurns:
    """The processes that wait for an answer: one for each conversation, bounded by number and by time.

    One whose turn can be run again is ended after `keep` seconds, or when there are too many; one whose turn has done
    something stays as long as its question is open.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        limit: int,
        keep: float,
        longest: float,
        discard: Callable[[ClaudeProcess], Awaitable[None]],
    ) -> None:
        self._clock = clock
        self._limit = limit
        self._keep = keep
        self._longest = longest
        self._discard = discard
        self._turns: OrderedDict[str, tuple[WaitingTurn, asyncio.Task[None]]] = OrderedDict()
        self._log = structlog.get_logger("ksi.claude")

    def put(self, waiting: WaitingTurn) -> None:
        """Let a turn wait."""
        seconds = self._longest if waiting.must_stay else self._keep
        timer = asyncio.create_task(self._end_after(waiting, seconds), name="claude waits")
        self._turns[waiting.conversation] = waiting, timer
        free = [one for one, _ in self._turns.values() if not one.must_stay]
        if len(self._turns) > self._limit and free:
            self._turns[free[0].conversation][1].cancel()
            self._turns[free[0].conversation] = (
                free[0],
                asyncio.create_task(self._end_after(free[0], 0.0), name="claude waits no more"),
            )

    async def take(self, conversation: str, request_id: str) -> WaitingTurn | None:
        """The turn of this request that waits here, if its process still does. One of another request is ended."""
        waiting, timer = self._turns.pop(conversation, (None, None))
        if waiting is None or timer is None:
            return None
        timer.cancel()
        await asyncio.gather(timer, return_exceptions=True)
        if waiting.request_id == request_id and waiting.opened.process.alive:
            return waiting
        await self._discard(waiting.opened.process)
        return None

    async def let_go(self, conversation: str) -> None:
        """Nobody waits for the answer any more."""
        await self.take(conversation, "")

    async def close(self) -> None:
        """End all."""
        for conversation in list(self._turns):
            await self.let_go(conversation)

    async def _end_after(self, waiting: WaitingTurn, seconds: float) -> None:
        await self._clock.sleep(seconds)
        self._turns.pop(waiting.conversation, None)
        self._log.debug("a process waits no more for an answer", request_id=waiting.request_id)
        # Shielded: whoever takes it at this moment must find it ended.
        await asyncio.shield(self._discard(waiting.opened.process))
