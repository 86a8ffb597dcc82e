"""From a line to a handler and back."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from ksi.errors import InternalError, NotFound, QueueFull
from ksi.events.bus import News
from ksi.events.completions import CompletionData, RequestReply
from ksi.events.conversations import ReleaseReply
from ksi.events.specs import SPECS
from ksi.testing import SimulatedClock
from ksi.transports.dispatch import LATER, Dispatcher, Exchange, Handler
from tests.effort import effort

INCOMING = sorted(name for name, spec in SPECS.items() if spec.incoming)
OUTGOING = sorted(name for name, spec in SPECS.items() if not spec.incoming)


class Wire:
    """A connection that keeps what is sent."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.settled = 0

    def push(self, line: bytes) -> None:
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        self.lines.append(line)

    def news(self, news: News) -> None:
        self.push(news.line())

    def answer(self, line: bytes) -> None:
        self.settled += 1
        self.push(line)

    def replies(self) -> list[dict[str, Any]]:
        """What was sent, as JSON."""
        return [msgspec.json.decode(line) for line in self.lines]


class Service:
    """Handlers that do what a test says, and keep what they were asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.reply: Any = {"done": True}
        self.error: Exception | None = None
        self.exchanges: list[Exchange] = []
        self.dispatcher = Dispatcher({name: self._handler(name) for name in INCOMING}, SimulatedClock(wall=7.5))

    def _handler(self, name: str) -> Handler:
        async def handle(data: Any, exchange: Exchange) -> Any:
            self.asked.append((name, data))
            self.exchanges.append(exchange)
            if self.error is not None:
                raise self.error
            return self.reply

        return handle

    async def say(self, event: str, wire: Wire | None = None, **rest: Any) -> dict[str, Any]:
        """Send one event; returns the answer, of which there is one."""
        wire = wire if wire is not None else Wire()
        before = len(wire.lines)
        await self.dispatcher.serve(msgspec.json.encode({"event": event, **rest}), wire)
        (reply,) = wire.replies()[before:]
        return reply


@pytest.fixture
def service() -> Service:
    return Service()


# -- replies ----------------------------------------------------------------------------------------------------------


@pytest.mark.promise("S1")
async def test_an_event_is_answered_with_its_name_its_correlation_id_and_the_time(service: Service) -> None:
    wire = Wire()
    reply = await service.say("completion:async", wire, data={"prompt": "x"}, correlation_id="c1", client_id="old")
    assert reply == {
        "event": "completion:async",
        "data": {"done": True},
        "correlation_id": "c1",
        "timestamp": 7.5,
    }
    ((name, data),) = service.asked
    assert name == "completion:async"
    assert isinstance(data, CompletionData)
    assert data.prompt == "x"
    assert wire.settled == 1


@pytest.mark.parametrize("correlation", ["", "x", 5, 2**62])
async def test_a_correlation_id_may_be_text_or_a_number(service: Service, correlation: str | int) -> None:
    reply = await service.say("system:health", correlation_id=correlation)
    assert reply["correlation_id"] == correlation


async def test_without_a_correlation_id_there_is_none_in_the_answer(service: Service) -> None:
    assert "correlation_id" not in await service.say("system:health")


async def test_an_answer_can_come_later(service: Service) -> None:
    service.reply = LATER
    wire = Wire()
    await service.dispatcher.serve(b'{"event": "completion:request", "data": {"prompt": "x"}}', wire)
    assert (wire.lines, wire.settled) == ([], 0)
    service.exchanges[0].answer({"late": True})
    assert wire.replies()[0]["data"] == {"late": True}
    assert wire.settled == 1


async def test_a_later_answer_can_be_an_error(service: Service) -> None:
    service.reply = LATER
    wire = Wire()
    await service.dispatcher.serve(b'{"event": "completion:wait", "data": {"request_id": "r"}}', wire)
    service.exchanges[0].refuse(NotFound("gone", request_id="r"))
    assert wire.replies()[0]["error"]["code"] == "not_found"
    assert wire.settled == 1


# -- warnings ---------------------------------------------------------------------------------------------------------


@pytest.mark.promise("S1")
@pytest.mark.parametrize(
    "reply",
    [
        {"done": True},
        RequestReply(request_id="r", status="queued", session_id="s"),
        ReleaseReply(released=True, conversation_id="c", request_id="r"),
    ],
)
async def test_unknown_fields_are_harmless_and_named_with_a_guess(service: Service, reply: Any) -> None:
    service.reply = reply
    answer = await service.say("completion:async", data={"prompt": "x", "agent_idd": "a", "zzz": 1})
    assert len(answer["data"]["warnings"]) == 2
    assert "'agent_id'" in answer["data"]["warnings"][0]
    assert (await service.say("completion:async", data={"prompt": "x"}))["data"].get("warnings") is None


@pytest.mark.promise("S1", "R1")
async def test_one_answer_for_two_who_wait_carries_to_each_its_own_warnings(service: Service) -> None:
    service.reply = LATER
    wrong, right = Wire(), Wire()
    await service.dispatcher.serve(b'{"event": "completion:wait", "data": {"request_id": "r", "timeuot": 1}}', wrong)
    await service.dispatcher.serve(b'{"event": "completion:wait", "data": {"request_id": "r"}}', right)
    reply = RequestReply(request_id="r", status="completed", session_id="s")
    for exchange in service.exchanges:
        exchange.answer(reply)
    assert len(wrong.replies()[0]["data"]["warnings"]) == 1
    assert "warnings" not in right.replies()[0]["data"]
    assert reply.warnings == []


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.promise("S1")
@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b'{"data": ' * 100_000, "invalid_json"),
        (b"[]", "invalid_envelope"),
        (b'"x"', "invalid_envelope"),
        (b"{}", "invalid_envelope"),
        (b'{"event": 5}', "invalid_envelope"),
        (b'{"event": "system:health", "data": []}', "invalid_envelope"),
        (b'{"event": "system:health", "correlation_id": {}}', "invalid_envelope"),
        (b'{"event": "nothing:here"}', "unknown_event"),
        (b'{"event": ""}', "unknown_event"),
        (b'{"event": "completion:result"}', "invalid_direction"),
        (b'{"event": "completion:async", "data": {"prompt": 5}}', "invalid_data"),
        (b'{"event": "completion:get"}', "invalid_data"),
    ],
)
async def test_every_mistake_has_a_code_and_the_connection_lives_on(service: Service, line: bytes, code: str) -> None:
    wire = Wire()
    await service.dispatcher.serve(line, wire)
    (reply,) = wire.replies()
    assert reply["error"]["code"] == code
    assert reply["error"]["message"]
    assert wire.settled == 1
    assert service.asked == []
    assert (await service.say("system:health", wire))["data"] == {"done": True}


@pytest.mark.promise("S1")
@settings(max_examples=effort(200, 2000))
@given(st.binary(max_size=60) | st.text(max_size=30).map(str.encode))
async def test_any_bytes_get_one_answer(line: bytes) -> None:
    service, wire = Service(), Wire()
    await service.dispatcher.serve(line, wire)
    assert len(wire.replies()) == wire.settled == 1


@pytest.mark.promise("S1")
async def test_an_error_keeps_the_event_s_name_and_correlation_id(service: Service) -> None:
    reply = await service.say("completion:get", data={}, correlation_id=5)
    assert (reply["event"], reply["correlation_id"]) == ("completion:get", 5)
    assert reply["error"]["details"] == {"path": "request_id"}
    assert reply["error"]["retryable"] is False


@pytest.mark.promise("S1")
async def test_an_unknown_event_is_refused_with_a_guess(service: Service) -> None:
    reply = await service.say("completion:asinc")
    assert "'completion:async'" in reply["error"]["message"]
    assert reply["error"]["details"] == {"nearest": "completion:async"}
    far = await service.say("x" * 100_000)
    assert "system:discover" in far["error"]["message"]
    assert len(far["error"]["message"]) < 300


@pytest.mark.promise("S1")
@pytest.mark.parametrize("event", OUTGOING)
async def test_an_event_that_only_the_daemon_sends_is_not_accepted(service: Service, event: str) -> None:
    assert (await service.say(event))["error"]["code"] == "invalid_direction"


async def test_a_service_s_refusal_goes_over_the_wire_with_its_facts(service: Service) -> None:
    service.error = QueueFull("full; try again later", limit=5, nothing=None)
    reply = await service.say("completion:async", data={"prompt": "x"})
    assert reply["error"] == {
        "code": "queue_full",
        "message": "full; try again later",
        "retryable": True,
        "details": {"limit": 5},
    }


@pytest.mark.promise("S1", "S3")
async def test_a_defect_is_an_internal_error_whose_trace_stays_in_the_log(service: Service) -> None:
    service.error = ZeroDivisionError("a secret of the inside")
    with capture_logs() as logs:
        reply = await service.say("system:health")
    assert reply["error"]["code"] == "internal_error"
    assert "secret" not in reply["error"]["message"]
    assert [entry["log_level"] for entry in logs] == ["error"]


@pytest.mark.promise("S1")
async def test_an_answer_that_cannot_be_sent_is_an_internal_error(service: Service) -> None:
    service.reply = {"number": object()}
    with capture_logs() as logs:
        reply = await service.say("system:health")
    assert reply["error"]["code"] == "internal_error"
    assert [entry["log_level"] for entry in logs] == ["error"]


# -- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.promise("R4")
@pytest.mark.parametrize("wrong", [{"nothing:here"}, {"system:health"}])
def test_events_and_handlers_must_match(service: Service, wrong: set[str]) -> None:
    handlers = {name: service._handler(name) for name in set(INCOMING) ^ wrong}
    with pytest.raises(InternalError, match=wrong.copy().pop()):
        Dispatcher(handlers, SimulatedClock())
