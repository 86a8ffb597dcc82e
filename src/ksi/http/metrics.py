"""`GET /metrics`: the daemon's figures for Prometheus and compatible readers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Set
from typing import Any, Literal

import msgspec
from aiohttp import web

from ksi.completion.notify.injection_events import InjectionEvents
from ksi.completion.usage.tallies import TOKEN_KINDS, Tallies, Times
from ksi.events.reports import HealthReply, ProviderReport, ReadyReply
from ksi.http.guard import require
from ksi.http.tokens import Scope
from ksi.request import FINAL_STATES, Priority, State
from ksi.store.values import StoreCondition, Totals


class Family(msgspec.Struct, frozen=True):
    """One metric: its name, kind, description, and labels."""

    name: str
    kind: Literal["counter", "gauge", "histogram", "summary"]
    help: str
    labels: tuple[str, ...] = ()


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("ksi_build_info", "gauge", "Always 1; the labels identify version and store.", ("version", "store")),
        Family("ksi_start_time_seconds", "gauge", "When the daemon started, Unix time."),
        Family("ksi_ready", "gauge", "1 while the daemon serves."),
        Family("ksi_problems", "gauge", "Problems that `ksi health` tells of."),
        Family("ksi_task_well", "gauge", "1 while a long-lived task works, 0 while it fails.", ("task",)),
        Family("ksi_connections", "gauge", "Clients connected to the Unix socket."),
        Family("ksi_memory_bytes", "gauge", "The daemon's resident memory."),
        Family("ksi_queue_requests", "gauge", "Requests that have not ended, by state.", ("state",)),
        Family("ksi_queue_limit", "gauge", "Waiting requests at which new ones are refused."),
        Family(
            "ksi_queue_waiting_requests",
            "gauge",
            "Requests that wait, by priority. Absent if the store cannot count them.",
            ("priority",),
        ),
        Family("ksi_queue_ready_requests", "gauge", "Requests that could run now, by route, up to 1,000.", ("route",)),
        Family("ksi_requests_total", "counter", "Requests that ever ended in this store, by final state.", ("state",)),
        Family(
            "ksi_wait_seconds",
            "histogram",
            "From a request's arrival to its first start, by priority; without scheduled delays.",
            ("priority",),
        ),
        Family("ksi_running_requests", "gauge", "Requests that run at this daemon, by provider.", ("provider",)),
        Family(
            "ksi_attempts_total",
            "counter",
            "Attempts that ended; `error` is the failure class, empty for an answer.",
            ("provider", "model", "outcome", "error"),
        ),
        Family("ksi_run_seconds", "histogram", "How long attempts took.", ("provider",)),
        Family("ksi_first_token_seconds", "histogram", "Until the first piece of an answer came.", ("provider",)),
        Family(
            "ksi_tokens_total", "counter", "Tokens as reported by providers, by kind.", ("provider", "model", "kind")
        ),
        Family("ksi_cost_usd_total", "counter", "US dollars, as reported or by price.", ("provider", "model")),
        Family(
            "ksi_unpriced_attempts_total",
            "counter",
            "Attempts with a report of usage and an unknown price.",
            ("provider", "model"),
        ),
        Family("ksi_unreported_answers_total", "counter", "Answers without a report of usage.", ("provider", "model")),
        Family(
            "ksi_provider_breaker",
            "gauge",
            "1 for the state that the provider's breaker is in.",
            ("provider", "state"),
        ),
        Family("ksi_provider_enabled", "gauge", "1 unless an operator disabled it.", ("provider",)),
        Family("ksi_provider_slots", "gauge", "Calls that may run at once.", ("provider",)),
        Family(
            "ksi_provider_limits",
            "gauge",
            "Limits that keep a provider, or models of it, from being asked, by cause.",
            ("provider", "cause"),
        ),
        Family(
            "ksi_provider_limited_until_seconds",
            "gauge",
            "Unix time until which the provider's longest limit holds; +Inf if only a login ends it.",
            ("provider",),
        ),
        Family("ksi_paused", "gauge", "Things that an operator paused, by kind.", ("scope",)),
        Family("ksi_draining", "gauge", "1 while the daemon takes nothing new."),
        Family("ksi_conversations", "gauge", "Conversations that are kept."),
        Family("ksi_locks", "gauge", "Conversations that are held, by who holds them.", ("holder",)),
        Family("ksi_lock_waiters", "gauge", "Outside holders that wait for a lock."),
        Family("ksi_lock_lapses_total", "counter", "Outside locks, and waits for one, whose time ran out."),
        Family(
            "ksi_chain_blocks_total",
            "counter",
            "Requests and deliveries that a chain's limit stopped, by the reason.",
            ("code",),
        ),
        Family("ksi_deliveries_total", "counter", "Deliveries of results, by the state they came to.", ("state",)),
        Family("ksi_store_bytes", "gauge", "The store's local files, if it has any.", ("file",)),
        Family(
            "ksi_store_commit_seconds",
            "summary",
            "Transactions of the store, or calls of its server: how many, and the time that they took.",
        ),
        Family("ksi_loop_lag_seconds", "summary", "How late the event loop answered; asked some 20 times a second."),
        Family("ksi_loop_stalls_total", "counter", "Times for which the event loop was held for 0.15 s and more."),
        Family("ksi_loop_longest_stall_seconds", "gauge", "The longest of them since the start."),
        Family("ksi_disk_free_bytes", "gauge", "Room on the fullest of the disks that are written to."),
        Family("ksi_log_dropped_lines_total", "counter", "Lines that the daemon's log could not take."),
        Family("ksi_response_files", "gauge", "Files of answers."),
        Family("ksi_response_files_bytes", "gauge", "Their size."),
    )
}
"""Every metric, in order. The reference and the files in `deploy/` are compared with it."""


class Gathered(msgspec.Struct, frozen=True, kw_only=True):
    """The data of one scrape, at one moment."""

    version: str
    store: str
    max_queued: int
    started_at: float
    health: HealthReply
    ready: ReadyReply
    totals: Totals
    waiting: Mapping[Priority, int] | None
    routes: Mapping[str, int]
    providers: Mapping[str, ProviderReport]
    running: Mapping[str, int]
    paused: Mapping[str, int]
    draining: bool
    lapses: int
    condition: StoreCondition
    lag: tuple[int, float]


Sample = tuple[Mapping[str, str], float]


class Metrics:
    """Exposes the gathered and counted figures under the metrics' names."""

    def __init__(self, tallies: Tallies, injections: InjectionEvents) -> None:
        self._tallies = tallies
        self._injections = injections

    def families(self, seen: Gathered) -> Iterator[tuple[Family, Any]]:
        """Each metric with its values: samples; for times, by label, the buckets and the sum; for a summary, the count
        and the sum."""
        for name, told in {**self._state(seen), **self._counted()}.items():
            yield FAMILIES[name], told

    def _state(self, seen: Gathered) -> dict[str, Any]:
        health, totals = seen.health, seen.totals
        found: dict[str, Any] = {
            "ksi_build_info": _one(1, version=seen.version, store=seen.store),
            "ksi_start_time_seconds": _one(seen.started_at),
            "ksi_ready": _one(seen.ready.ready),
            "ksi_problems": _one(len(health.problems)),
            "ksi_task_well": [({"task": task}, float(well)) for task, well in seen.ready.tasks.items()],
            "ksi_connections": _one(health.connections),
            "ksi_queue_requests": _by_state(totals, set(State) - FINAL_STATES),
            "ksi_queue_limit": _one(seen.max_queued),
            "ksi_queue_ready_requests": [
                ({"route": route}, float(count)) for route, count in seen.routes.items() if count
            ],
            "ksi_requests_total": _by_state(totals, FINAL_STATES),
            "ksi_running_requests": [({"provider": name}, float(seen.running.get(name, 0))) for name in seen.providers],
            "ksi_paused": [({"scope": scope}, float(count)) for scope, count in seen.paused.items()],
            "ksi_draining": _one(seen.draining),
            "ksi_conversations": _one(totals.conversations),
            "ksi_locks": [
                ({"holder": "request"}, float(totals.locks - totals.external_locks)),
                ({"holder": "external"}, float(totals.external_locks)),
            ],
            "ksi_lock_waiters": _one(totals.external_waiters),
            "ksi_lock_lapses_total": _one(seen.lapses),
            "ksi_loop_lag_seconds": seen.lag,
            "ksi_loop_stalls_total": _one(health.loop.stalls),
            "ksi_loop_longest_stall_seconds": _one(health.loop.longest_stall),
        }
        if seen.waiting is not None:
            found["ksi_queue_waiting_requests"] = [
                ({"priority": priority.name.lower()}, float(seen.waiting.get(priority, 0))) for priority in Priority
            ]
        if seen.condition.commits is not None:
            found["ksi_store_commit_seconds"] = (seen.condition.commits, seen.condition.commit_seconds)
        found |= self._sizes(seen) | self._providers(seen)
        return found

    def _sizes(self, seen: Gathered) -> dict[str, Any]:
        """Figures that not every daemon has, or knows."""
        health = seen.health
        files = {"database": seen.condition.database_bytes, "log": seen.condition.log_bytes}
        known = {
            "ksi_memory_bytes": health.memory_bytes,
            "ksi_disk_free_bytes": None if health.disk is None else health.disk.free_bytes,
            "ksi_log_dropped_lines_total": health.log.dropped,
            "ksi_response_files": None if health.responses is None else health.responses.files,
            "ksi_response_files_bytes": None if health.responses is None else health.responses.bytes,
        }
        found: dict[str, Any] = {name: _one(value) for name, value in known.items() if value is not None}
        found["ksi_store_bytes"] = [({"file": name}, float(size)) for name, size in files.items() if size is not None]
        return found

    def _providers(self, seen: Gathered) -> dict[str, Any]:
        breakers: list[Sample] = []
        limits: list[Sample] = []
        until: list[Sample] = []
        for name, report in seen.providers.items():
            for state in ("closed", "open", "half_open"):
                breakers.append(({"provider": name, "state": state}, float(report.breaker == state)))
            causes: dict[str, int] = {}
            for limit in report.limits:
                causes[limit.cause] = causes.get(limit.cause, 0) + 1
            limits += [({"provider": name, "cause": cause}, float(count)) for cause, count in causes.items()]
            ends = [float("inf") if limit.until is None else limit.until for limit in report.limits]
            if ends:
                until.append(({"provider": name}, max(ends)))
        return {
            "ksi_provider_breaker": breakers,
            "ksi_provider_enabled": [({"provider": n}, float(r.enabled)) for n, r in seen.providers.items()],
            "ksi_provider_slots": [({"provider": n}, float(r.max_concurrency)) for n, r in seen.providers.items()],
            "ksi_provider_limits": limits,
            "ksi_provider_limited_until_seconds": until,
        }

    def _counted(self) -> dict[str, Any]:
        tallies = self._tallies
        tokens: list[Sample] = []
        costs: list[Sample] = []
        unpriced: list[Sample] = []
        unreported: list[Sample] = []
        for (provider, model), tally in tallies.models.items():
            labels = {"provider": provider, "model": model}
            tokens += [
                ({**labels, "kind": kind}, float(count)) for kind, count in zip(TOKEN_KINDS, tally.tokens, strict=True)
            ]
            costs.append((labels, tally.cost))
            unpriced.append((labels, float(tally.unpriced)))
            unreported.append((labels, float(tally.unreported)))
        return {
            "ksi_attempts_total": [
                ({"provider": provider, "model": model, "outcome": outcome, "error": error}, float(count))
                for (provider, model, outcome, error), count in tallies.attempts.items()
            ],
            "ksi_tokens_total": tokens,
            "ksi_cost_usd_total": costs,
            "ksi_unpriced_attempts_total": unpriced,
            "ksi_unreported_answers_total": unreported,
            "ksi_chain_blocks_total": [({"code": code}, float(n)) for code, n in self._injections.blocks.items()],
            "ksi_deliveries_total": [({"state": state}, float(n)) for state, n in self._injections.deliveries.items()],
            "ksi_wait_seconds": _in_buckets(tallies.waits),
            "ksi_run_seconds": _in_buckets(tallies.runs),
            "ksi_first_token_seconds": _in_buckets(tallies.first_tokens),
        }


def _in_buckets(times: Mapping[str, Times]) -> dict[str, tuple[list[tuple[str, float]], float]]:
    return {label: (of.buckets(), of.sum) for label, of in times.items()}


def _by_state(totals: Totals, states: Set[State]) -> list[Sample]:
    return [({"state": state.value}, float(getattr(totals, state.value))) for state in State if state in states]


def _one(value: float, **labels: str) -> list[Sample]:
    return [(labels, float(value))]


def rendered(families: Iterable[tuple[Family, Any]], accept: str) -> tuple[bytes, str]:
    """The metrics in the form that a reader accepts, and that form's content type."""
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
        SummaryMetricFamily,
    )
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.registry import Collector, CollectorRegistry

    made: list[Metric] = []
    for family, told in families:
        match family.kind:
            case "counter":
                counter = CounterMetricFamily(family.name, family.help, labels=family.labels)
                for labels, value in told:
                    counter.add_metric([labels[name] for name in family.labels], value)
                made.append(counter)
            case "gauge":
                gauge = GaugeMetricFamily(family.name, family.help, labels=family.labels)
                for labels, value in told:
                    gauge.add_metric([labels[name] for name in family.labels], value)
                made.append(gauge)
            case "histogram":
                histogram = HistogramMetricFamily(family.name, family.help, labels=family.labels)
                for label, (buckets, total) in told.items():
                    histogram.add_metric([label], buckets, total)
                made.append(histogram)
            case "summary":
                made.append(SummaryMetricFamily(family.name, family.help, count_value=told[0], sum_value=told[1]))

    class Ours(Collector):
        def collect(self) -> Iterable[Metric]:
            return made

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Ours())
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class MetricsDoor:
    """The path of the metrics."""

    def __init__(self, gather: Callable[[], Awaitable[Gathered]], metrics: Metrics) -> None:
        self._gather = gather
        self._metrics = metrics

    def routes(self) -> list[web.RouteDef]:
        """The paths that this door serves."""
        return [web.get("/metrics", self.get)]

    async def get(self, request: web.Request) -> web.Response:
        """All metrics. They are put together off the loop."""
        require(request, Scope.READ)
        families = list(self._metrics.families(await self._gather()))
        body, content_type = await asyncio.to_thread(rendered, families, request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})
