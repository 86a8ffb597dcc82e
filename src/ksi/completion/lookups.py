"""Names by their beginning, and conversations to read back."""

from __future__ import annotations

from ksi.clock import MICROSECONDS
from ksi.completion.replies import content_reply
from ksi.errors import InvalidData, NotFound
from ksi.events.lookups import FindData, FindReply, HistoryData, HistoryReply, TurnReply
from ksi.events.specs import conversation_name
from ksi.request import Turn, decode_body
from ksi.store.base import Store

FIRST_READ = 64 * 1024
"""Characters of turns that are read at first; each further read takes as many as all before it."""
REPLY = 4 * 1024 * 1024
"""Characters after which a page of turns ends early, so that it fits a line."""


class Lookups:
    """Answers `completion:find` and `completion:history`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def find(self, data: FindData) -> FindReply:
        """`completion:find`: names of requests or conversations that begin so."""
        names = await self._store.find(data.kind, data.beginning, data.limit + 1)
        return FindReply(names=list(names[: data.limit]), more=len(names) > data.limit)

    async def history(self, data: HistoryData) -> HistoryReply:
        """`completion:history`: a conversation's completed turns, the newest first.

        Raises:
            NotFound: no such conversation.
            InvalidData: it is not named, or the cursor is none.
        """
        name = conversation_name(data.session_id, data.conversation_id)
        if name is None:
            raise InvalidData("session_id: which conversation?", path="session_id")
        view = await self._store.session(name)
        if view is None:
            raise NotFound(f"no session {name!r}", session_id=name)
        turns, following = await self._turns(
            view.head if data.cursor is None else _turn_number(data.cursor), data.limit
        )
        cursor = None if following is None else str(following)
        return HistoryReply(session_id=view.conversation, turns=list(map(_turn_reply, turns)), cursor=cursor)

    async def _turns(self, head: int | None, limit: int) -> tuple[list[Turn], int | None]:
        """At most `limit` turns from `head` backwards, and the number of the one before them."""
        turns: list[Turn] = []
        size, read = 0, FIRST_READ
        while head is not None and len(turns) < limit and size < REPLY:
            piece = (await self._store.history(head, read))[: limit - len(turns)]
            if not piece:
                return turns, None
            turns += piece
            size += sum(len(turn.body) + len(turn.text) for turn in piece)
            read = min(2 * read, REPLY)
            head = piece[-1].previous
        return turns, head


def _turn_number(cursor: str) -> int:
    if not cursor.isdecimal() or len(cursor) > 18:
        raise InvalidData("cursor: not one of this list", path="cursor")
    return int(cursor)


def _turn_reply(turn: Turn) -> TurnReply:
    return TurnReply(
        content=content_reply(turn.body),
        result=turn.text,
        blocks=list(turn.content),
        provider=turn.provider,
        finished_at=turn.finished_at / MICROSECONDS,
        session_id=turn.conversation,
        agent_id=decode_body(turn.body).agent_id,
        reminders=list(turn.reminders),
    )
