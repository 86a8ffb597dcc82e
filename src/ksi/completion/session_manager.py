"""Prepares a conversation's part of a call: its history, cut to fit. Says whether a session is alive."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import msgspec

from ksi.clock import Moment, microseconds
from ksi.completion.pool.abilities import asked_at, takes
from ksi.config.schema import Session
from ksi.content.blocks import Content, Message, before, size_of, tool_answers, tool_calls, weight_of
from ksi.content.features import Asked
from ksi.content.history import anybodys, in_words, sendable
from ksi.content.native import with_reminder
from ksi.errors import FailureClass, ProviderError
from ksi.injection.wrapper import join
from ksi.providers.base import Call, Capabilities, Provider, StatefulProvider, bare_model
from ksi.request import Attempt, RequestBody, Turn, decode_body
from ksi.store.base import Store
from ksi.store.values import Claimed, SessionView
from ksi.tokens import BYTES_PER_TOKEN, estimate_tokens

MESSAGE_TOKENS = 4
"""The tokens of a message's frame."""

ANSWER_SHARE = 4
"""An answer without `max_tokens` is left a quarter of the context."""

KEPT_PROVIDERS = 10_000
"""Conversations whose last provider is remembered."""

MOST_READ = 16 * 1024 * 1024
"""Characters of a conversation in the store, after which no more of it is read for one call."""

PAGE = 32 * 1024
"""Characters of a conversation that are read in one turn of the loop: a long history does not block it."""


class Exchange(msgspec.Struct, frozen=True):
    """One turn as messages, with its estimated tokens."""

    id: int
    messages: tuple[Message, ...]
    tokens: int
    size: int
    provider: str = ""
    """The provider that answered."""
    first: bool = False
    """Its request carried the whole dialogue, including earlier turns."""
    plain: bool = False
    """All of its messages are text and none is blank, so that every provider takes them as they are."""


class Past(msgspec.Struct, frozen=True):
    """A conversation's turns up to `head`, the oldest first; `whole` says that none is to be had before them."""

    head: int | None
    turns: tuple[Exchange, ...]
    messages: tuple[Message, ...]
    tokens: int
    size: int
    whole: bool
    plain: bool = False
    """True if all of its turns are."""

    def then(self, turn: Exchange) -> Past:
        """The past with one more turn."""
        if turn.first:
            return Past(turn.id, (turn,), turn.messages, turn.tokens, turn.size, True, turn.plain)
        return Past(
            turn.id,
            (*self.turns, turn),
            (*self.messages, *turn.messages),
            self.tokens + turn.tokens,
            self.size + turn.size,
            self.whole,
            self.plain and turn.plain,
        )


class _Place(msgspec.Struct, frozen=True):
    """A provider session, the last good message in it, and whether it is another conversation's."""

    session: str | None = None
    message: str | None = None
    foreign: bool = False
    fork: str | None = None
    """The reason why there is no session to continue in, if that makes a fork."""


_NOWHERE = _Place()

_LOST = _Place(fork="node_lost")
"""The session was on a machine that is gone. Its turns are sent along as history."""

_NOTHING = Past(None, (), (), 0, 0, True, True)


class SessionManager:
    """Prepares calls, and keeps the history of the conversations in play in bounded memory."""

    def __init__(self, store: Store, config: Session, node: str | None = None) -> None:
        """`node` is this machine, if several share the store."""
        self._store = store
        self._node = node
        self._config = config
        self._cache: OrderedDict[str, Past] = OrderedDict()
        self._cached_bytes = 0
        self._last: OrderedDict[str, str] = OrderedDict()
        """The providers of the last turns of conversations in play."""

    async def prepare(
        self, claim: Claimed, body: RequestBody, model: str, provider: Provider, *, stream: bool, shrink: int = 1
    ) -> Call:
        """The call for a claim: the history that fits, and the new prompt.

        A stateful provider that stands at the conversation's head needs the history only should its own be gone.
        Reminders that the claim took come before the new messages. `shrink` divides the history: 2 after the
        provider found the context too long.
        """
        reminders = [reminder.text for reminder in claim.reminders] if claim.reminders else ()
        can = provider.capabilities
        if body.native is not None and body.native.dialect == can.dialect:
            return self._native_call(claim, body, model, stream=stream, reminders=reminders)
        asked, dropped = asked_at(body, can)
        now = said(asked.messages, reminders)
        place = await self._place(claim, provider) if can.stateful else _NOWHERE
        limit = self._limit(asked, now, can)
        answers = 1 if tool_answers(now[0].content) else 0  # then the last turn is needed, however full the context
        known = _NOTHING
        if body.native is None and claim.head is not None and (limit or answers):
            wanted = max(limit, answers)
            known = self._cached(claim, wanted) or await self._read_past(claim, claim.head, wanted)
        # A share of the existing history: if it is shorter than the limit, half may be all of it once more.
        past = fit(known, limit if shrink == 1 else min(limit, known.tokens) // shrink, provider.name, can, now)
        if body.native is None:
            _check_results(past, now)
        return Call(
            request_id=claim.request_id,
            attempt=claim.attempt,
            conversation=claim.conversation,
            model=bare_model(model),
            messages=(*past, *now),
            history=len(past) if place.session is not None else 0,
            system=asked.system,
            max_tokens=asked.max_tokens,
            temperature=asked.temperature,
            stop=asked.stop,
            features=asked.features,
            stream=stream,
            provider_session=place.session,
            last_message=place.message,
            fork_session=place.foreign,
            fork=place.fork,
            mcp_config=body.mcp_config,
            options=body.provider_options or {},
            dropped=dropped,
        )

    def _native_call(
        self, claim: Claimed, body: RequestBody, model: str, *, stream: bool, reminders: Sequence[str]
    ) -> Call:
        """The call for a request in the provider's own dialect. It carries its whole dialogue."""
        native = body.native
        if native is not None and reminders:
            native = with_reminder(native, join(reminders))
        return Call(
            request_id=claim.request_id,
            attempt=claim.attempt,
            conversation=claim.conversation,
            model=bare_model(model),
            messages=(),
            max_tokens=body.max_tokens,
            native=native,
            stream=stream,
            options=body.provider_options or {},
        )

    async def last_provider(self, conversation: str) -> str | None:
        """Return the provider of a conversation's last turn; None if it has no turn."""
        known = self._last.get(conversation)
        if known is None:
            view = await self._store.session(conversation)
            known = view.provider if view is not None else None
            if known is not None:
                self._note_last(conversation, known)
        return known

    async def last_model(self, conversation: str) -> str | None:
        """The full name of the model in the request of a conversation's last turn, if it named one."""
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
        """Find the conversation's place at a stateful provider: its head, or a dialogue that it adopts."""
        keeper = cast(StatefulProvider, provider)  # asked by its class, each call would cost more than its history
        if claim.head is None:
            return _Place(session=claim.conversation) if keeper.knows(claim.conversation) else _NOWHERE
        turns = await self._store.history(claim.head, 0)
        if not turns or turns[0].provider != provider.name or turns[0].provider_session is None:
            return _NOWHERE
        head = turns[0]
        if self._node is not None and head.node not in (None, self._node):
            return _LOST
        return _Place(head.provider_session, head.last_message, head.conversation != claim.conversation)

    def _limit(self, asked: Asked, now: Sequence[Message], can: Capabilities) -> int:
        """Tokens that are left for history; the new prompt and the system text are always kept."""
        answer = asked.max_tokens or can.context_tokens // ANSWER_SHARE
        left = can.context_tokens - answer - count(now) - (estimate_content(asked.system) if asked.system else 0)
        if self._config.history_tokens is not None:
            left = min(left, self._config.history_tokens)
        return max(0, left)

    def _cached(self, claim: Claimed, limit: int) -> Past | None:
        cached = self._cache.get(claim.conversation)
        if cached is None or cached.head != claim.head:
            return None
        self._cache.move_to_end(claim.conversation)
        return cached if cached.whole or cached.tokens >= limit else None

    async def _read_past(self, claim: Claimed, head: int, limit: int) -> Past:
        past = await self._read(head, limit)
        self._keep(claim.conversation, past)
        return past

    async def _read(self, head: int, limit: int) -> Past:
        """A conversation's last turns from the store, at least as many as fit, page by page."""
        turns: list[Exchange] = []
        at: int | None = head
        tokens = size = 0
        chars = min(PAGE, int(limit * BYTES_PER_TOKEN * 2) + 1)
        while at is not None and tokens < limit and size < MOST_READ:
            read = await self._store.history(at, chars)
            exchanges = [_exchange(turn) for turn in read]
            turns += exchanges
            tokens += sum(exchange.tokens for exchange in exchanges)
            size += sum(turn.chars for turn in read)
            at = read[-1].previous if read and not exchanges[-1].first else None
            await asyncio.sleep(0)
        return _as_past(head, turns[::-1], at is None or size >= MOST_READ)

    def forget(self, conversation: str) -> None:
        """A conversation was deleted: nothing of it stays in memory."""
        self._last.pop(conversation, None)
        gone = self._cache.pop(conversation, None)
        if gone is not None:
            self._cached_bytes -= gone.size

    def turn_made(self, claim: Claimed, body: RequestBody, turn: int, attempt: Attempt) -> None:
        """A turn was settled: extend the cached history, so that the next call need not read it."""
        self._note_last(claim.conversation, claim.provider)
        cached = self._cache.get(claim.conversation)
        if claim.head is None:
            past = _NOTHING
        elif cached is not None and cached.head == claim.head:
            past = cached
        else:
            return
        reminders = [reminder.text for reminder in claim.reminders] if claim.reminders else ()
        answer = attempt.content or attempt.text or ""
        self._keep(claim.conversation, past.then(_as_exchange(turn, body, answer, attempt.provider, reminders)))

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


def fit(past: Past, limit: int, provider: str, can: Capabilities, now: Sequence[Message]) -> Sequence[Message]:
    """Whole turns, the newest that fit in `limit` tokens, in order, as `provider` can take them before `now`."""
    first = 0
    if past.tokens > limit:
        first, left = len(past.turns), limit
        while first > 0 and past.turns[first - 1].tokens <= left:
            first -= 1
            left -= past.turns[first].tokens
    if now and tool_answers(now[0].content):
        first = max(0, min(first, len(past.turns) - 1))  # its calls are in the last turn
    if past.plain:
        return past.messages if first == 0 else [m for turn in past.turns[first:] for m in turn.messages]
    turns = [
        turn.messages if turn.provider == provider else tuple(anybodys(message) for message in turn.messages)
        for turn in past.turns[first:]
    ]
    return [Message(m.role, in_words(m.content, takes(can))) for m in sendable(turns, now)]


def _check_results(past: Sequence[Message], now: Sequence[Message]) -> None:
    """See that the results of tools with which a turn begins answer calls of the conversation's last answer.

    Raises:
        ProviderError: they do not; endpoints refuse such a dialogue in words that do not help.
    """
    results = tool_answers(now[0].content)
    if not results:
        return
    orphans = results - (tool_calls(past[-1].content) if past else frozenset())
    if orphans:
        raise ProviderError(
            FailureClass.INVALID_REQUEST,
            f"the conversation's last answer did not call {', '.join(sorted(orphans))[:200]}; send the results of "
            "the calls that it made, in its conversation (session_id)",
        )


def said(messages: Sequence[Message], reminders: Sequence[str]) -> tuple[Message, ...]:
    """Return the messages of a turn. Waiting results come before its last message, as one reminder."""
    if not reminders:
        return tuple(messages)
    last = messages[-1]
    return (*messages[:-1], Message(last.role, before(join(reminders), last.content)))


def count(messages: Sequence[Message]) -> int:
    """About how many tokens messages have."""
    tokens = 0
    for message in messages:
        tokens += estimate_content(message.content) + MESSAGE_TOKENS
    return tokens


def estimate_content(content: Content) -> int:
    """About how many tokens a content has."""
    return estimate_tokens(content) if isinstance(content, str) else int(size_of(content) / BYTES_PER_TOKEN) + 1


def _as_past(head: int, turns: Sequence[Exchange], whole: bool) -> Past:
    messages = tuple(message for turn in turns for message in turn.messages)
    tokens, size = sum(t.tokens for t in turns), sum(t.size for t in turns)
    return Past(head, tuple(turns), messages, tokens, size, whole, all(t.plain for t in turns))


def _exchange(turn: Turn) -> Exchange:
    return _as_exchange(turn.id, decode_body(turn.body), turn.content or turn.text, turn.provider, turn.reminders)


def _as_exchange(
    turn: int, body: RequestBody, answer: Content, provider: str, reminders: Sequence[str] = ()
) -> Exchange:
    asked = body.dialogue()
    # An unreadable prompt's answer is of no use to others.
    messages = (*said(asked, reminders), Message("assistant", answer)) if asked else ()
    size = 200
    plain = True
    for message in messages:
        size += 2 * weight_of(message.content)
        plain = plain and isinstance(message.content, str) and not message.content.isspace() and message.content != ""
    return Exchange(turn, messages, count(messages), size, provider, body.native is not None, plain)
