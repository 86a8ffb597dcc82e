"""A request's answer on stdout, with words on stderr about what it waits for and how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ksi.cli.render import json_line, note, print_out, visible
from ksi.cli.settings import PATIENCE, Exit, Settings
from ksi.cli.waiting import waits_for

if TYPE_CHECKING:
    from ksi.client import Client, Handle
    from ksi.event_types import RequestReply

FIRST_LOOK = 1.0
"""Seconds until what a request waits for is looked at, ..."""
LOOK_EVERY = 3.0
"""... and between two looks."""

CUTS = {
    "max_tokens": "at its limit of tokens (--max-tokens)",
    "length": "at its limit of tokens (--max-tokens)",
    "context_window": "because the model's context window was full",
    "model_context_window_exceeded": "because the model's context window was full",
}
"""Stop reasons of an answer that is not whole, in the vocabulary of every kind of provider."""


class ReaderGone(Exception):
    """Whoever read stdout has closed it."""


class OutputFailed(Exception):
    """The answer came and could not be written."""


class Loss:
    """Says at once that the daemon was lost, and how to get the answer later."""

    def __init__(self) -> None:
        self.request_id: str | None = None
        self.accepted = False

    def __call__(self) -> None:
        """The connection is gone."""
        if self.request_id is None:
            return
        if self.accepted:
            note(f"ksi: the daemon is gone; {self.request_id} is kept, and goes on when it is back")
        else:
            note(f"ksi: the daemon is gone before it took {self.request_id}; it is sent again when it is back")
        note(f"ksi: waiting {PATIENCE:g} s for it; `ksi wait {self.request_id}` waits again later")


async def connected(settings: Settings, loss: Callable[[], None], *, start: bool, patience: float = PATIENCE) -> Client:
    """An open client; where no daemon runs, one is started if `start`."""
    from ksi.errors import ConnectionFailed

    client = settings.client(patience=patience, on_lost=loss)
    try:
        await client.open()
    except ConnectionFailed:
        if not start:
            raise
        from ksi.cli.background import start_daemon

        note(f"starting the daemon (home {settings.home})...")
        await asyncio.to_thread(start_daemon, settings.config)
        await client.open()
    return client


async def print_answer(client: Client, handle: Handle, *, stream: bool) -> RequestReply:
    """Print the text as it comes if `stream`, and say what the request waits for; returns it completed.

    Raises:
        ReaderGone: stdout was closed; the request goes on.
        RemoteError: the request has no answer.
        ConnectionFailed: the daemon is lost.
    """
    closed = asyncio.Event()
    work = asyncio.create_task(_stream(handle) if stream else handle.result())
    gone = asyncio.create_task(closed.wait())
    telling = asyncio.create_task(_tell_waiting(client, handle))
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


async def _stream(handle: Handle) -> RequestReply:
    written = ""
    try:
        async for chunk in handle.chunks():
            if chunk.restarted:
                _put("\n")
                note("ksi: the answer begins anew; what stands above does not count")
            text = shown(chunk.text)
            written = text or written
            _put(text)
    finally:
        if written and not written.endswith("\n"):
            _put("\n")
    return await handle.result()


def _put(text: str) -> None:
    try:
        print_out(text)
    except BrokenPipeError:
        raise ReaderGone from None
    except OSError as error:
        raise OutputFailed(error.strerror or str(error)) from None


def print_end(reply: RequestReply, *, stream: bool, as_json: bool) -> Exit:
    """Print what was not printed as it came, and say if the answer is not whole; returns the exit code.

    Raises:
        OutputFailed: it could not be written.
    """
    try:
        if as_json:
            json_line(reply)
        elif not stream:
            print_out(shown(reply.result or "") + "\n")
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
    note(f"ksi: the answer of {reply.request_id} is not whole: it was cut {cut}")
    return Exit.CUT


def is_cut(truncated: object, stop_reason: object) -> bool:
    """Whether an answer is not whole."""
    return bool(truncated) or stop_reason in CUTS


def lost_output(request_id: str, error: OutputFailed) -> Exit:
    """Say where the answer is that could not be written."""
    stop_writing()
    note(f"ksi: the answer could not be written ({error}); it is kept: ksi show {request_id}")
    return Exit.FAILED


def shown(text: str) -> str:
    """A model's text: as it is for a program, without terminal commands for a person."""
    return visible(text, keep="\n\t") if sys.stdout.isatty() else text


def stop_writing() -> None:
    """Let what is still buffered for stdout go nowhere, so that the interpreter's end does not fail over it."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def _reader_watched(on_closed: Callable[[], object]) -> Iterator[None]:
    """Call `on_closed` when the reading side of stdout is closed, where stdout is a pipe."""
    loop = asyncio.get_running_loop()
    try:
        descriptor = sys.stdout.fileno()
        if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            yield
            return
        loop.add_reader(descriptor, on_closed)
    except (OSError, ValueError, NotImplementedError):  # no descriptor, or none that can be watched
        yield
        return
    try:
        yield
    finally:
        loop.remove_reader(descriptor)


async def _tell_waiting(client: Client, handle: Handle) -> None:
    """Say on stderr what the request waits for, again when that changes."""
    from ksi.errors import KsiError

    said, pause = None, FIRST_LOOK
    while not handle.done:
        await asyncio.sleep(pause)
        pause = LOOK_EVERY
        try:
            reply = await client.send_event("completion:get", {"request_id": handle.request_id})
            providers: Mapping[str, Any] = {}
            if reply.get("status") == "queued":
                providers = (await client.send_event("completion:provider_status")).get("providers", {})
        except KsiError:
            return  # the answer's own wait says what is wrong
        words = waits_for(reply, providers)
        if words is not None and words != said:
            note(f"ksi: {handle.request_id} {words}")
        said = words
