"""Renaming and deletion of conversations in the reference store."""

from __future__ import annotations

import msgspec

from ksi.store.admission import Routing
from ksi.store.image.chains import Injection
from ksi.store.image.data import Conversation, Request
from ksi.store.rules import refusals
from ksi.store.values import Deleted
from tests.reference_store.data import MemoryData
from tests.reference_store.upkeep import Upkeep


class Owning:
    """See `ksi.store.base.Store` for each verb."""

    def __init__(self, data: MemoryData, upkeep: Upkeep) -> None:
        self._data = data
        self._upkeep = upkeep

    def _found(self, name: str) -> Conversation:
        found = self._data.find(name)
        if found is None:
            raise refusals.unknown_conversation(name)
        return found

    def rename(self, conversation: str, name: str) -> str:
        """See the protocol."""
        found = self._found(conversation)
        before = found.name
        if self._data.find(name) not in (None, found):
            raise refusals.name_taken(name)
        if name == before:
            return before
        if name in found.aliases:
            found.aliases.remove(name)
            del self._data.aliases[name]
        found.aliases.append(before)
        self._data.aliases[before] = found
        del self._data.conversations[before]
        self._data.conversations[name] = found
        found.name = name
        for _, number in self._data.trees.walk((found.root,)):
            fork = self._data.forks[number]
            parent = name if fork.parent == before else fork.parent
            child = name if fork.child == before else fork.child
            self._data.forks[number] = msgspec.structs.replace(fork, parent=parent, child=child)
        for record in self._data.turns.values():
            if record.conversation == before:
                record.conversation = name
                record.turn = msgspec.structs.replace(record.turn, conversation=name)
        self._account(before, name)
        return before

    def _account(self, before: str, after: str) -> None:
        for place, spent in enumerate(self._data.spent):
            if spent.conversation == before:
                first = spent.first and bool(after)
                self._data.spent[place] = msgspec.structs.replace(spent, conversation=after, first=first)

    def delete(self, conversation: str) -> Deleted:
        """See the protocol."""
        found = self._found(conversation)
        members = [member for member in self._data.members.values() if member.conversation is found]
        waiting = [member for member in members if not (isinstance(member, Request) and member.state.final)]
        first = found.holder or self._data.head_of_line(found) or min(waiting, key=lambda one: one.key, default=None)
        if first is not None:
            raise refusals.not_ended(found.name, first.request_id)
        requests = [member for member in members if isinstance(member, Request)]
        for request in requests:
            if request.link is not None and request.link.routing is Routing.UNROUTED:
                raise refusals.not_ended(found.name, request.request_id)
        forks = [child for child in self._data.numbered.values() if child.parent is found]
        if forks:
            raise refusals.has_forks(found.name, [fork.name for fork in forks])
        names = {found.name, *found.aliases}
        keys = {request.key for request in requests}
        deliveries = [one for one in self._data.injections.numbered.values() if self._goes(one, found, keys, names)]
        for injection in deliveries:
            self._data.injections.drop(injection)
        turns = len(found.turns)
        for request in requests:
            self._data.drop(request)
            if request.turn is not None:
                self._data.log.remove((request.turn,))
        found.reminders.clear()
        self._account(found.name, "")
        self._data.reindex(found)
        self._upkeep.forget(found)
        return Deleted(
            conversation=found.name,
            created_at=found.created_at,
            requests=len(requests),
            turns=turns,
            deliveries=len(deliveries),
            aliases=tuple(sorted(found.aliases)),
            reached=tuple(sorted({injection.target for injection in deliveries} - names)),
        )

    def _goes(self, injection: Injection, conversation: Conversation, keys: set[int], names: set[str]) -> bool:
        """True if a delivery goes with the conversation: it ended, or waits there for a prompt that does not come."""
        if injection.number in conversation.reminders:
            return True
        ended = injection.finished_at is not None
        return ended and (injection.parent_key in keys or injection.target in names)
