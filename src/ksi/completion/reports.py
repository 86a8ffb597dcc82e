"""Reports on the queue, on sessions and on requests that wait for another attempt."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET

from ksi.clock import MICROSECONDS, Clock, to_seconds
from ksi.completion.queue_manager import QueueManager
from ksi.completion.replies import row_reply
from ksi.completion.session_manager import SessionManager
from ksi.config.schema import Config
from ksi.errors import NotFound
from ksi.events.common import PageData
from ksi.events.conversations import SessionStatusData
from ksi.events.reports import (
    BudgetWaitBody,
    QueueStatusReply,
    RetryStatusReply,
    SessionReply,
    SessionStatusReply,
    TurnBody,
)
from ksi.events.service import QueueStatusData
from ksi.events.specs import conversation_name
from ksi.request import State
from ksi.store.base import Store
from ksi.store.values import BudgetWait, Listing, RequestRow, SessionView

PAGES_READ_ON = 100
"""At most so many pages of a list are read to fill one page of a part of it."""


class Reports:
    """Answers the events that ask for figures and lists."""

    def __init__(
        self, store: Store, queue: QueueManager, sessions: SessionManager, config: Config, clock: Clock
    ) -> None:
        self._store = store
        self._queue = queue
        self._sessions = sessions
        self._config = config
        self._clock = clock

    async def status(self) -> dict[str, Any]:
        """`completion:status`: return the queue's figures and the running requests, as fields of `StatusReply`."""
        page = await self._store.requests(Listing.ACTIVE, 100)
        return {
            "status": "ok" if self._queue.claiming else "stopping",
            **await self._figures(),
            "running": [row_reply(row) for row in page.items],
            "more": page.cursor is not None,
        }

    async def queue_status(self, data: QueueStatusData) -> QueueStatusReply:
        """`completion:queue_status`: return the queue's figures, and a page of a list if one is named."""
        totals = await self._store.totals()
        reply = QueueStatusReply(
            **await self._figures(),
            locked_conversations=totals.locks,
            external_locks=totals.external_locks,
            external_waiters=totals.external_waiters,
            conversations=totals.conversations,
            max_queued=self._config.queue.max_queued,
            ready_by_route={r: n for r, n in (await self._store.waiting_by_route()).items() if n},
            turns=[
                TurnBody(priority=one.priority.word, flow=one.flow, request_id=one.request_id)
                for one in (await self._store.next_flows() if self._config.queue.fair and totals.queued else ())
            ],
            over_budget=[_wait_body(wait) for wait in await self._store.budget_waits()],
        )
        if data.list is not None:
            page = await self._store.requests(Listing(data.list), data.limit, data.cursor)
            reply.items = [row_reply(row) for row in page.items]
            if page.cursor is not None:
                reply.cursor = page.cursor
        return reply

    async def _figures(self) -> dict[str, Any]:
        totals = await self._store.totals()
        return {
            "queued": totals.queued,
            "active": totals.running,
            "completed": totals.completed,
            "failed": totals.failed,
            "cancelled": totals.cancelled,
            "expired": totals.expired,
            "blocked": totals.blocked,
            "scheduled": totals.scheduled,
            "retrying": totals.retrying,
            "parked": totals.parked,
        }

    async def session_status(self, data: SessionStatusData) -> SessionStatusReply:
        """`completion:session_status`: return one session, or a page of sessions."""
        name = conversation_name(data.session_id, data.conversation_id)
        if name is not None:
            view = await self._store.session(name)
            if view is None:
                raise NotFound(f"no session {name!r}", session_id=name)
            return SessionStatusReply(**self._session(view))
        page = await self._store.sessions(data.limit, data.cursor, data.agent_id)
        sessions = [SessionReply(**self._session(view)) for view in page.items]
        return SessionStatusReply(sessions=sessions, cursor=UNSET if page.cursor is None else page.cursor)

    def _session(self, view: SessionView) -> dict[str, Any]:
        return {
            "session_id": view.conversation,
            "state": self._sessions.life(view, self._clock.now()),
            "created_at": to_seconds(view.created_at),
            "active_at": to_seconds(view.active_at),
            "turns": view.turns,
            "provider": view.provider,
            "provider_session_id": view.provider_session,
            "agents": list(view.agents),
            "locked": view.locked,
            "forked_from": view.forked_from,
            **({} if view.node is None else {"node": view.node}),
        }

    async def retry_status(self, data: PageData) -> RetryStatusReply:
        """`completion:retry_status`: return the requests that wait for another attempt, with their last errors."""
        totals = await self._store.totals()
        waiting, cursor = await self._to_be_tried_again(data, totals.retrying + totals.parked)
        return RetryStatusReply(
            retrying=totals.retrying,
            parked=totals.parked,
            max_attempts=self._config.retry.max_attempts,
            initial_delay=self._config.retry.initial_delay,
            max_delay=self._config.retry.max_delay,
            waiting=[row_reply(row) for row in waiting],
            cursor=UNSET if cursor is None else cursor,
        )

    async def _to_be_tried_again(self, data: PageData, there_are: int) -> tuple[list[RequestRow], str | None]:
        """Return a page of these requests, out of the list of all requests that wait for a time.

        Scheduled requests are in that list too: it is read until the page is full, up to a limit.
        """
        found: list[RequestRow] = []
        cursor = data.cursor
        for _ in range(PAGES_READ_ON):
            page = await self._store.requests(Listing.DELAYED, data.limit - len(found), cursor)
            found += [row for row in page.items if row.state in (State.RETRYING, State.PARKED)]
            cursor = page.cursor
            if data.cursor is None and len(found) >= there_are:
                return found, None
            if cursor is None or len(found) == data.limit:
                break
        return found, cursor


def _wait_body(wait: BudgetWait) -> BudgetWaitBody:
    name, _, subject = wait.budget.partition("\n")
    return BudgetWaitBody(budget=name, scope=subject, waiting=wait.requests, until=wait.until / MICROSECONDS)
