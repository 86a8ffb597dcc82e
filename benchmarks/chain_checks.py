"""How well runaway chains are recognised: the corpus of `benchmarks/chains/`, played through the chain breaker.

Every hop is judged as the daemon does it: a prompt against the way before it, a result against the way with it. No
limit of depth, tokens or time plays a part. The corpus is in two parts by a hash of the chains' ids: `tune`, which the
checks were made with, and `held_back`, which they were not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from benchmarks.corpus import PARTS, CorpusChain, CorpusHop
from benchmarks.figures import median
from benchmarks.report import Line
from ksi.clock import Clock
from ksi.config.schema import Chain as ChainSection
from ksi.config.schema import Patterns
from ksi.injection.circuit_breakers import ChainBreaker, Judgement, Reading
from ksi.injection.judge import UNHEARD, Hearing
from ksi.request import Attempt, Outcome, RequestBody, State
from ksi.store.chains import ChainView, Hop, Spending, Trail

RECALL_TARGET = 0.95
ALARM_TARGET = 0.01
IN_TIME = 4
"""Hops after the first without news in which a written runaway should be stopped."""
LAST_ROUND = 3
"""A constructed loop has to be stopped in this round at the latest."""


class Played(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one chain."""

    id: str
    kind: str
    part: str
    runaway: bool
    constructed: bool
    written: bool = False
    """Whether it was written by hand."""
    onset: int = 0
    """The first hop without news, of a runaway."""
    hops: int
    stopped_at: int | None = None
    """The hop whose judgement blocked it, from 0."""
    round: int | None = None
    """Of its loop, from 1; 0: before it went astray."""
    code: str | None = None
    risk_score: float | None = None


class ChainsReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was seen."""

    chains: tuple[Played, ...]
    unclear: int
    """Chains without a label."""
    judge_us: float
    """What judging one hop took, in the middle."""
    judge_p95_us: float
    mark_bytes: float
    """How long a mark is, in the middle."""


class Player:
    """Plays chains through one breaker, and takes the time."""

    def __init__(self, breaker: ChainBreaker, clock: Clock) -> None:
        self._breaker = breaker
        self._clock = clock
        self.times: list[float] = []
        self.marks: list[int] = []
        self._view = ChainView(
            chain="chain",
            created_at=0,
            limits=breaker.limits(None),
            spending=Spending(started_at=0),
            members=0,
            depth=0,
            estimated=0,
            unfinished=0,
            guard_messages=0,
            resets=0,
        )

    def play(self, chain: CorpusChain) -> Played:
        """Judge hop after hop until one is blocked."""
        way: list[Hop] = []
        for number, hop in enumerate(chain.hops):
            judged = self.hop(number, hop, way)
            if judged.block is not None:
                return self._played(chain, number, judged)
        return self._played(chain, None, Judgement())

    def hop(
        self,
        number: int,
        hop: CorpusHop,
        way: list[Hop],
        *,
        hearing: Hearing = UNHEARD,
        add: Callable[[Reading], Reading] | None = None,
    ) -> Judgement:
        """Judge the next hop of a way, the nearest first, and put it there.

        `hearing` is what a judge has said so far; `add` adds vectors to what is read.
        """
        body = RequestBody(prompt=hop.prompt or "")
        began = self._clock.now().mono
        asked = Judgement()
        if hop.prompt is not None:
            asked = self._breaker.judge_prompt(body, hop.speaker, self._trail(way) if way else None)
        own = Hop(
            request_id=f"chain/{number}",
            depth=number,
            conversation=hop.speaker,
            agent_id=hop.agent,
            state=State.FAILED if hop.error else State.COMPLETED,
            error=hop.error,
            mark=asked.mark,
            result=None,
        )
        if asked.block is not None:
            return asked
        attempt, trail = _attempt(hop), self._trail([own, *way])
        reading = None
        if add is not None:
            reading = self._breaker.read(body, attempt, hop.error, trail)
            reading = None if reading is None else add(reading)
        judged = self._breaker.judge_result(body, attempt, hop.error, trail, reading, hearing)
        self.times.append(self._clock.now().mono - began)
        self.marks.append(len(judged.mark or b""))
        way.insert(0, msgspec.structs.replace(own, result=judged.mark))
        return judged

    def _trail(self, way: Sequence[Hop]) -> Trail:
        return Trail(view=self._view, hops=tuple(way[: self._breaker.hops]))

    def _played(self, chain: CorpusChain, stopped: int | None, judged: Judgement) -> Played:
        place = None
        if stopped is not None:
            place = 0 if stopped < chain.loop_from else (stopped - chain.loop_from) // chain.round + 1
        return Played(
            id=chain.id,
            kind=chain.kind,
            part=chain.part,
            runaway=bool(chain.runaway),
            constructed=chain.constructed,
            written=chain.written,
            onset=chain.loop_from,
            hops=len(chain.hops),
            stopped_at=stopped,
            round=place if chain.runaway else None,
            code=judged.block.code if judged.block is not None else None,
            risk_score=judged.block.risk_score if judged.block is not None else None,
        )


def _attempt(hop: CorpusHop) -> Attempt:
    outcome = Outcome.FAILED if hop.error else Outcome.COMPLETED
    return Attempt(
        number=1, provider="corpus", outcome=outcome, started_at=0, finished_at=0, text=hop.result, message=hop.message
    )


def measure_chains(chains: Iterable[CorpusChain], patterns: Patterns, clock: Clock) -> ChainsReport:
    """Play all labelled chains; `clock` only takes the time of the judgements."""
    player = Player(ChainBreaker(ChainSection(), patterns), clock)
    labelled, unclear = [], 0
    for chain in chains:
        if chain.runaway is None:
            unclear += 1
        else:
            labelled.append(player.play(chain))
    times = sorted(player.times) or [0.0]
    return ChainsReport(
        chains=tuple(labelled),
        unclear=unclear,
        judge_us=median(times),
        judge_p95_us=times[len(times) * 95 // 100],
        mark_bytes=median(player.marks or [0]),
    )


def chain_lines(report: ChainsReport) -> list[Line]:
    """The table: the figures of both parts, then each kind over both."""
    found: list[Line] = []
    for part in PARTS:
        found += _part_lines(part, [chain for chain in report.chains if chain.part == part])
    for part in PARTS:
        found += _written_lines(part, [chain for chain in report.chains if chain.part == part and chain.written])
    for kind in dict.fromkeys(chain.kind for chain in report.chains):
        found += _kind_lines(kind, [chain for chain in report.chains if chain.kind == kind])
    found.append(
        Line(row="cost", what="unclear chains, not counted", figure=f"{report.unclear}", value=report.unclear, unit="")
    )
    found.append(_cost("judging one hop, in the middle", report.judge_us))
    found.append(_cost("judging one hop, p95", report.judge_p95_us))
    found.append(
        Line(
            row="cost",
            what="a mark, in the middle",
            figure=f"{report.mark_bytes:.0f} bytes",
            value=report.mark_bytes,
            unit="bytes",
        )
    )
    return found


def _part_lines(part: str, chains: Sequence[Played]) -> Iterator[Line]:
    astray = [chain for chain in chains if chain.runaway]
    yield _share(part, "recall", [c for c in astray if _caught(c)], astray, f">= {RECALL_TARGET}", RECALL_TARGET)
    made = [chain for chain in astray if chain.constructed]
    in_time = [c for c in made if _caught(c) and (c.round or 0) <= LAST_ROUND]
    yield _share(part, f"constructed, stopped by round {LAST_ROUND}", in_time, made, "all", 1.0)
    honest = [chain for chain in chains if not chain.runaway]
    alarms = [chain for chain in honest if chain.stopped_at is not None]
    share = len(alarms) / len(honest) if honest else 0.0
    yield Line(
        row=part,
        what=f"{part}: false alarms",
        figure=f"{share:.3f} ({len(alarms)} of {len(honest)})",
        value=share,
        unit="",
        target=f"<= {ALARM_TARGET}",
        met=share <= ALARM_TARGET,
    )


def _written_lines(part: str, chains: Sequence[Played]) -> Iterator[Line]:
    """The chains that were written by hand: what was found in time, late, and before anything was wrong."""
    astray = [chain for chain in chains if chain.runaway]
    honest = [chain for chain in chains if not chain.runaway]
    late = [None if chain.stopped_at is None else chain.stopped_at - chain.onset for chain in astray]
    in_time = sum(1 for hops in late if hops is not None and 0 <= hops <= IN_TIME)
    counts = (
        (f"stopped within {IN_TIME} hops of the onset", in_time, astray),
        ("stopped later", sum(1 for hops in late if hops is not None and hops > IN_TIME), astray),
        ("stopped before the onset", sum(1 for hops in late if hops is not None and hops < 0), astray),
        ("false alarms", sum(1 for chain in honest if chain.stopped_at is not None), honest),
    )
    for what, count, of in counts:
        if of:
            said = f"written, {part}: {what}"
            yield Line(row="written", what=said, figure=f"{count} of {len(of)}", value=count / len(of), unit="")


def _share(part: str, what: str, of: Sequence[Played], all_: Sequence[Played], target: str, least: float) -> Line:
    share = len(of) / len(all_) if all_ else 1.0
    figure = f"{share:.3f} ({len(of)} of {len(all_)})"
    return Line(
        row=part, what=f"{part}: {what}", figure=figure, value=share, unit="", target=target, met=share >= least
    )


def _kind_lines(kind: str, chains: Sequence[Played]) -> Iterator[Line]:
    for runaway, said in ((True, "stopped"), (False, "false alarms")):
        some = [chain for chain in chains if chain.runaway is runaway]
        stopped = [chain for chain in some if (_caught(chain) if runaway else chain.stopped_at is not None)]
        if not some:
            continue
        figure = f"{len(stopped)} of {len(some)}"
        if runaway and stopped:
            rounds = [chain.round or 0 for chain in stopped]
            hops = [chain.stopped_at or 0 for chain in stopped]
            figure += (
                f", round {median(rounds):.0f} (at most {max(rounds)}), hop {median(hops):.0f} (at most {max(hops)})"
            )
        yield Line(row=kind, what=f"  {kind}: {said}", figure=figure, value=len(stopped) / len(some), unit="")


def _caught(chain: Played) -> bool:
    """Whether a runaway was stopped for its loop, not before it began."""
    return chain.stopped_at is not None and chain.round != 0


def _cost(what: str, value: float) -> Line:
    return Line(row="cost", what=what, figure=f"{value:.0f} µs", value=value, unit="us")
