"""Forked conversations as they are shown (L6, L7)."""

from __future__ import annotations

from typing import Any

from ksi.clock import to_seconds
from ksi.event_types import ForkBody
from ksi.store.values import Fork


def fork_body(fork: Fork) -> ForkBody:
    """A fork as the request that made it tells of it."""
    return ForkBody(parent=fork.parent, child=fork.child, kind=fork.kind)


def fork_reply(fork: Fork) -> dict[str, Any]:
    """One fork as it goes over the wire."""
    return {
        "parent": fork.parent,
        "child": fork.child,
        "request_id": fork.request_id,
        "at": to_seconds(fork.at),
        "kind": fork.kind,
    }
