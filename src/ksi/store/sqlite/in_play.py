"""The knowledge of the database's only writer about live rows: free conversations, and running requests.

A statement that changes rows makes some of that untrue: `_FORGETS` says what, and after one that it does not name
nothing is known. So what is known is true, and what is not known is read. After a rollback nothing is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

import msgspec

KNOWN_CONVERSATIONS = 20_000
"""Free conversations that are remembered; those that became free first are forgotten first."""

KNOWN_RUNS = 20_000
"""Running requests that are remembered."""


class FreeConversation(msgspec.Struct, frozen=True):
    """A conversation without a holder, with an empty wait queue, and without deliveries for its next prompt."""

    id: int
    name: str
    head: int | None


class KnownRun(NamedTuple):
    """A running request in no chain and without reminders, as its settlement needs it: columns of `to_settle`."""

    request_id: str
    state: int
    fence: int
    token: int
    conversation: int
    hold: int
    route: str
    cancelling: int
    earlier: int | None
    head: int | None
    chain: None = None
    reminded: int = 0


class Forget(Enum):
    """The knowledge that a statement invalidates; its first value is the key or the id."""

    NOTHING = 0
    RUN = 1
    CONVERSATION = 2
    ITS_CONVERSATION = 3
    """The conversation that a new request's row names."""
    ITS_NAME = 4
    """The conversation, whose runs still know it by another name."""


_FORGETS = {
    **dict.fromkeys(
        (
            # Other tables.
            "set_totals", "touch", "add_route", "add_agent", "add_alias", "add_fork", "add_body", "add_cut_body",
            "drop_body", "prune_body", "add_attempt", "prune_attempt", "put_provider_record", "keep_reminders",
            "put_reminders_back",
            "drop_agents", "drop_aliases", "drop_forks", "add_member", "grow_chain", "trip_chain", "count_guard",
            "reserve", "reserve_in_chain", "charge", "charge_chain", "leave_member", "leave_chain", "set_routing",
            "set_result", "delivered", "bury", "retried", "put_budget_use", "add_budget_steps", "drop_budget_steps",
            "add_demand",
            "set_hold", "drop_hold", "over_budget", "take_turn", "forget_turns",
            "close_chain", "reset_chain", "drop_member", "shrink_chain",
            "drop_empty_chain",
            # Times and the turn at the line's head.
            "touch_conversation", "set_ready", "renew_grant", "renew_waiter",
            # A conversation that has one of these is not free.
            "start", "wake_kept", "drop_request", "mark_interrupted",
        ),
        Forget.NOTHING,
    ),
    **dict.fromkeys(
        ("finish", "delay", "note_attempt", "mark_cancelling", "join_chain", "note_reminded"), Forget.RUN
    ),
    **dict.fromkeys(
        ("advance_conversation", "set_head", "drop_conversation", "no_reminders_wait"),
        Forget.CONVERSATION,
    ),
    "add_request": Forget.ITS_CONVERSATION,
    "rename": Forget.ITS_NAME,
}  # fmt: skip


class InPlay:
    """Bounded memory of live rows."""

    def __init__(self) -> None:
        self._free: dict[str, FreeConversation] = {}
        self._names: dict[int, str] = {}
        """The names of free conversations, by id."""
        self._renamed: set[int] = set()
        """Renamed conversations: facts under an earlier name are not kept."""
        self._runs: dict[int, KnownRun] = {}
        """By key."""

    def forget_all(self) -> None:
        """Know nothing."""
        self._free.clear()
        self._names.clear()
        self._runs.clear()

    def changed(self, statement: str, values: Sequence[Any]) -> None:
        """A statement changes rows."""
        forget = _FORGETS.get(statement)
        if forget is Forget.NOTHING:
            return
        if forget is Forget.RUN:
            self._runs.pop(values[0], None)
        elif forget is Forget.CONVERSATION:
            self._forget_conversation(values[0])
        elif forget is Forget.ITS_CONVERSATION:
            self._forget_conversation(values[2])
        elif forget is Forget.ITS_NAME:
            self._forget_conversation(values[0])
            self._renamed.add(values[0])
        else:
            self.forget_all()

    def _forget_conversation(self, conversation: int) -> None:
        name = self._names.pop(conversation, None)
        if name is not None:
            del self._free[name]

    # -- free conversations ---------------------------------------------------------------------------------------

    def free(self, name: str) -> FreeConversation | None:
        """A conversation of this name that is known to be free."""
        return self._free.get(name)

    def is_free(self, conversation: FreeConversation) -> None:
        """A conversation became free."""
        if conversation.id in self._renamed:
            return
        if len(self._free) >= KNOWN_CONVERSATIONS:
            self._forget_conversation(self._free[next(iter(self._free))].id)
        self._free[conversation.name] = conversation
        self._names[conversation.id] = conversation.name

    def known_free(self) -> list[FreeConversation]:
        """All free conversations that are known."""
        return list(self._free.values())

    # -- runs -----------------------------------------------------------------------------------------------------

    def run(self, key: int) -> KnownRun | None:
        """A running request, as it is known."""
        return self._runs.get(key)

    def runs(self, key: int, run: KnownRun) -> None:
        """A request runs."""
        if len(self._runs) >= KNOWN_RUNS:
            del self._runs[next(iter(self._runs))]
        self._runs[key] = run

    def known_runs(self) -> list[tuple[int, KnownRun]]:
        """All runs that are known, by key."""
        return list(self._runs.items())
