"""Conversations of the memory store: beginnings, forks, and completed turns."""

from __future__ import annotations

import msgspec

from ksi.clock import Moment
from ksi.request import Attempt, Turn
from ksi.store.binding import SESSION_FORKS, node_of
from ksi.store.image.data import Conversation, Request, TurnRecord
from ksi.store.values import Fork
from tests.reference_store.data import MemoryData


class Conversations:
    """The one place where conversations begin and grow."""

    def __init__(self, data: MemoryData) -> None:
        self._data = data

    def enter(self, name: str, now: Moment, fork_of: str | None = None, request_id: str | None = None) -> Conversation:
        """The conversation of this name; a new one begins at the head of `fork_of`, if that is given."""
        found = self._data.find(name)
        if found is None:
            number = self._data.number("conversation")
            found = Conversation(number=number, name=name, created_at=now.wall, active_at=now.wall)
            self._data.conversations[name] = self._data.numbered[number] = found
            parent = self._data.find(fork_of) if fork_of is not None else None
            if parent is not None and request_id is not None:
                self._fork(parent, found, request_id, now)
        return found

    def meet(self, conversation: Conversation, agent_id: str | None) -> None:
        """An agent came to a conversation."""
        if agent_id is not None and agent_id not in conversation.agents:
            conversation.agents.append(agent_id)

    def _fork(self, parent: Conversation, child: Conversation, request_id: str, now: Moment) -> None:
        child.parent, child.head = parent, parent.head
        parent.children += 1
        fork = Fork(parent=parent.name, child=child.name, request_id=request_id, at=now.wall, kind="requested")
        self._data.record_fork(child, fork)
        self._data.reindex(parent)

    def bind(self, conversation: Conversation, attempt: Attempt) -> Attempt:
        """Make a provider session an alias of this conversation; one that is an alias of another loses that (L7)."""
        if attempt.provider_session is None:
            return attempt
        owner = self._data.find(attempt.provider_session)
        if owner is None:
            self._data.aliases[attempt.provider_session] = conversation
            conversation.aliases.append(attempt.provider_session)
        elif owner is not conversation:
            return msgspec.structs.replace(attempt, provider_session=None, last_message=None, node=None)
        return attempt

    def fork_seen(self, request: Request, attempt: Attempt, now: Moment) -> Fork | None:
        """Record a fork that the provider saw (L7)."""
        conversation = request.conversation
        if attempt.fork is None or attempt.provider_session is None:
            return None
        head = None if conversation.head is None else self._data.turns[conversation.head].turn
        before = None if head is None else head.provider_session
        parent = before if attempt.fork in SESSION_FORKS and before is not None else conversation.name
        fork = Fork(
            parent=parent,
            child=attempt.provider_session,
            request_id=request.request_id,
            at=now.wall,
            kind=attempt.fork,
        )
        self._data.record_fork(conversation, fork)
        return fork

    def add_turn(self, request: Request, attempt: Attempt) -> int:
        """Make a completed attempt the conversation's head."""
        conversation = request.conversation
        number = self._data.number("turn")
        turn = Turn(
            id=number,
            body=request.body,
            text=attempt.text or "",
            provider=attempt.provider,
            provider_session=attempt.provider_session,
            finished_at=attempt.finished_at,
            previous=conversation.head,
            last_message=attempt.last_message,
            conversation=conversation.name,
            reminders=tuple(injection.text for injection in request.taken),
            node=node_of(attempt),
            content=attempt.content,
        )
        self._data.turns[number] = TurnRecord(
            turn=turn,
            request_id=request.request_id,
            conversation=conversation.name,
            agent_id=request.agent_id,
            attempt=attempt,
        )
        self._data.log.add((number,))
        conversation.turns.append(number)
        conversation.head = number
        conversation.provider = attempt.provider
        conversation.provider_session = attempt.provider_session
        return number
