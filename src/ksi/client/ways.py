"""The ways to a daemon: its socket, or HTTP if the socket cannot be reached, as in a sandbox without Unix sockets."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from ksi.client.link import Connect, Link, dial, unreachable
from ksi.errors import ConnectionFailed
from ksi.host.marks import runs_under

URL, TOKEN = "KSI_URL", "KSI_TOKEN"


class HttpWay(msgspec.Struct, frozen=True):
    """A daemon's address by HTTP, and the token for it."""

    url: str
    token: str
    source: str
    """The origin of the address."""


class _Told(msgspec.Struct):
    url: str


def named_way(environ: Mapping[str, str] = os.environ) -> HttpWay | None:
    """The one that the environment names."""
    url = environ.get(URL)
    return HttpWay(url, environ.get(TOKEN, ""), URL) if url else None


def told_way(run_dir: Path) -> HttpWay | None:
    """The address that the daemon of a home has published for its owner; none for the programs of its agents."""
    if runs_under(run_dir, os.environ):
        return None
    path = run_dir / "http.json"
    try:
        told = msgspec.json.decode(path.read_bytes(), type=_Told)
        return HttpWay(told.url, (run_dir / "token").read_text().strip(), str(path))
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def by_socket_or_http(find: Callable[[], HttpWay | None]) -> Connect:
    """Connect by the socket; if that fails, by the HTTP address that `find` returns then."""

    async def connect(path: Path, make: Callable[[], Link]) -> Link:
        try:
            return await dial(path, make)
        except OSError as error:
            way = find()
            if way is None:
                raise
            first = unreachable(path, error)
        try:
            return await _dial_http(way, make)
        except ConnectionFailed as second:
            raise ConnectionFailed(f"{first.message}; by HTTP: {second.message}", path=str(path)) from None

    return connect


def by_http(way: HttpWay) -> Connect:
    """Connect by HTTP only."""

    async def connect(path: Path, make: Callable[[], Link]) -> Link:
        return await _dial_http(way, make)

    return connect


async def _dial_http(way: HttpWay, make: Callable[[], Link]) -> Link:
    from ksi.client.http_link import dial_http  # loaded only where it is used: it brings a whole HTTP client

    return await dial_http(way.url, way.token, way.source, make)
