"""Asks a model about chains, beside their work: its requests go through the queue like any others and are in no chain.

Nothing waits for an answer. It is read from the store when the chain's next hop ends, so it outlives the daemon, and
what the judge costs, limits and budgets included, is that of its agent. A question that cannot be asked is dropped.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

import msgspec
import structlog

from ksi.clock import Clock
from ksi.errors import KsiError, RequestIdConflict
from ksi.events.completions import CompletionData, JsonSchema, ResponseFormat, RetryData
from ksi.host.supervise import Supervised, in_words
from ksi.injection.circuit_breakers import Judgement, prompt_text
from ksi.injection.judge import (
    GUARD,
    SCHEMA,
    SHOWN,
    SYSTEM,
    Digest,
    Hearing,
    Question,
    digest,
    due,
    prompt,
    read_answer,
)
from ksi.request import Priority, RequestBody, decode_body
from ksi.store.base import Store
from ksi.store.chains import Hop, Trail
from ksi.store.values import RequestView

MOST_WANTED = 100
"""Questions that wait to be written down; the oldest is dropped for another."""
ANSWER = 2_000
"""Tokens of an answer, at most: a model may think before it answers."""
TIMEOUT = 60.0
"""Seconds for one attempt."""
LIFETIME = 600.0
"""Seconds in which a question must start."""
ATTEMPTS = 2
_KEY = "judge"

Ask = Callable[[CompletionData], Awaitable[None]]
"""Puts a request into the queue, as a client would."""


class _Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A question to be asked."""

    chain: str
    number: int
    hops: tuple[Hop, ...]
    """The latest ones, the nearest first."""
    latest: Digest
    """The nearest one, whose end may not be written yet."""
    priority: Priority


class _Subject(msgspec.Struct, frozen=True):
    """The hop that a question is about, as the metadata of its request has it."""

    request_id: str
    depth: int


class Judge:
    """Keeps no state but what it is about to ask."""

    def __init__(self, store: Store, model: str, most: int, clock: Clock) -> None:
        """`model` is asked at most `most` times about one chain."""
        self._store = store
        self._model = model
        self._most = most
        self._put: Ask | None = None
        self._wanted: deque[_Wanted] = deque(maxlen=MOST_WANTED)
        self._some = asyncio.Event()
        self.task = Supervised("ksi-judge", self._work, clock)
        self.problem: str | None = None
        """Why the last question could not be asked; None if it was."""
        self._log = structlog.get_logger("ksi.judge")

    def start(self, put: Ask) -> None:
        """Begin to ask."""
        self._put = put
        self.task.start()

    # -- what it said -------------------------------------------------------------------------------------------------

    async def heard(self, trail: Trail) -> Hearing:
        """Everything that was asked about the way to a hop, as far as there are answers."""
        way = {hop.request_id for hop in trail.hops}
        asked, questions = 0, list[Question]()
        for number in range(1, self._most + 1):
            view = await self._store.get(_name(trail.view.chain, number))
            if view is None:
                break
            asked = number
            subject = _subject(view)
            if subject is not None and subject.request_id in way:
                questions.append(_question(view, number, subject.depth))
        return Hearing(most=self._most, asked=asked, questions=tuple(questions))

    # -- asking -------------------------------------------------------------------------------------------------------

    def consider(self, trail: Trail, text: str, judgement: Judgement, hearing: Hearing, priority: Priority) -> None:
        """Ask about a hop that ends now, if it is time; `text` is what it said."""
        own = trail.hops[0]
        if judgement.block is not None or trail.view.spending.tripped is not None:
            return
        if not due(hearing, own.depth, judgement.risk_score):
            return
        self._wanted.append(
            _Wanted(
                chain=trail.view.chain,
                number=hearing.asked + 1,
                hops=trail.hops[:SHOWN],
                latest=digest(_speaker(own), text),
                priority=priority,
            )
        )
        self._some.set()

    async def _work(self) -> None:
        await self._some.wait()
        while self._wanted and self._put is not None:
            wanted = self._wanted.popleft()
            try:
                await self._put(await self._data(wanted))
                self.problem = None
            except RequestIdConflict:
                pass  # another branch of the chain, or another daemon, has asked meanwhile
            except KsiError as error:
                self.problem = f"patterns.judge: {self._model} cannot be asked about chains: {in_words(error)}"
                self._log.warning("the judge could not be asked", chain_id=wanted.chain, reason=in_words(error))
        self._some.clear()

    async def _data(self, wanted: _Wanted) -> CompletionData:
        own = wanted.hops[0]
        return CompletionData(
            request_id=_name(wanted.chain, wanted.number),
            agent_id=GUARD,
            model=self._model,
            system=SYSTEM,
            prompt=prompt(await self._task(wanted), await self._digests(wanted)),
            response_format=ResponseFormat(
                type="json_schema", json_schema=JsonSchema(name="verdict", schema=SCHEMA, strict=True)
            ),
            drop_unsupported=True,
            max_tokens=ANSWER,
            priority=wanted.priority.name.lower(),
            timeout=TIMEOUT,
            ttl=LIFETIME,
            retry=RetryData(max_attempts=ATTEMPTS),
            metadata={_KEY: {"chain_id": wanted.chain, "request_id": own.request_id, "depth": own.depth}},
        )

    async def _task(self, wanted: _Wanted) -> str:
        root = await self._store.get(wanted.chain)
        return "" if root is None else prompt_text(await _body(root))

    async def _digests(self, wanted: _Wanted) -> list[Digest]:
        """The hops' digests, the oldest first."""
        found = [wanted.latest]
        for hop in wanted.hops[1:]:
            view = await self._store.get(hop.request_id)
            if view is not None:
                said = view.answer.text if view.answer is not None else view.message or view.error
                found.append(digest(_speaker(hop), said or ""))
        return found[::-1]


async def _body(view: RequestView) -> RequestBody:
    return await asyncio.to_thread(decode_body, view.body)


def _name(chain: str, number: int) -> str:
    """The request that asks a question: the store lets each number of a chain be used once, by any daemon."""
    return f"{chain}/judge/{number}"


def _speaker(hop: Hop) -> str:
    return hop.agent_id or hop.conversation


def _subject(view: RequestView) -> _Subject | None:
    """The hop that a question is about; None if it is not ours."""
    metadata = decode_body(view.body).metadata
    if view.agent_id != GUARD or metadata is None:
        return None
    try:
        return msgspec.convert(metadata.get(_KEY), _Subject)
    except msgspec.ValidationError:
        return None


def _question(view: RequestView, number: int, depth: int) -> Question:
    said = view.answer.text if view.answer is not None else None
    return Question(
        number=number,
        depth=depth,
        pending=not view.state.final,
        opinion=None if said is None else read_answer(said),
    )
