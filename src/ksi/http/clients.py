"""The properties of a client program, by the headers of its request."""

from __future__ import annotations

from collections.abc import Mapping

from ksi.http.fleets import Sender

_SESSION, _AGENT, _PARENT = "x-claude-code-session-id", "x-claude-code-agent-id", "x-claude-code-parent-agent-id"


class Client(Sender, frozen=True):
    """The sender of a request, and its behaviour."""

    claude_code: bool = False
    timeout: float | None = None
    """Seconds that it waits at most, by its own word."""


def is_claude_code(headers: Mapping[str, str]) -> bool:
    """True if Claude Code sent a request, by its headers."""
    return headers.get("User-Agent", "").startswith("claude-cli/")


def client_of(headers: Mapping[str, str]) -> Client:
    """The properties of a client, by a request's headers."""
    try:
        timeout = float(headers.get("X-Stainless-Timeout", ""))
    except ValueError:
        timeout = None
    return Client(
        session=headers.get(_SESSION),
        agent=headers.get(_AGENT),
        parent=headers.get(_PARENT),
        claude_code=is_claude_code(headers),
        timeout=timeout,
    )
