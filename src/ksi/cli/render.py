"""What people see: tables, figures and times; and the JSON lines that programs read."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

Row = Sequence[object]

STATE_COLUMNS = frozenset({"state", "status", "outcome"})
"""Columns and figures whose words have a colour."""


def json_line(value: Any) -> None:
    """One JSON object on a line of its own, out at once. What a terminal could obey is written as escapes."""
    print_out(escaped(msgspec.json.encode(value).decode(), ascii_only=not _takes_unicode()) + "\n")


def escaped(text: str, *, ascii_only: bool = False) -> str:
    """JSON that means the same, without a character that is not printable."""
    if text.isprintable() and not (ascii_only and not text.isascii()):
        return text
    return "".join(c if c.isprintable() and not (ascii_only and ord(c) > 126) else _json_escape(c) for c in text)


def _json_escape(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


def _takes_unicode() -> bool:
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")


def print_out(text: str) -> None:
    """Write to stdout, out at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def visible(text: str, keep: str = "") -> str:
    """Text that came from outside, with control characters spelt out: a terminal obeys some of them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


def table(columns: Sequence[str], rows: Iterable[Row], *, title: str | None = None) -> None:
    """Rows under their columns: drawn and made to fit for a terminal, plain aligned text elsewhere."""
    cells = [[visible(_word(value)) for value in row] for row in rows]
    if sys.stdout.isatty():
        # Loaded for people only.
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
    """Names and values, one a line; values that are None are left away."""
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


def note(text: str) -> None:
    """A word to the person beside the output, on stderr."""
    print(visible(text), file=sys.stderr, flush=True)


def terminal_width() -> int:
    """Columns of the terminal."""
    import shutil

    return max(shutil.get_terminal_size().columns, 20)


class Painter:
    """Colours, where the output is a terminal that has them and NO_COLOR does not forbid it."""

    COLOURS: Mapping[str, str] = {
        **dict.fromkeys(("completed", "well", "healthy", "delivered", "ok", "open", "idle", "active"), "32"),
        **dict.fromkeys(("running", "ready", "locked"), "36"),
        **dict.fromkeys(("retrying", "parked", "left", "being", "degraded", "disabled", "stopping", "queued"), "33"),
        **dict.fromkeys(("failed", "blocked", "tripped", "exhausted", "fenced"), "31"),
        **dict.fromkeys(("cancelled", "expired", "closed", "interrupted"), "2"),
    }

    def __init__(self, on: bool) -> None:
        self._on = on

    def state(self, word: str) -> str:
        """A state in its colour: green is well, yellow waits, red has failed."""
        code = self.COLOURS.get(word.partition(" ")[0].rstrip(","))
        return self._in(code, word) if code is not None else word

    def bold(self, text: str) -> str:
        """A heading."""
        return self._in("1", text)

    def dim(self, text: str) -> str:
        """What matters less."""
        return self._in("2", text)

    def _in(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._on and text else text


def painter() -> Painter:
    """The colours of stdout."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return Painter(sys.stdout.isatty() and not plain)


def clock_time(unix: float | None, now: float | None = None) -> str | None:
    """A time of day, with the date where it is not today's; local."""
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
