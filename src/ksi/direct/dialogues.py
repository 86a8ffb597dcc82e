"""V1's memory of a conversation: its turns from the session log, and its session at a provider."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import cast

import msgspec

from ksi.completion.session_manager import ANSWER_SHARE, count, estimate_content
from ksi.content.blocks import Message
from ksi.direct.session_log import SessionLog, dialogue, write_line
from ksi.providers.base import Call, Capabilities, Provider, StatefulProvider, bare_model
from ksi.request import RequestBody
from ksi.store.values import LoggedTurn

KEPT = 1_000
"""Conversations that are held in memory."""
KEPT_TURNS = 1_000
"""Turns of each."""
READ_AT_ONCE = 256 * 1024
"""Bytes of a session log up to which it is read on the loop: a thread would take longer."""


class Dialogue:
    """One conversation's turns, and the provider of its last one."""

    def __init__(self) -> None:
        self.provider: str | None = None
        self.provider_session: str | None = None
        self._turns: deque[tuple[Message, ...]] = deque(maxlen=KEPT_TURNS)

    @property
    def begun(self) -> bool:
        """True if it has a turn."""
        return bool(self._turns)

    def add(self, messages: Sequence[Message], provider: str, provider_session: str | None) -> None:
        """A turn was made."""
        self._turns.append(tuple(messages))
        self.provider, self.provider_session = provider, provider_session

    def fit(self, limit: int) -> list[Message]:
        """The messages of the newest turns that fit in so many tokens, in order."""
        taken = 0
        for turn in reversed(self._turns):
            limit -= count(turn)
            if limit < 0:
                break
            taken += 1
        return [message for turn in islice(self._turns, len(self._turns) - taken, None) for message in turn]


class Dialogues:
    """The conversations in use; others are read again when they continue."""

    def __init__(self, folder: Path, *, logged: bool) -> None:
        """`logged` is whether turns are written to the folder; without it a restart forgets them."""
        self._log = SessionLog(folder)
        self._logged = logged
        self._known: OrderedDict[str, Dialogue] = OrderedDict()

    async def of(self, conversation: str) -> Dialogue:
        """One conversation."""
        known = self._known.get(conversation)
        if known is None:
            large = self._logged and self._log.size(conversation) > READ_AT_ONCE
            read = await asyncio.to_thread(self._read, conversation) if large else self._read(conversation)
            # Two requests may have read it at the same time: they share the first copy.
            known = self._known.setdefault(conversation, read)
        self._known.move_to_end(conversation)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return known

    def _read(self, conversation: str) -> Dialogue:
        read = Dialogue()
        for turn in self._log.read(conversation) if self._logged else ():
            messages = [Message(m.role, m.content) for m in dialogue(turn)]
            read.add(messages, turn.provider, turn.provider_session)
        return read

    async def call(self, request_id: str, conversation: str, body: RequestBody, model: str, provider: Provider) -> Call:
        """The call for a request: the history that fits, and the new prompt."""
        known = await self.of(conversation)
        now = [Message(m.role, m.content) for m in body.dialogue()]
        past = known.fit(_limit(body, now, provider.capabilities))
        session = _session(known, conversation, provider)
        return Call(
            request_id=request_id,
            attempt=1,
            conversation=conversation,
            model=bare_model(model),
            messages=[*past, *now],
            history=len(past) if session is not None else 0,
            system=body.system,
            max_tokens=body.max_tokens,
            temperature=body.temperature,
            stop=body.stop,
            provider_session=session,
            mcp_config=body.mcp_config,
            options=body.provider_options or {},
        )

    async def made(self, turn: LoggedTurn, body: RequestBody) -> None:
        """A turn was made: remember it, and write its line.

        Raises:
            OSError: the line cannot be written.
        """
        known = await self.of(turn.conversation)
        messages = [Message(m.role, m.content) for m in body.dialogue()]
        attempt = turn.attempt
        known.add([*messages, Message("assistant", attempt.text or "")], attempt.provider, attempt.provider_session)
        if self._logged:
            # Only the text is kept: the provider's full answer is in the log anyhow.
            self._log.append(turn.conversation, write_line(turn, msgspec.structs.replace(body, metadata=None)))


def _session(known: Dialogue, conversation: str, provider: Provider) -> str | None:
    """The session in which a stateful provider continues: the last turn's, or one named like the conversation."""
    if not provider.capabilities.stateful:
        return None
    if known.begun:
        return known.provider_session if known.provider == provider.name else None
    return conversation if cast(StatefulProvider, provider).knows(conversation) else None


def _limit(body: RequestBody, now: Sequence[Message], can: Capabilities) -> int:
    """Tokens that are left for history."""
    answer = body.max_tokens or can.context_tokens // ANSWER_SHARE
    return can.context_tokens - answer - count(now) - (estimate_content(body.system) if body.system else 0)
