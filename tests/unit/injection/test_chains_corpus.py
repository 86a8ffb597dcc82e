"""The corpus of chains: that it is whole, and that what is recognised on a part of it does not get worse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.chain_checks import LAST_ROUND, ChainsReport, chain_lines, measure_chains
from benchmarks.corpus import CORPUS, CorpusChain, read_corpus
from ksi.cli import main
from ksi.clock import SystemClock
from ksi.config.schema import Patterns
from ksi.errors import InvalidData
from ksi.testing import SimulatedClock

CHAINS = [chain for chain in read_corpus(CORPUS) if not chain.written]
"""Those that were made by scripts and by a small model."""


def played(chains: list[CorpusChain]) -> ChainsReport:
    return measure_chains(chains, Patterns(), SimulatedClock())


def test_the_corpus_has_the_origin_of_each_chain_and_enough_of_each() -> None:
    assert len({chain.id for chain in CHAINS}) == len(CHAINS)
    assert all(chain.origin for chain in CHAINS)
    assert len([chain for chain in CHAINS if chain.runaway]) > 200
    assert len([chain for chain in CHAINS if chain.runaway is False]) > 200
    for part in ("tune", "held_back"):
        assert 0.4 < len([chain for chain in CHAINS if chain.part == part]) / len(CHAINS) < 0.6
    assert any(chain.id.startswith("local-") for chain in CHAINS)


@pytest.mark.promise("C7")
def test_runaway_chains_are_stopped_and_honest_ones_are_not() -> None:
    report = played(CHAINS[::4])
    astray = [chain for chain in report.chains if chain.runaway]
    stopped = [chain for chain in astray if chain.stopped_at is not None and chain.round != 0]
    assert len(stopped) >= 0.95 * len(astray)
    in_time = [chain for chain in stopped if chain.constructed and (chain.round or 0) <= LAST_ROUND]
    assert len(in_time) >= 0.95 * len([chain for chain in astray if chain.constructed])
    # The labels of a small model's own chains come from comparing letters, and say nothing about what they mean.
    honest = [chain for chain in report.chains if not chain.runaway and not chain.id.startswith("local-")]
    assert len([chain for chain in honest if chain.stopped_at is not None]) <= 0.02 * len(honest)


def test_the_table_has_both_parts_and_every_kind() -> None:
    some = CHAINS[::20]
    report = measure_chains(some, Patterns(), SystemClock())
    found = chain_lines(report)
    assert [line.row for line in found[:6]] == ["tune"] * 3 + ["held_back"] * 3
    assert {chain.kind for chain in some if chain.runaway is not None} <= {line.row for line in found}
    assert all(line.met is not None for line in found if line.target is not None)


def test_without_patterns_nothing_is_stopped() -> None:
    report = measure_chains(CHAINS[::20], Patterns(enabled=False), SimulatedClock())
    assert all(chain.stopped_at is None for chain in report.chains)


def test_a_chain_without_a_label_does_not_count(tmp_path: Path) -> None:
    line = {"id": "x", "kind": "k", "origin": "o", "runaway": None, "hops": [{"speaker": "a", "result": "b"}]}
    (tmp_path / "some.jsonl").write_text(json.dumps(line) + "\n")
    report = played(read_corpus(tmp_path))
    assert (report.chains, report.unclear) == ((), 1)


@pytest.mark.parametrize("text", ["", "{}\n", "no json\n"])
def test_a_corpus_that_cannot_be_read_is_reported(tmp_path: Path, text: str) -> None:
    (tmp_path / "some.jsonl").write_text(text)
    with pytest.raises(InvalidData, match=r"some\.jsonl|no chains"):
        read_corpus(tmp_path)


def test_the_command_prints_a_table_or_json(tmp_path: Path) -> None:
    lines = [json.dumps(json.loads(line)) for line in (CORPUS / "honest.jsonl").read_text("utf-8").splitlines()]
    (tmp_path / "few.jsonl").write_text("\n".join(lines[:3]) + "\n")
    shown = CliRunner().invoke(main, ["--home", str(tmp_path), "bench", "--chains", "--corpus", str(tmp_path)])
    assert shown.exit_code == 0
    assert "false alarms" in shown.output
    told = CliRunner().invoke(main, ["--home", str(tmp_path), "bench", "--chains", "--corpus", str(tmp_path), "--json"])
    assert len(json.loads(told.output)["runs"]["chains"]) == 3
