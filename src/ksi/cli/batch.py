"""`ksi batch`: a file of prompts becomes a file of answers."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ksi.cli.answer import connected, is_cut
from ksi.cli.completing import complete_agent, complete_model
from ksi.cli.render import duration, json_line, note
from ksi.cli.settings import Exit, Settings, json_option, pass_settings

if TYPE_CHECKING:
    from ksi.cli.batch_files import Input, Item, Results
    from ksi.client import Client, Handle
    from ksi.event_types import RequestReply

PRIORITIES = ("critical", "high", "normal", "low", "background")
REPORT_EVERY = 10.0
"""Seconds between two lines of progress where stderr is no terminal."""
PATIENCE = 3600.0
"""Seconds that a batch waits for a daemon that was lost."""
CLEAR = "\r\x1b[K"
"""Empties a terminal's line."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds until a request that the daemon could not take is sent again."""


@click.command(
    epilog="""\b
Examples:
  ksi batch questions.jsonl answers.jsonl
  ksi batch questions.jsonl answers.jsonl --model claude-cli/haiku --concurrency 4
  jq -r .result answers.jsonl

\b
A line of the input is a JSON string, or an object with the fields of a completion and, if wanted, custom_id:
  "Name three colours"
  {"prompt": "Name three birds", "max_tokens": 50, "custom_id": "birds"}
"""
)
@click.argument("source", metavar="IN", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(dir_okay=False, path_type=Path))
@click.option("-m", "--model", metavar="PROVIDER/MODEL", shell_complete=complete_model, help="Where a line names none.")
@click.option("-p", "--priority", type=click.Choice(PRIORITIES, case_sensitive=False), default="background")
@click.option("-a", "--agent", "agent_id", metavar="NAME", shell_complete=complete_agent, help="Who asks.")
@click.option("--system", metavar="TEXT", help="Instructions for lines that have none.")
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="The longest answer.")
@click.option(
    "--concurrency", type=click.IntRange(1, 1000), default=16, show_default=True, help="Requests sent and not ended."
)
@click.option("--run", metavar="NAME", default="", help="Ask the same file once more, under another name.")
@click.option("--no-start", is_flag=True, help="Do not start the daemon where none runs.")
@json_option
@pass_settings
@click.pass_context
def batch(
    ctx: click.Context,
    settings: Settings,
    /,
    source: Path,
    target: Path,
    concurrency: int,
    run: str,
    no_start: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Ask every line of IN, and write every answer to OUT, both in JSON lines.

    Run the same command again after anything, and it goes on: what is answered is not asked again, what was sent is
    waited for, what failed is tried again. Failures stand in a file of their own beside OUT, OUT.failed. When all is
    done, OUT has the order of IN.

    Exit code 0 means that all is answered, 1 that something failed, 7 that an answer was cut at a limit.
    """
    from ksi.cli.batch_files import Input, Results

    if source.resolve() == target.resolve():
        raise click.UsageError("IN and OUT are the same file")
    given = {name: value for name, value in options.items() if value is not None}
    with ExitStack() as opened:
        prompts = Input(source, run)
        opened.callback(prompts.close)
        answers = Results(target)
        opened.callback(answers.close, keep_empty=True)
        failures = Results(target.with_name(target.name + ".failed"))
        opened.callback(failures.close, keep_empty=False)
        work = Batch(prompts, answers, failures, given, concurrency)
        opened.callback(work.end)
        asyncio.run(work.run(settings, start=not no_start))
    if as_json:
        json_line(work.tally.report())
    ctx.exit(work.tally.exit_code)


class Tally:
    """A batch's figures, kept as they change."""

    def __init__(self, lines: int) -> None:
        self.lines = lines
        self.answered = 0
        self.cut = 0
        self.cost = 0.0
        self.without_price = 0
        self.failed: set[str] = set()
        """Items that failed in this run, by name."""

    def answer(self, entry: Mapping[str, Any]) -> None:
        """Count an answer."""
        self.answered += 1
        self.cut += is_cut(entry.get("truncated"), entry.get("stop_reason"))
        self.pay(entry)

    def pay(self, entry: Mapping[str, Any]) -> None:
        """Count what a request cost; one that was never asked cost nothing."""
        if entry.get("status") == "refused":
            return
        cost = entry.get("cost_usd")
        self.cost += cost or 0.0
        self.without_price += cost is None

    @property
    def left(self) -> int:
        """Lines without a result."""
        return self.lines - self.answered - len(self.failed)

    def report(self) -> dict[str, Any]:
        """All figures."""
        return {
            "lines": self.lines,
            "answered": self.answered,
            "failed": len(self.failed),
            "left": self.left,
            "cut": self.cut,
            "cost_usd": self.cost,
            "without_price": self.without_price,
        }

    @property
    def exit_code(self) -> Exit:
        """How it ended."""
        if self.failed or self.left:
            return Exit.FAILED
        return Exit.CUT if self.cut else Exit.DONE


class Batch:
    """One run over a file of prompts."""

    def __init__(
        self, prompts: Input, answers: Results, failures: Results, options: Mapping[str, Any], concurrency: int
    ) -> None:
        self._prompts = prompts
        self._answers = answers
        self._failures = failures
        self._options = options
        self._places = asyncio.Semaphore(concurrency)
        self._sent = 0
        self._error: Exception | None = None
        self._progress = Progress()
        self._began = time.monotonic()
        self.tally = Tally(len(prompts.items))
        for item in prompts.items:
            if item.name in answers.known:
                self.tally.answer(answers.known[item.name])
            elif item.name in failures.known:
                self.tally.pay(failures.known[item.name])
        self._before = self.tally.answered

    async def run(self, settings: Settings, *, start: bool) -> None:
        """Ask all that is not answered yet.

        Raises:
            ConnectionFailed: the daemon is gone for long.
            OSError: an answer cannot be written.
        """
        todo = [item for item in self._prompts.items if item.name not in self._answers.known]
        if not todo:
            return
        if self._before:
            note(f"ksi: {self._before} of {self.tally.lines} are answered already")
        client = await connected(settings, _lost, start=start, patience=PATIENCE)
        tasks: set[asyncio.Task[None]] = set()
        async with client:
            try:
                for item in todo:
                    await self._places.acquire()
                    if self._error is not None:
                        raise self._error
                    handle = await self._submit(client, item)
                    if handle is None:
                        self._places.release()
                        continue
                    self._sent += 1
                    task = asyncio.create_task(self._finish(item, handle))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                await asyncio.gather(*tasks)
                if self._error is not None:
                    raise self._error
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _submit(self, client: Client, item: Item) -> Handle | None:
        """Send one request, again while the daemon cannot take it; one that it refuses has failed."""
        from ksi.cli.batch_files import made_name
        from ksi.errors import RemoteError

        fields = {**self._options, **self._prompts.fields(item)}
        fields.pop("custom_id", None)
        request_id = made_name(item.name, sorted(self._options.items()), self._tries(item))
        pause = FIRST_PAUSE
        while True:
            try:
                return await client.submit(**{**fields, "request_id": request_id})
            except RemoteError as error:
                if not error.retryable:
                    told = {"status": "refused", "error": {"code": error.code, "message": error.message}}
                    self._fail(item, {"request_id": request_id, **told})
                    return None
                self._progress.say(f"{error.message}; trying again in {pause:g} s")
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _tries(self, item: Item) -> int:
        """How often it has failed; each try is a request of its own."""
        return int(self._failures.known.get(item.name, {}).get("tries", 0))

    async def _finish(self, item: Item, handle: Handle) -> None:
        """Wait for one request's end and write it down. What cannot be written stops the batch."""
        from ksi.errors import KsiError

        try:
            reply = await handle.wait()
            if reply.status == "completed":
                entry = {**self._head(item), **_answer(reply)}
                self._answers.add(entry)
                self.tally.answer(entry)
            else:
                self._fail(item, _answer(reply))
        except (KsiError, OSError) as error:
            self._error = self._error or error
        finally:
            self._sent -= 1
            self._places.release()
        self._progress.show(self._words())

    def _head(self, item: Item) -> dict[str, Any]:
        custom = self._prompts.fields(item).get("custom_id")
        return {"line": item.line, "item": item.name, **({} if custom is None else {"custom_id": custom})}

    def _fail(self, item: Item, told: Mapping[str, Any]) -> None:
        self._failures.add({**self._head(item), "tries": self._tries(item) + 1, **told})
        self.tally.failed.add(item.name)
        self.tally.pay(told)

    def end(self) -> None:
        """Bring both files into order, and say how far it went."""
        order = {item.name: item.line for item in self._prompts.items}
        try:
            self._answers.rewrite(order)
            self._failures.rewrite(order, without=self._answers.known)
        except OSError as error:
            note(f"ksi: the results are all there, but not in order: {error.strerror}")
        self._progress.end(self._words())
        if self.tally.failed:
            note(f"ksi: {self._failures.path} says what failed; the same command tries it again")
        if self.tally.left:
            note(f"ksi: {self.tally.left} have no answer yet; the same command goes on. What was sent is not lost.")

    def _words(self) -> str:
        tally = self.tally
        words = [f"{tally.answered} of {tally.lines} answered"]
        if tally.failed:
            words.append(f"{len(tally.failed)} failed")
        if self._sent:
            words.append(f"{self._sent} on their way")
        words.append(f"${tally.cost:.4f} so far")
        if tally.without_price:
            words.append(f"{tally.without_price} without a price")
        new = tally.answered - self._before
        if new and tally.left:
            words.append(f"about {duration((time.monotonic() - self._began) / new * tally.left)} more")
        return ", ".join(words)


def _answer(reply: RequestReply) -> dict[str, Any]:
    """What is kept of a request's end."""
    import msgspec

    told: dict[str, Any] = msgspec.to_builtins(reply)
    names: tuple[str, ...] = (
        "request_id",
        "status",
        "result",
        "error",
        "stop_reason",
        "model",
        "provider",
        "session_id",
        "usage",
    )
    names = (*names, "truncated", "note", "cost_usd", "metadata")
    return {name: told[name] for name in names if told.get(name) is not None}


def _lost() -> None:
    note("ksi: the daemon is gone; what was sent is kept, and the batch goes on when it is back")


class Progress:
    """A line on stderr: written over at a terminal, now and then elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._said_at = time.monotonic()

    def show(self, words: str) -> None:
        """Say how far it is."""
        if self._live:
            sys.stderr.write(f"{CLEAR}{words}")
            sys.stderr.flush()
        elif time.monotonic() - self._said_at >= REPORT_EVERY:
            self.say(words)

    def say(self, words: str) -> None:
        """Say something on a line of its own."""
        self._said_at = time.monotonic()
        self.end(words)

    def end(self, words: str) -> None:
        """Say the last word."""
        if self._live:
            sys.stderr.write(CLEAR)
        note(f"ksi: {words}")
