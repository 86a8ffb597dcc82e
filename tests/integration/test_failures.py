"""Failing providers behind a whole daemon: classes, retries, failover, breakers, quotas, limits, and the operator."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from ksi.testing import SimulatedClock
from tests.daemon_process import DaemonProcess, make_home
from tests.endpoint import Answer, ScriptedEndpoint, Seen
from tests.integration.house import APIS, FAILS, GOOD, House, provider, serving, trail
from tests.integration.wire import Json, Wire, answer, in_state, until

both_apis = pytest.mark.parametrize("api", APIS)

QUOTA = Answer(status=429, headers={"Retry-After": "30"})
SILENT = Answer(silent=True)


def again(*answers: Answer) -> tuple[Answer, ...]:
    """These, then good ones."""
    return (*answers, GOOD)


# -- F1: classes ------------------------------------------------------------------------------------------------------


@both_apis
@pytest.mark.promise("F1", "F2")
@pytest.mark.parametrize(
    ("bad", "stream", "expected"),
    [
        pytest.param(Answer(status=429), False, "rate_limited", id="429 without a time"),
        pytest.param(Answer(status=429, headers={"Retry-After": "0"}), False, "rate_limited", id="429, at once"),
        pytest.param(Answer(status=500), False, "provider_error", id="500"),
        pytest.param(Answer(status=502, body=b"<html>Bad gateway"), False, "provider_error", id="502 of a proxy"),
        pytest.param(Answer(status=503), False, "overloaded", id="503"),
        pytest.param(Answer(status=529), False, "overloaded", id="529"),
        pytest.param(Answer(hang_up=True), False, "network_error", id="hang-up"),
        pytest.param(Answer(cut_after=1), False, "network_error", id="cut in the body"),
        pytest.param(Answer(cut_after=1, piece_delay=0.01), True, "network_error", id="cut in mid-stream"),
        pytest.param(Answer(end_after=1), True, "network_error", id="an end too early"),
        pytest.param(Answer(fail_after=1, error_type="overloaded_error"), True, "overloaded", id="error in mid-stream"),
        pytest.param(Answer(body=b"{nope"), False, "provider_error", id="malformed"),
        pytest.param(Answer(body=b"[]"), False, "provider_error", id="another shape"),
        pytest.param(Answer(raw=b"not even HTTP\r\n\r\n"), False, "provider_error", id="no HTTP"),
        pytest.param(
            Answer(body=b"data: {\n\n", content_type="text/event-stream"), True, "provider_error", id="malformed stream"
        ),
    ],
)
async def test_a_temporary_failure_is_retried_and_the_trail_names_it(
    api: str, bad: Answer, stream: bool, expected: str
) -> None:
    async with ScriptedEndpoint(*again(bad)) as endpoint, serving({"team": provider(api, endpoint)}) as house:
        reply = await house.asked(stream=stream)
        assert reply["status"] == "completed"
        away = expected in ("rate_limited", "overloaded")
        assert trail(reply) == [("team", "parked" if away else "failed", expected), ("team", "completed", None)]
        assert reply["attempts"][0]["usage"] == "unknown"
        assert reply["usage"]["unknown_attempts"] == 1
        assert len(endpoint.requests) == 2


@both_apis
@pytest.mark.promise("F1")
@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        pytest.param(Answer(status=400), "invalid_request", id="400"),
        pytest.param(Answer(status=404), "invalid_request", id="404"),
        pytest.param(Answer(status=401), "authentication", id="401"),
        pytest.param(Answer(status=403), "authentication", id="403"),
        pytest.param(Answer(status=413), "context_too_long", id="413"),
    ],
)
async def test_a_permanent_failure_fails_at_once_with_the_endpoint_s_own_words(
    api: str, bad: Answer, expected: str
) -> None:
    async with ScriptedEndpoint(bad) as endpoint, serving({"team": provider(api, endpoint)}) as house:
        reply = await house.asked()
        assert (reply["status"], reply["error"]["code"]) == ("failed", expected)
        assert "scripted" in reply["error"]["message"]
        assert trail(reply) == [("team", "failed", expected)]
        assert len(endpoint.requests) == 1


@both_apis
@pytest.mark.promise("F1", "F7")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_an_answer_that_takes_too_long_is_a_timeout_and_the_call_is_ended(api: str, stream: bool) -> None:
    hangs = Answer(silent=True) if not stream else Answer(stall_after=1)
    async with ScriptedEndpoint(*again(hangs)) as endpoint, serving({"team": provider(api, endpoint)}) as house:
        reply = await house.asked(timeout=0.2, stream=stream)
        assert trail(reply) == [("team", "failed", "timeout"), ("team", "completed", None)]
        assert "0.2 s" in reply["attempts"][0]["message"]
        assert reply["attempts"][0].get("text") == ("Hello" if stream else None)
        async with asyncio.timeout(5):
            await endpoint.requests[0].gone.wait()


@both_apis
@pytest.mark.promise("F1", "F7")
async def test_a_stream_that_falls_silent_is_a_timeout_long_before_the_whole_call_s(api: str) -> None:
    async with (
        ScriptedEndpoint(*again(Answer(stall_after=1))) as endpoint,
        serving({"team": provider(api, endpoint)}, limits={"idle_timeout": 0.2, "timeout": 600.0}) as house,
    ):
        reply = await house.asked(stream=True)
        assert trail(reply) == [("team", "failed", "timeout"), ("team", "completed", None)]
        assert "nothing of the answer came for 0.2 s" in reply["attempts"][0]["message"]


# -- F2: retries ------------------------------------------------------------------------------------------------------


@both_apis
@pytest.mark.promise("F2")
async def test_after_the_last_attempt_it_has_failed_and_is_listed(api: str) -> None:
    async with ScriptedEndpoint(FAILS) as endpoint, serving({"team": provider(api, endpoint)}) as house:
        reply = await house.asked(request_id="r1")
        assert (reply["status"], reply["error"]["code"]) == ("failed", "provider_error")
        assert trail(reply) == [("team", "failed", "provider_error")] * 3
        assert len(endpoint.requests) == 3
        listed = await house.wire.ask("completion:queue_status", list="failed")
        assert [(item["request_id"], item["attempt"]) for item in listed["items"]] == [("r1", 3)]


@pytest.mark.promise("F2")
@pytest.mark.parametrize(("retry", "attempts"), [({"max_attempts": 1}, 1), ({"max_attempts": 5}, 5), ({}, 3)])
async def test_a_request_says_how_often_it_is_tried(retry: Json, attempts: int) -> None:
    async with (
        ScriptedEndpoint(FAILS) as endpoint,
        serving({"team": provider("openai", endpoint)}, breaker={"failures": 20}) as house,
    ):
        reply = await house.asked(retry=retry)
        assert reply["status"] == "failed"
        assert len(reply["attempts"]) == len(endpoint.requests) == attempts


@pytest.mark.promise("F2")
async def test_the_waits_grow_and_stay_within_their_bounds() -> None:
    clock = SimulatedClock()
    async with (
        ScriptedEndpoint(FAILS) as endpoint,
        serving(
            {"team": provider("openai", endpoint)},
            clock=clock,
            retry={"max_attempts": 9, "initial_delay": 1.0, "max_delay": 8.0},
            breaker={"failures": 20},
        ) as house,
    ):
        waits = []
        for number in range(1, 9):
            reply = await house.begin("r1", "retrying") if number == 1 else await in_state(house.wire, "r1", "retrying")
            waits.append(reply["due_at"] - clock.now().unix)
            await clock.advance(waits[-1])
            await endpoint.wait_for_requests(number + 1)
        assert all(0 <= wait <= min(8.0, 2.0**n) + 1e-6 for n, wait in enumerate(waits)), waits
        assert max(waits) > 1.0, "the jitter never left the first bound"
        assert (await in_state(house.wire, "r1", "failed"))["error"]["code"] == "provider_error"


@both_apis
@pytest.mark.promise("F2")
async def test_a_time_of_return_is_the_floor_of_the_wait(api: str) -> None:
    clock = SimulatedClock()
    busy = Answer(status=500, headers={"Retry-After": "40"})
    async with (
        ScriptedEndpoint(*again(busy)) as endpoint,
        serving({"team": provider(api, endpoint)}, clock=clock) as house,
    ):
        reply = await house.begin("r1", "retrying")
        assert reply["due_at"] - clock.now().unix == pytest.approx(40.0)
        await clock.advance(39.9)
        assert len(endpoint.requests) == 1
        await clock.advance(0.1)
        assert trail(await in_state(house.wire, "r1", "completed"))[-1] == ("team", "completed", None)


@pytest.mark.promise("F2")
async def test_a_request_that_waits_for_its_retry_still_waits_after_a_restart_and_then_runs(tmp_path: Path) -> None:
    clock = SimulatedClock()
    busy = Answer(status=500, headers={"Retry-After": "40"})
    async with ScriptedEndpoint(*again(busy)) as endpoint:
        providers = {"team": provider("openai", endpoint)}
        async with serving(providers, clock=clock, home=tmp_path) as house:
            before = await house.begin("r1", "retrying", session_id="talk")
        async with serving(providers, clock=clock, home=tmp_path) as house:
            after = await in_state(house.wire, "r1", "retrying")
            assert after["due_at"] == before["due_at"]
            assert after["attempts"] == before["attempts"]
            await clock.advance(40)
            reply = await in_state(house.wire, "r1", "completed")
            assert trail(reply) == [("team", "failed", "provider_error"), ("team", "completed", None)]


@pytest.mark.promise("F2", "F5", "Q3")
async def test_a_kill_takes_nothing_from_requests_that_wait_for_a_retry_or_a_quota(tmp_path: Path) -> None:
    soon = {"Retry-After": "8"}  # long enough to be seen however busy the machine is
    async with (
        ScriptedEndpoint(*again(Answer(status=500, headers=soon))) as one,
        ScriptedEndpoint(*again(Answer(status=429, headers=soon))) as other,
    ):
        home = make_home(
            tmp_path,
            f'[providers.team]\nkind = "openai"\nbase_url = "{one.openai_url}"\n'
            f'[providers.quota]\nkind = "openai"\nbase_url = "{other.openai_url}"\n',
        )
        daemon = DaemonProcess(home)
        with daemon:
            async with await Wire.open(daemon.socket_path) as wire:
                for name in ("team", "quota"):
                    await wire.ask("completion:async", request_id=name, prompt="Hi", model=f"{name}/x")
                await in_state(wire, "team", "retrying")
                await in_state(wire, "quota", "parked")
            daemon.end(signal.SIGKILL)
            daemon.start()
            async with await Wire.open(daemon.socket_path) as wire:
                replies = [await wire.ask("completion:wait", request_id=name) for name in ("team", "quota")]
        assert [trail(reply) for reply in replies] == [
            [("team", "failed", "provider_error"), ("team", "completed", None)],
            [("quota", "parked", "rate_limited"), ("quota", "completed", None)],
        ]
        assert [reply.get("interruptions", 0) for reply in replies] == [0, 0]


@pytest.mark.promise("F2")
async def test_retry_status_shows_waiting_requests_why_since_when_and_until_when() -> None:
    clock = SimulatedClock()
    async with (
        ScriptedEndpoint(Answer(status=500, headers={"Retry-After": "40"})) as endpoint,
        ScriptedEndpoint(QUOTA) as spent,
        serving(
            {"team": provider("openai", endpoint), "spent": provider("openai", spent, models=["spent/*"])}, clock=clock
        ) as house,
    ):
        began = clock.now().unix
        await house.begin("r1", "retrying")
        await house.begin("r2", "parked", model="spent/x")
        await house.begin("later", "scheduled", delay=10)
        await clock.advance(5)
        status = await house.wire.ask("completion:retry_status")
        assert (status["retrying"], status["parked"], status["max_attempts"]) == (1, 1, 3)
        rows = {row["request_id"]: row for row in status["waiting"]}
        assert set(rows) == {"r1", "r2"}
        assert (rows["r1"]["status"], rows["r1"]["error"]) == ("retrying", "provider_error")
        assert (rows["r2"]["status"], rows["r2"]["error"]) == ("parked", "rate_limited")
        assert "scripted" in rows["r1"]["message"]
        assert [rows[name]["failed_at"] for name in ("r1", "r2")] == pytest.approx([began, began])
        assert [rows[name]["due_at"] for name in ("r1", "r2")] == pytest.approx([began + 40, began + 30])


@pytest.mark.promise("F2")
async def test_a_request_that_waits_for_a_retry_is_found_behind_any_number_of_scheduled_requests() -> None:
    async with serving({"team": {"kind": "stub"}}, clock=SimulatedClock()) as house:
        for number in range(250):
            await house.begin(f"later {number}", "scheduled", delay=10)
        for number in range(3):
            fails = {"fail": "provider_error", "retry_after": 40 + number}
            await house.begin(f"again {number}", "retrying", provider_options=fails)

        async def page(**data: Any) -> tuple[list[str], str | None]:
            status = await house.wire.ask("completion:retry_status", **data)
            return [row["request_id"] for row in status["waiting"]], status.get("cursor")

        assert await page() == (["again 0", "again 1", "again 2"], None)
        names, cursor = await page(limit=7)
        assert (names, cursor) == (["again 0", "again 1", "again 2"], None)
        names, cursor = await page(limit=3, cursor=(await page(limit=1))[1])
        assert (names, cursor) == (["again 0", "again 1", "again 2"], None)
        seen: list[str] = []
        cursor = None
        while True:
            names, cursor = await page(limit=2, **({} if cursor is None else {"cursor": cursor}))
            assert len(names) <= 2
            seen += names
            if cursor is None:
                break
        assert seen == ["again 0", "again 1", "again 2"]


# -- F2: clients' reports, requeues ------------------------------------------------------------------------------------


@pytest.mark.promise("F2")
async def test_a_client_that_saw_a_running_attempt_fail_ends_it() -> None:
    async with (
        ScriptedEndpoint(*again(SILENT)) as endpoint,
        serving({"team": provider("openai", endpoint)}) as house,
    ):
        await house.begin("r1", "running")
        await endpoint.wait_for_requests(1)
        reply = await house.wire.ask("completion:failed", request_id="r1", reason="timeout", message="it hung")
        assert (reply["request_id"], reply["status"]) == ("r1", "retry_scheduled")
        done = await in_state(house.wire, "r1", "completed")
        assert trail(done) == [("team", "failed", "timeout"), ("team", "completed", None)]
        assert done["attempts"][0]["message"] == "it hung"
        async with asyncio.timeout(5):
            await endpoint.requests[0].gone.wait()
        late = await house.wire.ask("completion:failed", request_id="r1")
        assert (late["status"], late["state"]) == ("not_retryable", "completed")


@pytest.mark.promise("F2")
async def test_a_reported_failure_that_no_retry_can_help_ends_the_request() -> None:
    async with ScriptedEndpoint(SILENT) as endpoint, serving({"team": provider("openai", endpoint)}) as house:
        await house.begin("r1", "running")
        reply = await house.wire.ask("completion:failed", request_id="r1", reason="invalid_request")
        assert (reply["status"], reply["state"]) == ("not_retryable", "failed")


@pytest.mark.promise("F2")
async def test_a_failure_of_a_request_that_does_not_run_changes_nothing() -> None:
    clock = SimulatedClock()
    async with (
        ScriptedEndpoint(FAILS) as endpoint,
        serving({"team": provider("openai", endpoint)}, clock=clock) as house,
    ):
        await house.begin("r1", "retrying", retry={"initial_delay": 1000, "max_delay": 1000})
        reply = await house.wire.ask("completion:failed", request_id="r1", reason="timeout")
        assert (reply["status"], reply["state"]) == ("not_running", "retrying")
        unknown = await house.wire.ask("completion:failed", request_id="nobody")
        assert unknown == {"request_id": "nobody", "status": "not_found"}
        error = await house.wire.refused("completion:failed", request_id="r1", reason="bad mood")
        assert (error.code, error.details["path"]) == ("invalid_data", "reason")
        assert "timeout" in error.message


@pytest.mark.promise("F2")
async def test_a_failed_request_is_asked_again_as_a_new_one() -> None:
    async with (
        ScriptedEndpoint(*again(Answer(status=400))) as endpoint,
        serving({"team": provider("openai", endpoint)}) as house,
    ):
        failed = await house.asked("What now?", session_id="talk", agent_id="ann", request_id="r1", priority="high")
        assert failed["status"] == "failed"
        reply = await house.wire.ask("completion:requeue", request_id="r1")
        assert reply["request_id"] != "r1"
        assert reply["session_id"] == "talk"
        done = await in_state(house.wire, reply["request_id"], "completed")
        assert (done["requeued_from"], done["agent_id"], done["priority"]) == ("r1", "ann", "high")
        assert endpoint.requests[1].json == endpoint.requests[0].json
        assert (await house.wire.ask("completion:get", request_id="r1"))["status"] == "failed"


@pytest.mark.promise("F2")
async def test_only_a_request_that_ended_without_an_answer_is_asked_again() -> None:
    async with ScriptedEndpoint(GOOD) as endpoint, serving({"team": provider("openai", endpoint)}) as house:
        await house.asked(request_id="done")
        await house.begin("later", "scheduled", delay=1000)
        for name, state in (("done", "completed"), ("later", "scheduled")):
            error = await house.wire.refused("completion:requeue", request_id=name)
            assert error.code == "invalid_data"
            assert state in error.message
        assert (await house.wire.refused("completion:requeue", request_id="nobody")).code == "not_found"
        await house.wire.ask("completion:cancel", request_id="later")
        again = await house.wire.ask("completion:requeue", request_id="later")
        assert (await in_state(house.wire, again["request_id"], "completed"))["requeued_from"] == "later"


@pytest.mark.promise("F10", "Q3")
@pytest.mark.parametrize("on_interrupted", ["retry", "fail"])
async def test_a_request_interrupted_by_a_kill_runs_again_or_fails_as_configured(
    tmp_path: Path, on_interrupted: str
) -> None:
    async with ScriptedEndpoint(*again(SILENT)) as endpoint:
        home = make_home(
            tmp_path,
            f'[queue]\non_interrupted = "{on_interrupted}"\n'
            f'[providers.team]\nkind = "openai"\nbase_url = "{endpoint.openai_url}"\n',
        )
        daemon = DaemonProcess(home)
        with daemon:
            async with await Wire.open(daemon.socket_path) as wire:
                await wire.ask("completion:async", request_id="r1", prompt="Hi", model="team/x")
                await endpoint.wait_for_requests(1)
            daemon.end(signal.SIGKILL)
            daemon.start()
            async with await Wire.open(daemon.socket_path) as wire:
                reply = await wire.ask("completion:wait", request_id="r1")
        interrupted = ("team", "interrupted", "daemon_restart")
        if on_interrupted == "fail":
            assert (reply["status"], reply["error"]["code"]) == ("failed", "daemon_restart")
            assert trail(reply) == [interrupted]
        else:
            assert trail(reply) == [interrupted, ("team", "completed", None)]
            assert reply["usage"]["unknown_attempts"] == 1
        assert reply["interruptions"] == 1
        assert len(endpoint.requests) == len(reply["attempts"])


# -- F4: failover -----------------------------------------------------------------------------------------------------


@both_apis
@pytest.mark.promise("F4")
@pytest.mark.parametrize(
    "bad",
    [FAILS, Answer(status=401), Answer(status=429), Answer(hang_up=True), QUOTA],
    ids=["500", "401", "429", "hang-up", "quota"],
)
async def test_the_next_provider_of_the_route_takes_over_at_once_and_the_answer_says_who(api: str, bad: Answer) -> None:
    clock = SimulatedClock()
    other = "anthropic" if api == "openai" else "openai"
    async with (
        ScriptedEndpoint(bad) as first,
        ScriptedEndpoint(Answer(model="team-small-b")) as second,
        serving(
            {"a": provider(api, first, priority=1), "b": provider(other, second, priority=2)},
            clock=clock,
            retry={"max_attempts": 1},
        ) as house,
    ):
        reply = await house.asked(session_id="talk")
        assert (reply["status"], reply["provider"], reply["model"]) == ("completed", "b", "team-small-b")
        assert [entry[:2] for entry in trail(reply)] == [
            ("a", "parked" if bad.status == 429 else "failed"),
            ("b", "completed"),
        ]
        assert (len(first.requests), len(second.requests)) == (1, 1)


@pytest.mark.promise("F4")
async def test_a_fault_of_the_request_is_not_carried_to_others() -> None:
    async with (
        ScriptedEndpoint(Answer(status=400)) as first,
        ScriptedEndpoint() as second,
        serving({"a": provider("openai", first, priority=1), "b": provider("openai", second, priority=2)}) as house,
    ):
        assert (await house.asked())["status"] == "failed"
        assert second.requests == []


@pytest.mark.promise("F4")
async def test_the_model_s_fallbacks_come_after_all_of_its_providers() -> None:
    async with (
        ScriptedEndpoint(FAILS) as first,
        ScriptedEndpoint(FAILS) as second,
        ScriptedEndpoint() as third,
        serving(
            {
                "a": provider("openai", first, priority=1),
                "b": provider("openai", second, priority=2),
                "spare": provider("anthropic", third, models=["spare/*"], priority=0),
            },
            models={"team/small": {"fallbacks": ["spare/tiny"]}},
            retry={"max_attempts": 1},
        ) as house,
    ):
        reply = await house.asked()
        assert [entry[0] for entry in trail(reply)] == ["a", "b", "spare"]
        assert (reply["provider"], reply["model"], reply["requested_model"]) == ("spare", "tiny", "team/small")
        assert [endpoint.requests[0].json["model"] for endpoint in (first, second, third)] == ["small", "small", "tiny"]
        other = await house.asked(model="team/other")
        assert other["status"] == "failed"
        assert len(third.requests) == 1


@pytest.mark.promise("F2", "F4")
async def test_after_a_wait_every_provider_of_the_route_is_asked_again() -> None:
    async with (
        ScriptedEndpoint(FAILS, FAILS, GOOD) as first,
        ScriptedEndpoint(FAILS) as second,
        serving({"a": provider("openai", first, priority=1), "b": provider("openai", second, priority=2)}) as house,
    ):
        reply = await house.asked(retry={"max_attempts": 5})
        assert [entry[:2] for entry in trail(reply)] == [
            ("a", "failed"),
            ("b", "failed"),
            ("a", "failed"),
            ("b", "failed"),
            ("a", "completed"),
        ]


@pytest.mark.promise("F4", "Q6")
async def test_a_request_that_failed_over_goes_back_when_its_new_provider_cannot_be_asked() -> None:
    async with (
        ScriptedEndpoint(*again(FAILS)) as first,
        ScriptedEndpoint(SILENT) as second,
        serving(
            {
                "a": provider("openai", first, priority=1),
                "b": provider("openai", second, priority=2, max_concurrency=1, models=["team/*", "b/*"]),
            },
        ) as house,
    ):
        await house.begin("hangs", "running", model="b/x")
        await house.begin("r1", "queued")
        await house.wire.ask("provider:disable", provider="b")
        reply = await in_state(house.wire, "r1", "completed")
        assert [entry[:2] for entry in trail(reply)] == [("a", "failed"), ("a", "completed")]


@pytest.mark.promise("L8", "F4")
async def test_a_failover_keeps_the_conversation_s_order() -> None:
    async with (
        ScriptedEndpoint(FAILS) as first,
        ScriptedEndpoint() as second,
        serving({"a": provider("openai", first, priority=1), "b": provider("openai", second, priority=2)}) as house,
    ):
        replies = await asyncio.gather(*(answer(house.ask(f"turn {n}", session_id="talk")) for n in range(4)))
        assert [reply["status"] for reply in replies] == ["completed"] * 4
        said = [[m["content"] for m in seen.json["messages"] if m["role"] == "user"] for seen in second.requests]
        assert said == [[f"turn {n}" for n in range(turns + 1)] for turns in range(4)]


@both_apis
@pytest.mark.promise("R2", "F2", "F4")
@pytest.mark.parametrize("elsewhere", [False, True], ids=["again", "elsewhere"])
async def test_a_stream_that_broke_starts_over_and_only_its_last_text_counts(api: str, elsewhere: bool) -> None:
    cut = Answer(pieces=("Half of", " it"), cut_after=1, piece_delay=0.02)
    whole = Answer(pieces=("All ", "of ", "it."))
    async with (
        ScriptedEndpoint(cut, *(() if elsewhere else (whole,))) as first,
        ScriptedEndpoint(whole) as second,
        serving(
            {"a": provider(api, first, priority=1), **({"b": provider(api, second, priority=2)} if elsewhere else {})}
        ) as house,
    ):
        reply = await house.asked(request_id="r1", stream=True)
        assert reply["result"] == "All of it."
        assert reply["attempts"][0]["text"] == "Half of"
        pushed = [line["data"] for line in house.wire.lines if line["event"] == "completion:chunk"]
        texts = {1: "", 2: ""}
        for attempt, text in texts.items():
            mine = [chunk for chunk in pushed if chunk["attempt"] == attempt]
            assert [chunk["seq"] for chunk in mine] == list(range(len(mine)))
            texts[attempt] = text.join(chunk["text"] for chunk in mine)
        assert texts == {1: "Half of", 2: "All of it."}


# -- F3: breakers -----------------------------------------------------------------------------------------------------

BREAKER = {"failures": 3, "open_for": 10.0, "probes_to_close": 2}


@both_apis
@pytest.mark.promise("F3", "F4")
async def test_the_circuit_of_a_provider_that_keeps_failing_opens_half_opens_and_closes(api: str) -> None:
    clock = SimulatedClock()
    async with (
        ScriptedEndpoint(FAILS, FAILS, FAILS, FAILS, GOOD) as first,
        ScriptedEndpoint() as second,
        serving(
            {"a": provider(api, first, priority=1), "b": provider(api, second, priority=2)},
            clock=clock,
            breaker=BREAKER,
        ) as house,
    ):
        who = [(await house.asked())["provider"] for _ in range(6)]
        assert who == ["b"] * 6
        assert len(first.requests) == 3, "an open breaker let a call out"
        assert await house.changes(1) == [("a", "closed", "open")]
        status = await house.status("a")
        assert status["breaker"] == "open"
        assert status["open_until"] == pytest.approx(clock.now().unix + 10)
        assert (await house.wire.ask("system:health"))["status"] == "degraded"

        await clock.advance(10)
        assert (await house.asked())["provider"] == "b", "the probe failed"
        assert await house.changes(2) == [("a", "open", "half_open"), ("a", "half_open", "open")]
        await clock.advance(10)
        assert (await house.asked())["provider"] == "b"
        assert len(first.requests) == 4, "it is left alone for twice as long"
        await clock.advance(10)
        assert [(await house.asked())["provider"] for _ in range(3)] == ["a"] * 3
        assert await house.changes(2) == [("a", "open", "half_open"), ("a", "half_open", "closed")]
        assert (await house.status("a"))["breaker"] == "closed"


@pytest.mark.promise("F3", "Q6")
async def test_while_a_probe_hangs_others_go_on_elsewhere() -> None:
    clock = SimulatedClock()
    async with (
        ScriptedEndpoint(FAILS, FAILS, FAILS, SILENT) as first,
        ScriptedEndpoint() as second,
        serving(
            {"a": provider("openai", first, priority=1), "b": provider("openai", second, priority=2)},
            clock=clock,
            breaker=BREAKER,
        ) as house,
    ):
        for _ in range(3):
            await house.asked()
        await clock.advance(10)
        await house.begin("probe", "running")
        await first.wait_for_requests(4)
        assert [(await house.asked())["provider"] for _ in range(5)] == ["b"] * 5
        assert len(first.requests) == 4
        await house.wire.ask("completion:cancel", request_id="probe")
        assert (await house.status("a"))["breaker"] == "half_open", "what was stopped says nothing"


@pytest.mark.promise("F3")
async def test_with_no_other_provider_requests_wait_for_the_breaker_and_are_not_used_up() -> None:
    clock = SimulatedClock()
    async with (
        ScriptedEndpoint(FAILS, FAILS, FAILS, GOOD) as endpoint,
        serving({"team": provider("openai", endpoint)}, clock=clock, breaker=BREAKER) as house,
    ):
        for number in range(3):
            await house.begin(f"bad {number}", "failed", retry={"max_attempts": 1})
        for number in range(5):
            await house.begin(f"r{number}", "queued")
        assert len(endpoint.requests) == 3
        await clock.advance(10)
        for number in range(5):
            assert len((await in_state(house.wire, f"r{number}", "completed"))["attempts"]) == 1
        assert await house.changes(3) == [
            ("team", "closed", "open"),
            ("team", "open", "half_open"),
            ("team", "half_open", "closed"),
        ]


@pytest.mark.promise("F3")
@pytest.mark.parametrize("status", [400, 404, 413])
async def test_bad_requests_never_trip_it(status: int) -> None:
    async with (
        ScriptedEndpoint(Answer(status=status)) as endpoint,
        serving({"team": provider("openai", endpoint)}, breaker={"failures": 1, "rate": 0.01}) as house,
    ):
        for _ in range(20):
            assert (await house.asked())["status"] == "failed"
        report = await house.status("team")
        assert (report["breaker"], report["failures"]) == ("closed", 20)
        assert len(endpoint.requests) == 20


# -- F5: quotas and limits --------------------------------------------------------------------------------------------


@both_apis
@pytest.mark.promise("F5")
async def test_a_spent_quota_parks_its_requests_without_using_attempts_and_others_go_on(api: str) -> None:
    clock = SimulatedClock()
    async with (
        ScriptedEndpoint(QUOTA, QUOTA, GOOD) as spent,
        ScriptedEndpoint() as well,
        serving(
            {"spent": provider(api, spent, models=["spent/*"]), "well": provider(api, well, models=["well/*"])},
            clock=clock,
            retry={"max_attempts": 1},
        ) as house,
    ):
        began = clock.now().unix
        parked = await house.begin("r0", "parked", model="spent/x")
        assert parked["due_at"] == pytest.approx(began + 30)
        assert await house.changes(1) == [("spent", "closed", "parked")]
        assert (await house.status("spent"))["parked_until"] == pytest.approx(began + 30)
        for number in range(1, 4):
            await house.begin(f"r{number}", "queued", model="spent/x")
        assert (await house.asked(model="well/x"))["status"] == "completed"
        await clock.advance(29.9)
        assert len(spent.requests) == 1
        await clock.advance(0.1)
        await spent.wait_for_requests(2)
        replies = [await house.advance_to(f"r{number}", "completed", "failed") for number in range(4)]
        assert [reply["status"] for reply in replies] == ["completed"] * 4
        outcomes = [[entry[1] for entry in trail(reply)] for reply in replies]
        assert await house.changes(1) == [("spent", "parked", "closed")], "it is told once, however often it was met"
        refused = sum(outcome.count("parked") for outcome in outcomes)
        assert refused == 2, "only the two that the endpoint refused were parked"
        assert all(outcome == ["parked"] * (len(outcome) - 1) + ["completed"] for outcome in outcomes)


@pytest.mark.promise("F5")
async def test_a_parked_request_is_asked_as_soon_as_the_first_of_its_providers_is_back() -> None:
    clock = SimulatedClock()
    async with (
        ScriptedEndpoint(*again(Answer(status=429, headers={"Retry-After": "20"}))) as soon,
        ScriptedEndpoint(Answer(status=429, headers={"Retry-After": "3600"})) as late,
        serving(
            {"a": provider("openai", soon, priority=1), "b": provider("openai", late, priority=2)}, clock=clock
        ) as house,
    ):
        reply = await house.begin("r1", "parked")
        assert reply["due_at"] == pytest.approx(clock.now().unix + 20)
        await clock.advance(20)
        assert (await in_state(house.wire, "r1", "completed"))["provider"] == "a"


@pytest.mark.promise("F5")
async def test_a_day_that_never_comes_is_not_believed_and_found_out_by_asking() -> None:
    clock = SimulatedClock()
    never = Answer(status=429, headers={"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "999999999d"})
    async with (
        ScriptedEndpoint(never) as endpoint,
        serving({"team": provider("openai", endpoint)}, clock=clock) as house,
    ):
        reply = await house.begin("r1", "parked")
        assert reply["due_at"] == pytest.approx(clock.now().unix + 1)


@pytest.mark.promise("F5")
async def test_requests_per_minute_are_kept_on_our_side() -> None:
    clock = SimulatedClock()
    async with (
        ScriptedEndpoint() as endpoint,
        serving({"team": provider("openai", endpoint, requests_per_minute=4)}, clock=clock) as house,
    ):
        futures = [house.ask() for _ in range(7)]
        await asyncio.gather(*(answer(future) for future in futures[:4]))
        await clock.advance(14.9)
        assert len(endpoint.requests) == 4
        await clock.advance(0.2)
        await endpoint.wait_for_requests(5)
        await clock.advance(14.5)
        assert len(endpoint.requests) == 5
        await clock.advance(30)
        await endpoint.wait_for_requests(7)


@pytest.mark.promise("F5")
async def test_tokens_per_minute_are_counted_as_the_provider_reports_them() -> None:
    clock = SimulatedClock()
    answers = Answer(usage=Answer().usage)
    async with (
        ScriptedEndpoint(answers) as endpoint,
        serving({"team": provider("openai", endpoint, tokens_per_minute=30, max_concurrency=1)}, clock=clock) as house,
    ):
        await house.asked("x" * 3000, request_id="long")
        await house.begin("r1", "completed")  # 15 of 30 are left: what was guessed for the long prompt is put back
        await house.begin("r2", "queued")
        await clock.advance(1.9)
        assert len(endpoint.requests) == 2
        await clock.advance(0.2)
        await in_state(house.wire, "r2", "completed")


# -- the operator -----------------------------------------------------------------------------------------------------


@pytest.mark.promise("F3", "F4")
async def test_an_operator_takes_a_provider_out_and_in_again() -> None:
    async with (
        ScriptedEndpoint() as first,
        ScriptedEndpoint() as second,
        serving({"a": provider("openai", first, priority=1), "b": provider("openai", second, priority=2)}) as house,
    ):
        assert (await house.wire.ask("provider:disable", provider="a"))["enabled"] is False
        await house.wire.ask("provider:disable", provider="a")
        assert (await house.asked())["provider"] == "b"
        await house.wire.ask("provider:disable", provider="b")
        await house.begin("waits", "queued")
        assert (await house.wire.ask("provider:enable", provider="a"))["enabled"] is True
        assert (await in_state(house.wire, "waits", "completed"))["provider"] == "a"
        assert await house.changes(3) == [
            ("a", "enabled", "disabled"),
            ("b", "enabled", "disabled"),
            ("a", "disabled", "enabled"),
        ]
        error = await house.wire.refused("provider:enable", provider="c")
        assert error.code == "not_found"
        assert "a, b" in error.message


@pytest.mark.promise("F4", "Q6")
async def test_a_request_that_waits_for_a_provider_s_slot_goes_to_the_next_when_it_is_removed() -> None:
    async with (
        ScriptedEndpoint(SILENT) as first,
        ScriptedEndpoint() as second,
        serving(
            {
                "a": provider("openai", first, priority=1, max_concurrency=1),
                "b": provider("openai", second, priority=2),
            }
        ) as house,
    ):
        await house.begin("hangs", "running")
        await house.begin("waits", "queued")
        await house.wire.ask("provider:disable", provider="a")
        assert (await in_state(house.wire, "waits", "completed"))["provider"] == "b"
        assert (await house.wire.ask("completion:get", request_id="hangs"))["status"] == "running"


@pytest.mark.promise("F3", "F5")
async def test_a_reset_provider_is_asked_at_once() -> None:
    clock = SimulatedClock()
    async with (
        ScriptedEndpoint(FAILS, FAILS, FAILS, GOOD) as failing,
        ScriptedEndpoint(*again(QUOTA)) as spent,
        serving(
            {"team": provider("openai", failing), "spent": provider("openai", spent, models=["spent/*"])},
            clock=clock,
            breaker=BREAKER,
        ) as house,
    ):
        for number in range(3):
            await house.begin(f"bad {number}", "failed", retry={"max_attempts": 1})
        await house.begin("parked", "parked", model="spent/x")
        await house.begin("r1", "queued")
        await house.begin("r2", "queued", model="spent/x")
        assert (await house.wire.ask("provider:reset", provider="team"))["breaker"] == "closed"
        assert (await house.wire.ask("provider:reset", provider="spent"))["parked_until"] is None
        for name in ("r1", "r2", "parked"):
            await in_state(house.wire, name, "completed")
        assert await house.changes(4) == [
            ("team", "closed", "open"),
            ("spent", "closed", "parked"),
            ("team", "open", "closed"),
            ("spent", "parked", "closed"),
        ]


@pytest.mark.promise("F6")
async def test_a_provider_s_health_can_be_seen() -> None:
    def script(seen: Seen) -> Answer:
        word = seen.json["messages"][-1]["content"]
        return {"fail": FAILS, "slow": Answer(delay=0.2), "hang": SILENT}.get(word, GOOD)

    async with (
        ScriptedEndpoint(script=script) as endpoint,
        serving({"team": provider("openai", endpoint)}, retry={"max_attempts": 1}) as house,
    ):
        fresh = await house.status("team")
        assert (fresh["calls"], fresh["success_rate"], fresh["latency_ms"], fresh["last_error"]) == (
            0,
            None,
            None,
            None,
        )
        for word in ("a", "b", "slow", "fail"):
            await house.asked(word, stream=True)
        await house.begin("hangs", "running", prompt="hang")
        await house.begin("stopped", "running", prompt="hang")
        await house.wire.ask("completion:cancel", request_id="stopped")
        report = await house.status("team")
        assert (report["calls"], report["failures"], report["running"]) == (4, 1, 1)
        assert report["success_rate"] == 0.75
        assert report["outcomes"] == {"completed": 3, "provider_error": 1}
        assert report["latency_ms"]["p50"] < 200 <= report["latency_ms"]["p95"]
        assert report["time_to_first_token_ms"]["p95"] >= 200
        assert report["last_error"]["code"] == "provider_error"
        assert "scripted" in report["last_error"]["message"]
        assert (report["max_concurrency"], report["breaker"], report["enabled"]) == (8, "closed", True)


# -- L3, L8, F8: waits for a retry
# --------------------------------------------------------------------------------------


@pytest.mark.promise("L8")
@pytest.mark.parametrize("bad", [FAILS, QUOTA], ids=["retrying", "parked"])
@pytest.mark.parametrize("hold", [True, False], ids=["holding", "letting go"])
async def test_a_request_that_waits_keeps_its_place_unless_it_lets_others_pass(bad: Answer, hold: bool) -> None:
    clock = SimulatedClock()
    script = {"first": [bad, GOOD]}

    def play(seen: Seen) -> Answer:
        prompt = seen.json["messages"][-1]["content"]
        return script[prompt].pop(0) if prompt in script else GOOD

    long = {"initial_delay": 1000.0, "max_delay": 1000.0}
    async with (
        ScriptedEndpoint(script=play) as endpoint,
        ScriptedEndpoint() as other,
        serving(
            {"team": provider("openai", endpoint), "other": provider("openai", other, models=["other/*"])},
            clock=clock,
            retry=long,
        ) as house,
    ):
        state = "parked" if bad is QUOTA else "retrying"
        await house.begin("r1", state, prompt="first", session_id="talk", hold_on_retry=hold)
        if hold:
            waiting = await house.begin("r2", "queued", prompt="second", session_id="talk", model="other/x")
            assert waiting["holder"] == "r1"
            await house.advance_to("r1", "completed", step=50)
            await in_state(house.wire, "r2", "completed")
            asked = [m["content"] for m in other.requests[0].json["messages"] if m["role"] == "user"]
            assert asked == ["first", "second"]
        else:
            await house.begin("r2", "completed", prompt="second", session_id="talk", model="other/x")
            await house.advance_to("r1", "completed", step=50)
            asked = [m["content"] for m in endpoint.requests[-1].json["messages"] if m["role"] == "user"]
            assert asked == ["second", "first"]


@pytest.mark.promise("L3")
@pytest.mark.parametrize("bad", [FAILS, QUOTA], ids=["retrying", "parked"])
async def test_a_holder_that_waits_can_be_interrupted(bad: Answer) -> None:
    clock = SimulatedClock()
    async with (
        ScriptedEndpoint(bad) as endpoint,
        ScriptedEndpoint() as other,
        serving(
            {"team": provider("openai", endpoint), "other": provider("openai", other, models=["other/*"])},
            clock=clock,
            retry={"initial_delay": 1000.0, "max_delay": 1000.0},
        ) as house,
    ):
        state = "parked" if bad is QUOTA else "retrying"
        await house.begin("r1", state, session_id="talk", priority="high")
        await house.begin("behind", "queued", session_id="talk", model="other/x", priority="critical")
        refused = await house.wire.refused(
            "completion:async", prompt="Now", session_id="talk", model="other/x", on_busy="interrupt", priority="low"
        )
        assert (refused.code, refused.details["holder"]) == ("conversation_busy", "r1")
        given: Json = {"prompt": "Now", "session_id": "talk", "model": "other/x", "priority": "high"}
        reply = await house.wire.ask("completion:request", request_id="r2", on_busy="interrupt", **given)
        assert reply["status"] == "completed"
        stopped = await in_state(house.wire, "r1", "cancelled")
        assert (stopped["interrupted_by"], stopped["error"]["code"]) == ("r2", "cancelled")
        await in_state(house.wire, "behind", "completed")
        assert [seen.json["messages"][-1]["content"] for seen in other.requests] == ["Now", "Hi"]


@pytest.mark.promise("F8", "L3")
@pytest.mark.parametrize("bad", [FAILS, QUOTA], ids=["retrying", "parked"])
async def test_a_request_that_waits_for_a_retry_can_be_cancelled_and_lets_the_next_one_in(bad: Answer) -> None:
    clock = SimulatedClock()
    async with (
        ScriptedEndpoint(bad) as endpoint,
        ScriptedEndpoint() as other,
        serving(
            {"team": provider("openai", endpoint), "other": provider("openai", other, models=["other/*"])},
            clock=clock,
            retry={"initial_delay": 1000.0, "max_delay": 1000.0},
        ) as house,
    ):
        await house.begin("r1", "retrying", "parked", session_id="talk")
        await house.begin("r2", "queued", session_id="talk", model="other/x")
        cancelled = await house.wire.ask("completion:cancel", request_id="r1")
        assert (cancelled["status"], cancelled["state"]) == ("cancelled", "cancelled")
        assert (await in_state(house.wire, "r2", "completed"))["status"] == "completed"
        await clock.advance(1001)
        assert len(endpoint.requests) == 1
        later = await house.wire.ask("completion:cancel", request_id="r1")
        assert (later["status"], later["state"]) == ("already_final", "cancelled")


@both_apis
@pytest.mark.promise("F8")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_cancel_ends_the_call_at_the_endpoint(api: str, stream: bool) -> None:
    hangs = Answer(stall_after=1) if stream else SILENT
    async with ScriptedEndpoint(hangs) as endpoint, serving({"team": provider(api, endpoint)}) as house:
        future = house.ask(request_id="r1", stream=stream)
        await endpoint.wait_for_requests(1)
        if stream:
            await house.wire.pushed("completion:chunk", request_id="r1")
        cancelled = await house.wire.ask("completion:cancel", request_id="r1")
        assert cancelled["status"] == "cancelled"
        async with asyncio.timeout(5):
            await endpoint.requests[0].gone.wait()
        reply = await answer(future)
        assert trail(reply) == [("team", "cancelled", "cancelled")]
        assert (await house.status("team"))["calls"] == 0, "a cancel is no failure of the provider"


async def _many(house: House, count: int, **data: Any) -> list[Json]:
    return await asyncio.gather(*(answer(house.ask(f"Question {n}", **data)) for n in range(count)))


@pytest.mark.promise("F3", "F4")
async def test_a_provider_that_dies_under_load_costs_no_more_calls_than_its_threshold_and_those_under_way() -> None:
    async with (
        ScriptedEndpoint(FAILS) as dead,
        ScriptedEndpoint(Answer(delay=0.01)) as well,
        serving(
            {
                "a": provider("openai", dead, priority=1, max_concurrency=4),
                "b": provider("openai", well, priority=2, max_concurrency=8),
            },
            breaker={"failures": 5, "open_for": 60.0},
        ) as house,
    ):
        replies = await _many(house, 60)
        assert [reply["provider"] for reply in replies] == ["b"] * 60
        assert 5 <= len(dead.requests) <= 5 + 3
        assert len(well.requests) == 60
        await until(lambda: _open(house))


async def _open(house: House) -> bool:
    return bool((await house.status("a"))["breaker"] == "open")
