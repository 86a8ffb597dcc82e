"""A request's answer on stdout, with remarks on stderr about its waits and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ksi.cli.progress import LiveLine
from ksi.cli.render import json_line, note, print_text
from ksi.cli.settings import PATIENCE, Exit, Settings
from ksi.cli.waiting import waits_for

if TYPE_CHECKING:
    from ksi.client import Client, Handle
    from ksi.events.completions import RequestReply

FIRST_LOOK = 1.0
"""Seconds until the reason of a wait is looked up, ..."""
LOOK_EVERY = 3.0
"""... and between two look-ups."""
TICK = 0.2
"""Seconds between two changes of a terminal's line."""

CUTS = {
    "max_tokens": "at its limit of tokens (--max-tokens)",
    "length": "at its limit of tokens (--max-tokens)",
    "context_window": "because the model's context window was full",
    "model_context_window_exceeded": "because the model's context window was full",
}
"""Stop reasons of an incomplete answer, for every kind of provider."""


class ReaderGone(Exception):
    """The reader of stdout has closed it."""


class OutputFailed(Exception):
    """The answer arrived and could not be written."""


class Loss:
    """Reports a lost daemon at once, with the way to get the answer later."""

    def __init__(self) -> None:
        self.request_id: str | None = None
        self.accepted = False

    def __call__(self) -> None:
        """The connection was lost."""
        if self.request_id is None:
            return
        if self.accepted:
            note(f"ksi: the daemon is gone; {self.request_id} is kept, and continues when it is back")
        else:
            note(f"ksi: the daemon is gone before it took {self.request_id}; it is sent again when the daemon is back")
        note(f"ksi: waiting {PATIENCE:g} s for it; `ksi wait {self.request_id}` waits again later")


async def connected(settings: Settings, loss: Callable[[], None], *, start: bool, patience: float = PATIENCE) -> Client:
    """An open client; if no daemon runs, one is started if `start`."""
    from ksi.client.ways import URL
    from ksi.errors import ConnectionFailed

    client = settings.client(patience=patience, on_lost=loss)
    try:
        await client.open()
    except ConnectionFailed:
        way = settings.http_way()
        if not start or (way is not None and way.source == URL):
            raise  # an explicit address does not mean a daemon of this home
        from ksi.cli.background import start_daemon

        note(f"starting the daemon (home {settings.home})...")
        await asyncio.to_thread(start_daemon, settings.config)
        await client.open()
    return client


async def print_answer(client: Client, handle: Handle, *, stream: bool) -> RequestReply:
    """Print the text as it comes if `stream`, and name the reasons of waits; returns the completed request.

    Raises:
        ReaderGone: stdout was closed; the request continues.
        RemoteError: the request has no answer.
        ConnectionFailed: the daemon was lost.
    """
    closed = asyncio.Event()
    line = LiveLine()
    work = asyncio.create_task(_stream(handle, line) if stream else handle.result())
    gone = asyncio.create_task(closed.wait())
    telling = asyncio.create_task(_tell_waiting(client, handle, line))
    try:
        with _reader_watched(closed.set):
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ReaderGone
        return work.result()
    finally:
        for task in (work, gone, telling):
            task.cancel()
        await asyncio.gather(work, gone, telling, return_exceptions=True)
        line.clear()


async def _stream(handle: Handle, line: LiveLine) -> RequestReply:
    written = ""
    try:
        async for chunk in handle.chunks():
            line.clear()
            line.on = False  # from here on the answer is what changes
            if chunk.restarted:
                _put("\n")
                note("ksi: the answer starts over; ignore the text above")
            written = chunk.text or written
            _put(chunk.text)
    finally:
        if written and not written.endswith("\n"):
            _put("\n")
    return await handle.result()


def _put(text: str) -> None:
    try:
        print_text(text)
    except BrokenPipeError:
        raise ReaderGone from None
    except OSError as error:
        raise OutputFailed(error.strerror or str(error)) from None


def print_end(reply: RequestReply, *, stream: bool, as_json: bool) -> Exit:
    """Print the rest of the answer, and say if it is incomplete; returns the exit code.

    Raises:
        OutputFailed: it could not be written.
    """
    try:
        if as_json:
            json_line(reply)
        elif not stream:
            print_text((reply.result or "") + "\n")
    except BrokenPipeError:
        stop_writing()  # the reader has enough
        return Exit.DONE
    except OSError as error:
        raise OutputFailed(error.strerror or str(error)) from None
    if reply.note is not None:
        note(f"ksi: {reply.note}")
    if not is_cut(reply.truncated, reply.stop_reason):
        return Exit.DONE
    cut = CUTS.get(reply.stop_reason or "", "at a limit of tokens")
    note(f"ksi: the answer of {reply.request_id} is incomplete: it was cut {cut}")
    return Exit.CUT


def is_cut(truncated: object, stop_reason: object) -> bool:
    """True if an answer is incomplete."""
    return bool(truncated) or stop_reason in CUTS


def lost_output(request_id: str, error: OutputFailed) -> Exit:
    """Say where to find an answer that could not be written."""
    stop_writing()
    note(f"ksi: the answer could not be written ({error}); it is kept: ksi show {request_id}")
    return Exit.FAILED


def stop_writing() -> None:
    """Discard output that is still buffered for stdout, so that the interpreter's exit does not fail over it."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def _reader_watched(on_closed: Callable[[], object]) -> Iterator[None]:
    """Call `on_closed` when the reading end of stdout is closed, if stdout is a pipe."""
    loop = asyncio.get_running_loop()
    try:
        descriptor = sys.stdout.fileno()
        if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            yield
            return
        loop.add_reader(descriptor, on_closed)
    except (OSError, ValueError, NotImplementedError):  # no descriptor, or one that cannot be watched
        yield
        return
    try:
        yield
    finally:
        loop.remove_reader(descriptor)


async def _tell_waiting(client: Client, handle: Handle, line: LiveLine) -> None:
    """Say on stderr why the request waits: as it changes, on a line of its own place at a terminal."""
    loop = asyncio.get_running_loop()
    began, look_at, said, words = loop.time(), FIRST_LOOK, None, ""
    while not handle.done:
        await asyncio.sleep(TICK if line.on else look_at - (loop.time() - began))
        passed = loop.time() - began
        if passed >= look_at:
            look_at = passed + LOOK_EVERY
            looked = await _look(client, handle.request_id, line)
            if looked is None:
                return  # the wait for the answer itself reports the error
            words, waits = looked
            if waits and words != said and not line.on:
                note(f"ksi: {handle.request_id} {words}")
                said = words
        if words:
            line.show(words, seconds=passed)


async def _look(client: Client, request_id: str, line: LiveLine) -> tuple[str, bool] | None:
    """The line about a request, and True if it waits; None if the daemon does not tell."""
    from ksi.errors import KsiError

    try:
        wish = {"request_id": request_id, **({"after_seq": -1} if line.on else {})}
        reply = await client.send_event("completion:get", wish)
        providers: Mapping[str, Any] = {}
        if reply.get("status") == "queued":
            providers = (await client.send_event("completion:provider_status")).get("providers", {})
    except KsiError:
        return None
    words = waits_for(reply, providers)
    if words is not None:
        return words, True
    return _runs(reply), False


def _runs(reply: Mapping[str, Any]) -> str:
    """The provider that runs a request, and the length of its answer so far."""
    if reply.get("status") != "running":
        return ""
    count = len(str(reply.get("text_so_far") or "").split())
    attempt = len(reply.get("attempts") or ()) + 1
    return ", ".join(
        (
            f"runs at {reply.get('provider')}",
            *([f"attempt {attempt}"] if attempt > 1 else ()),
            *([f"{count} words so far"] if count else ()),
        )
    )
