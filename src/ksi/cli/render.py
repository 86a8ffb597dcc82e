"""What people see: tables, figures and times; and the JSON lines that programs read."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

Row = Sequence[object]


def json_line(value: Any) -> None:
    """One JSON object on a line of its own, out at once."""
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()


def visible(text: str, keep: str = "") -> str:
    """Text that came from outside, with control characters spelt out: a terminal obeys some of them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


def table(columns: Sequence[str], rows: Iterable[Row], *, title: str | None = None) -> None:
    """Rows under their columns: drawn for a terminal, plain aligned text elsewhere."""
    cells = [[visible(_word(value)) for value in row] for row in rows]
    if sys.stdout.isatty():
        _drawn(columns, cells, title)
        return
    if title is not None:
        print(title)
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in (columns, *cells):
        print("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip())


def figures(values: Mapping[str, object], *, title: str | None = None) -> None:
    """Names and values, one a line; values that are None are left away."""
    shown = {name: visible(_word(value), keep="\n") for name, value in values.items() if value is not None}
    if title is not None:
        print(title)
    width = max(map(len, shown), default=0)
    for name, text in shown.items():
        head, *more = text.split("\n")
        print(f"{name.ljust(width)}  {head}".rstrip())
        for line in more:
            print(f"{'':{width}}  {line}".rstrip())


def note(text: str) -> None:
    """A word to the person beside the output, on stderr."""
    print(visible(text), file=sys.stderr, flush=True)


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


def _drawn(columns: Sequence[str], cells: Sequence[Sequence[str]], title: str | None) -> None:
    # Loaded for people only: it takes as long as all the rest.
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for line in cells:
        drawn.add_row(*(Text(word) for word in line))
    Console().print(drawn)
