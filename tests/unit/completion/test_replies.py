"""From the store's views to what goes over the wire."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ksi.completion.replies import Teller, attempt_reply, milliseconds, request_reply, row_reply, usage_reply
from ksi.completion.usage.prices import Prices
from ksi.config.schema import PriceConfig
from ksi.content.blocks import Message
from ksi.providers.base import Capabilities
from ksi.request import Attempt, Outcome, Priority, RequestBody, State, Usage, encode_body
from ksi.store.values import RequestRow, RequestView

BODY = encode_body(RequestBody(messages=(Message("user", "hello"),)))


def attempt(number: int = 1, outcome: Outcome = Outcome.COMPLETED, **fields: Any) -> Attempt:
    known: dict[str, Any] = {"number": number, "provider": "stub", "outcome": outcome}
    times = {"started_at": 1_000_000 * number, "finished_at": 1_000_000 * number + 250_000}
    return Attempt(**(known | times | fields))


def view(state: State, *attempts: Attempt, **fields: Any) -> RequestView:
    known: dict[str, Any] = {
        "request_id": "r",
        "conversation": "talk",
        "priority": Priority.NORMAL,
        "model": "stub/echo",
        "route": "stub",
        "body": BODY,
        "enqueued_at": 500_000,
    }
    return RequestView(**(known | {"state": state, "attempts": attempts} | fields))


def wire(reply: msgspec.Struct) -> Any:
    return msgspec.json.decode(msgspec.json.encode(reply))


# -- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.promise("R1")
def test_a_completed_request_has_its_answer_who_gave_it_and_its_times() -> None:
    done = attempt(
        text="hi",
        model="echo-1",
        stop_reason="end_turn",
        provider_session="ps",
        usage=Usage(input_tokens=3, output_tokens=2, cache_read_tokens=7),
        first_token_us=1_500,
    )
    fields = {"provider": "stub", "agent_id": "a", "started_at": 1_000_000, "finished_at": 1_250_000}
    assert wire(request_reply(view(State.COMPLETED, done, **fields), 0.5)) == {
        "request_id": "r",
        "status": "completed",
        "session_id": "talk",
        "result": "hi",
        "provider_session_id": "ps",
        "model": "echo-1",
        "requested_model": "stub/echo",
        "provider": "stub",
        "priority": "normal",
        "agent_id": "a",
        "usage": {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5, "cache_read_tokens": 7},
        "cost_usd": 0.5,
        "stop_reason": "end_turn",
        "duration_ms": 250.0,
        "queued_ms": 500.0,
        "enqueued_at": 0.5,
        "started_at": 1.0,
        "finished_at": 1.25,
        "attempts": [
            {
                "attempt": 1,
                "provider": "stub",
                "outcome": "completed",
                "started_at": 1.0,
                "duration_ms": 250.0,
                "model": "echo-1",
                "usage": {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5, "cache_read_tokens": 7},
                "time_to_first_token_ms": 1.5,
                "stop_reason": "end_turn",
            }
        ],
    }


@pytest.mark.promise("F2", "F4")
def test_a_retried_request_counts_from_its_first_start_and_shows_the_failure() -> None:
    failed = attempt(1, Outcome.FAILED, error="overloaded", message="busy", text="hal")
    done = attempt(3, text="hi")
    reply = request_reply(view(State.COMPLETED, failed, done, started_at=3_000_000, finished_at=3_250_000), None)
    assert (reply.queued_ms, reply.duration_ms) == (500.0, 2_250.0)
    assert reply.result == "hi"
    assert [(a.outcome, a.error, a.message, a.text) for a in reply.attempts] == [
        ("failed", "overloaded", "busy", "hal"),
        ("completed", None, None, None),
    ]


@pytest.mark.promise("R1")
@pytest.mark.parametrize("state", [State.FAILED, State.CANCELLED, State.RUNNING, State.QUEUED, State.EXPIRED])
def test_only_a_completed_request_has_a_result(state: State) -> None:
    reply = request_reply(view(state, attempt(text="not its answer")), None)
    assert (reply.result, reply.model, reply.stop_reason, reply.provider_session_id) == (None, None, None, None)
    assert reply.status == state.value


@pytest.mark.promise("F10")
def test_a_late_answer_stays_in_the_trail() -> None:
    late = attempt(1, Outcome.FENCED, text="too late", usage=Usage(input_tokens=1))
    reply = request_reply(view(State.FAILED, late), None)
    assert reply.result is None
    assert reply.attempts[0].text == "too late"


def test_an_error_without_a_message_gets_one() -> None:
    def message(code: str, said: str | None = None) -> str:
        error = request_reply(view(State.FAILED, error=code, message=said), None).error
        assert error is not None
        assert error.code == code
        return error.message

    assert message("daemon_restart").startswith("the daemon ended too often")
    assert "cancelled" in message("cancelled")
    assert message("overloaded") == "overloaded"
    assert message("overloaded", "come back later") == "come back later"


def test_a_request_that_never_ran_has_no_span() -> None:
    reply = request_reply(view(State.QUEUED, position=3, holder="h", due=9_000_000), None)
    assert (reply.queued_ms, reply.duration_ms, reply.started_at, reply.finished_at) == (None, None, None, None)
    assert (reply.position, reply.holder, reply.due_at) == (3, "h", 9.0)


def test_the_client_s_metadata_come_back() -> None:
    body = encode_body(RequestBody(prompt="x", metadata={"a": [1, {"b": None}]}))
    assert request_reply(view(State.QUEUED, body=body), None).metadata == {"a": [1, {"b": None}]}
    quoting = encode_body(RequestBody(prompt='{"metadata": 5}'))
    assert request_reply(view(State.QUEUED, body=quoting), None).metadata is None


# -- usage ------------------------------------------------------------------------------------------------------------


@pytest.mark.promise("T1")
def test_usage_is_the_sum_of_the_reports_and_says_how_many_are_missing() -> None:
    one = attempt(1, Outcome.FAILED, usage=Usage(input_tokens=3, output_tokens=1))
    two = attempt(2, Outcome.INTERRUPTED)
    three = attempt(3, usage=Usage(input_tokens=4, output_tokens=2, reasoning_tokens=1))
    usage = request_reply(view(State.COMPLETED, one, two, three), None).usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens, usage.reasoning_tokens) == (7, 3, 10, 1)
    assert usage.unknown_attempts == 1


@pytest.mark.promise("T1")
def test_no_report_is_unknown_and_never_zero() -> None:
    reply = request_reply(view(State.COMPLETED, attempt(text="hi")), None)
    assert reply.usage is None
    assert reply.attempts[0].usage == "unknown"
    assert attempt_reply(attempt(usage=Usage())).usage == usage_reply(Usage())


def teller(**free: bool) -> Teller:
    return Teller(
        Prices(
            {"team/*": PriceConfig(input=1.0, output=1.0)},
            {name: Capabilities(free=is_free) for name, is_free in free.items()},
        )
    )


@pytest.mark.promise("T1")
async def test_a_cost_is_the_sum_over_attempts_and_unknown_if_one_report_has_no_price() -> None:
    told = teller(stub=True, dear=False)
    reported = Usage(input_tokens=1, cost_usd=0.25)
    free = attempt(2, usage=Usage(input_tokens=5))
    known = await told.tell(view(State.COMPLETED, attempt(1, Outcome.FAILED, usage=reported), free))
    assert known.cost_usd == 0.25
    unpriced = attempt(1, Outcome.FAILED, provider="dear", usage=Usage(input_tokens=5))
    unknown = await told.tell(view(State.COMPLETED, unpriced, attempt(2, usage=reported)))
    assert unknown.cost_usd is None
    silent = await told.tell(view(State.COMPLETED, attempt(1, Outcome.FAILED), attempt(2, usage=reported)))
    assert silent.cost_usd == 0.25
    none = await told.tell(view(State.FAILED, attempt(1, Outcome.FAILED)))
    assert none.cost_usd is None
    never = await told.tell(view(State.QUEUED))
    assert never.cost_usd is None


# -- rows -------------------------------------------------------------------------------------------------------------


def test_a_row_has_the_known_fields_and_leaves_out_the_rest() -> None:
    row = RequestRow(
        request_id="r",
        conversation="talk",
        state=State.PARKED,
        priority=Priority.BACKGROUND,
        model="stub/echo",
        agent_id=None,
        attempt=0,
        enqueued_at=1_500_000,
        due=2_000_000,
        error="rate_limited",
    )
    assert msgspec.to_builtins(row_reply(row)) == {
        "request_id": "r",
        "session_id": "talk",
        "status": "parked",
        "priority": "background",
        "model": "stub/echo",
        "attempt": 0,
        "enqueued_at": 1.5,
        "due_at": 2.0,
        "error": "rate_limited",
    }


@pytest.mark.parametrize(("span", "shown"), [(None, None), (0, 0.0), (1, 0.001), (1_500_000, 1_500.0)])
def test_spans_go_over_the_wire_in_milliseconds(span: int | None, shown: float | None) -> None:
    assert milliseconds(span) == shown
