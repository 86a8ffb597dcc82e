"""The server's address: one server, a Unix socket, Sentinels or a cluster, and a connection to the node with our keys.

    redis://[user:password@]host[:port][/db]         rediss:// the same with TLS
    redis+sentinel://host[:port],host.../service[/db]   rediss+sentinel:// with TLS
    redis+cluster://host[:port],host...              rediss+cluster:// with TLS
    unix:///path/to/socket[?db=0]

`?namespace=` names the KSI that the keys belong to; `sentinel_username` and `sentinel_password` are for the
Sentinels themselves, which are asked by TLS too unless `sentinel_tls=no`; other options are those of redis-py. With
TLS: `ssl_ca_certs`, the file of the authority that signed the server's certificate; `ssl_certfile` and `ssl_keyfile`,
this daemon's own, if the server asks for one.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
    parse_url,
)
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from ksi.config.addresses import shown_url
from ksi.errors import ConfigError

CONNECT_TIME = 5.0
"""Seconds in which a server takes a connection."""

_PORT, _SENTINEL_PORT = 6379, 26379
_FILES = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")
SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")


class Address:
    """A parsed `store.url`, and which server of it is asked at present."""

    def __init__(self, url: str) -> None:
        """Read a URL.

        Raises:
            ConfigError: it is none of the forms above.
        """
        self._url = url
        try:
            parts = urlsplit(url)
        except ValueError:
            raise ConfigError(
                f"store.url: {shown_url(url)} is no address; write special characters of a password as %XX",
                place="store.url",
            ) from None
        kind, _, self._mode = parts.scheme.partition("+")
        if parts.scheme not in SCHEMES:
            raise ConfigError(f"store.url: {parts.scheme!r} is none of {', '.join(SCHEMES)}", place="store.url")
        options = parse_qs(parts.query)
        self.namespace = options.pop("namespace", ["ksi"])[-1]
        self._sentinel = {
            key: options.pop(f"sentinel_{key}")[-1] for key in ("username", "password") if f"sentinel_{key}" in options
        }
        self._sentinel_tls = options.pop("sentinel_tls", ["yes"])[-1] != "no" and kind == "rediss"
        if not self.namespace or set(self.namespace) & set("{}*\n "):
            raise ConfigError("store.url: a namespace has no blanks, braces or stars", place="store.url")
        hosts = parts.netloc.rpartition("@")[2]
        first = f"{kind}://{parts.netloc}{parts.path}"
        path = [unquote(part) for part in parts.path.split("/") if part]
        self._service = ""
        if self._mode:
            credentials = parts.netloc[: len(parts.netloc) - len(hosts)]
            first = f"{kind}://{credentials}{hosts.split(',')[0]}"
            if self._mode == "sentinel":
                if not path:
                    raise ConfigError("store.url: redis+sentinel://host/service: which service?", place="store.url")
                self._service = path[0]
                first += f"/{path[1]}" if path[1:] else ""
                path = path[1:]
        if kind != "unix" and path and not path[0].isdecimal():
            # A password with a slash in it would stand there: it is not repeated.
            raise ConfigError(
                f"store.url: in {shown_url(url)} the path is not the number of a database; write a slash in a password "
                "as %2F",
                place="store.url",
            )
        query = urlencode(options, doseq=True)
        try:
            settings: dict[str, Any] = dict(parse_url(f"{first}?{query}" if query else first))
        except ValueError as error:
            raise ConfigError(f"store.url: {error}", place="store.url") from None
        self._class: type[AbstractConnection] = settings.pop("connection_class", Connection)
        self._settings = settings
        self._check_options()
        self._hosts = [_host(host, _SENTINEL_PORT if self._mode == "sentinel" else _PORT) for host in hosts.split(",")]
        self._at = 0
        self._moved: tuple[str, int] | None = None

    def again(self) -> Address:
        """The same address for another thread, which finds its own way to the server."""
        return Address(self._url)

    def __str__(self) -> str:
        """The URL without secrets."""
        return shown_url(self._url)

    def _check_options(self) -> None:
        """Raise ConfigError if an option, or a file named by one, is not valid."""
        try:
            connection = self._class(**self._settings)
            if isinstance(connection, SSLConnection):
                connection.ssl_context.get()
        except TypeError as error:
            name = str(error).rpartition("argument ")[2]
            raise ConfigError(f"store.url: there is no option {name} for {self}", place="store.url") from None
        except (RedisError, OSError, ValueError) as error:
            files = [str(self._settings[name]) for name in _FILES if name in self._settings]
            raise ConfigError(f"store.url: {' '.join([*files, str(error)])}", place="store.url") from None

    async def connect(self) -> AbstractConnection:
        """A connection to the server that is asked at present.

        Raises:
            redis.exceptions.RedisError, OSError: there is none.
        """
        settings = {
            "socket_connect_timeout": CONNECT_TIME,
            "socket_keepalive": True,
            "socket_timeout": None,
            **self._settings,
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
            "driver_info": None,
        }
        if self._class is UnixDomainSocketConnection:
            settings.pop("socket_keepalive")
            connection: AbstractConnection = UnixDomainSocketConnection(**settings)
        else:
            settings["host"], settings["port"] = await self._host()
            connection = self._class(**settings)
        await connection.connect()  # type: ignore[no-untyped-call]
        return connection

    def moved(self, host: str, port: int) -> None:
        """A cluster says that our keys are there."""
        self._moved = host, port

    def lost(self) -> None:
        """The server did not answer: ask the next one for the node with our keys."""
        self._moved = None
        self._at = (self._at + 1) % len(self._hosts)

    async def _host(self) -> tuple[str, int]:
        if self._moved is not None:
            return self._moved
        if self._mode != "sentinel":
            return self._hosts[self._at]
        settings: dict[str, Any] = {"socket_timeout": CONNECT_TIME, **self._sentinel}
        if self._sentinel_tls:
            settings["ssl"] = True
            settings |= {name: value for name, value in self._settings.items() if name.startswith("ssl_")}
        sentinel = Sentinel(self._hosts, sentinel_kwargs=settings)  # type: ignore[no-untyped-call]
        try:
            host, port = await sentinel.discover_master(self._service)
        finally:
            for client in sentinel.sentinels:
                await client.aclose()
        return host, int(port)


def _host(text: str, port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    return parts.hostname or "localhost", parts.port or port
