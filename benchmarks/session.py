"""One whole benchmark: a folder for it, its rows in order, and what they found."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.claude import ClaudePlan, measure_claude
from benchmarks.faults import FaultPlan, measure_faults
from benchmarks.machine import this_machine
from benchmarks.processes import few_cores
from benchmarks.report import Report
from benchmarks.rows import Plan, Rows
from ksi.errors import ConfigError
from ksi.host.private_files import make_folder


def measure(
    plan: Plan,
    parent: Path,
    rows: Sequence[str],
    keep: bool,
    say: Callable[[str], None],
    faults: FaultPlan | None = None,
    claude: tuple[ClaudePlan, Sequence[str]] | None = None,
) -> Report:
    """Measure these rows in a new folder in `parent`, so on its disk; it is removed afterwards unless `keep` is set.

    With `faults`, what a provider's death costs is measured after them; with `claude`, which has the program's command,
    what a turn of Claude Code costs.

    Raises:
        ConfigError: no folder can be made there, or there is no Claude Code.
        InternalError: a daemon did not start or failed, or the load generator did.
    """
    report = Report(machine=this_machine(), plan=plan)
    try:
        make_folder(parent)
        folder = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
    except OSError as error:
        raise ConfigError(
            f"{parent} cannot be used: {error.strerror}; make it writable or choose another home", place=str(parent)
        ) from None
    try:
        with few_cores():
            bench = Rows(plan, folder, say)
            for row in rows:
                setattr(report, row, getattr(bench, row)())
            if faults is not None:
                report.fault_plan, report.faults = faults, measure_faults(faults, folder, say)
            if claude is not None:
                report.claude_plan, report.claude = claude[0], measure_claude(*claude, folder, say)
    finally:
        if keep:
            say(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return report
