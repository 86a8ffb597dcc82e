"""What a conversation brings into a call: its history, cut to fit (L9), and its life (L10)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import msgspec

from ksi.clock import Moment, microseconds
from ksi.config import Session
from ksi.injection.wrapper import join
from ksi.providers.base import Call, Capabilities, Message, Provider, StatefulProvider, bare_model
from ksi.request import RequestBody, Turn, decode_body
from ksi.store.base import Store
from ksi.store.values import Claimed, SessionView

BYTES_PER_TOKEN = 3.5
"""The estimate where a provider does not count: on the careful side for plain English, right for mixed text."""

MESSAGE_TOKENS = 4
"""What a message's frame costs."""

ANSWER_SHARE = 4
"""An answer without `max_tokens` is left a quarter of the context."""

KEPT_PROVIDERS = 10_000
"""Conversations whose last provider is remembered."""

MOST_READ = 16 * 1024 * 1024
"""Characters of a conversation in the store, after which no more of it is read for one call."""


def estimate_tokens(text: str) -> int:
    """About how many tokens a text has."""
    return int(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN) + 1


class Exchange(msgspec.Struct, frozen=True):
    """One turn as messages, with its estimated tokens."""

    id: int
    messages: tuple[Message, ...]
    tokens: int
    size: int


class Past(msgspec.Struct, frozen=True):
    """A conversation's turns up to `head`, the oldest first; `whole` says that none is to be had before them."""

    head: int | None
    turns: tuple[Exchange, ...]
    messages: tuple[Message, ...]
    tokens: int
    size: int
    whole: bool

    def then(self, turn: Exchange) -> Past:
        """The past with one more turn."""
        return Past(
            turn.id,
            (*self.turns, turn),
            (*self.messages, *turn.messages),
            self.tokens + turn.tokens,
            self.size + turn.size,
            self.whole,
        )


class _Place(msgspec.Struct, frozen=True):
    """A provider session, the last good message in it, and whether it is another conversation's."""

    session: str | None = None
    message: str | None = None
    foreign: bool = False
    fork: str | None = None
    """Why there is no session to go on in, where that makes a fork."""


_LOST = _Place(fork="node_lost")
"""It was on a machine that is gone: what it held goes along as history (D4)."""

_NOTHING = Past(None, (), (), 0, 0, True)


class SessionManager:
    """Prepares calls, and keeps the history of the conversations in play in bounded memory."""

    def __init__(self, store: Store, config: Session, node: str | None = None) -> None:
        """`node` is this machine, where several share the store."""
        self._store = store
        self._node = node
        self._config = config
        self._cache: OrderedDict[str, Past] = OrderedDict()
        self._cached_bytes = 0
        self._last: OrderedDict[str, str] = OrderedDict()
        """Who made the last turn of conversations in play."""

    async def prepare(
        self, claim: Claimed, body: RequestBody, model: str, provider: Provider, *, stream: bool, shrink: int = 1
    ) -> Call:
        """The call for a claim: the history that fits, and what is said now.

        A stateful provider that stands at the conversation's head needs the history only should its own be gone.
        Reminders that the claim took go before what is said now (C2). `shrink` divides the history: 2 after the
        provider found the context too long.
        """
        now = said(body, [reminder.text for reminder in claim.reminders])
        place = await self._place(claim, provider)
        limit = self._limit(body, now, provider.capabilities)
        known = await self._past(claim, limit)
        # A share of what there is: of a limit that the history does not reach, half may be all of it once more.
        past = fit(known, limit if shrink == 1 else min(limit, known.tokens) // shrink)
        return Call(
            request_id=claim.request_id,
            attempt=claim.attempt,
            conversation=claim.conversation,
            model=bare_model(model),
            messages=(*past, *now),
            history=len(past) if place.session is not None else 0,
            system=body.system,
            max_tokens=body.max_tokens,
            temperature=body.temperature,
            stop=body.stop,
            stream=stream,
            provider_session=place.session,
            last_message=place.message,
            fork_session=place.foreign,
            fork=place.fork,
            mcp_config=body.mcp_config,
            options=body.provider_options or {},
        )

    async def last_provider(self, conversation: str) -> str | None:
        """Who made a conversation's last turn; None for a conversation without one."""
        known = self._last.get(conversation)
        if known is None:
            view = await self._store.session(conversation)
            known = view.provider if view is not None else None
            if known is not None:
                self._note_last(conversation, known)
        return known

    async def last_model(self, conversation: str) -> str | None:
        """The full name of the model that a conversation's last turn asked for, where it named one."""
        view = await self._store.session(conversation)
        if view is None or view.head is None:
            return None
        last = await self._store.log_after(view.head - 1, 1, 1)
        return last[0].attempt.asked if last and last[0].id == view.head else None

    def _note_last(self, conversation: str, provider: str) -> None:
        self._last[conversation] = provider
        self._last.move_to_end(conversation)
        if len(self._last) > KEPT_PROVIDERS:
            self._last.popitem(last=False)

    async def _place(self, claim: Claimed, provider: Provider) -> _Place:
        """Where in a stateful provider the conversation stands: at its head, or in a dialogue that it adopts (L9)."""
        if not provider.capabilities.stateful:
            return _Place()
        keeper = cast(StatefulProvider, provider)  # asked by its class, each call would cost more than its history
        if claim.head is None:
            return _Place(session=claim.conversation) if keeper.knows(claim.conversation) else _Place()
        turns = await self._store.history(claim.head, 0)
        if not turns or turns[0].provider != provider.name or turns[0].provider_session is None:
            return _Place()
        head = turns[0]
        if self._node is not None and head.node not in (None, self._node):
            return _LOST
        return _Place(head.provider_session, head.last_message, head.conversation != claim.conversation)

    def _limit(self, body: RequestBody, now: Sequence[Message], can: Capabilities) -> int:
        """Tokens that are left for history; what is said now and the system text are always kept."""
        answer = body.max_tokens or can.context_tokens // ANSWER_SHARE
        left = can.context_tokens - answer - count(now) - (estimate_tokens(body.system) if body.system else 0)
        if self._config.history_tokens is not None:
            left = min(left, self._config.history_tokens)
        return max(0, left)

    async def _past(self, claim: Claimed, limit: int) -> Past:
        if claim.head is None or limit == 0:
            return _NOTHING
        cached = self._cache.get(claim.conversation)
        if cached is not None and cached.head == claim.head:
            self._cache.move_to_end(claim.conversation)
            if cached.whole or cached.tokens >= limit:
                return cached
        past = await self._read(claim.head, limit)
        self._keep(claim.conversation, past)
        return past

    async def _read(self, head: int, limit: int) -> Past:
        """A conversation's last turns from the store, at least as many as fit.

        The store measures a turn by all that came with it, and more than its words may have come: where the first
        reading was too short, it is gone on with.
        """
        turns: list[Exchange] = []
        at: int | None = head
        tokens = size = 0
        chars = int(limit * BYTES_PER_TOKEN * 2) + 1
        while at is not None and tokens < limit and size < MOST_READ:
            read = await self._store.history(at, chars)
            exchanges = [_exchange(turn) for turn in read]
            turns += exchanges
            tokens += sum(exchange.tokens for exchange in exchanges)
            size += sum(len(turn.body) + len(turn.text) for turn in read)
            at = read[-1].previous if read else None
            chars *= 2
        return _as_past(head, turns[::-1], at is None or size >= MOST_READ)

    def turn_made(self, claim: Claimed, body: RequestBody, turn: int, text: str) -> None:
        """A turn was settled: go on from what the cache has, so that the next call need not read it."""
        self._note_last(claim.conversation, claim.provider)
        cached = self._cache.get(claim.conversation)
        if claim.head is None:
            past = _NOTHING
        elif cached is not None and cached.head == claim.head:
            past = cached
        else:
            return
        reminders = [reminder.text for reminder in claim.reminders]
        self._keep(claim.conversation, past.then(_as_exchange(turn, body, text, reminders)))

    def _keep(self, conversation: str, past: Past) -> None:
        before = self._cache.pop(conversation, None)
        if before is not None:
            self._cached_bytes -= before.size
        if past.size > self._config.cache_bytes // 8:
            return
        self._cache[conversation] = past
        self._cached_bytes += past.size
        while self._cached_bytes > self._config.cache_bytes:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= dropped.size

    def life(self, view: SessionView, now: Moment) -> str:
        """`created` before the first turn, then `active`, `idle`, `expired` by its last activity."""
        quiet = now.wall - view.active_at
        if quiet >= microseconds(self._config.expire_after):
            return "expired"
        if quiet >= microseconds(self._config.idle_after):
            return "idle"
        return "active" if view.turns or view.locked else "created"


def fit(past: Past, limit: int) -> Sequence[Message]:
    """Whole turns, the newest that fit in `limit` tokens, in order."""
    if past.tokens <= limit:
        return past.messages
    first, left = len(past.turns), limit
    while first > 0 and past.turns[first - 1].tokens <= left:
        first -= 1
        left -= past.turns[first].tokens
    return [message for turn in past.turns[first:] for message in turn.messages]


def said(body: RequestBody, reminders: Sequence[str]) -> tuple[Message, ...]:
    """What is said in a turn; waiting results go before its last message, as one reminder (C2)."""
    messages = tuple(Message(m.role, m.content) for m in body.dialogue())
    if not reminders:
        return messages
    last = messages[-1]
    return (*messages[:-1], Message(last.role, f"{join(reminders)}\n\n{last.content}"))


def count(messages: Sequence[Message]) -> int:
    """About how many tokens messages have."""
    return sum(estimate_tokens(m.content) + MESSAGE_TOKENS for m in messages)


def _as_past(head: int, turns: Sequence[Exchange], whole: bool) -> Past:
    messages = tuple(message for turn in turns for message in turn.messages)
    return Past(head, tuple(turns), messages, sum(t.tokens for t in turns), sum(t.size for t in turns), whole)


def _exchange(turn: Turn) -> Exchange:
    return _as_exchange(turn.id, decode_body(turn.body), turn.text, turn.reminders)


def _as_exchange(turn: int, body: RequestBody, text: str, reminders: Sequence[str] = ()) -> Exchange:
    messages = (*said(body, reminders), Message("assistant", text))
    size = sum(len(m.content) for m in messages) * 2 + 200
    return Exchange(turn, messages, count(messages), size)
