"""Sends spans on by OpenTelemetry's own exporter (OTLP over HTTP, protobuf), in a thread of its own.

The packages are an extra: they are loaded if an endpoint is configured.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import structlog

from ksi.completion.trace.spans import SpanRecord
from ksi.config.schema import Traces
from ksi.errors import ConfigError

NANOSECONDS = 1_000
"""In a microsecond."""

PATH = "/v1/traces"

WAIT_AT_END = 5.0
"""Seconds that the last spans get at the daemon's end."""


class OtlpSink:
    """Sends spans; those that the endpoint does not accept are reported in `problem`, and lost."""

    def __init__(self, config: Traces, version: str) -> None:
        """Raises:
        ConfigError: the packages are not there, or the endpoint is none.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http import Compression
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
        except ImportError as error:
            raise ConfigError(
                f"traces.endpoint: a package for traces is missing ({error.name}); install ksi[otel], or in a "
                "checkout `.venv/bin/pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http`",
                place="traces.endpoint",
            ) from None
        if not config.endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"traces.endpoint: {config.endpoint!r} is no address such as http://127.0.0.1:4318",
                place="traces.endpoint",
            )
        url = config.endpoint.rstrip("/")
        url = url if url.endswith(PATH) else url + PATH
        self.problem: str | None = None
        """Why the endpoint does not take them now, in a sentence."""
        self._log = structlog.get_logger("ksi.traces")
        # The library's own messages are reported once, by `problem`.
        quiet = logging.getLogger("opentelemetry")
        quiet.propagate = False
        if not quiet.handlers:
            quiet.addHandler(logging.NullHandler())
        sink = self

        class Told(SpanExporter):
            """Exports, and notes how that went."""

            def __init__(self) -> None:
                self._inner = OTLPSpanExporter(endpoint=url, compression=Compression.Gzip)

            def export(self, spans: Sequence[Any]) -> SpanExportResult:
                result = self._inner.export(spans)
                sink.note(None if result is SpanExportResult.SUCCESS else f"traces are lost: {url} does not take them")
                return result

            def shutdown(self) -> None:
                stop: Any = self._inner.shutdown  # it has no types
                stop()

        self._processor = BatchSpanProcessor(Told(), schedule_delay_millis=1_000)
        self._resource = Resource.create({"service.name": config.service_name, "service.version": version})

    def note(self, problem: str | None) -> None:
        """How the last delivery went; called from the exporter's thread."""
        if problem is not None and self.problem is None:
            self._log.warning("traces are not taken", problem=problem)
        self.problem = problem

    def __call__(self, records: Sequence[SpanRecord]) -> None:
        """Send these on, by and by."""
        for record in records:
            self._processor.on_end(self._span(record))

    def _span(self, record: SpanRecord) -> Any:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

        def context(span_id: str, *, remote: bool) -> SpanContext:
            flags = TraceFlags(TraceFlags.SAMPLED)
            return SpanContext(int(record.trace_id, 16), int(span_id, 16), is_remote=remote, trace_flags=flags)

        attributes = dict(record.attributes)
        if record.error is not None:
            attributes["error.type"] = record.error
        return ReadableSpan(
            name=record.name,
            context=context(record.span_id, remote=False),
            parent=None if record.parent is None else context(record.parent, remote=record.remote_parent),
            resource=self._resource,
            attributes=attributes,
            kind=SpanKind[record.kind.upper()],
            status=Status() if record.error is None else Status(StatusCode.ERROR, record.message or record.error),
            start_time=record.start * NANOSECONDS,
            end_time=record.end * NANOSECONDS,
            instrumentation_scope=InstrumentationScope("ksi"),
        )

    async def close(self) -> None:
        """Send the rest, for a limited time."""
        try:
            async with asyncio.timeout(WAIT_AT_END):
                await asyncio.to_thread(self._processor.force_flush, int(WAIT_AT_END * 1000))
        except TimeoutError:
            self._log.warning("the last traces were not taken in time")
        await asyncio.to_thread(self._processor.shutdown)
