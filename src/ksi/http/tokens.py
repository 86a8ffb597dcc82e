"""Tokens for access by HTTP: the owner's, and those made for agents."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ksi.events.tokens import Scope
from ksi.host.private_files import write_whole

PREFIX = "ksi_"
OWNER = "owner"
"""The name of users who can open the socket."""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """The identity that a token stands for."""

    name: str
    scope: Scope
    priority: str | None = None
    """The priority of requests that name none."""
    key: str = ""
    """The digest of its token."""
    page: bool = False
    """It comes from a browser, with a session of the page: see `ksi.http.page`."""


def new_token() -> str:
    """A token that cannot be guessed."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(token: str) -> str:
    """The stored part of a token. It has 256 bits of chance, so a plain hash tells nothing of it."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def owner_token(path: Path) -> str:
    """The owner's token, made at the first start and kept in a file that only the owner can read."""
    try:
        kept = path.read_text().strip()
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except FileNotFoundError:
        kept = ""
    return kept if kept.startswith(PREFIX) else write_owner_token(path)


def write_owner_token(path: Path) -> str:
    """Make a new token of the owner."""
    token = new_token()
    write_whole(path, f"{token}\n".encode())
    return token


class Tokens:
    """Finds the identity of a token, and closes everything under a revoked one."""

    def __init__(self) -> None:
        self._owner = Identity(name=OWNER, scope=Scope.OPERATE)
        self._agents: Mapping[str, Identity] = {}
        self._held: dict[str, set[Callable[[], None]]] = {}
        self._signing = secrets.token_bytes(32)

    def sign(self, text: str) -> bytes:
        """A signature that cannot be made without the owner's token. It changes when that is renewed."""
        return hmac.digest(self._signing, text.encode("utf-8", "surrogateescape"), "sha256")

    def by_key(self, key: str) -> Identity | None:
        """The identity of the token with this digest; None if it is not valid."""
        return self._owner if key == self._owner.key else self._agents.get(key)

    def find(self, token: str) -> Identity | None:
        """The identity of a token; None for an unknown one."""
        given = digest(token)
        if self._owner.key and hmac.compare_digest(given, self._owner.key):
            return self._owner
        return self._agents.get(given)

    def take_owner(self, token: str) -> None:
        """Go by this token of the owner; the one before it is revoked."""
        before, self._owner = self._owner.key, Identity(name="owner", scope=Scope.OPERATE, key=digest(token))
        self._signing = hmac.digest(token.encode(), b"signatures", "sha256")
        self._end(before)

    def take_agents(self, agents: Mapping[str, Identity]) -> None:
        """Go by these tokens, by their digests; those that are not among them are revoked."""
        before, self._agents = self._agents, agents
        for key in before.keys() - agents.keys():
            self._end(key)

    def valid(self, identity: Identity) -> bool:
        """True if its token was not revoked."""
        return identity.key == self._owner.key or identity.key in self._agents

    @contextmanager
    def holding(self, identity: Identity, end: Callable[[], None]) -> Iterator[None]:
        """Have `end` called if the token is revoked before this is over."""
        held = self._held.setdefault(identity.key, set())
        held.add(end)
        try:
            yield
        finally:
            held.discard(end)
            if not held:
                self._held.pop(identity.key, None)

    def _end(self, key: str) -> None:
        for end in list(self._held.get(key, ())):
            end()


__all__ = ["PREFIX", "Identity", "Scope", "Tokens", "digest", "new_token", "owner_token", "write_owner_token"]
