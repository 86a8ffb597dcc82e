"""The HTTP server: its address, its access checks, and its end."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import structlog
from aiohttp import web
from aiohttp.typedefs import Middleware

from ksi.clock import Clock
from ksi.config.schema import Http
from ksi.errors import ConfigError
from ksi.host.private_files import write_whole
from ksi.host.supervise import Periodic
from ksi.http.errors import Refusal, shape_of
from ksi.http.event_stream import EventStreams
from ksi.http.guard import CheckOwn, Find, Handler, guard, host_name, note_begun
from ksi.http.tokens import Tokens, owner_token

LOOK = 5.0
"""Seconds between looks at connections that say nothing."""

SILENT = 20.0
"""Seconds that a new connection has to send a whole head."""

IDLE = 75.0
"""Seconds that a connection may be idle, or take for the head of its next request."""

END = 5.0
"""Seconds that running answers get to be written at the end."""


class HttpServer:
    """Listens for HTTP, and writes the address to a file."""

    def __init__(
        self,
        config: Http,
        run_dir: Path,
        routes: Iterable[web.RouteDef],
        tokens: Tokens,
        check_own: CheckOwn,
        find: Find,
        streams: EventStreams,
        clock: Clock,
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._address_path = run_dir / "http.json"
        self._clock = clock
        self._runner: web.AppRunner | None = None
        self._seen: dict[object, float] = {}
        self._spoke: set[object] = set()
        self.url: str | None = None
        """The listening address; None while it does not listen."""
        self.problem: str | None = None
        """The reason why it does not listen at the configured address, in a sentence."""
        self._tokens = tokens
        self._check_own = check_own
        self._find = find
        self._streams = streams
        self._routes = list(routes)
        self.task = Periodic("ksi-http", self._look, LOOK, clock)
        self._log = structlog.get_logger("ksi.http")

    async def start(self) -> None:
        """Begin to listen. A taken port stops nothing: any free one is used and reported.

        Raises:
            ConfigError: an address that is not this machine's own, without `allow_remote`; or a token that cannot be
                read or written.
        """
        host, port = listen_address(self._config)
        token_path = self._run_dir / "token"
        try:
            self._tokens.take_owner(owner_token(token_path))
        except OSError as error:
            raise ConfigError(f"{token_path} cannot be used: {error.strerror}", place=str(token_path)) from None
        app = web.Application(
            client_max_size=self._config.max_body,
            middlewares=[
                self._counted(),
                guard(
                    self._tokens,
                    frozenset(h.lower() for h in (*self._config.hosts, host)),
                    self._check_own,
                    self._find,
                ),
            ],
        )
        app.add_routes(self._routes)
        app.on_response_prepare.append(note_begun)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            # The rest are invalid requests of clients, in any number.
            logger=logging.Logger("ksi.http.server", logging.CRITICAL),  # noqa: LOG001
            handler_cancellation=True,
            shutdown_timeout=END,
            keepalive_timeout=IDLE,
        )
        await self._runner.setup()
        server = await self._bind(host, port)
        await web.SockSite(self._runner, server).start()
        bound = server.getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{bound}"
        if port and bound != port:
            told = f"port {port} is taken by another program; HTTP is served at {self.url}"
            self._log.warning(told)
            # The default port was not requested: a second home can use another one.
            self.problem = None if self._config.listen == Http().listen else told
        try:
            self._tell()
        except OSError as error:
            # A full disk does not keep the daemon from starting. `_look` tries again and tells of it.
            self._log.warning("the address was not written", path=str(self._address_path), error=str(error))
        self.task.start()

    def _tell(self) -> None:
        """Write the address, unless the file has it.

        Raises:
            OSError: it cannot be written.
        """
        told = msgspec.json.encode({"url": self.url}) + b"\n"
        try:
            if self._address_path.read_bytes() == told:
                return
        except FileNotFoundError:
            pass  # at the start, or the file was removed
        write_whole(self._address_path, told)

    async def _bind(self, host: str, port: int) -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        for candidate in (port, 0):
            server = socket.socket(family, socket.SOCK_STREAM)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind((host, candidate))
                server.listen(1024)
            except OSError as error:
                server.close()
                if error.errno != errno.EADDRINUSE or candidate == 0:
                    raise ConfigError(f"http.listen: {host}:{port}: {error.strerror}", place="http.listen") from None
            else:
                server.setblocking(False)
                return server
        raise AssertionError

    async def stop(self) -> None:
        """Close open connections, and stop listening."""
        await self.task.stop()
        self._address_path.unlink(missing_ok=True)
        await self._streams.close()
        if self._runner is not None:
            await self._runner.cleanup()
        self._runner = self.url = None

    # -- connections --------------------------------------------------------------------------------------------------

    def _counted(self) -> Middleware:
        """Notes that a connection has asked, and refuses those above the limit."""

        @web.middleware
        async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
            self._spoke.add(request.protocol)
            server = self._runner.server if self._runner is not None else None
            if server is None or len(server.connections) <= self._config.max_connections:
                return await handler(request)
            shape = shape_of(request)
            refusal = Refusal(503, "too_many_connections", "too many connections; ask again later", retry=True)
            answer = shape.refusal(refusal)
            answer.force_close()
            return answer

        return count

    async def _look(self) -> None:
        """Let connections go that have not sent a whole head in time, and those above the limit that wait. Then restore
        the file with the address if it was removed."""
        self._streams.look()
        server = self._runner.server if self._runner is not None else None
        if server is None:
            return
        self._close_silent(server)
        self._tell()

    def _close_silent(self, server: web.Server) -> None:
        now = self._clock.now().mono / 1e6
        present = set(server.connections)
        for connection in present - self._spoke:
            if now - self._seen.setdefault(connection, now) > SILENT:
                connection.force_close()
        self._seen = {c: at for c, at in self._seen.items() if c in present}
        self._spoke &= present


def listen_address(config: Http) -> tuple[str, int]:
    """The host and port to listen at.

    Raises:
        ConfigError: it cannot be used, or is not this machine's own without `allow_remote`.
    """
    try:
        parts = urlsplit(f"//{config.listen}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    if not host or port is None:
        raise ConfigError(
            f"http.listen: {config.listen!r} is no host:port such as 127.0.0.1:7411; an empty one turns HTTP off",
            place="http.listen",
        )
    if host_name(host) not in ("localhost", "127.0.0.1", "::1") and not config.allow_remote:
        raise ConfigError(
            f"http.listen: {config.listen!r} can be reached from other machines; set http.allow_remote = true if that "
            "is meant, and put TLS before it",
            place="http.listen",
        )
    return host, port
