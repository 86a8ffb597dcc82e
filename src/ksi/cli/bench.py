"""`ksi bench`: measure this machine, and print what was measured beside the targets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ksi.cli.settings import Settings, json_option, pass_settings

if TYPE_CHECKING:
    from ksi.benchmarking.report import Report

ROWS = ("throughput", "latency", "depth", "routes", "memory")


@click.command(
    epilog="""\b
Examples:
  ksi bench --quick
  ksi bench --only depth --depth 100000
  ksi bench --faults
  ksi bench --claude
  ksi bench --json > bench.json
"""
)
@click.option("--quick", is_flag=True, help="Shorter runs and a shorter queue: a minute or two in all.")
@click.option("--seconds", type=click.FloatRange(min=0.1), help="Of each run, its warm-up not counted.")
@click.option("--runs", type=click.IntRange(min=1), help="Of each kind; their medians are shown.")
@click.option("--depth", type=click.IntRange(min=1_000), metavar="N", help="Requests in the long queue (1,000,000).")
@click.option("--only", "rows", multiple=True, type=click.Choice(ROWS), help="This row; can be given again.")
@click.option("--faults", is_flag=True, help="What it costs that a provider dies under load; this alone, a minute.")
@click.option("--claude", is_flag=True, help="What a turn of Claude Code costs over its endpoint; a minute.")
@click.option("--keep", is_flag=True, help="Keep the daemons' homes, with their logs and databases.")
@json_option
@pass_settings
def command(
    settings: Settings,
    quick: bool,
    seconds: float | None,
    runs: int | None,
    depth: int | None,
    rows: tuple[str, ...],
    faults: bool,
    claude: bool,
    keep: bool,
    as_json: bool,
) -> None:
    """Measure KSI on this machine: completions per second, added latency, long queues, memory, or a provider's death.

    It starts daemons of its own, on homes of their own below this home's var/, with the stub provider that answers at
    once; your daemon and its data are left alone. All takes about six minutes and 1.5 GB of disk; --quick a minute or
    two.
    """
    import msgspec

    from ksi.benchmarking import claude as turns
    from ksi.benchmarking import faults as faulty
    from ksi.benchmarking.rows import QUICK, Plan
    from ksi.benchmarking.session import measure
    from ksi.cli.render import note

    given = {"seconds": seconds, "runs": runs, "depth": depth}
    plan = msgspec.structs.replace(
        QUICK if quick else Plan(), **{name: value for name, value in given.items() if value is not None}
    )
    wanted = [row for row in ROWS if row in rows or not (rows or faults or claude)]
    deaths = (faulty.QUICK if quick else faulty.FaultPlan()) if faults else None
    talk = turns.QUICK if quick else turns.ClaudePlan()
    talks = (msgspec.structs.replace(talk, runs=runs or talk.runs), _claude_command(settings)) if claude else None
    report = measure(plan, settings.config.path("var"), wanted, keep, note, deaths, talks)
    show(report, as_json=as_json)


def _claude_command(settings: Settings) -> list[str]:
    """Claude Code as this home runs it."""
    kinds = (entry for entry in settings.config.providers.values() if entry.kind == "claude-cli")
    entry = next(kinds, None)
    return list(entry.options.get("command", ["claude"])) if entry is not None else ["claude"]


def show(report: Report, *, as_json: bool) -> None:
    """Print a report: a table for people, one object for programs."""
    from ksi.benchmarking.report import lines
    from ksi.cli.render import json_line, table

    found = lines(report)
    if as_json:
        json_line({"lines": found, "runs": report})
        return
    click.echo(report.machine.text)
    words = {True: "met", False: "MISSED", None: ""}
    table(
        ("", "figure", "target", ""),
        [(line.what, line.figure, line.target or "", words[line.met]) for line in found],
    )
