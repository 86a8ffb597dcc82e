"""`ksi top`: the daemon live in a terminal, with keys to sort, filter, cancel and pause."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sys
import termios
import time
import tty
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
import msgspec

from ksi.cli.render import Screen, print_lines, terminal_size
from ksi.cli.settings import Settings, pass_settings

if TYPE_CHECKING:
    from ksi.cli.top_view import Act, Seen, View
    from ksi.client import Client

HEALTH_EVERY = 5.0
COST_EVERY = 30.0
"""Seconds between looks at figures that cost more, or change less."""

DAY = 86_400.0
ROWS = 200

_SEQUENCES = {
    b"\x1b[A": "up",
    b"\x1b[B": "down",
    b"\x1bOA": "up",
    b"\x1bOB": "down",
    b"\x1b[H": "home",
    b"\x1b[F": "end",
    b"\x1b": "escape",
    b"\r": "enter",
    b"\n": "enter",
    b"\t": "tab",
    b"\x7f": "backspace",
    b"\x08": "backspace",
    b"\x03": "ctrl-c",
}


@click.command(
    epilog="""\b
Examples:
  ksi top
  ksi top --every 5
  ksi top --once
"""
)
@click.option(
    "--every",
    type=click.FloatRange(0.2, 3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Look so often.",
)
@click.option("--once", is_flag=True, help="Print one view and end; this is the default without a terminal.")
@pass_settings
def top(settings: Settings, every: float, once: bool) -> None:
    """Show running, waiting and failed requests and the providers' state, as they change.

    Keys choose a list (1 to 6), a request (arrows), a filter (/) and an order (s); c cancels, p pauses, r resumes, q
    leaves, and ? lists them all.
    """
    live = not once and sys.stdin.isatty() and sys.stdout.isatty()
    asyncio.run(_live(settings, every) if live else _once(settings))


async def _once(settings: Settings) -> None:
    from ksi.cli.top_view import Seen, View, lines

    async with settings.client() as client:
        look = Look(client)
        seen = await look.at(View(), Seen())
    columns, rows = terminal_size()
    print_lines(lines(View(), seen, max(columns, 40), max(rows, 20) if sys.stdout.isatty() else 60)[:-1])


class Look:
    """Asks for the shown data, and for some of them less often."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._next_health = self._next_cost = 0.0

    async def at(self, view: View, before: Seen) -> Seen:
        """The present data of a view.

        Raises:
            As `Client.send_event`.
        """
        ask = self._client.send_event
        now = time.time()
        status, queue, reports = await asyncio.gather(
            ask("completion:status"),
            ask("completion:queue_status", {"list": view.listing, "limit": ROWS}),
            ask("completion:provider_status"),
        )
        providers = reports.get("providers", {})
        problems, cost = before.problems, before.cost
        if now >= self._next_health:
            problems = tuple((await ask("system:health")).get("problems", ()))
            self._next_health = now + HEALTH_EVERY
        if now >= self._next_cost:
            cost = (await ask("completion:token_usage", {"since": now - DAY}))["totals"].get("cost_usd")
            self._next_cost = now + COST_EVERY
        return msgspec.structs.replace(
            before,
            status=status,
            rows=tuple(queue.get("items", ())),
            more=queue.get("cursor") is not None,
            providers=providers,
            problems=problems,
            cost=cost,
            text=await self._text(view, providers),
            at=now,
            lost=None,
        )

    async def _text(self, view: View, providers: Mapping[str, Any]) -> str:
        """The lines about the chosen request: its answer so far, the reason of its wait, or its end."""
        from ksi.cli.waiting import waits_for
        from ksi.errors import RemoteError

        if view.chosen is None:
            return ""
        try:
            reply = await self._client.send_event("completion:get", {"request_id": view.chosen, "after_seq": -1})
        except RemoteError:
            return ""  # it has just gone; the next look shows it no more
        ended = reply.get("error") or {}
        words = reply.get("text_so_far") or waits_for(reply, providers) or ended.get("message") or reply.get("result")
        return str(words or "")


class Top:
    """The screen, as long as it is looked at."""

    def __init__(self, client: Client, every: float) -> None:
        from ksi.cli.top_view import Seen, View

        self._client = client
        self._every = every
        self._look = Look(client)
        self._screen = Screen()
        self._view = View()
        self._seen = Seen()
        self._again = asyncio.Event()
        """Something was chosen or done: look now."""
        self._left = asyncio.Event()
        self._working: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Show it until the person leaves.

        Raises:
            ConnectionFailed: no daemon can be reached at the beginning.
        """
        self._seen = await self._look.at(self._view, self._seen)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._left.set)
        for number in (signal.SIGWINCH, signal.SIGCONT):
            loop.add_signal_handler(number, self._draw)
        with _keys_at_once(sys.stdin.fileno()), self._screen.taken():
            loop.add_reader(sys.stdin.fileno(), self._read)
            looking = asyncio.create_task(self._follow())
            try:
                self._draw()
                leaving = asyncio.create_task(self._left.wait())
                await asyncio.wait({looking, leaving}, return_when=asyncio.FIRST_COMPLETED)
                leaving.cancel()
                if looking.done():
                    looking.result()
            finally:
                loop.remove_reader(sys.stdin.fileno())
                for task in (looking, *self._working):
                    task.cancel()
                await asyncio.gather(looking, *self._working, return_exceptions=True)

    def lose(self) -> None:
        """The daemon is gone: say so until a look succeeds again."""
        self._seen = msgspec.structs.replace(self._seen, lost="the daemon is gone; this is how it was")
        self._draw()

    async def _follow(self) -> None:
        from ksi.errors import KsiError

        while True:
            try:
                self._seen = await self._look.at(self._view, self._seen)
            except KsiError as error:
                self._seen = msgspec.structs.replace(self._seen, lost=error.message)
            self._draw()
            try:
                async with asyncio.timeout(self._every):
                    await self._again.wait()
            except TimeoutError:
                continue
            self._again.clear()

    def _draw(self) -> None:
        from ksi.cli.top_view import lines

        columns, rows = terminal_size()
        self._screen.draw(lines(self._view, self._seen, columns, rows))

    def _read(self) -> None:
        from ksi.cli.top_view import QUIT, pressed

        data = os.read(sys.stdin.fileno(), 1024)
        if not data:
            self._left.set()
            return
        for key in keys_in(data):
            before = self._view
            self._view, act = pressed(self._view, self._seen, key)
            if act is QUIT:
                self._left.set()
                return
            if act is not None:
                self._work(lambda act=act: self._do(act))  # type: ignore[misc]
            if (before.listing, before.chosen) != (self._view.listing, self._view.chosen):
                if before.listing != self._view.listing:
                    self._seen = msgspec.structs.replace(self._seen, rows=(), text="")
                self._again.set()
        self._draw()

    def _work(self, work: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.ensure_future(work())
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    async def _do(self, act: Act) -> None:
        from ksi.errors import KsiError

        try:
            await self._client.send_event(act.event, act.data)
            word = act.done
        except KsiError as error:
            word = error.message
        self._view = msgspec.structs.replace(self._view, word=word)
        self._draw()
        self._again.set()


async def _live(settings: Settings, every: float) -> None:
    # It is watched across restarts: a look waits until the daemon is back, and the last data stay.
    looked_at: list[Top] = []

    def lose() -> None:
        for one in looked_at:
            one.lose()

    async with settings.client(patience=math.inf, on_lost=lose) as client:
        looked_at.append(Top(client, every))
        await looked_at[0].run()


def keys_in(data: bytes) -> Iterator[str]:
    """The keys that a terminal's bytes stand for; unknown ones are left out."""
    at = 0
    while at < len(data):
        for length in (3, 1):
            name = _SEQUENCES.get(data[at : at + length])
            if name is not None and not (name == "escape" and data[at + 1 : at + 2] in (b"[", b"O")):
                at += length
                yield name
                break
        else:
            if data[at] == 0x1B:
                at += 2  # a sequence of a key that means nothing here: to its last letter
                while at < len(data) and not 0x40 <= data[at] <= 0x7E:
                    at += 1
                at += 1
                continue
            length = _character(data[at])
            char = data[at : at + length].decode("utf-8", "ignore")
            at += length
            if char.isprintable() and char:
                yield char


def _character(first: int) -> int:
    """How many bytes a character has, by its first one."""
    return 1 if first < 0xC0 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4


@contextmanager
def _keys_at_once(descriptor: int) -> Iterator[None]:
    """Let keys come one by one and unseen, and give the terminal back as it was."""
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)
