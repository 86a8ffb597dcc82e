"""Page sessions: a browser's credentials, in place of a token."""

from __future__ import annotations

import asyncio
import base64
import hmac

import msgspec

from ksi.clock import MICROSECONDS, Clock
from ksi.http.tokens import Identity, Tokens

PREFIX = "ksip_"

LIFETIME = 7 * 86_400
"""Seconds for which a session is valid."""

CODE_LIFETIME = 120.0
"""Seconds in which a code must be used."""

MOST_CODES = 100
"""Codes that wait to be used; the oldest is dropped for a new one."""


class _Code(msgspec.Struct, frozen=True):
    identity: Identity
    ends: int
    """Monotonic time."""
    used: asyncio.Future[None]


class PageSessions:
    """Makes one-time codes, and sessions of them.

    A session is signed with a key that is made of the owner's token, so it outlives the daemon, and nothing is kept of
    it. It ends at its time, when its token is revoked, and when the owner's token is renewed.
    """

    def __init__(self, tokens: Tokens, clock: Clock) -> None:
        self._tokens = tokens
        self._clock = clock
        self._codes: dict[str, _Code] = {}

    def offer(self, code: str, identity: Identity) -> None:
        """Let a code be used once."""
        now = self._clock.now().mono
        self._codes = {one: kept for one, kept in self._codes.items() if kept.ends > now}
        while len(self._codes) >= MOST_CODES:
            del self._codes[next(iter(self._codes))]
        ends = now + round(CODE_LIFETIME * MICROSECONDS)
        self._codes[code] = _Code(identity, ends, asyncio.get_running_loop().create_future())

    def used(self, code: str, identity: Identity) -> asyncio.Future[None] | None:
        """When a code of this identity is used; None for one that does not wait for that."""
        kept = self._codes.get(code)
        return kept.used if kept is not None and kept.identity.key == identity.key else None

    def redeem(self, code: str) -> tuple[str, float] | None:
        """A session for a code, and the Unix time of its end; None for a code that was used, is too old or is none."""
        kept = self._codes.pop(code, None)
        now = self._clock.now()
        if kept is None or kept.ends <= now.mono or not self._tokens.valid(kept.identity):
            return None
        if not kept.used.done():  # the waiting client may have left
            kept.used.set_result(None)
        until = now.wall // MICROSECONDS + LIFETIME
        return self._session(kept.identity.key, until), float(until)

    def _session(self, key: str, until: int) -> str:
        signed = f"{until:x}.{key}"
        return f"{PREFIX}{signed}.{self._signature(signed)}"

    def _signature(self, text: str) -> str:
        return base64.urlsafe_b64encode(self._tokens.sign(f"page session {text}")).decode().rstrip("=")

    def find(self, session: str) -> Identity | None:
        """The identity of a session; None if it is not valid."""
        signed, _, signature = session.removeprefix(PREFIX).rpartition(".")
        until, _, key = signed.partition(".")
        given, right = signature.encode("utf-8", "surrogateescape"), self._signature(signed).encode()
        if not hmac.compare_digest(given, right) or int(until, 16) <= self._clock.now().unix:
            return None
        identity = self._tokens.by_key(key)
        return None if identity is None else msgspec.structs.replace(identity, page=True)
