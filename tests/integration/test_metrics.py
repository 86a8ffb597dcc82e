"""`GET /metrics` as Prometheus reads it, and the files in `deploy/` that go by its names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from ksi.completion.usage.tallies import MOST_MODELS, OTHER, Tallies
from ksi.daemon.daemon import Daemon
from ksi.http.metrics import FAMILIES
from tests.integration.serving import daemon_and_wire
from tests.integration.wire import in_state

pytestmark = pytest.mark.promise("V3")

ROOT = Path(__file__).parents[2]
HTTP: dict[str, Any] = {"listen": "127.0.0.1:0"}


async def scraped(daemon: Daemon, accept: str = "text/plain", token: str | None = None) -> tuple[int, str, str]:
    """Status, content type and text of a scrape."""
    assert daemon.http is not None
    token = token or (daemon.config.run_dir / "token").read_text().strip()
    headers = {"Authorization": f"Bearer {token}", "Accept": accept}
    async with aiohttp.ClientSession() as session, session.get(f"{daemon.http.url}/metrics", headers=headers) as got:
        return got.status, got.headers["Content-Type"], await got.text()


async def samples(daemon: Daemon) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """All samples by name and labels."""
    status, _, text = await scraped(daemon)
    assert status == 200
    return {(one.name, frozenset(one.labels.items())): one.value for one in read(text)}


def read(text: str) -> Iterator[Sample]:
    """The samples of a text, as the official parser has them."""
    for family in text_string_to_metric_families(text):
        yield from family.samples


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    """The place of a sample."""
    return name, frozenset(labels.items())


STUBS: Mapping[str, Any] = {
    "stub": {"kind": "stub"},
    "broken": {"kind": "stub", "fail": "invalid_request"},
    "hung": {"kind": "stub", "delay": 600, "max_concurrency": 1},
}


async def test_a_scrape_shows_running_waiting_and_ended_requests(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path, http=HTTP, providers=STUBS) as (daemon, wire):
        await wire.ask("completion:request", prompt="hello there", model="stub/echo", priority="high")
        await wire.ask("completion:request", prompt="hello", model="broken/x")
        await wire.ask("completion:async", prompt="hello", model="hung/x", request_id="r")
        await in_state(wire, "r", "running")
        await wire.ask("completion:async", prompt="hello", model="hung/x", priority="low")
        await wire.ask("completion:async", prompt="hello", model="hung/x", priority="low", delay=600)
        await wire.ask("conversation:acquire_lock", session_id="held", request_id="lock")
        await wire.ask("queue:pause", agent_id="nightly")
        seen = await samples(daemon)
    answered = {"provider": "stub", "model": "stub/echo"}
    assert seen[key("ksi_attempts_total", **answered, outcome="completed", error="")] == 1
    failed = {"provider": "broken", "model": "broken/x", "outcome": "failed", "error": "invalid_request"}
    assert seen[key("ksi_attempts_total", **failed)] == 1
    assert seen[key("ksi_tokens_total", **answered, kind="output")] > 0
    assert seen[key("ksi_queue_requests", state="running")] == 1
    assert seen[key("ksi_queue_requests", state="queued")] == 1
    assert seen[key("ksi_queue_requests", state="scheduled")] == 1
    assert seen[key("ksi_queue_waiting_requests", priority="low")] == 2
    assert seen[key("ksi_queue_waiting_requests", priority="high")] == 0
    assert seen[key("ksi_requests_total", state="completed")] == 1
    assert seen[key("ksi_requests_total", state="failed")] == 1
    assert seen[key("ksi_running_requests", provider="hung")] == 1
    assert seen[key("ksi_wait_seconds_count", priority="high")] == 1
    assert seen[key("ksi_wait_seconds_bucket", priority="high", le="+Inf")] == 1
    assert seen[key("ksi_run_seconds_count", provider="stub")] == 1
    assert seen[key("ksi_provider_breaker", provider="stub", state="closed")] == 1
    assert seen[key("ksi_provider_slots", provider="hung")] == 1
    assert seen[key("ksi_locks", holder="external")] == 1
    assert seen[key("ksi_paused", scope="agent")] == 1
    assert seen[key("ksi_ready")] == 1
    assert seen[key("ksi_store_commit_seconds_count")] > 0
    assert seen[key("ksi_build_info", version=daemon._version, store="sqlite")] == 1


async def test_both_formats_are_ones_that_the_official_parsers_read(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path, http=HTTP) as (daemon, wire):
        await wire.ask("completion:request", prompt='a "quoted"\nline')
        parse: Any = openmetrics.text_string_to_metric_families  # it has no types
        status, kind, text = await scraped(daemon, "application/openmetrics-text; version=1.0.0")
        assert (status, kind.partition(";")[0]) == (200, "application/openmetrics-text")
        families = {family.name for family in parse(text)}
        assert {name.removesuffix("_total") for name in FAMILIES} - families <= {
            *("ksi_log_dropped_lines", "ksi_response_files", "ksi_response_files_bytes")
        }
        _, kind, text = await scraped(daemon)
        assert kind.startswith("text/plain")
        assert all(one.name.startswith("ksi_") for one in read(text))


async def test_metrics_need_a_token_that_may_read(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path, http=HTTP) as (daemon, wire):
        assert (await scraped(daemon, token="nonsense"))[0] == 401
        submitter = await wire.ask("token:create", name="worker", scope="submit")
        assert (await scraped(daemon, token=submitter["token"]))[0] == 403
        reader = await wire.ask("token:create", name="prometheus", scope="read")
        assert (await scraped(daemon, token=reader["token"]))[0] == 200


async def test_blocks_of_chains_are_counted_by_their_reason(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path, http=HTTP) as (daemon, wire):
        root = await wire.ask("completion:request", prompt="begin")
        wish = {"circuit_breaker_config": {"parent_request_id": root["request_id"], "max_depth": 0}}
        reply = await wire.ask("completion:async", prompt="go on", **wish)
        assert reply["status"] == "blocked"
        seen = await samples(daemon)
    assert seen[key("ksi_chain_blocks_total", code="max_depth")] == 1


def test_models_that_clients_make_up_do_not_make_up_series() -> None:
    tallies = Tallies.__new__(Tallies)
    tallies._models = set()
    labels = [tallies._label(f"stub/{number}") for number in range(3 * MOST_MODELS)]
    assert len(set(labels)) == MOST_MODELS + 1
    assert labels[-1] == OTHER
    assert tallies._label("stub/1") == "stub/1"
