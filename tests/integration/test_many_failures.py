"""Two thousand requests over three providers that fail by a script: each end, attempt and token is accounted for."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict

import msgspec
import pytest

from ksi.request import Usage
from tests.endpoint import Answer, ScriptedEndpoint, Seen
from tests.integration.house import House, provider, serving
from tests.integration.wire import Json, Wire, answer

REQUESTS = 2_000
CONVERSATIONS = 250
SLOTS = 16
ATTEMPTS = 8
DIES_AT = 150
"""The call with which the first provider begins to fail all."""
HEALED_AT = 1_100
"""Ended requests after which it is well again."""
SAMPLES = 20
BREAKER = {"failures": 5, "rate": 0.5, "max_samples": SAMPLES, "open_for": 0.2, "max_open_for": 0.5}
MODELS = ("team/any", "team/any", "duo/any", "solo/any")


class Fault(msgspec.Struct, frozen=True):
    """One thing that an endpoint does, and how the trail must tell it."""

    share: float
    answer: Answer
    outcome: str
    error: str | None = None


FAULTS = (
    Fault(0.03, Answer(status=500), "failed", "provider_error"),
    Fault(0.02, Answer(status=529), "failed", "overloaded"),
    Fault(0.01, Answer(status=429), "failed", "rate_limited"),
    Fault(0.005, Answer(status=429, headers={"retry-after-ms": "150"}), "parked", "rate_limited"),
    Fault(0.02, Answer(cut_after=1), "failed", "network_error"),
    Fault(0.01, Answer(body=b"{nope"), "failed", "provider_error"),
    Fault(0.003, Answer(silent=True), "failed", "timeout"),
    Fault(0.01, Answer(status=400), "failed", "invalid_request"),
    Fault(0.02, Answer(usage=None), "completed"),
    Fault(0.05, Answer(delay=0.05), "completed"),
)
DEAD = FAULTS[0]
GOOD = Fault(0.0, Answer(), "completed")


class Called(msgspec.Struct, frozen=True):
    """One call as its endpoint saw it."""

    provider: str
    fault: Fault
    reported: Usage | None
    dead: bool


class Scene:
    """The endpoints' behaviour, and all calls that they got, by request."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Called]] = defaultdict(list)
        self.by_provider: Counter[str] = Counter()
        self.healed = False
        self.good_after_healing = 0

    def endpoint(self, name: str) -> ScriptedEndpoint:
        return ScriptedEndpoint(script=lambda seen: self._play(name, seen))

    def _play(self, name: str, seen: Seen) -> Answer:
        said = seen.json["messages"][-1]["content"]
        request_id = said.partition(" ")[0]
        self.by_provider[name] += 1
        dice = random.Random(f"{name} {request_id} {len(self.calls[request_id])}")
        dead = name == "a" and self.by_provider[name] > DIES_AT and not self.healed
        fault = DEAD if dead else self._fault(dice)
        shown = fault.answer
        if fault.outcome == "completed" and shown.usage is not None:
            usage = Usage(
                input_tokens=dice.randrange(1, 3_000),
                output_tokens=dice.randrange(1, 900),
                cache_read_tokens=dice.choice((0, dice.randrange(500))),
            )
            shown = msgspec.structs.replace(shown, usage=usage, pieces=("Answer to ", request_id))
        whole = shown.usage if fault.outcome == "completed" else None
        self.calls[request_id].append(Called(name, fault, whole, dead))
        self.good_after_healing += name == "a" and self.healed and fault.outcome == "completed"
        return shown

    def _fault(self, dice: random.Random) -> Fault:
        roll = dice.random()
        for fault in FAULTS:
            roll -= fault.share
            if roll < 0:
                return fault
        return GOOD


def data(number: int) -> Json:
    return {
        "request_id": f"r{number:04}",
        "prompt": f"r{number:04} asks",
        "session_id": f"talk {number % CONVERSATIONS}",
        "model": MODELS[number % len(MODELS)],
        "stream": number % 3 == 0,
        "priority": ("high", "normal", "low")[number % 3],
    }


async def run_all(house: House, scene: Scene) -> tuple[dict[str, Json], Counter[str]]:
    """Submit all; returns each request's end, and how often its end was published."""
    told: Counter[str] = Counter()
    ended: dict[str, Json] = {}
    async with await Wire.open(house.daemon.config.socket_path) as listener:
        await listener.ask("monitor:subscribe", patterns=["completion:result"])
        acks = [house.wire.post("completion:async", data(number)) for number in range(REQUESTS)]
        await asyncio.gather(*(answer(ack) for ack in acks))
        while len(ended) < REQUESTS:
            push = await listener.pushed("completion:result")
            told[push["request_id"]] += 1
            ended[push["request_id"]] = push
            scene.healed = scene.healed or len(ended) >= HEALED_AT
        await listener.ask("completion:status")
        told.update(line["data"]["request_id"] for line in listener.lines if line["event"] == "completion:result")
    return ended, told


def expected_usage(called: Called) -> Json | str:
    if called.reported is None:
        return "unknown"
    usage = called.reported
    shown = {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens}
    if usage.cache_read_tokens:
        shown["cache_read_tokens"] = usage.cache_read_tokens
    return {**shown, "total_tokens": usage.input_tokens + usage.output_tokens}


@pytest.mark.promise("F1", "F2", "F3", "F4", "F5", "F6", "F10", "Q3", "R1", "T1")
async def test_two_thousand_requests_over_failing_providers_are_accounted_for_to_the_last_token() -> None:
    scene = Scene()
    async with scene.endpoint("a") as a, scene.endpoint("b") as b, scene.endpoint("c") as c:
        providers = {
            "a": provider("openai", a, models=["team/*", "solo/*"], priority=1, max_concurrency=SLOTS),
            "b": provider("anthropic", b, models=["team/*", "duo/*"], priority=2, max_concurrency=SLOTS),
            "c": provider("openai", c, models=["team/*", "duo/*"], priority=3, max_concurrency=SLOTS),
        }
        async with serving(
            providers,
            breaker=BREAKER,
            retry={"max_attempts": ATTEMPTS, "initial_delay": 0.02, "max_delay": 0.1},
            limits={"timeout": 15.0},
        ) as house:
            ended, told = await run_all(house, scene)
            status = await house.wire.ask("completion:queue_status")
            listed = [await house.wire.ask("completion:get", request_id=name) for name in ended]
            report = (await house.wire.ask("completion:provider_status"))["providers"]
            account = await house.wire.ask("completion:token_usage", hours=1)
            changes = [line["data"] for line in house.wire.lines if line["event"] == "provider:state_changed"]

    # Each request ended once, and stayed so.
    assert set(told.values()) == {1}
    assert sorted(ended) == sorted(scene.calls) == [f"r{number:04}" for number in range(REQUESTS)]
    assert [reply["attempts"] for reply in listed] == [ended[reply["request_id"]]["attempts"] for reply in listed]
    ends = Counter(reply["status"] for reply in ended.values())
    assert set(ends) == {"completed", "failed"}
    assert (status["completed"], status["failed"]) == (ends["completed"], ends["failed"])
    assert status["queued"] + status["active"] + status["retrying"] + status["parked"] == 0

    # The trail of attempts equals the calls that the endpoints got.
    for name, reply in ended.items():
        attempts = reply["attempts"]
        seen = scene.calls[name]
        assert [entry["attempt"] for entry in attempts] == list(range(1, len(seen) + 1))
        assert [(e["provider"], e.get("error"), e["usage"]) for e in attempts] == [
            (called.provider, called.fault.error, expected_usage(called)) for called in seen
        ]
        # A failure is no failure of the request if the provider was away, or was only being probed.
        known = [(entry["outcome"], called.fault.outcome) for entry, called in zip(attempts, seen, strict=True)]
        assert set(known) <= {(o, o) for o in ("completed", "failed", "parked")} | {("parked", "failed")}
        assert (reply["status"] == "completed") == (seen[-1].fault.outcome == "completed")
        if reply["status"] == "completed":
            assert reply["provider"] == seen[-1].provider
            assert reply["result"] in (f"Answer to {name}", "Hello there.")
        else:
            assert reply["error"]["code"] == seen[-1].fault.error
            failures = sum(entry["outcome"] == "failed" for entry in attempts)
            assert seen[-1].fault.error == "invalid_request" or failures == ATTEMPTS

    # Tokens add up to the reports, and missing reports are counted.
    calls = [called for seen in scene.calls.values() for called in seen]
    reported = [called.reported for called in calls if called.reported is not None]
    usages = [reply["usage"] for reply in ended.values() if "usage" in reply]
    for field in ("input_tokens", "output_tokens", "cache_read_tokens"):
        assert sum(usage.get(field, 0) for usage in usages) == sum(getattr(usage, field) for usage in reported)
    unknown = sum(usage.get("unknown_attempts", 0) for usage in usages)
    unknown += sum(len(reply["attempts"]) for reply in ended.values() if "usage" not in reply)
    assert unknown == len(calls) - len(reported) > 100
    totals = account["totals"]
    assert (totals["requests"], totals["attempts"], totals["unknown_attempts"]) == (REQUESTS, len(calls), unknown)
    assert totals["total_tokens"] == sum(usage.input_tokens + usage.output_tokens for usage in reported)
    by_provider: Counter[str] = Counter()
    for called in calls:
        by_provider[called.provider] += called.reported.input_tokens if called.reported is not None else 0
    assert {row["provider"]: row["input_tokens"] for row in account["by_provider"]} == dict(by_provider)
    played = {id(called.fault) for called in calls}
    assert [fault for fault in (*FAULTS, GOOD) if id(fault) not in played] == [], "not every fault was played"
    assert {name: entry["calls"] for name, entry in report.items() if name in providers} == dict(scene.by_provider)

    # The provider that died was left within its threshold, and used again.
    steps = Counter((push["before"], push["after"]) for push in changes if push["provider"] == "a")
    in_vain = sum(called.dead for called in calls)
    assert BREAKER["rate"] * SAMPLES <= in_vain <= SAMPLES + SLOTS + steps["half_open", "open"]
    assert steps["half_open", "closed"] >= 1
    assert report["a"]["breaker"] == "closed"
    assert scene.good_after_healing > 100
