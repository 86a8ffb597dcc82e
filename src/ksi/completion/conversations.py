"""Renaming, search and deletion of conversations for their owners."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import structlog

from ksi.clock import MICROSECONDS, Clock
from ksi.completion.session_manager import SessionManager
from ksi.completion.upkeep.checkpoint import Checkpoints
from ksi.completion.upkeep.response_log import ResponseLog
from ksi.errors import NotFound
from ksi.events.bus import EventBus
from ksi.events.owned import (
    DeleteData,
    DeletedPush,
    DeleteReply,
    MatchReply,
    RemainBody,
    RenameData,
    RenamedReply,
    SearchData,
    SearchReply,
)
from ksi.providers.base import Provider, StatefulProvider
from ksi.request import decode_body, said_in
from ksi.store.base import Store
from ksi.store.rules.terms import Phrase, composed, find, phrases, words
from ksi.store.values import Deleted, Found

AROUND = 60
"""Approximate number of characters of an excerpt before the match; twice as many follow."""


class Conversations:
    """Answers `conversation:rename`, `conversation:delete` and `conversation:search`."""

    def __init__(
        self,
        store: Store,
        sessions: SessionManager,
        responses: ResponseLog,
        checkpoints: Checkpoints,
        providers: Mapping[str, Provider],
        bus: EventBus,
        clock: Clock,
        *,
        shared: bool,
    ) -> None:
        """`shared`: other daemons use the store too, and write files of answers of their own."""
        self._store = store
        self._sessions = sessions
        self._responses = responses
        self._checkpoints = checkpoints
        self._providers = providers
        self._bus = bus
        self._clock = clock
        self._shared = shared
        self._log = structlog.get_logger("ksi.conversations")

    async def rename(self, data: RenameData) -> RenamedReply:
        """`conversation:rename`: the old name stays an alias of the conversation.

        Raises:
            NotFound: no such conversation.
            NameTaken: the name means another one.
        """
        before = await self._store.rename(data.session_id, data.name, self._clock.now())
        reply = RenamedReply(session_id=data.name, before=before)
        if before != data.name:
            await self._responses.move(before, data.name)
            self._log.info("conversation renamed")
            self._bus.publish("conversation:renamed", reply)
        return reply

    async def search(self, data: SearchData) -> SearchReply:
        """`conversation:search`: turns with all that is looked for, the newest first.

        Raises:
            InvalidData: there is no word in `query`, or the cursor is none.
            Unsupported: the store has no full text.
        """
        asked = phrases(data.query)
        page = await self._store.search(asked, data.limit, data.cursor)
        matches = await asyncio.to_thread(lambda: [_match(found, asked) for found in page.items])
        return SearchReply(matches=matches, cursor=page.cursor, behind=page.behind)

    async def delete(self, data: DeleteData) -> DeleteReply:
        """`conversation:delete`: everything of it that this daemon can reach, and a list of the rest.

        Raises:
            NotFound: no such conversation.
            ConversationBusy: something of it has not ended.
            HasForks: other conversations begin with its turns.
        """
        # Once begun it is brought to its end, whether its client stays or not.
        return await asyncio.shield(asyncio.create_task(self._delete(data.session_id)))

    async def _delete(self, name: str) -> DeleteReply:
        view = await self._store.session(name)
        if view is None:
            # A daemon that died in the middle left the file behind.
            if not await self._responses.erase(name):
                raise NotFound(f"no session {name!r}", session_id=name)
            return DeleteReply(session_id=name, response_file=True)
        deleted = await self._store.delete(name, self._clock.now())
        files = [await self._responses.erase(own) for own in (deleted.conversation, *deleted.aliases)]
        for own in (deleted.conversation, *deleted.aliases):
            self._sessions.forget(own)
        self._log.info("conversation deleted", requests=deleted.requests, turns=deleted.turns)
        self._bus.publish("conversation:deleted", DeletedPush(session_id=deleted.conversation))
        remains = await asyncio.to_thread(lambda: list(self._remains(deleted, view.node)))
        return DeleteReply(
            session_id=deleted.conversation,
            requests=deleted.requests,
            turns=deleted.turns,
            deliveries=deleted.deliveries,
            response_file=any(files),
            remains=remains,
        )

    def _remains(self, deleted: Deleted, node: str | None) -> Iterator[RemainBody]:
        """The traces of it that nothing here may or can remove."""
        for path in self._checkpoints.since(deleted.created_at / MICROSECONDS):
            yield RemainBody(
                what="a checkpoint that was saved while the conversation was kept",
                where=str(path),
                how="delete the file, and its copies, or save a new one and delete this one",
            )
        for transcript in self._transcripts(deleted.aliases):
            yield RemainBody(what="the provider's own transcript", where=str(transcript), how=f"rm {transcript}")
        if node is not None:
            yield RemainBody(
                what="transcripts that a provider keeps itself",
                where=f"machine {node}",
                how="delete them there: ~/.claude/projects/*/SESSION.jsonl of Claude Code",
            )
        if self._shared:
            yield RemainBody(
                what="files of answers that other daemons of the store wrote",
                where="var/logs/responses of their homes",
                how="delete the session's file there; otherwise it is deleted with the retention of sessions",
            )
        for target in deleted.reached:
            yield RemainBody(
                what="its results in the prompts of another conversation",
                where=f"conversation {target}",
                how="delete that conversation too",
            )
        if deleted.turns:
            yield RemainBody(
                what="the provider's own records of its calls",
                where="the provider",
                how="see the provider's terms on retention",
            )

    def _transcripts(self, sessions: Sequence[str]) -> Iterator[Path]:
        for provider in self._providers.values():
            if provider.capabilities.stateful:
                keeper = cast(StatefulProvider, provider)
                yield from (path for path in map(keeper.transcript, sessions) if path is not None)


def _match(found: Found, asked: Sequence[Phrase]) -> MatchReply:
    body = decode_body(found.body)
    text, start, end = _excerpt(said_in(body), found.text, asked)
    return MatchReply(
        session_id=found.conversation,
        finished_at=found.finished_at / MICROSECONDS,
        provider=found.provider,
        agent_id=body.agent_id,
        excerpt=text,
        start=start,
        end=end,
    )


def _excerpt(prompt: str, answer: str, asked: Sequence[Phrase]) -> tuple[str, int, int]:
    """Some words around the first match in prompt or answer, and its place in them."""
    for said in (composed(prompt), composed(answer)):
        places = list(words(said))
        for phrase in asked:
            place = find(places, phrase)
            if place is not None:
                return _cut(said, place.start, place.end)
    return _cut(composed(answer), 0, 0)


def _cut(said: str, start: int, end: int) -> tuple[str, int, int]:
    begin, until = max(0, start - AROUND), min(len(said), max(end, start + 2 * AROUND))
    head = "" if begin == 0 else "…"
    tail = "" if until == len(said) else "…"
    before, middle, after = (_in_one_line(part) for part in (said[begin:start], said[start:end], said[end:until]))
    before = head + before
    return f"{before}{middle}{after}{tail}", len(before), len(before) + len(middle)


def _in_one_line(text: str) -> str:
    return text.replace("\r", " ").replace("\n", " ")
