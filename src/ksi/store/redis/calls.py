"""Calls of the store's functions: the context sent with each, and the meaning of their refusals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec

from ksi.clock import Moment
from ksi.errors import StoreUnavailable
from ksi.store.redis.link import Change, Link
from ksi.store.redis.values import Answer, decode, encode, pad20
from ksi.store.values import StoreRules

T = TypeVar("T")
A = TypeVar("A", bound=Answer)


def no_work() -> None:
    """Stands for `on_work` while the store is not open."""


class Calls:
    """One daemon's way to the functions of one namespace.

    `hand` lets `Moment.mono` of the caller measure time in place of the server's clock: for tests that move it.
    """

    def __init__(self, rules: StoreRules, namespace: str, daemon: str, node: str, lease: int, *, hand: bool) -> None:
        self.namespace = f"{{ksi:{namespace}}}"
        self.daemon = daemon
        self._standing = {
            "lock_expiry": rules.lock_expiry,
            "position_limit": rules.position_limit,
            "max_queued": rules.max_queued,
            "max_interruptions": rules.max_interruptions,
            "fail_interrupted": rules.fail_interrupted,
            "guard_messages": rules.guard_messages,
            "node_timeout": rules.node_timeout,
            "chain_limits": msgspec.to_builtins(rules.chain_limits),
            "daemon": daemon,
            "node": node,
            "lease": lease,
            "hand": hand,
            "fair": rules.fair,
            "weights": dict(rules.weights),
        }
        self.on_work: Callable[[], None] = no_work
        """Called when a call's answer says that something may have become ready."""
        self.count = 0
        self.seconds = 0.0
        """How many calls changed something, and the time from each one's sending to its answer."""
        self._caller = b""
        self._operations = 0
        self.live("0")
        self._writer: Link | None = None
        self._reader: Link | None = None
        self._free = asyncio.Event()
        self._free.set()
        self._one = asyncio.Lock()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Let all calls wait but those that are urgent, and plain commands."""
        async with self._one:
            self._free.clear()
            try:
                yield
            finally:
                self._free.set()

    def live(self, life: str) -> None:
        """Speak as this life of the daemon from now on."""
        self.life = life
        self._caller = encode({**self._standing, "life": life})

    @property
    def caller(self) -> bytes:
        """The context of each call: the lease under which it acts, and the rules."""
        return self._caller

    def begin(self, writer: Link, reader: Link) -> None:
        """Use these links from now on."""
        self._writer, self._reader = writer, reader

    def end(self) -> None:
        """Use no link any more."""
        self._writer = self._reader = None

    def bundle(self, changes: Sequence[Change]) -> tuple[bytes | str, ...]:
        """The arguments of the function `change` for these: see `lua/00_records.lua`."""
        self._operations += 1
        verbs: list[str | int] = []
        parts: list[bytes | str] = []
        for change in changes:
            verbs += (change.verb, len(change.parts))
            parts += change.parts
        head = encode({"op": self._operations, "verbs": verbs})
        return (self.namespace, self._caller, head, *parts)

    def tell(self, answer: Answer) -> None:
        """Signal new work if an answer reports it."""
        if answer.work:
            self.on_work()

    async def plain(self, *command: Any) -> Any:
        """A command that is no function."""
        return await _open(self._writer).submit(*command)

    async def change(
        self, verb: str, now: Moment, kind: type[A], blobs: Sequence[bytes] = (), **args: Any
    ) -> tuple[A, list[bytes]]:
        """Call a function that changes something. Its answer may be a refusal: see `Answer.error`.

        Raises:
            StoreUnavailable: another daemon has the namespace for itself, to save it or to load it.
        """
        await self._free.wait()
        return await self.urgent(verb, now, kind, blobs, **args)

    async def urgent(
        self, verb: str, now: Moment, kind: type[A], blobs: Sequence[bytes | str] = (), **args: Any
    ) -> tuple[A, list[bytes]]:
        """As `change`, but it does not wait while this daemon has the namespace for itself."""
        args["wall"], args["mono"] = pad20(now.wall), now.mono
        # Lua reserves room in its tables even for nil.
        given = {name: value for name, value in args.items() if value is not None}
        begun = time.perf_counter()
        answer = await _open(self._writer).change(verb, encode(given), *blobs)
        self.count += 1
        self.seconds += time.perf_counter() - begun
        packed, bytes_of = _parts(answer)
        decoded = decode(packed, kind)
        if decoded.error == "stopped":
            raise StoreUnavailable("another daemon saves or loads the whole store; try again when it is done")
        return decoded, bytes_of

    async def read(self, verb: str, kind: type[T], **args: Any) -> tuple[T, list[bytes]]:
        """Call a function that only reads."""
        await self._free.wait()
        args.setdefault("mono", 0)
        answer = await _open(self._reader).fcall(verb, self.namespace, self._caller, encode(args))
        packed, bytes_of = _parts(answer)
        return decode(packed, kind), bytes_of


def _parts(answer: Any) -> tuple[bytes, list[bytes]]:
    return (answer[0], answer[1:]) if isinstance(answer, list) else (answer, [])


def _open(link: Link | None) -> Link:
    if link is None:
        raise StoreUnavailable("the store is not open")
    return link
