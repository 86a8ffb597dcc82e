"""`ksi bench`: measure this machine, and print what was measured beside the targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import click

from ksi.cli.settings import Settings, json_option, pass_settings

if TYPE_CHECKING:
    from benchmarks.machine import Machine
    from benchmarks.report import Line, Report


class Measured(Protocol):
    """A report of any kind."""

    @property
    def machine(self) -> Machine:
        """Where it was measured."""
        ...


ROWS = ("throughput", "yardstick", "latency", "depth", "routes", "budgets", "fairness", "memory", "life")


@click.command(
    epilog="""\b
Examples:
  ksi bench --quick
  ksi bench --only yardstick --runs 5
  ksi bench --only depth --depth 100000
  ksi bench --faults
  ksi bench --claude
  ksi bench --chains
  ksi bench --versions
  ksi bench --http
  ksi bench --page
  ksi bench --store redis://localhost
  ksi bench --json > bench.json
"""
)
@click.option("--quick", is_flag=True, help="Shorter runs and a shorter queue: a minute or two in all.")
@click.option("--seconds", type=click.FloatRange(min=0.1), help="The length of each run, its warm-up not counted.")
@click.option("--runs", type=click.IntRange(min=1), help="The number of runs of each kind; their medians are shown.")
@click.option("--depth", type=click.IntRange(min=1_000), metavar="N", help="Requests in the long queue (1,000,000).")
@click.option("--only", "rows", multiple=True, type=click.Choice(ROWS), help="Measure this row; it can be given again.")
@click.option("--faults", is_flag=True, help="Measure the cost of a provider's death under load; this alone, a minute.")
@click.option("--claude", is_flag=True, help="Measure the cost of a turn of Claude Code over its endpoint; a minute.")
@click.option(
    "--chains", is_flag=True, help="Measure how well runaway chains are recognised, on the corpus; this alone."
)
@click.option("--versions", is_flag=True, help="Measure the cost of version 2 over version 1; this alone, a minute.")
@click.option(
    "--http", is_flag=True, help="Measure the cost of a call by HTTP over its endpoint; this alone, two minutes."
)
@click.option(
    "--page", is_flag=True, help="Measure the cost of an open page for a loaded daemon; this alone, two minutes."
)
@click.option(
    "--corpus",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The folder of chains for --chains (the checkout's benchmarks/chains).",
)
@click.option("--store", metavar="URL", help="Measure one, two and three daemons on this server; this alone, a minute.")
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
    chains: bool,
    versions: bool,
    http: bool,
    page: bool,
    corpus: Path | None,
    store: str | None,
    keep: bool,
    as_json: bool,
) -> None:
    """Measure KSI on this machine: completions per second, added latency, long queues, memory, or a provider's death.

    It starts daemons of its own, on homes of their own below this home's var/, with the stub provider that answers at
    once; your daemon and its data are left alone. All takes about six minutes and 1.5 GB of disk; --quick a minute or
    two. With --chains nothing is started: a corpus of chains is judged, and how fast does not matter.
    """
    if chains:
        _chains(settings, corpus, as_json=as_json)
        return
    if versions:
        _versions(settings, quick=quick, seconds=seconds, runs=runs, as_json=as_json)
        return
    if http:
        _http(settings, quick=quick, seconds=seconds, runs=runs, as_json=as_json)
        return
    if page:
        _page(settings, quick=quick, seconds=seconds, runs=runs, as_json=as_json)
        return
    if store is not None:
        _shared(settings, store, quick=quick, seconds=seconds, runs=runs, as_json=as_json)
        return
    import msgspec

    from benchmarks import claude as turns
    from benchmarks import faults as faulty
    from benchmarks.rows import QUICK, Plan
    from benchmarks.session import measure
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


def _chains(settings: Settings, corpus: Path | None, *, as_json: bool) -> None:
    """Judge the corpus with this home's settings of patterns."""
    from benchmarks.chain_checks import chain_lines, measure_chains
    from benchmarks.corpus import CORPUS, read_corpus
    from ksi.cli.render import json_line
    from ksi.clock import SystemClock

    report = measure_chains(read_corpus(corpus or CORPUS), settings.config.patterns, SystemClock())
    found = chain_lines(report)
    if as_json:
        json_line({"lines": found, "runs": report})
    else:
        _print(found)


def _versions(settings: Settings, *, quick: bool, seconds: float | None, runs: int | None, as_json: bool) -> None:
    """Version 2 beside version 1."""
    import msgspec

    from benchmarks import versions
    from ksi.cli.render import note

    plan = versions.QUICK if quick else versions.VersionsPlan()
    plan = msgspec.structs.replace(plan, seconds=seconds or plan.seconds, runs=runs or plan.runs)
    report = versions.measure_versions(plan, settings.config.path("var"), note)
    _show(report, versions.version_lines(report), as_json=as_json)


def _http(settings: Settings, *, quick: bool, seconds: float | None, runs: int | None, as_json: bool) -> None:
    """Calls by HTTP beside the endpoint itself."""
    import msgspec

    from benchmarks import http
    from ksi.cli.render import note

    plan = http.QUICK if quick else http.HttpPlan()
    plan = msgspec.structs.replace(plan, seconds=seconds or plan.seconds, runs=runs or plan.runs)
    report = http.measure_http(plan, settings.config.path("var"), note)
    _show(report, list(http.http_lines(report)), as_json=as_json)


def _page(settings: Settings, *, quick: bool, seconds: float | None, runs: int | None, as_json: bool) -> None:
    """The daemon's load without and with an open page."""
    import msgspec

    from benchmarks import page
    from ksi.cli.render import note

    plan = page.QUICK if quick else page.PagePlan()
    plan = msgspec.structs.replace(plan, seconds=seconds or plan.seconds, runs=runs or plan.runs)
    report = page.measure_page(plan, settings.config.path("var"), note)
    _show(report, list(page.page_lines(report)), as_json=as_json)


def _shared(
    settings: Settings, url: str, *, quick: bool, seconds: float | None, runs: int | None, as_json: bool
) -> None:
    """Several daemons on one server."""
    import msgspec

    from benchmarks import shared
    from ksi.cli.render import note

    plan = shared.QUICK if quick else shared.SharedPlan()
    plan = msgspec.structs.replace(plan, seconds=seconds or plan.seconds, runs=runs or plan.runs)
    report = shared.measure_shared(url, plan, settings.config.path("var"), note)
    _show(report, shared.shared_lines(report), as_json=as_json)


def _claude_command(settings: Settings) -> list[str]:
    """Claude Code as this home runs it."""
    kinds = (entry for entry in settings.config.providers.values() if entry.kind == "claude-cli")
    entry = next(kinds, None)
    return list(entry.options.get("command", ["claude"])) if entry is not None else ["claude"]


def show(report: Report, *, as_json: bool) -> None:
    """Print a report: a table for people, one object for programs."""
    from benchmarks.report import lines

    _show(report, lines(report), as_json=as_json)


def _show(report: Measured, found: Sequence[Line], *, as_json: bool) -> None:
    from ksi.cli.render import json_line

    if as_json:
        json_line({"lines": found, "runs": report})
        return
    click.echo(report.machine.text)
    _print(found)


def _print(found: Sequence[Line]) -> None:
    from ksi.cli.render import table

    words = {True: "met", False: "MISSED", None: ""}
    table(
        ("", "figure", "target", ""),
        [(line.what, line.figure, line.target or "", words[line.met]) for line in found],
    )
