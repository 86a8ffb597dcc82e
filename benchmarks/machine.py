"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import apsw
import msgspec

from benchmarks.processes import CORES, cores_here


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The machine and what runs on it."""

    processor: str
    cores: int
    cores_used: int
    system: str
    python: str
    sqlite: str
    uvloop: str
    ksi: str
    load: float | None
    """Runnable processes in the last minute, before anything was measured; None where the system does not tell."""

    @property
    def busy(self) -> bool:
        """Whether so much else runs here that rates and times tell of that too."""
        return self.load is not None and self.load > self.cores / 4

    @property
    def text(self) -> str:
        """One line."""
        busy = f"; {self.load:.1f} processes ran before" if self.load is not None and self.busy else ""
        return (
            f"{self.processor}, {self.cores} cores ({self.cores_used} used), {self.system}, Python {self.python}, "
            f"SQLite {self.sqlite}, uvloop {self.uvloop}, KSI {self.ksi}{busy}"
        )


def this_machine() -> Machine:
    """Look around."""
    return Machine(
        processor=_processor(),
        cores=cores_here(),
        cores_used=min(CORES, cores_here()),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        sqlite=apsw.sqlite_lib_version(),
        uvloop=version("uvloop"),
        ksi=version("ksi"),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
