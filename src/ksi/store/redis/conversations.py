"""Renaming, search and deletion of conversations on Redis; `ksi.store.base.Store` documents each verb."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ksi.clock import Moment
from ksi.store.account import Spent
from ksi.store.redis.calls import Calls
from ksi.store.redis.values import Answer, encode, kept_account, pad20
from ksi.store.rules import refusals
from ksi.store.rules.terms import Phrase
from ksi.store.values import Deleted, SearchPage

PAGE = 1_000
"""Entries of a list that are looked through at once."""

REWRITTEN = 200
"""Number of entries of the account that are rewritten in one step."""


class _Renamed(Answer, frozen=True, kw_only=True):
    name: str = ""


class _Doomed(Answer, frozen=True, kw_only=True):
    members: tuple[str, ...] = ()
    after: str | None = None


class _Ids(Answer, frozen=True, kw_only=True):
    ids: tuple[str, ...] = ()


class _Deleted(Answer, frozen=True, kw_only=True):
    member: str | None = None
    forks: tuple[str, ...] = ()
    name: str = ""
    created_at: int = 0
    turns: int = 0
    aliases: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    deliveries: int = 0


class _Emptied(Answer, frozen=True, kw_only=True):
    more: bool = False


class RedisConversations:
    """Other names for conversations, and the end of all that one holds.

    There is no index of a conversation's ended requests: a deletion scans all ended requests, in steps.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def rename(self, conversation: str, name: str, now: Moment) -> str:
        """See the protocol."""
        answer, _ = await self._calls.change("rename", now, _Renamed, name=conversation, to=name)
        if answer.error == "taken":
            raise refusals.name_taken(name)
        if answer.error is not None:
            raise refusals.unknown_conversation(conversation)
        return answer.name

    async def delete(self, conversation: str, now: Moment) -> Deleted:
        """See the protocol. The account is rewritten after everything else is deleted."""
        keys = await self._doomed(conversation, "finished")
        ids = await self._ids(keys)
        deliveries = await self._doomed(conversation, "injections_ended", ids)
        answer, _ = await self._calls.change(
            "delete", now, _Deleted, name=conversation, keys=keys, deliveries=deliveries
        )
        match answer.error:
            case "in_use":
                member = answer.member or await self._first_waiting(conversation)
                if member is None:
                    # Something of it ended in between.
                    return await self.delete(conversation, now)
                raise refusals.not_ended(answer.name, member)
            case "forks":
                raise refusals.has_forks(answer.name, list(answer.forks))
            case "unknown":
                raise refusals.unknown_conversation(conversation)
        more = True
        while more:
            more = (await self._calls.change("empty", now, _Emptied))[0].more
        await self._leave_the_account({answer.name, *answer.aliases}, now)
        return Deleted(
            conversation=answer.name,
            created_at=answer.created_at,
            requests=len(keys),
            turns=answer.turns,
            deliveries=answer.deliveries,
            aliases=answer.aliases,
            reached=tuple(sorted(set(answer.targets))),
        )

    async def search(self, terms: Sequence[Phrase], limit: int, cursor: str | None = None) -> SearchPage:
        """See the protocol: the server has no full text.

        Raises:
            Unsupported: always.
        """
        raise refusals.no_full_text()

    async def _doomed(self, conversation: str, index: str, ids: Sequence[str] = ()) -> list[str]:
        """The entries of a list that belong to a conversation."""
        found: list[str] = []
        after: str | None = None
        known = dict.fromkeys(ids, True)
        while True:
            page, _ = await self._calls.read(
                "doomed", _Doomed, name=conversation, index=index, after=after, limit=PAGE, ids=known
            )
            if page.error is not None:
                raise refusals.unknown_conversation(conversation)
            found += page.members
            after = page.after
            if after is None:
                return found

    async def _first_waiting(self, conversation: str) -> str | None:
        """The first request of a conversation that stands beside its line: for a time, or for a person's answer."""
        waiting = [*await self._doomed(conversation, "delayed"), *await self._doomed(conversation, "asking")]
        return next(iter(await self._ids(sorted(waiting)[:1])), None)

    async def _ids(self, keys: Sequence[str]) -> list[str]:
        ids: list[str] = []
        for at in range(0, len(keys), PAGE):
            ids += (await self._calls.read("ids_of", _Ids, keys=keys[at : at + PAGE]))[0].ids
        return ids

    async def _leave_the_account(self, names: set[str], now: Moment) -> None:
        """The cost of a deleted conversation stays, without its names."""
        after, pairs = "", list[bytes]()
        while True:
            _, page = await self._calls.read("account", Answer, after=after, until=pad20(2**62), limit=PAGE)
            for entry in page:
                spent = kept_account(entry)
                if spent.conversation in names:
                    pairs += (entry, _without_name(entry, spent))
            if len(page) < PAGE:
                break
            after = f"{page[-1][:36].decode()}~"
        for at in range(0, len(pairs), 2 * REWRITTEN):
            await self._calls.change("reaccount", now, Answer, pairs[at : at + 2 * REWRITTEN])


def _without_name(entry: bytes, spent: Spent) -> bytes:
    """An entry of the account without its conversation's name."""
    attempt = msgspec.structs.replace(spent.attempt, provider_session=None, last_message=None, message=None, content=())
    return entry[:37] + encode(msgspec.structs.replace(spent, conversation="", first=False, attempt=attempt))
