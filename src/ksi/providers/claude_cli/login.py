"""Claude Code's stored login: it is refreshed by one process at a time, and found again after it failed.

The program keeps a login in `.credentials.json` (on macOS in the keychain, which is not looked at), and refreshes it by
a token that can be used once. Processes that refresh it at the same time log each other out. So while the stored login
is due, turns begin one after the other, each when the API has accepted the one before.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from ksi.clock import Clock

_DUE = 330.0
"""Seconds before its end at which a login is due. The program refreshes it five minutes before its end."""
_GIVEN = (
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_AUTH_TOKEN",
    "CLAUDE_CODE_OAUTH_TOKEN",
    "CLAUDE_CODE_USE_BEDROCK",
    "CLAUDE_CODE_USE_VERTEX",
    "CLAUDE_CODE_USE_FOUNDRY",
)


class StoredLogin(msgspec.Struct, frozen=True):
    """A login as the program has stored it."""

    mark: bytes
    """A digest of its tokens."""
    ends_at: float | None
    """Unix time in seconds; None if it does not say so."""
    can_refresh: bool


class _Tokens(msgspec.Struct, rename="camel"):
    access_token: str = ""
    refresh_token: str | None = None
    expires_at: float | None = None


class _Credentials(msgspec.Struct):
    login: _Tokens = msgspec.field(name="claudeAiOauth")


def is_given(environment: Mapping[str, str]) -> bool:
    """Return True if the environment brings the login, whatever is stored."""
    return any(environment.get(name) for name in _GIVEN)


def credentials_path(environment: Mapping[str, str]) -> Path | None:
    """The file with the stored login; None if the environment does not name its folder."""
    own, home = environment.get("CLAUDE_CONFIG_DIR"), environment.get("HOME")
    folder = Path(own) if own else Path(home) / ".claude" if home else None
    return folder / ".credentials.json" if folder is not None else None


def stored_login(environment: Mapping[str, str]) -> StoredLogin | None:
    """The login that processes with these variables use; None if it is not stored in a file, or was blanked."""
    path = credentials_path(environment)
    if path is None or is_given(environment):
        return None
    try:
        login = msgspec.json.decode(path.read_bytes(), type=_Credentials).login
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    if not login.access_token:
        return None
    tokens = f"{login.access_token}\n{login.refresh_token or ''}".encode()
    ends_at = login.expires_at / 1000 if login.expires_at else None
    return StoredLogin(hashlib.blake2b(tokens, digest_size=16).digest(), ends_at, bool(login.refresh_token))


def is_due(login: StoredLogin | None, now: float) -> bool:
    """Return True if the next process that uses a login refreshes it; `now` is in Unix seconds."""
    return login is not None and login.can_refresh and login.ends_at is not None and login.ends_at - now <= _DUE


def came_back(failed: StoredLogin | None, found: StoredLogin | None) -> bool | None:
    """Return True if another login is stored than the one that failed; None if only a call or the program can tell."""
    if found is None:
        return None
    return True if failed is None or failed.mark != found.mark else None


class LoginPermit:
    """A turn's permit to use the login. `close` lets the next one begin; it may be called more than once."""

    def __init__(self, login: StoredLogin | None, lock: asyncio.Lock | None) -> None:
        self.login = login
        self._lock = lock

    @property
    def refreshes(self) -> bool:
        """Its process may be refreshing the login now."""
        return self._lock is not None

    def close(self) -> None:
        """The login was accepted, or the turn has ended."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()


class LoginGate:
    """Lets turns begin: one at a time while the stored login is due for a refresh, else all at once."""

    def __init__(self, look: Callable[[], StoredLogin | None], clock: Clock) -> None:
        self._look = look
        self._clock = clock
        self._lock = asyncio.Lock()

    async def enter(self) -> LoginPermit:
        """Wait until a turn may begin."""
        login = await asyncio.to_thread(self._look)
        if not self._is_due(login):
            return LoginPermit(login, None)
        await self._lock.acquire()
        permit = LoginPermit(login, self._lock)
        try:
            permit.login = await asyncio.to_thread(self._look)
        except BaseException:
            permit.close()
            raise
        if not self._is_due(permit.login):
            permit.close()  # another turn refreshed it meanwhile
        return permit

    def _is_due(self, login: StoredLogin | None) -> bool:
        return is_due(login, self._clock.now().unix)
