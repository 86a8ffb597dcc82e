"""The chain breaker: what a request may want of its chain, and whether the chain has gone astray (C5, C6, C7)."""

from __future__ import annotations

import msgspec

from ksi.clock import microseconds
from ksi.config import Chain, Patterns
from ksi.errors import FailureClass
from ksi.injection.fingerprint import mark_failure, mark_text
from ksi.injection.patterns import Finding, Step, Suspicion, assess
from ksi.request import Attempt, ChainConfig, PatternsConfig, RequestBody, State
from ksi.store.chains import CHARS_PER_TOKEN, Block, ChainLimits, Hop, Membership, Trail

FIRST_JUDGED = 1
"""The depth from which patterns are looked for: a chain's second hop (C7)."""

BESIDE = 8
"""So many requests without `max_tokens` fit beside each other into a chain's whole budget ..."""
LEAST_OUTPUT = 1_024
"""... unless it is so small that their answers would be cut too short."""


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """What the pattern checks say at one moment of a chain."""

    risk_score: float = 0.0
    """0..1."""
    evidence: tuple[str, ...] = ()
    """In words, the weightiest first."""
    block: Block | None = None
    """Set where the score is at or over the threshold: the chain is to be tripped."""
    mark: bytes | None = None
    """What the text leaves for later hops."""


class ChainBreaker:
    """Knows the daemon's maxima and how patterns are judged; no state."""

    def __init__(self, chain: Chain, patterns: Patterns) -> None:
        self._chain = chain
        self._patterns = patterns
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
        """A request's limits within the daemon's maxima; without a wish only these bind (C5)."""
        if config is None:
            return self._maxima
        asked = ChainLimits(
            max_depth=config.max_depth,
            token_budget=config.token_budget,
            time_window=microseconds(config.time_window),
        )
        return asked.within(self._maxima)

    def membership(self, body: RequestBody, conversation: str, trail: Trail | None = None) -> Membership | None:
        """How a request that a client sent belongs to a chain; None where it has no parent, no limits, no injection.

        `trail` is its parent's, where it names a parent that is in a chain: its prompt is then judged against it.
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
        )

    def child(self, body: RequestBody, parent: str, *, guard: bool = False) -> Membership:
        """How the request of a direct delivery belongs to its parent's chain. What it says is judged as the parent's
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
        """The most output tokens that a member of a chain wants (C6).

        One that names no `max_tokens` gets a share of its budget, so that several can run beside each other.
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

    def judge_result(self, body: RequestBody, attempt: Attempt | None, error: str | None, trail: Trail) -> Judgement:
        """An ended request's result, or failure, against its own way; `trail` begins with the request itself.

        One that somebody cancelled says nothing about its chain.
        """
        if not self._enabled(body.patterns) or error == FailureClass.CANCELLED:
            return Judgement()
        if error is None and attempt is not None:
            mark = mark_text(attempt.text or "")
        else:
            mark = mark_failure(error or "failed", (attempt.message if attempt is not None else None) or "")
        own, *before = trail.hops
        ended = msgspec.structs.replace(own, result=mark)
        if own.depth < FIRST_JUDGED:
            return Judgement(mark=mark)
        steps = _steps(msgspec.structs.replace(trail, hops=(ended, *before)))
        return self._judged(assess(steps), body.patterns, mark)

    def _enabled(self, wish: PatternsConfig | None) -> bool:
        return self._patterns.enabled if wish is None or wish.enabled is None else wish.enabled

    def _judged(self, suspicion: Suspicion, wish: PatternsConfig | None, mark: bytes) -> Judgement:
        findings = [f for f in suspicion.findings if wish is None or f.code not in wish.ignore]
        score = combined(findings)
        evidence = tuple(f.words for f in findings)
        threshold = wish.threshold if wish is not None and wish.threshold is not None else self._patterns.threshold
        block = None
        if findings and score >= threshold:
            block = Block(code=findings[0].code, message=findings[0].words, risk_score=score, evidence=evidence)
        return Judgement(risk_score=score, evidence=evidence, block=block, mark=mark)


def combined(findings: list[Finding]) -> float:
    """One score for all: each finding takes its share of what the others left of 1."""
    left = 1.0
    for finding in findings:
        left *= 1.0 - finding.weight
    return round(1.0 - left, 3)


def injects_result(body: RequestBody) -> bool:
    """Whether a request's end has to be routed to conversations."""
    return body.injection_config is not None and body.injection_config.enabled


def prompt_text(body: RequestBody) -> str:
    """What a request asks: its prompt, or its last message."""
    return body.messages[-1].content if body.messages else body.prompt or ""


def estimate(body: RequestBody) -> int:
    """A request's input in tokens: its system text and messages; of the history nothing is known here."""
    said = len(body.system or "") + sum(len(message.content) for message in body.dialogue())
    return -(-said // CHARS_PER_TOKEN)


def _steps(trail: Trail) -> list[Step]:
    """A trail as the detectors read it, the oldest first."""
    return [_step(hop) for hop in reversed(trail.hops)]


def _step(hop: Hop) -> Step:
    result = hop.result
    if result is None and hop.state is State.FAILED:
        result = mark_failure(hop.error or "failed", "")
    return Step(speaker=hop.conversation, agent=hop.agent_id, prompt=hop.mark, result=result)
