"""Makes spans of ended requests, outside their way: a request is noted at its end, and read from the store later."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import Protocol

import structlog

from ksi.clock import Clock
from ksi.completion.trace.context import TraceContext, attempt_span, parse, request_span, trace_id
from ksi.completion.trace.spans import SpanRecord, span_of_delivery, spans_of
from ksi.config.schema import Traces as TraceConfig
from ksi.errors import StoreError
from ksi.host.supervise import Periodic
from ksi.store.base import Store
from ksi.store.chains import InjectionView

MOST_KEPT = 10_000
"""Requests whose client's span is remembered; and ends that wait to be read."""

BATCH = 100
"""Ends that are read in one step, so that the queue's work comes in between."""

PAUSE = 1.0
"""Seconds between two looks at ended requests."""


class Sink(Protocol):
    """Sends spans on."""

    problem: str | None
    """Why that does not work now, in a sentence."""

    def __call__(self, records: Sequence[SpanRecord]) -> None:
        """Send these, by and by."""
        ...

    async def close(self) -> None:
        """Send the rest, for a limited time."""
        ...


class Traces:
    """The places of requests in traces, and the spans of ended ones.

    A client's `traceparent` is kept in memory: a request that outlives its daemon continues in a trace of its own,
    which every daemon names alike.
    """

    def __init__(self, store: Store, config: TraceConfig, kinds: Mapping[str, str], sink: Sink, clock: Clock) -> None:
        """`kinds` are the kinds of providers by their names."""
        self._store = store
        self._config = config
        self._kinds = kinds
        self._sink = sink
        self._asked: OrderedDict[str, TraceContext] = OrderedDict()
        """The clients' contexts, by request."""
        self._ended: deque[str] = deque(maxlen=MOST_KEPT)
        self._deliveries: deque[InjectionView] = deque(maxlen=MOST_KEPT)
        self._log = structlog.get_logger("ksi.traces")
        self.task = Periodic("ksi-traces", self._step, PAUSE, clock)

    def asked(self, request_id: str, traceparent: str | None) -> None:
        """A client sent a request from within this span of its own; an invalid `traceparent` counts as none."""
        context = parse(traceparent)
        if context is None:
            return
        self._asked[request_id] = context
        if len(self._asked) > MOST_KEPT:
            self._asked.popitem(last=False)

    def place(self, request_id: str, chain: str | None) -> TraceContext:
        """A request's own span."""
        above = self._asked.get(request_id) or self._asked.get(chain or "")
        if above is not None:
            return TraceContext(above.trace_id, request_span(request_id), above.sampled)
        trace = trace_id(chain or request_id)
        return TraceContext(trace, request_span(request_id), self._chosen(trace))

    def of_attempt(self, request_id: str, chain: str | None, number: int) -> str:
        """The `traceparent` that an attempt hands on to its provider."""
        place = self.place(request_id, chain)
        return TraceContext(place.trace_id, attempt_span(request_id, number), place.sampled).header

    def _chosen(self, trace: str) -> bool:
        """True if a trace without a client's decision is sent, the same for all of its spans at every daemon."""
        return int(trace[-14:], 16) < self._config.sample * 16**14

    def ended(self, request_id: str) -> None:
        """A request reached its final state."""
        self._ended.append(request_id)

    def delivered(self, view: InjectionView) -> None:
        """A delivery reached its end."""
        self._deliveries.append(view)

    @property
    def problem(self) -> str | None:
        """Why spans are lost now, in a sentence."""
        return self._sink.problem

    async def stop(self) -> None:
        """Send the rest, as long as the store can be read."""
        await self.task.stop()
        try:
            while self._ended or self._deliveries:
                await self._step()
        except StoreError as error:
            self._log.warning("the last traces are lost", error=error.message)
        await self._sink.close()

    async def _step(self) -> None:
        """Make spans of the requests that ended since the last step. Requests that the store cannot read now are read
        again later."""
        for _ in range(min(BATCH, len(self._deliveries))):
            view = self._deliveries.popleft()
            place = self.place(view.parent, view.chain)
            if place.sampled:
                self._sink([span_of_delivery(view, place.trace_id)])
        for _ in range(min(BATCH, len(self._ended))):
            await self._send(self._ended[0])
            self._ended.popleft()
        if self._ended or self._deliveries:
            self.task.hurry()

    async def _send(self, request_id: str) -> None:
        view = await self._store.get(request_id)
        if view is None:
            return  # it was deleted meanwhile
        place = self.place(request_id, view.chain)
        if not place.sampled:
            return
        parent = self._asked.pop(request_id, None) if view.chain != request_id else self._asked.get(request_id)
        if parent is None and view.parent is not None:
            parent = TraceContext(place.trace_id, request_span(view.parent))
        self._sink(spans_of(view, place, parent, self._kinds, content=self._config.content))
