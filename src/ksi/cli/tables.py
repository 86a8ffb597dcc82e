"""Tables for a terminal: they fit its width, and never cut an id or a number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
from rich.cells import cell_len, set_cell_size

from ksi.cli.render import STATE_COLUMNS, Painter

PROSE = frozenset(
    {"default", "error", "fields", "last error", "message", "problem", "reason", "type", "value", "what it is for"}
)
"""Columns of words, which may be cut if the row does not fit."""
SHORTEST = 12
"""Minimum width of a cut column."""
GAP = "  "


class Layout(msgspec.Struct, frozen=True):
    """The layout of rows: the columns of the first line with their widths, and those below it."""

    line: tuple[int, ...]
    widths: tuple[int, ...]
    below: tuple[int, ...] = ()


def lay_out(columns: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> Layout:
    """Decide how a table fits `width` cells.

    Columns without any value are left out. If that is not enough, columns of words are cut; if that is not enough
    either, the first line of a row has as many columns as fit, and the others follow below it with their names.
    """
    kept = [at for at in range(len(columns)) if not cells or any(row[at] not in ("-", "") for row in cells)] or [0]
    natural = {at: max(cell_len(columns[at]), *(cell_len(row[at]) for row in cells), 1) for at in kept}
    spare = width - len(GAP) * (len(kept) - 1)
    if sum(natural.values()) <= spare:
        return Layout(tuple(kept), tuple(natural.values()))
    least = {
        at: min(size, max(SHORTEST, cell_len(columns[at]))) for at, size in natural.items() if columns[at] in PROSE
    }
    if sum({**natural, **least}.values()) <= spare:
        widths = dict(natural)
        while sum(widths.values()) > spare:
            widest = max(least, key=lambda at: widths[at] - least[at])
            widths[widest] -= 1
        return Layout(tuple(kept), tuple(widths.values()))
    line, used = [kept[0]], natural[kept[0]]
    for at in kept[1:]:
        if columns[at] in PROSE or used + len(GAP) + natural[at] > width:
            continue
        line.append(at)
        used += len(GAP) + natural[at]
    return Layout(tuple(line), tuple(natural[at] for at in line), tuple(at for at in kept if at not in line))


def drawn(
    columns: Sequence[str], cells: Sequence[Sequence[str]], *, title: str | None, width: int, paint: Painter
) -> Iterator[str]:
    """A table's lines."""
    layout = lay_out(columns, cells, width)
    if title is not None:
        yield paint.bold(title)
    heads = [columns[at] for at in layout.line]
    yield paint.bold(_joined(heads, layout.widths))
    yield paint.dim("─" * min(width, sum(layout.widths) + len(GAP) * (len(layout.widths) - 1)))
    for row in cells:
        yield _joined([row[at] for at in layout.line], layout.widths, [columns[at] for at in layout.line], paint)
        yield from _below([(columns[at], row[at]) for at in layout.below], width, paint)


def _joined(
    words: Sequence[str], widths: Sequence[int], columns: Sequence[str] = (), paint: Painter | None = None
) -> str:
    fitted = [_fitted(word, width) for word, width in zip(words, widths, strict=True)]
    if fitted:
        fitted[-1] = fitted[-1].rstrip()
    if paint is not None:
        fitted = [
            paint.state(word) if column in STATE_COLUMNS else word for column, word in zip(columns, fitted, strict=True)
        ]
    return GAP.join(fitted).rstrip()


def _fitted(word: str, width: int) -> str:
    size = cell_len(word)
    if size <= width:
        return word + " " * (width - size)
    return set_cell_size(word, max(width - 1, 0)) + "…"


def _below(pairs: Sequence[tuple[str, str]], width: int, paint: Painter) -> Iterator[str]:
    """The columns that did not fit, filling each line; one that is longer than a line is cut if it is words."""
    line: list[str] = []
    used = 0
    for name, word in pairs:
        if word in ("-", ""):
            continue
        room = width - len(GAP) - len(name) - 1
        text = _fitted(word, room).rstrip() if name in PROSE and cell_len(word) > room > 0 else word
        size = len(GAP) + len(name) + 1 + cell_len(text)
        if line and used + size > width:
            yield "".join(line)
            line, used = [], 0
        line.append(f"{GAP}{paint.dim(name)} {paint.state(text) if name in STATE_COLUMNS else text}")
        used += size
    if line:
        yield "".join(line)
