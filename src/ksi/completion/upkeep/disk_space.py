"""Measures the disk's free room, and refuses new work below a limit so that running requests can end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ksi.clock import Clock, microseconds
from ksi.errors import DiskFull
from ksi.host.private_files import free_bytes

LOW_SPACE = 64 * 1024 * 1024
"""Free bytes below which `system:health` warns."""

LOOK_EVERY = 0.5
"""Seconds for which a look at the disk holds."""

MIB = 1024 * 1024


class DiskSpace:
    """Looks at the disks of the home and of the database, and goes by the fuller one."""

    def __init__(
        self,
        folders: Sequence[Path],
        least: int,
        clock: Clock,
        look: Callable[[Path], int | None] = free_bytes,
    ) -> None:
        """`least`: bytes that must be free for new work; 0 takes it as long as the store does. `look` tells a folder's
        free bytes."""
        self._look = look
        self._folders = folders
        self._least = least
        self._clock = clock
        self._looked: int | None = None
        self._free: int | None = None

    @property
    def free(self) -> int | None:
        """Free bytes; None if unknown."""
        now = self._clock.now().mono
        if self._looked is None or now - self._looked >= microseconds(LOOK_EVERY):
            self._looked = now
            known = [free for free in map(self._look, self._folders) if free is not None]
            self._free = min(known, default=None)
        return self._free

    @property
    def enough(self) -> bool:
        """True while there is room for new work."""
        free = self.free
        return free is None or free >= self._least

    def check(self) -> None:
        """Before new work is taken.

        Raises:
            DiskFull: there is too little room for it.
        """
        free = self.free
        if free is not None and free < self._least:
            raise DiskFull(
                f"only {_told(free)} are free on the disk, and new work needs {_told(self._least)} "
                "(store.min_free_bytes); free some space and send the request again",
                free_bytes=free,
                needed_bytes=self._least,
            )

    def problems(self) -> list[str]:
        """One sentence on a disk that is nearly full."""
        free = self.free
        if free is None or free >= max(LOW_SPACE, self._least):
            return []
        if free < self._least:
            return [
                f"only {_told(free)} are free on the disk of {self._folders[0]}: new work is refused with disk_full "
                f"until {_told(self._least)} are free"
            ]
        return [f"only {_told(free)} are free on the disk of {self._folders[0]}"]


def _told(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // 1024} KiB"
