"""An agent's endless loop of successes, reported by a daemon."""

from __future__ import annotations

import pytest

from tests.integration.serving import daemon_and_wire


@pytest.mark.promise("R4")
async def test_a_loop_is_an_event_and_a_problem_with_its_usage() -> None:
    async with daemon_and_wire(loops={"repeats": 30}) as (_, wire):
        await wire.ask("monitor:subscribe", patterns=["completion:loop"])
        usage = {"usage": {"input_tokens": 900, "output_tokens": 100}}
        for number in range(45):
            await wire.ask(
                "completion:request",
                prompt="Check the status and try again.",
                agent_id="worker",
                session_id=f"s{number}",
                provider_options=usage,
            )
        told = await wire.pushed("completion:loop")
        assert (told["kind"], told["agent_id"], told["requests"]) == ("repeats", "worker", 30)
        assert (told["total_tokens"], told.get("session_id")) == (30_000, None)
        health = await wire.ask("system:health")
        assert health["status"] == "degraded"
        (problem,) = health["problems"]
        assert "agent 'worker' asked the same" in problem
        last = await wire.ask("completion:get", request_id=told["request_id"], content=True)
        assert last["content"]["prompt"] == "Check the status and try again."


@pytest.mark.promise("R4")
async def test_a_batch_is_no_loop() -> None:
    async with daemon_and_wire(loops={"repeats": 30}) as (_, wire):
        for number in range(100):
            await wire.ask("completion:request", prompt="Name a colour", request_id=f"batch_{number:026x}")
        assert (await wire.ask("system:health"))["problems"] == []
