"""`ksi batch`: a file of prompts becomes a file of answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ksi.cli.answer import connected, is_cut
from ksi.cli.completing import complete_agent, complete_model
from ksi.cli.progress import LiveLine
from ksi.cli.render import duration, json_line, note
from ksi.cli.settings import Exit, Settings, json_option, pass_settings

if TYPE_CHECKING:
    from ksi.cli.batch_files import Input, Item, Results
    from ksi.client import Client, Handle
    from ksi.events.completions import RequestReply

PRIORITIES = ("critical", "high", "normal", "low", "background")
REPORT_EVERY = 10.0
"""Seconds between two lines of progress if stderr is no terminal."""
PATIENCE = 3600.0
"""Seconds that a batch waits for a lost daemon."""
"""Clears a line of the terminal."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds until a request that the daemon could not accept is sent again."""


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
@click.option(
    "-m", "--model", metavar="PROVIDER/MODEL", shell_complete=complete_model, help="The model of lines that name none."
)
@click.option("-p", "--priority", type=click.Choice(PRIORITIES, case_sensitive=False), default="background")
@click.option("-a", "--agent", "agent_id", metavar="NAME", shell_complete=complete_agent, help="The asking agent.")
@click.option("--system", metavar="TEXT", help="Instructions for lines that have none.")
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="The maximum length of an answer.")
@click.option(
    "--concurrency",
    type=click.IntRange(1, 1000),
    default=16,
    show_default=True,
    help="The maximum number of requests under way.",
)
@click.option("--run", metavar="NAME", default="", help="A name that asks the same file once more.")
@click.option("--no-start", is_flag=True, help="Do not start the daemon if none runs.")
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

    After any interruption, run the same command again to continue: answered lines are not asked again, sent requests
    are waited for, and failed ones are retried. Failures are in a file of their own, OUT.failed. When the batch is
    done, OUT has the order of IN.

    Exit code 0 means that every line is answered, 1 that a line failed, 7 that an answer was cut at a limit.
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
    """A batch's figures, updated as they change."""

    def __init__(self, lines: int) -> None:
        self.lines = lines
        self.answered = 0
        self.cut = 0
        self.cost = 0.0
        self.without_price = 0
        self.failed: set[str] = set()
        """The names of items that failed in this run."""

    def answer(self, entry: Mapping[str, Any]) -> None:
        """Count an answer."""
        self.answered += 1
        self.cut += is_cut(entry.get("truncated"), entry.get("stop_reason"))
        self.pay(entry)

    def pay(self, entry: Mapping[str, Any]) -> None:
        """Count the cost of a request; one that was never sent cost nothing."""
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
        """The exit code for its end."""
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
        """Ask every line that is not answered yet.

        Raises:
            ConnectionFailed: the daemon has been away too long.
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
        """Send one request, repeatedly while the daemon cannot accept it; a refused one has failed."""
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
        """How often the item has failed; each retry is a request of its own."""
        return int(self._failures.known.get(item.name, {}).get("tries", 0))

    async def _finish(self, item: Item, handle: Handle) -> None:
        """Wait for one request's end and record it. A result that cannot be written stops the batch."""
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
        self._progress.show(self._words(), self.tally.answered / max(self.tally.lines, 1))

    def _head(self, item: Item) -> dict[str, Any]:
        custom = self._prompts.fields(item).get("custom_id")
        return {"line": item.line, "item": item.name, **({} if custom is None else {"custom_id": custom})}

    def _fail(self, item: Item, told: Mapping[str, Any]) -> None:
        self._failures.add({**self._head(item), "tries": self._tries(item) + 1, **told})
        self.tally.failed.add(item.name)
        self.tally.pay(told)

    def end(self) -> None:
        """Bring both files into order, and report the progress."""
        order = {item.name: item.line for item in self._prompts.items}
        try:
            self._answers.rewrite(order)
            self._failures.rewrite(order, without=self._answers.known)
        except OSError as error:
            note(f"ksi: all results exist, but they are not in order: {error.strerror}")
        self._progress.say(self._words())
        if self.tally.failed:
            note(f"ksi: {self._failures.path} lists the failures; the same command retries them")
        if self.tally.left:
            note(f"ksi: {self.tally.left} have no answer yet; the same command continues. Sent requests are not lost.")

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
    """The stored part of a request's end."""
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
    note("ksi: the daemon is gone; sent requests are kept, and the batch continues when it is back")


class Progress:
    """How far a batch is: on a line that is written over at a terminal, now and then elsewhere."""

    def __init__(self) -> None:
        self._line = LiveLine()
        self._said_at = time.monotonic()

    def show(self, words: str, share: float) -> None:
        """Say how far it is."""
        if self._line.on:
            self._line.show(words, share=share)
        elif time.monotonic() - self._said_at >= REPORT_EVERY:
            self.say(words)

    def say(self, words: str) -> None:
        """Say something on a line of its own."""
        self._said_at = time.monotonic()
        self._line.say(f"ksi: {words}")
