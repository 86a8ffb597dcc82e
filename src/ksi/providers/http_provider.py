"""The part that providers over HTTP have in common: one endpoint, its life, and the state of its login."""

from __future__ import annotations

from pathlib import Path

from ksi.providers.http import Endpoint


class HttpProvider:
    """A provider with one endpoint; `complete` and `capabilities` are its API's."""

    def __init__(self, name: str, endpoint: Endpoint, *, login_path: str) -> None:
        """`login_path` is a path that only a good key can GET, and that costs nothing."""
        self.name = name
        self._endpoint = endpoint
        self._login_path = login_path

    async def start(self) -> None:
        """Make the session; nothing is sent."""
        await self._endpoint.start()

    async def stop(self) -> None:
        """Close the session and what runs on it."""
        await self._endpoint.stop()

    def problem(self) -> str | None:
        """A missing key, an environment that cannot be used, or what the endpoint last said about the account."""
        return self._endpoint.problem()

    async def login_works(self) -> bool | None:
        """Whether the endpoint takes the key now, found out without a call that costs anything."""
        return await self._endpoint.login_works(self._login_path)


def path_at(home: Path, path: str | None) -> Path | None:
    """A path of the configuration, absolute or below the home."""
    return None if path is None else home / Path(path).expanduser()
