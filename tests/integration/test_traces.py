"""Traces by OpenTelemetry, at a collector: from a client's span over attempts and provider to deliveries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from ksi.completion.trace.context import attempt_span, request_span, trace_id
from ksi.errors import ConfigError
from ksi.testing import running_daemon
from tests.claude import House
from tests.endpoint import Answer, ScriptedEndpoint
from tests.integration.serving import daemon_and_wire
from tests.integration.wire import Wire, until
from tests.otlp_collector import Collector, Span

pytestmark = pytest.mark.promise("V3")

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CLIENT = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{CLIENT}-01"
SERVER, CLIENT_KIND, INTERNAL = 2, 3, 1
OK, ERROR = 0, 2


def traces(collector: Collector, **fields: Any) -> dict[str, Any]:
    return {"endpoint": collector.url, **fields}


def named(spans: list[Span], name: str) -> Span:
    (found,) = [span for span in spans if span.name == name]
    return found


async def test_a_request_is_one_trace_from_its_client_s_span_to_its_provider(tmp_path: Path) -> None:
    async with Collector() as collector, ScriptedEndpoint(Answer(pieces=("hello ", "there"))) as endpoint:
        providers = {"team": {"kind": "openai", "base_url": endpoint.openai_url}}
        async with daemon_and_wire(tmp_path, providers=providers, traces=traces(collector)) as (_, wire):
            reply = await wire.ask(
                "completion:request",
                prompt="a secret",
                model="team/big",
                request_id="r",
                session_id="trip",
                agent_id="ann",
                temperature=0.5,
                max_tokens=50,
                stream=True,
                traceparent=TRACEPARENT,
            )
            assert reply["status"] == "completed"
            spans = await collector.until(2)
        (seen,) = endpoint.requests
    request, attempt = named(spans, "request team/big"), named(spans, "chat big")
    assert (request.trace_id, request.parent, request.kind) == (TRACE, CLIENT, SERVER)
    assert (attempt.trace_id, attempt.parent, attempt.kind) == (TRACE, request.span_id, CLIENT_KIND)
    assert seen.headers["traceparent"] == f"00-{TRACE}-{attempt.span_id}-01"
    assert request.start <= attempt.start <= attempt.end <= request.end
    told = attempt.attributes
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.provider.name"] == "openai"
    assert told["gen_ai.request.model"] == "big"
    assert told["gen_ai.request.temperature"] == 0.5
    assert told["gen_ai.request.max_tokens"] == 50
    assert told["gen_ai.conversation.id"] == "trip"
    assert told["gen_ai.agent.name"] == "ann"
    assert told["gen_ai.response.finish_reasons"] == ["end_turn"]
    assert told["gen_ai.usage.output_tokens"] > 0
    assert told["gen_ai.response.time_to_first_chunk"] >= 0
    assert request.attributes["ksi.request.state"] == "completed"
    assert attempt.resource["service.name"] == "ksi"
    assert "secret" not in json.dumps([span.attributes for span in spans])


async def test_every_attempt_and_wait_is_a_span_and_failures_say_their_class(tmp_path: Path) -> None:
    async with Collector() as collector, ScriptedEndpoint(Answer(status=500), Answer(pieces=("ok",))) as endpoint:
        providers = {"team": {"kind": "openai", "base_url": endpoint.openai_url}}
        retry = {"initial_delay": 0.05, "max_delay": 0.05}
        async with daemon_and_wire(tmp_path, providers=providers, retry=retry, traces=traces(collector)) as (_, wire):
            await wire.ask("completion:request", prompt="p", model="team/m", request_id="r")
            spans = await collector.until(4)
    attempts = sorted((span for span in spans if span.name == "chat m"), key=lambda span: span.start)
    assert [span.span_id for span in attempts] == [attempt_span("r", 1), attempt_span("r", 2)]
    assert [span.status for span in attempts] == [ERROR, OK]
    assert attempts[0].attributes["error.type"] == "provider_error"
    waits = [span for span in spans if span.name == "wait"]
    assert "provider_error" in [span.attributes["ksi.wait.reason"] for span in waits]
    assert {span.trace_id for span in spans} == {trace_id("r")}


async def test_a_chain_is_one_trace_with_its_deliveries(tmp_path: Path) -> None:
    async with Collector() as collector, daemon_and_wire(tmp_path, traces=traces(collector)) as (_, wire):
        injection = {"enabled": True, "target_sessions": ["coordinator"]}
        await wire.ask(
            "completion:request",
            prompt="begin",
            request_id="root",
            injection_config=injection,
            traceparent=TRACEPARENT,
        )
        spans = await collector.until(5)
    root = next(span for span in spans if span.span_id == request_span("root"))
    children = [span for span in spans if span.kind == SERVER and span is not root]
    assert {span.trace_id for span in spans} == {TRACE}
    assert [span.parent for span in children] == [root.span_id]
    inject = named(spans, "inject")
    assert (inject.parent, inject.attributes["ksi.injection.target"]) == (root.span_id, "coordinator")


async def test_content_is_only_in_it_where_it_is_asked_for(tmp_path: Path) -> None:
    async with (
        Collector() as collector,
        daemon_and_wire(tmp_path, traces=traces(collector, content=True)) as (_, wire),
    ):
        await wire.ask("completion:request", prompt="a question", system="Be brief.", request_id="r")
        spans = await collector.until(2)
    (attempt,) = [span for span in spans if span.span_id == attempt_span("r", 1)]
    told = {name: json.loads(attempt.attributes[f"gen_ai.{name}"]) for name in ("input.messages", "output.messages")}
    assert told["input.messages"] == [{"role": "user", "parts": [{"type": "text", "content": "a question"}]}]
    assert told["output.messages"][0]["parts"] == [{"type": "text", "content": "echo: a question"}]
    assert json.loads(attempt.attributes["gen_ai.system_instructions"]) == [{"type": "text", "content": "Be brief."}]


async def test_a_client_s_header_counts_and_its_word_not_to_sample_too(tmp_path: Path) -> None:
    async with Collector() as collector:
        settings: dict[str, Any] = {"http": {"listen": "127.0.0.1:0"}, "traces": traces(collector)}
        async with daemon_and_wire(tmp_path, **settings) as (daemon, _):
            assert daemon.http is not None
            token = (daemon.config.run_dir / "token").read_text().strip()
            body = {"model": "stub/x", "messages": [{"role": "user", "content": "hello"}]}
            async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session:
                for flags, span in (("00", "1111111111111111"), ("01", CLIENT)):
                    headers = {"traceparent": f"00-{TRACE}-{span}-{flags}"}
                    url = f"{daemon.http.url}/v1/chat/completions"
                    async with session.post(url, json=body, headers=headers) as got:
                        assert got.status == 200
            spans = await collector.until(2)
    assert {span.parent for span in spans if span.kind == SERVER} == {CLIENT}


async def test_a_tool_call_by_mcp_brings_its_span_along(tmp_path: Path) -> None:
    async with Collector() as collector:
        settings: dict[str, Any] = {"http": {"listen": "127.0.0.1:0"}, "traces": traces(collector)}
        async with daemon_and_wire(tmp_path, **settings) as (daemon, _):
            assert daemon.http is not None
            token = (daemon.config.run_dir / "token").read_text().strip()
            params = {"name": "ask", "arguments": {"prompt": "hello"}, "_meta": {"traceparent": TRACEPARENT}}
            call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
            headers = {"Authorization": f"Bearer {token}", "Accept": "application/json, text/event-stream"}
            async with (
                aiohttp.ClientSession(headers=headers) as session,
                session.post(f"{daemon.http.url}/mcp", json=call) as got,
            ):
                assert got.status == 200
                await got.read()
            spans = await collector.until(2)
    assert {(span.trace_id, span.parent) for span in spans if span.kind == SERVER} == {(TRACE, CLIENT)}


async def test_spans_without_a_collector_harm_no_request_and_are_reported_in_health(tmp_path: Path) -> None:
    async with Collector() as collector:
        collector.status = 400
        async with daemon_and_wire(tmp_path, traces=traces(collector)) as (_, wire):
            assert (await wire.ask("completion:request", prompt="p"))["status"] == "completed"

            async def told() -> bool:
                return any("traces are lost" in one for one in (await wire.ask("system:health"))["problems"])

            await until(told)
            collector.status = 200
            await wire.ask("completion:request", prompt="p", request_id="again")
            await collector.until(2)


async def test_the_last_spans_are_sent_when_the_daemon_stops(tmp_path: Path) -> None:
    async with Collector() as collector:
        async with daemon_and_wire(tmp_path, traces=traces(collector)) as (_, wire):
            await wire.ask("completion:request", prompt="p", request_id="r")
        assert {span.span_id for span in collector.spans} >= {request_span("r"), attempt_span("r", 1)}


async def test_the_same_request_may_come_again_from_another_span(tmp_path: Path) -> None:
    async with Collector() as collector, daemon_and_wire(tmp_path, traces=traces(collector)) as (_, wire):
        for span in (CLIENT, "1111111111111111"):
            reply = await ask_again(wire, f"00-{TRACE}-{span}-01")
            assert reply["status"] == "completed"


async def ask_again(wire: Wire, traceparent: str) -> dict[str, Any]:
    return await wire.ask("completion:request", prompt="p", request_id="r", traceparent=traceparent)


async def test_claude_code_runs_within_the_span_of_its_attempt(tmp_path: Path) -> None:
    async with Collector() as collector, ScriptedEndpoint(Answer(pieces=("ok",))) as endpoint:
        house = House(tmp_path, endpoint.url)
        settings: dict[str, Any] = {
            "providers": {"claude-cli": {"kind": "claude-cli", **house.options()}},
            "traces": traces(collector),
        }
        async with daemon_and_wire(house.home, **settings) as (_, wire):
            await wire.ask("completion:request", prompt="p", model="haiku", request_id="r", traceparent=TRACEPARENT)
            given = {span for child in psutil.Process().children(recursive=True) if (span := traceparent_of(child))}
            spans = await collector.until(2)
    attempt = named(spans, "invoke_agent haiku")
    assert attempt.attributes["gen_ai.provider.name"] == "anthropic"
    assert given == {f"00-{TRACE}-{attempt.span_id}-01"}


def traceparent_of(process: psutil.Process) -> str | None:
    """What a process has as its span; None of one that has just gone."""
    try:
        return process.environ().get("TRACEPARENT")
    except psutil.Error:
        return None


async def test_without_an_endpoint_nothing_of_it_runs_and_providers_get_no_header(tmp_path: Path) -> None:
    async with ScriptedEndpoint(Answer(pieces=("ok",))) as endpoint:
        providers = {"team": {"kind": "openai", "base_url": endpoint.openai_url}}
        async with daemon_and_wire(tmp_path, providers=providers) as (daemon, wire):
            await wire.ask("completion:request", prompt="p", model="team/m", traceparent=TRACEPARENT)
            assert "ksi-traces" not in {task.name for task in daemon.tasks()}
        (seen,) = endpoint.requests
    assert "traceparent" not in seen.headers


async def test_a_wrong_endpoint_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"traces\.endpoint"):
        async with running_daemon(tmp_path, settings={"traces": {"endpoint": "collector:4318"}}):
            pass
