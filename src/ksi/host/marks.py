"""The mark that the processes of agents leave in the environment of all programs that they start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

MARK = "KSI_PROCESS"
"""The variable that a process's descendants inherit: the path of its file in the registry."""


def runs_under(run_dir: Path, environ: Mapping[str, str]) -> bool:
    """True if an agent of the daemon with this `var/run` has started a program with this environment.

    Such a program does not take the owner's token by itself: over the socket it acts for its agent's run.
    """
    mark = environ.get(MARK)
    return mark is not None and Path(mark).is_relative_to(run_dir)
