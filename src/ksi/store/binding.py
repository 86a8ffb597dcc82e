"""Which machine a conversation's next turn belongs on: the one that its provider session lives on."""

from __future__ import annotations

import msgspec

from ksi.request import Attempt, Turn

SESSION_FORKS = frozenset({"new_session", "node_lost"})
"""Kinds of forks that lead from one provider session to the next; others begin at the conversation."""


class Binding(msgspec.Struct, frozen=True):
    """A provider session on a machine."""

    node: str
    provider: str

    def binds(self, route: str) -> bool:
        """True if requests of a route continue in it: its provider serves them."""
        return serves(route, self.provider)


def binding_of(head: Turn | None) -> Binding | None:
    """The binding of a conversation whose head is this turn; None if any machine may continue it."""
    return None if head is None or head.node is None else Binding(head.node, head.provider)


def node_of(attempt: Attempt) -> str | None:
    """The machine with an attempt's provider session; without a session there is nothing to continue."""
    return None if attempt.provider_session is None else attempt.node


def serves(route: str, provider: str) -> bool:
    """True if a provider is a step of a route, for any model, and even if it failed before."""
    return any(word.removeprefix("~").partition("=")[0] == provider for word in route.split(","))
