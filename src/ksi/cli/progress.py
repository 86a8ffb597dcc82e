"""How far something is, on one line of a terminal's stderr that is written over; elsewhere on lines of its own."""

from __future__ import annotations

import os
import sys

from ksi.cli.render import duration, note, progress

FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
BAR = 20
"""Cells of a bar."""


def bar(share: float, size: int = BAR) -> str:
    """A bar of `size` cells that is filled so far."""
    filled = round(min(max(share, 0.0), 1.0) * size)
    return "█" * filled + "░" * (size - filled)


class LiveLine:
    """A line that changes in its place, if stderr is a terminal that can do that."""

    def __init__(self) -> None:
        self.on = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._frame = 0
        self._shown = False

    def show(self, words: str, *, seconds: float | None = None, share: float | None = None) -> None:
        """Say how it stands: after so many seconds, or done so far."""
        if not self.on:
            return
        self._frame += 1
        self._shown = True
        head = FRAMES[self._frame % len(FRAMES)] if share is None else bar(share)
        passed = "" if seconds is None else f" {duration(float(int(seconds)))}"
        progress(f"{head}{passed} {words}")

    def clear(self) -> None:
        """Take it away, so that something else can be said."""
        if self._shown:
            self._shown = False
            progress("")

    def say(self, words: str) -> None:
        """Say something that stays."""
        self.clear()
        note(words)
