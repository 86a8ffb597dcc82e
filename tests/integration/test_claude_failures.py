"""The real Claude Code behind the daemon while its API fails: retries, waits, failover, and counts."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from ksi.request import Usage
from tests.claude import House, number_messages, said
from tests.effort import sample
from tests.endpoint import Answer, ScriptedEndpoint, Seen
from tests.integration.serving import daemon_and_wire
from tests.integration.wire import Json, Wire, in_state

USAGE = Usage(input_tokens=11, output_tokens=7, cache_read_tokens=5)
GOOD = Answer(pieces=("All ", "well."), usage=USAGE)
STREAM = "text/event-stream"


class Place:
    """A home with Claude Code in it, and its endpoint, which fails on demand and is healthy then."""

    def __init__(self, house: House, endpoint: ScriptedEndpoint) -> None:
        self.house = house
        self.endpoint = endpoint

    def fails(self, answers: Iterable[Answer]) -> None:
        bad = iter(answers)
        self.endpoint._script = lambda _: next(bad, GOOD)

    @asynccontextmanager
    async def served(self, *, attempts: int = 2, **more: Json) -> AsyncIterator[Wire]:
        """A daemon with Claude Code, and a connection that hears of providers."""
        claude: Json = {"kind": "claude-cli", "priority": 1, **self.house.options(idle_timeout=5.0)}
        retry: Json = {"max_attempts": attempts, "initial_delay": 0.001, "max_delay": 0.002}
        async with daemon_and_wire(self.house.home, providers={"claude-cli": claude, **more}, retry=retry) as (_, wire):
            await wire.ask("monitor:subscribe", patterns=["provider:*"])
            yield wire


@pytest_asyncio.fixture
async def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    number_messages(monkeypatch)
    async with ScriptedEndpoint(GOOD) as endpoint:
        yield Place(House(tmp_path, endpoint.url), endpoint)


async def ask(wire: Wire, prompt: str = "How are you?", **fields: object) -> Json:
    return await wire.ask("completion:request", model="haiku", prompt=prompt, **fields)


def trail(reply: Json) -> list[tuple[str, str, str | None]]:
    return [(entry["provider"], entry["outcome"], entry.get("error")) for entry in reply["attempts"]]


@pytest.mark.promise("F1", "F2", "F9", "T1")
@pytest.mark.parametrize(
    ("bad", "outcome", "error"),
    sample(
        [
            pytest.param(Answer(status=429), "parked", "rate_limited", id="429"),
            pytest.param(
                Answer(status=429, headers={"Retry-After": "1"}), "parked", "rate_limited", id="429 with a time"
            ),
            pytest.param(Answer(status=500), "failed", "provider_error", id="500"),
            pytest.param(Answer(status=503), "parked", "overloaded", id="503"),
            pytest.param(Answer(status=529), "parked", "overloaded", id="529"),
            pytest.param(Answer(silent=True), "failed", "timeout", id="silent"),
            pytest.param(Answer(stall_after=1), "failed", "timeout", id="silent in mid-stream"),
            pytest.param(Answer(hang_up=True), "failed", "network_error", id="cut before an answer"),
            pytest.param(Answer(cut_after=1), "failed", "network_error", id="cut in mid-stream"),
            pytest.param(Answer(end_after=1), "failed", "network_error", id="ended in mid-stream"),
            pytest.param(Answer(fail_after=1), "parked", "overloaded", id="error in mid-stream"),
            pytest.param(Answer(body=b"{nope"), "failed", "provider_error", id="no JSON"),
            pytest.param(
                Answer(body=b"event: message_start\ndata: {nope\n\n", content_type=STREAM),
                "failed",
                "provider_error",
                id="no JSON in the stream",
            ),
            pytest.param(
                Answer(body=b"<html>Bad gateway</html>", content_type="text/html"),
                "failed",
                "provider_error",
                id="a page",
            ),
            pytest.param(
                Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"), "failed", "network_error", id="no HTTP"
            ),
        ],
        4,
    ),
)
async def test_a_fault_of_its_api_is_retried_without_a_trace_and_counted_once(
    place: Place, bad: Answer, outcome: str, error: str
) -> None:
    async with place.served() as wire:
        await ask(wire, "First.", session_id="talk")
        place.fails([bad])
        reply = await ask(wire, "Second.", session_id="talk")
        account = (await wire.ask("completion:token_usage"))["totals"]
    assert (reply["status"], reply["result"]) == ("completed", "All well.")
    assert trail(reply) == [("claude-cli", outcome, error), ("claude-cli", "completed", None)]
    assert [entry["usage"] == "unknown" for entry in reply["attempts"]] == [True, False]
    asked = [said(seen) for seen in place.endpoint.requests]
    assert len(asked) == 3, "Claude Code does not try again by itself"
    assert asked[1] == asked[2] == [("user", "First."), ("assistant", "All well."), ("user", "Second.")]
    assert (account["requests"], account["attempts"], account["unknown_attempts"]) == (2, 3, 1)
    assert (account["input_tokens"], account["output_tokens"], account["cache_read_tokens"]) == (22, 14, 10)


@pytest.mark.promise("F7")
async def test_a_slow_api_is_waited_for(place: Place) -> None:
    async with place.served() as wire:
        place.fails([Answer(delay=1.0, piece_delay=0.4, pieces=("Slowly, ", "but ", "well."), usage=USAGE)])
        reply = await ask(wire)
    assert (reply["result"], len(reply["attempts"])) == ("Slowly, but well.", 1)


@pytest.mark.promise("F4")
async def test_the_next_provider_takes_over_after_a_fault_of_its_api(place: Place) -> None:
    spare: Json = {"kind": "stub", "models": ["claude-cli/*"], "priority": 2}
    async with place.served(spare=spare) as wire:
        await ask(wire, "First.", session_id="talk")
        place.fails([Answer(status=500)])
        reply = await ask(wire, "Second.", session_id="talk")
        assert trail(reply) == [("claude-cli", "failed", "provider_error"), ("spare", "completed", None)]
        back = await ask(wire, "Third.", session_id="talk")
    assert back["provider"] == "claude-cli"
    heard = said(place.endpoint.requests[-1])[-1][1]
    assert "Second." in heard and heard.endswith("Third."), "what was said elsewhere comes along"


def spent(place: Place, seconds: float) -> Answer:
    """The answer of a subscription's API when its quota is spent: Claude Code reports it by a `rate_limit_event`."""
    back = str(int(place.house.clock.now().unix + seconds))
    kinds = {"status": "rejected", "reset": back, "representative-claim": "five_hour"}
    headers = {f"anthropic-ratelimit-unified-{name}": value for name, value in kinds.items()}
    headers |= {"anthropic-ratelimit-unified-5h-status": "rejected", "anthropic-ratelimit-unified-5h-reset": back}
    return Answer(status=429, headers=headers)


@pytest.mark.promise("F5")
async def test_a_spent_quota_parks_it_until_its_return_and_others_go_on(place: Place) -> None:
    place.house.variables.pop("ANTHROPIC_API_KEY")
    place.house.variables["CLAUDE_CODE_OAUTH_TOKEN"] = "sk-ant-oat01-any"
    now = place.house.clock.now().unix
    other: Json = {"kind": "stub", "models": ["stub/*"]}
    async with place.served(attempts=1, other=other) as wire:
        place.fails([spent(place, 3_600)])
        parked = (await wire.ask("completion:async", model="haiku", prompt="Now?", session_id="talk"))["request_id"]
        view = await in_state(wire, parked, "parked")
        assert view["due_at"] == pytest.approx(now + 3_600, abs=60)
        change = await wire.pushed("provider:state_changed")
        assert (change["provider"], change["before"], change["after"]) == ("claude-cli", "closed", "parked")
        assert change["until"] == pytest.approx(now + 3_600, abs=60)
        waits = (await wire.ask("completion:async", model="haiku", prompt="And I?"))["request_id"]
        assert (await wire.ask("completion:get", request_id=waits))["status"] == "queued"
        assert (await wire.ask("completion:request", model="stub/echo", prompt="Hi"))["status"] == "completed"
        (listed,) = (await wire.ask("completion:retry_status"))["waiting"]
        assert (listed["request_id"], listed["status"], listed["error"]) == (parked, "parked", "rate_limited")
        assert len(place.endpoint.requests) == 1, "it is not asked before"

        await wire.ask("provider:reset", provider="claude-cli")
        replies = [await wire.ask("completion:wait", request_id=name) for name in (parked, waits)]
    assert [reply["status"] for reply in replies] == ["completed", "completed"]
    assert trail(replies[0]) == [("claude-cli", "parked", "rate_limited"), ("claude-cli", "completed", None)]


@pytest.mark.promise("F5")
async def test_a_warning_that_the_quota_is_nearly_spent_parks_nothing(place: Place) -> None:
    place.house.variables.pop("ANTHROPIC_API_KEY")
    place.house.variables["CLAUDE_CODE_OAUTH_TOKEN"] = "sk-ant-oat01-any"
    back = str(int(place.house.clock.now().unix + 3_600))
    near = {
        "anthropic-ratelimit-unified-status": "allowed_warning",
        "anthropic-ratelimit-unified-reset": back,
        "anthropic-ratelimit-unified-representative-claim": "five_hour",
        "anthropic-ratelimit-unified-5h-status": "allowed_warning",
        "anthropic-ratelimit-unified-5h-reset": back,
        "anthropic-ratelimit-unified-5h-utilization": "0.95",
    }

    def warning(_: Seen) -> Answer:
        return Answer(pieces=GOOD.pieces, usage=USAGE, headers=near)

    async with place.served() as wire:
        place.endpoint._script = warning
        for _ in range(2):
            assert len((await ask(wire))["attempts"]) == 1
        status = (await wire.ask("completion:provider_status"))["providers"]["claude-cli"]
    assert (status["breaker"], status["parked_until"]) == ("closed", None)


@pytest.mark.promise("F3")
async def test_the_circuit_of_an_api_that_keeps_failing_opens_and_bad_requests_are_not_its_fault(place: Place) -> None:
    async with place.served(attempts=1) as wire:
        place.fails(itertools.repeat(Answer(status=400, error_message="no such thing")))
        for _ in range(6):  # more failures than it takes
            assert (await ask(wire))["error"]["code"] == "invalid_request"
        status = (await wire.ask("completion:provider_status"))["providers"]["claude-cli"]
        assert (status["breaker"], status["outcomes"]) == ("closed", {"invalid_request": 6})
        place.fails(itertools.repeat(Answer(status=500)))
        while status["breaker"] == "closed":
            assert (await ask(wire))["error"]["code"] == "provider_error"
            status = (await wire.ask("completion:provider_status"))["providers"]["claude-cli"]
        assert status["outcomes"]["provider_error"] == 5
        change = await wire.pushed("provider:state_changed")
    assert (change["before"], change["after"]) == ("closed", "open")
    assert "its API answered 500" in change["reason"]
