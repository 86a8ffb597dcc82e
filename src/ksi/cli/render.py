"""All output of the command: tables, figures and texts for people, and JSON lines for programs.

Nothing else in `ksi.cli` writes to stdout or stderr, so that the rule of `ksi.host.printable` holds for every command.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from ksi.host.printable import escaped, visible

Row = Sequence[object]

STATE_COLUMNS = frozenset({"state", "status", "outcome"})
"""Columns and figures whose values are coloured."""


def json_line(value: Any) -> None:
    """One JSON object on a line of its own, flushed at once. Control characters are escaped."""
    try:
        text = msgspec.json.encode(value).decode()
    except UnicodeEncodeError:
        # A file name or word of the command line that is not UTF-8: spelt as Python spells it.
        text = json.dumps(msgspec.to_builtins(value), separators=(",", ":"))
    _write(escaped(text, ascii_only=not _takes_unicode()) + "\n")


def _takes_unicode() -> bool:
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")


def say(text: object = "", *, style: Callable[[str], str] = str, keep: str = "") -> None:
    """A line on stdout, flushed at once; control characters are made visible. `style` is a Painter's."""
    print(style(visible(str(text), keep)), flush=True)


def print_text(text: str) -> None:
    """A long text on stdout, flushed at once: unchanged for a program, without control characters for a person."""
    _write(visible(text, keep="\n\t") if sys.stdout.isatty() else text)


def print_data(data: bytes) -> None:
    """The same for a file's bytes."""
    if sys.stdout.isatty():
        print_text(data.decode("utf-8", "replace"))
        return
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def note(text: str, *, keep: str = "") -> None:
    """A remark for the person on stderr, apart from the output."""
    print(visible(text, keep), file=sys.stderr, flush=True)


def write_file(path: str, lines: Iterable[str]) -> None:
    """A text in a new file that only this user can read; `-` is stdout.

    Raises:
        OSError: it cannot be written, or exists already.
    """
    if path == "-":
        for line in lines:
            print_text(line)
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:  # noqa: PTH123 - it is open
        for line in lines:
            file.write(line)


def progress(text: str) -> None:
    """A line on a terminal's stderr in the place of the one before; an empty one takes that away.

    A line longer than the terminal's width is cut: the rest of a broken line would stay.
    """
    shown = visible(text)
    if shown:
        # Loaded for people only.
        from rich.cells import cell_len, set_cell_size

        width = terminal_width() - 1
        shown = set_cell_size(shown, width) if cell_len(shown) > width else shown
    sys.stderr.write(f"\r\x1b[K{shown}")
    sys.stderr.flush()


class Screen:
    """A whole terminal, drawn over and over; its former contents come back at the end."""

    def __init__(self) -> None:
        self._paint = painter()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Have the terminal for oneself inside."""
        _write("\x1b[?1049h\x1b[?25l")
        try:
            yield
        finally:
            _write("\x1b[?25h\x1b[?1049l")

    def draw(self, lines: Sequence[Sequence[tuple[str, str]]]) -> None:
        """Show these lines, each made of texts with their styles, and nothing else. They must fit."""
        # Between the first and the last word a terminal that knows them shows nothing half.
        rows = "\r\n".join(f"\x1b[K{_styled(self._paint, line)}" for line in lines)
        _write(f"\x1b[?2026h\x1b[H{rows}\x1b[J\x1b[?2026l")


def print_lines(lines: Sequence[Sequence[tuple[str, str]]]) -> None:
    """The same lines, one after the other, without blanks at their ends."""
    paint = painter()
    for line in lines:
        print(_styled(paint, line).rstrip())


def _styled(paint: Painter, line: Sequence[tuple[str, str]]) -> str:
    return "".join(paint.styled(style, visible(text)) for text, style in line)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def table(columns: Sequence[str], rows: Iterable[Row], *, title: str | None = None) -> None:
    """Rows under their columns: drawn to fit a terminal, plain aligned text elsewhere."""
    cells = [[visible(_word(value)) for value in row] for row in rows]
    if sys.stdout.isatty():
        # Loaded only for output to people.
        from ksi.cli.tables import drawn

        for line in drawn(columns, cells, title=title, width=terminal_width(), paint=painter()):
            print(line)
        return
    if title is not None:
        print(title)
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for row in (columns, *cells):
        print("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())


def figures(values: Mapping[str, object], *, title: str | None = None) -> None:
    """Names and values, one per line; values that are None are left out."""
    shown = {visible(name): visible(_word(value), keep="\n") for name, value in values.items() if value is not None}
    if title is not None:
        print(title)
    paint = painter()
    width = max(map(len, shown), default=0)
    for name, text in shown.items():
        head, *more = text.split("\n")
        if name in STATE_COLUMNS:
            head = paint.state(head)
        print(f"{name.ljust(width)}  {head}".rstrip())
        for line in more:
            print(f"{'':{width}}  {line}".rstrip())


def terminal_size() -> tuple[int, int]:
    """Columns and lines of the terminal on stdout now.

    `COLUMNS` and `LINES` count only where there is none: a shell that passed them on does not follow the window.
    """
    import shutil

    try:
        size = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):
        size = os.terminal_size((0, 0))
    if not (size.columns and size.lines):
        size = shutil.get_terminal_size()
    return max(size.columns, 1), max(size.lines, 1)


def terminal_width() -> int:
    """The terminal's width in columns."""
    import shutil

    return max(shutil.get_terminal_size().columns, 20)


class Painter:
    """Colours, if the output is a terminal that has them and NO_COLOR does not forbid it."""

    COLOURS: Mapping[str, str] = {
        **dict.fromkeys(("completed", "healthy", "delivered", "ok", "open", "idle", "active"), "32"),
        **dict.fromkeys(("running", "ready", "locked"), "36"),
        **dict.fromkeys(
            ("retrying", "parked", "circuit", "probed", "degraded", "disabled", "paused", "stopping", "queued"), "33"
        ),
        **dict.fromkeys(("failed", "blocked", "tripped", "exhausted", "fenced"), "31"),
        **dict.fromkeys(("cancelled", "expired", "closed", "interrupted"), "2"),
    }

    def __init__(self, on: bool) -> None:
        self._on = on

    def state(self, word: str) -> str:
        """A state in its colour: green is healthy, yellow waits, red has failed."""
        code = self.COLOURS.get(word.partition(" ")[0].rstrip(","))
        return self._in(code, word) if code is not None else word

    def bold(self, text: str) -> str:
        """A heading."""
        return self._in("1", text)

    def dim(self, text: str) -> str:
        """Less important text."""
        return self._in("2", text)

    def styled(self, code: str, text: str) -> str:
        """A text in a terminal's style, by its number; none is plain."""
        return self._in(code, text) if code else text

    def _in(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._on and text else text


def painter() -> Painter:
    """The colours of stdout."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return Painter(sys.stdout.isatty() and not plain)


def clock_time(unix: float | None, now: float | None = None) -> str | None:
    """A local time of day, with the date unless it is today's."""
    if unix is None:
        return None
    moment, today = time.localtime(unix), time.localtime(now)
    same_day = moment[:3] == today[:3]
    return time.strftime("%H:%M:%S" if same_day else "%Y-%m-%d %H:%M:%S", moment)


def duration(seconds: float | None) -> str | None:
    """A length of time in its two largest units."""
    if seconds is None:
        return None
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def _word(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(map(str, value)) or "-"
    if isinstance(value, Mapping):
        return msgspec.json.encode(value).decode()
    return str(value)
