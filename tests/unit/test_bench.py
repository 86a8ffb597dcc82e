"""The benchmark's own arithmetic: percentiles, lines of requests, counted results, and the table."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from benchmarks import command as bench
from benchmarks import load, report
from benchmarks.faults import FaultPlan, FaultRun
from benchmarks.figures import Latency, Rate, Times, median, percentile
from benchmarks.life import Life, Span
from benchmarks.load import LoadError, Requests, ResultCounter, Target
from benchmarks.machine import this_machine
from benchmarks.rows import BarePair, BudgetPair, FairPair, Memory, Pair, Plan, RoutePair
from ksi.cli import bench as door
from ksi.cli import main
from ksi.events.completions import CompletionData
from ksi.protocol import convert, decode_envelope, encode_reply


def rate(per_second: float, daemon_us: float | None = 100.0) -> Rate:
    count = int(per_second)
    cpu = None if daemon_us is None else count * daemon_us / 1e6
    return Rate(completions=count, seconds=1.0, submitted=count, seen=count, daemon_cpu=cpu, load_cpu=count * 1e-5)


def latency(p50: float, p99: float) -> Latency:
    return Latency(loop=Times(p50, p99, 9), commit=Times(0.2, 1.0, 9), sync=Times(0.1, 0.5, 9), daemon_us=300.0)


def whole_report(**parts: object) -> report.Report:
    return report.Report(machine=this_machine(), plan=Plan(), **parts)  # type: ignore[arg-type]


def target(conversations: int | None = 3, turns: int | None = 2) -> Target:
    return Target(
        socket="", pid=1, model="stub/echo", mark="m", sessions="talk", conversations=conversations, turns=turns
    )


def sessions(requests: Requests, count: int) -> list[str]:
    return [str(decode_envelope(requests.line()).data["session_id"]) for _ in range(count)]


@pytest.mark.parametrize(
    ("percent", "value"), [(0, 1), (1, 1), (10, 1), (11, 2), (50, 5), (51, 6), (99, 10), (100, 10)]
)
def test_a_percentile_is_the_nearest_rank(percent: float, value: float) -> None:
    assert percentile([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], percent) == value


def test_a_percentile_of_one_value_is_that_value() -> None:
    assert {percentile([7.0], percent) for percent in (0, 50, 99, 100)} == {7.0}


def test_a_median_is_the_middle_or_the_mean_of_the_two_in_the_middle() -> None:
    assert median([3, 1, 2]) == 2
    assert median([4, 1, 2, 3]) == 2.5


def test_times_are_milliseconds() -> None:
    assert Times.of([1_000_000, 2_000_000, 3_000_000]) == Times(2.0, 3.0, 3)


def test_cpu_is_given_for_one_completion_and_not_guessed() -> None:
    assert rate(200, daemon_us=150.0).daemon_us == pytest.approx(150.0)
    assert rate(200, daemon_us=None).daemon_us is None


def test_a_line_is_an_event_that_the_daemon_takes_without_a_warning() -> None:
    line = Requests(target(), "completion:async").line()
    assert line.endswith(b"\n")
    envelope = decode_envelope(line)
    assert envelope.event == "completion:async"
    assert envelope.data.keys() <= {f.name for f in msgspec.structs.fields(CompletionData)}
    assert convert(envelope.data, CompletionData).model == "stub/echo"


def test_ids_never_come_twice() -> None:
    requests = Requests(target(), "completion:async")
    ids = [decode_envelope(line).data["request_id"] for line in requests.lines(50).splitlines()]
    assert len(set(ids)) == 50


def test_so_many_conversations_are_in_play_and_each_ends_after_its_turns() -> None:
    names = sessions(Requests(target(conversations=3, turns=2), "completion:async"), 60)
    for begin in range(0, 60, 3):
        assert len(set(names[begin : begin + 3])) == 3
    turns = Counter(names)
    begun_before_or_ended_after = 6
    assert max(turns.values()) == 2
    assert sum(1 for count in turns.values() if count < 2) <= begun_before_or_ended_after


def test_conversations_without_end_are_the_same_ones() -> None:
    names = sessions(Requests(target(conversations=3, turns=None), "completion:async"), 30)
    assert set(names) == {"talk-0", "talk-1", "talk-2"}


def test_each_request_has_a_conversation_of_its_own_if_asked_for() -> None:
    names = sessions(Requests(target(conversations=None), "completion:async"), 30)
    assert len(set(names)) == 30


@pytest.mark.parametrize("size", [1, 7, 28, 29, 1000])
def test_results_are_counted_however_the_stream_is_cut(size: int) -> None:
    stream = b"".join(
        encode_reply(name, {"request_id": f"r{number}"}, None, 1.5)
        for number in range(20)
        for name in ("completion:async", "completion:result", "conversation:unlocked")
    )
    counter = ResultCounter()
    assert sum(counter.feed(stream[at : at + size]) for at in range(0, len(stream), size)) == 20


def test_an_error_ends_the_run() -> None:
    counter = ResultCounter()
    with pytest.raises(LoadError, match="queue_full"):
        counter.feed(b'{"event":"completion:async","error":{"code":"queue_full"}}\n')


def test_a_job_survives_its_way_to_the_other_process() -> None:
    job = load.Flow(target=target(), window=4, warm_up=0.1, seconds=0.2)
    assert msgspec.json.decode(msgspec.json.encode(job), type=load.Job) == job


def test_the_target_is_that_of_durability_full_alone() -> None:
    found = report.lines(
        whole_report(
            throughput={"full": [rate(4_999)], "normal": [rate(4_999)]},
            latency={"full": [latency(9, 9)], "normal": [latency(9, 9)]},
        )
    )
    assert [line.met for line in found if line.unit == "1/s"] == [False, None]
    assert [line.met for line in found if line.what.startswith("one at a time")] == [False, False, None, None]


def test_a_rate_is_the_median_of_its_runs() -> None:
    found = report.lines(whole_report(throughput={"full": [rate(9_000), rate(1), rate(6_000)]}))
    assert found[0].value == 6_000
    assert found[0].met


@pytest.mark.parametrize(("p50", "p99", "met"), [(0.7, 5.0, [True, True]), (0.71, 5.01, [False, False])])
def test_latency_is_measured_against_two_commits_of_this_disk(p50: float, p99: float, met: list[bool]) -> None:
    found = report.lines(whole_report(latency={"full": [latency(p50, p99)]}))
    assert [line.met for line in found if line.target is not None] == met


def test_a_ratio_is_the_median_of_runs_side_by_side() -> None:
    # By the medians of the rates it would be 100/100.
    pairs = [Pair(rate(100), rate(80)), Pair(rate(1_000), rate(100)), Pair(rate(10), rate(9))]
    found = report.lines(whole_report(depth={"few": pairs}))
    ratio = next(line for line in found if line.target is not None)
    assert ratio.value == pytest.approx(0.8)
    assert ratio.met


@pytest.mark.promise("Q8")
def test_the_daemon_is_measured_against_the_bare_core_run_by_run() -> None:
    runs = [(100, 40), (1_000, 600), (10, 7)]
    pairs = [BarePair(rate(bare), latency(1, 2), rate(daemon), latency(0.9, 2)) for bare, daemon in runs]
    found = report.lines(whole_report(yardstick=pairs))
    ratio, p50 = (line for line in found if line.target is not None)
    assert ratio.figure == "0.60 (0.40 to 0.70)"
    assert ratio.met
    assert p50.met


def test_values_that_the_system_does_not_report_are_left_out() -> None:
    found = report.lines(whole_report(throughput={"full": [rate(1, daemon_us=None)]}))
    assert [line.unit for line in found] == ["1/s"]


def test_every_row_has_its_lines() -> None:
    pair = RoutePair(rate(10), latency(1, 2), rate(9), latency(1, 2))
    found = report.lines(
        whole_report(
            throughput={"full": [rate(1)]},
            yardstick=[BarePair(rate(10), latency(1, 2), rate(4), latency(2, 3))],
            latency={"full": [latency(1, 2)]},
            depth={"few": [Pair(rate(2), rate(1))], "own": [Pair(rate(2), rate(1))]},
            routes=[pair],
            budgets=[BudgetPair(rate(10), latency(1, 2), rate(9), latency(1, 2))],
            fairness=[FairPair(arrival=rate(10), turns=rate(9))],
            memory=Memory(1_000_000, 2_000_000, 3_000_000, 4_000_000),
            life=Life(start=[Span(2, 1)], recovery=[Span(0.9, 0.5)], help=[Span(0.1, 0.1)], status=[Span(0.2, 0.1)]),
        )
    )
    assert list(dict.fromkeys(line.row for line in found)) == list(bench.ROWS)
    assert next(line.figure for line in found if line.row == "memory") == "1 MB"


@pytest.mark.parametrize(
    ("calls", "lost", "met"), [(FaultPlan().bound, 0, [True, True]), (FaultPlan().bound + 1, 1, [False, False])]
)
def test_a_provider_s_death_may_cost_so_many_calls_and_no_answer(calls: int, lost: int, met: list[bool]) -> None:
    times = Times(1.0, 2.0, 3)
    run = FaultRun(
        way="hangs",
        before=times,
        dead=times,
        met=times,
        after=times,
        calls_in_vain=calls,
        probes_in_vain=2,
        left_alone_after=0.5,
        spare_share=1.0,
        used_again_after=0.1,
        not_completed=lost,
    )
    found = report.lines(whole_report(fault_plan=FaultPlan(), faults=[run]))
    assert [line.met for line in found if line.target is not None] == met


def test_the_table_shows_figures_with_targets(capsys: pytest.CaptureFixture[str]) -> None:
    bench.show(whole_report(throughput={"full": [rate(4_000)], "normal": [rate(8_000)]}), as_json=False)
    shown = capsys.readouterr().out
    assert "SQLite" in shown
    full = next(line for line in shown.splitlines() if "4,000/s" in line)
    assert ">= 5,000/s" in full
    assert "MISSED" in full


def test_json_has_the_lines_and_every_run(capsys: pytest.CaptureFixture[str]) -> None:
    bench.show(whole_report(throughput={"full": [rate(4_000), rate(5_000)]}), as_json=True)
    told = msgspec.json.decode(capsys.readouterr().out)
    assert told["lines"][0]["value"] == 4_500
    assert len(told["runs"]["throughput"]["full"]) == 2


def test_a_row_that_is_not_there_is_refused() -> None:
    outcome = CliRunner().invoke(bench.command, ["--only", "nothing"])
    assert outcome.exit_code == 2
    assert "throughput" in outcome.output


@pytest.mark.parametrize(
    ("given", "rows", "faults"),
    [
        ([], list(bench.ROWS), False),
        (["--faults"], [], True),
        (["--only", "latency"], ["latency"], False),
        (["--only", "latency", "--faults"], ["latency"], True),
    ],
)
def test_faults_are_measured_when_asked_for_and_then_alone(
    given: list[str], rows: list[str], faults: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[list[str], bool]] = []

    def measure(
        plan: Plan,
        parent: Path,
        rows: list[str],
        keep: bool,
        say: Callable[[str], None],
        faults: FaultPlan | None = None,
        claude: object = None,
    ) -> report.Report:
        assert claude is None
        measured.append((rows, faults is not None))
        return whole_report()

    monkeypatch.setattr("benchmarks.session.measure", measure)
    outcome = CliRunner().invoke(main, ["--home", str(tmp_path), "bench", *given])
    assert outcome.exit_code == 0, outcome.output
    assert measured == [(rows, faults)]


def test_an_installed_package_names_the_place_of_the_benchmarks(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(door.load(tmp_path), ["--only", "latency", "--runs", "2"])
    assert outcome.exit_code == 2
    assert "./ksi bench" in outcome.output


def test_the_package_has_no_benchmarks() -> None:
    project = tomllib.loads((door.CHECKOUT / "pyproject.toml").read_text("utf-8"))
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["src/ksi"]
    assert door.load(door.CHECKOUT) is bench.command
