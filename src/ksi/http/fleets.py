"""The parents of Claude Code's requests: its subagents do not name them, and are distinguished by headers."""

from __future__ import annotations

from collections import OrderedDict

import msgspec

MOST_KEPT = 10_000
"""Agents that are remembered."""


class Sender(msgspec.Struct, frozen=True):
    """The sender of a request, by its headers."""

    session: str | None = None
    agent: str | None = None
    """The subagent; None for the session's main turns."""
    parent: str | None = None
    """The subagent that sent it; None for the session itself."""

    @property
    def account(self) -> str | None:
        """The agent whose account it is: the session, and within it the subagent."""
        if self.session is None:
            return None
        return f"{self.session}/{self.agent}" if self.agent else self.session


class Fleets:
    """Remembers the latest request of each agent, and the parent request of each subagent.

    The parent request of a subagent is its parent's latest one when the subagent's first request came. All its requests
    are children of that one, so that a chain is as deep as its agents are nested, however many turns each of them
    takes.
    """

    def __init__(self) -> None:
        self._latest: OrderedDict[tuple[str, str | None], str] = OrderedDict()
        self._births: OrderedDict[tuple[str, str], str] = OrderedDict()

    def parent(self, sender: Sender) -> str | None:
        """The parent request of a subagent; None for a main turn, or if it is not known any more."""
        if sender.session is None or sender.agent is None:
            return None
        key = (sender.session, sender.agent)
        born = self._births.get(key) or self._latest.get((sender.session, sender.parent))
        if born is not None:
            self._births[key] = born
            self._births.move_to_end(key)
            if len(self._births) > MOST_KEPT:
                self._births.popitem(last=False)
        return born

    def asked(self, sender: Sender, request_id: str) -> None:
        """A request was taken."""
        if sender.session is None:
            return
        key = (sender.session, sender.agent)
        self._latest[key] = request_id
        self._latest.move_to_end(key)
        if len(self._latest) > MOST_KEPT:
            self._latest.popitem(last=False)
