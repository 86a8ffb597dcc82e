"""The chain breaker: limits a request's demands on its chain, and finds runaway chains."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ksi.clock import microseconds
from ksi.config.schema import Chain, Patterns
from ksi.content.blocks import size_of, text_of
from ksi.errors import FailureClass
from ksi.injection.fingerprint import mark_failure, mark_text, read_mark, with_sentences
from ksi.injection.judge import JUDGE, UNHEARD, Hearing, Opinion, Verdict, weighed
from ksi.injection.meaning.features import Result
from ksi.injection.meaning.model import NO_PROGRESS, Weights, judge, learned
from ksi.injection.meaning.sentence import Sentence
from ksi.injection.meaning.sentences import Piece, read_sentences
from ksi.injection.patterns import Finding, Step, Suspicion, assess
from ksi.request import Attempt, ChainConfig, PatternsConfig, RequestBody, State
from ksi.store.chains import Block, ChainLimits, Hop, Membership, Trail
from ksi.tokens import CHARACTERS_PER_TOKEN

FIRST_JUDGED = 1
"""The pattern checks begin at this depth, which is a chain's second hop."""

WARNED = 0.5
"""The share of the threshold from which the chain's agents are told."""
SURE = 0.85
"""The weight of a finding on the surface, such as a loop word by word, from which no judge is asked first."""

BESIDE = 8
"""This many concurrent requests without `max_tokens` fit into a chain's whole budget ..."""
LEAST_OUTPUT = 1_024
"""... unless it is so small that their answers would be cut too short."""


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """The judgement of the pattern checks at one moment of a chain."""

    risk_score: float = 0.0
    """0..1."""
    evidence: tuple[str, ...] = ()
    """In words, the weightiest first."""
    block: Block | None = None
    """Set if the score is at or over the threshold: the chain is to be tripped."""
    mark: bytes | None = None
    """The text's mark for later hops."""
    code: str | None = None
    """Of the weightiest finding."""
    warning: str | None = None
    """What to tell where the score is at half the threshold or more, and below it."""

    @property
    def to_be_shown(self) -> bool:
        """Whether sentences are wanted that show what it says."""
        return self.code == NO_PROGRESS and (self.block is not None or self.warning is not None)

    def showing(self, quotes: Sequence[str]) -> Judgement:
        """The same with sentences that show it, as further evidence."""
        evidence = (*self.evidence, *quotes)
        block = None if self.block is None else msgspec.structs.replace(self.block, evidence=evidence)
        return msgspec.structs.replace(self, evidence=evidence, block=block)


class Reading(msgspec.Struct, frozen=True):
    """What an ended request says, sentence by sentence."""

    said: tuple[Piece, ...]
    """Its result, or why there is none."""
    task: tuple[Piece, ...] = ()
    """Its prompt, where it begins a chain."""


class ChainBreaker:
    """Knows the daemon's maxima and how patterns are judged; no state."""

    def __init__(self, chain: Chain, patterns: Patterns, weights: Weights | None = None) -> None:
        """`weights` defaults to those of the package."""
        self._chain = chain
        self._patterns = patterns
        self._weights = weights or learned()
        self._maxima = ChainLimits(
            max_depth=chain.max_depth,
            token_budget=chain.token_budget,
            time_window=microseconds(chain.time_window),
        )

    @property
    def hops(self) -> int:
        """How many hops of a trail the judgements use: the `limit` to read it with."""
        return self._patterns.hops

    def limits(self, config: ChainConfig | None) -> ChainLimits:
        """Return a request's limits, capped by the daemon's maxima. Without own limits, only the maxima hold."""
        if config is None:
            return self._maxima
        asked = ChainLimits(
            max_depth=config.max_depth,
            token_budget=config.token_budget,
            time_window=microseconds(config.time_window),
        )
        return asked.within(self._maxima)

    def membership(self, body: RequestBody, conversation: str, trail: Trail | None = None) -> Membership | None:
        """The membership of a client's request; None if it has no parent, no limits, no injection.

        `trail` is its parent's, if it names a parent in a chain: its prompt is then judged against it.
        """
        config = body.circuit_breaker_config
        injects = injects_result(body)
        if config is None and not injects:
            return None
        judged = self.judge_prompt(body, conversation, trail)
        return Membership(
            limits=self.limits(config),
            parent=config.parent_request_id if config is not None else None,
            injects=injects,
            estimate=estimate(body),
            output_cap=self.output_cap(body),
            block=judged.block,
            trips=judged.block is not None,
            mark=judged.mark,
            risk_score=judged.risk_score,
        )

    def child(self, body: RequestBody, parent: str, *, guard: bool = False) -> Membership:
        """How the request of a direct delivery belongs to its parent's chain. Its text is judged as the parent's
        result, so its prompt leaves no mark."""
        return Membership(
            limits=self.limits(body.circuit_breaker_config),
            parent=parent,
            injects=not guard and injects_result(body),
            estimate=estimate(body),
            output_cap=self.output_cap(body),
            guard=guard,
        )

    def output_cap(self, body: RequestBody) -> int:
        """Return the largest number of output tokens that a member of a chain asks for.

        One that names no `max_tokens` gets a share of its budget, so that several can run concurrently.
        """
        if body.max_tokens:
            return body.max_tokens
        share = self.limits(body.circuit_breaker_config).token_budget // BESIDE
        return min(self._chain.max_output, max(share, LEAST_OUTPUT))

    def judge_prompt(self, body: RequestBody, conversation: str, trail: Trail | None) -> Judgement:
        """A new request's prompt against the way of its parent."""
        if not self._enabled(body.patterns):
            return Judgement()
        mark = mark_text(prompt_text(body))
        if trail is None:
            return Judgement(mark=mark)
        steps = [*_steps(trail), Step(speaker=conversation, prompt=mark, result=None)]
        return self._judged(assess(steps), body.patterns, mark)

    def read(self, body: RequestBody, attempt: Attempt | None, error: str | None, trail: Trail) -> Reading | None:
        """The sentences of an ended request's result, and of its prompt where it begins a chain; None where they are
        not looked at. One that somebody cancelled says nothing about its chain."""
        if not self._enabled(body.patterns) or error == FailureClass.CANCELLED or not trail.hops:
            return None
        said = (attempt.text if error is None else attempt.message) if attempt is not None else None
        begins = trail.hops[0].depth == 0
        return Reading(
            said=tuple(read_sentences(said or "")),
            task=tuple(read_sentences(prompt_text(body))) if begins else (),
        )

    def judge_result(
        self,
        body: RequestBody,
        attempt: Attempt | None,
        error: str | None,
        trail: Trail,
        reading: Reading | None = None,
        hearing: Hearing = UNHEARD,
    ) -> Judgement:
        """An ended request's result, or failure, against its own way; `trail` begins with the request itself.

        `reading` is what `read` said, if it was read before; `hearing` is what the judge was asked so far.
        """
        reading = reading or self.read(body, attempt, error, trail)
        if reading is None:
            return Judgement()
        if error is None and attempt is not None:
            mark = mark_text(attempt.text or "")
        else:
            mark = mark_failure(error or "failed", (attempt.message if attempt is not None else None) or "")
        mark = with_sentences(mark, _sentences(reading.said), _sentences(reading.task))
        own, *before = trail.hops
        ended = msgspec.structs.replace(own, result=mark)
        if own.depth < FIRST_JUDGED:
            return Judgement(mark=mark)
        way = msgspec.structs.replace(trail, hops=(ended, *before))
        return self._judged(self._assessed(way), body.patterns, mark, hearing, own.depth)

    def _assessed(self, trail: Trail) -> Suspicion:
        """The findings on the surface of the results and on their sentences."""
        seen = judge(self._weights, *_meanings(trail))
        suspicion = assess(_steps(trail))
        if seen is None:
            return suspicion
        findings = (*suspicion.findings, Finding(NO_PROGRESS, seen.weight, seen.words))
        return Suspicion(tuple(sorted(findings, key=lambda finding: -finding.weight)))

    def _enabled(self, wish: PatternsConfig | None) -> bool:
        return self._patterns.enabled if wish is None or wish.enabled is None else wish.enabled

    def _judged(
        self,
        suspicion: Suspicion,
        wish: PatternsConfig | None,
        mark: bytes,
        hearing: Hearing = UNHEARD,
        depth: int = 0,
    ) -> Judgement:
        ignored = wish.ignore if wish is not None else ()
        findings = [f for f in suspicion.findings if f.code not in ignored]
        words = [] if JUDGE in ignored else hearing.words(depth)
        score = combined(findings)
        sure = any(f.weight >= SURE and f.code != NO_PROGRESS for f in findings)
        if not sure:
            score = weighed(score, words)
        findings = _with_words(findings, words)
        evidence = tuple(f.words for f in findings)
        threshold = wish.threshold if wish is not None and wish.threshold is not None else self._patterns.threshold
        over = bool(findings) and score >= threshold
        held = over and not sure and not words and JUDGE not in ignored and hearing.may_hold(depth)
        block = None
        if over and not held:
            block = Block(code=findings[0].code, message=findings[0].words, risk_score=score, evidence=evidence)
        warned = bool(findings) and block is None and score >= WARNED * threshold
        return Judgement(
            risk_score=score,
            evidence=evidence,
            block=block,
            mark=mark,
            code=findings[0].code if findings else None,
            warning=findings[0].words if warned else None,
        )


def _with_words(findings: Sequence[Finding], words: Sequence[Opinion]) -> list[Finding]:
    """The findings with what the judge said against the chain, behind those of the checks that weigh more."""
    astray = [word for word in words if word.verdict is Verdict.ASTRAY]
    if not astray:
        return list(findings)
    weight = weighed(0.0, astray)
    said = Finding(JUDGE, weight, f"the judge says that the chain has gone astray: {astray[-1].reason}")
    return sorted((*findings, said), key=lambda finding: -finding.weight)


def combined(findings: list[Finding]) -> float:
    """One score for all: each finding takes its share of the rest that the others left of 1."""
    left = 1.0
    for finding in findings:
        left *= 1.0 - finding.weight
    return round(1.0 - left, 3)


def injects_result(body: RequestBody) -> bool:
    """True if a request's end has to be routed to conversations."""
    return body.injection_config is not None and body.injection_config.enabled


def prompt_text(body: RequestBody) -> str:
    """A request's prompt, or its last message."""
    return text_of(body.dialogue()[-1].content)


def estimate(body: RequestBody) -> int:
    """A request's input in tokens: its system text and messages; the history is not known here."""
    said = size_of(body.system or "") + sum(size_of(message.content) for message in body.dialogue())
    return -(-said // CHARACTERS_PER_TOKEN)


def _steps(trail: Trail) -> list[Step]:
    """A trail as the detectors read it, the oldest first."""
    return [_step(hop) for hop in reversed(trail.hops)]


def _step(hop: Hop) -> Step:
    result = hop.result
    if result is None and hop.state is State.FAILED:
        result = mark_failure(hop.error or "failed", "")
    return Step(speaker=hop.conversation, agent=hop.agent_id, prompt=hop.mark, result=result)


def _meanings(trail: Trail) -> tuple[tuple[Sentence, ...], list[Result]]:
    """The task's sentences, and those of each result, the oldest first."""
    task: tuple[Sentence, ...] = ()
    results: list[Result] = []
    for hop in reversed(trail.hops):
        mark = read_mark(hop.result)
        if mark is not None and mark.task:
            task = mark.task
        if mark is not None and mark.said:
            results.append(Result(hop.agent_id or hop.conversation, mark.said, mark.error is not None))
    return task, results


def _sentences(pieces: Sequence[Piece]) -> tuple[Sentence, ...]:
    return tuple(piece.sentence for piece in pieces)
