"""Whatever comes in gets a typed error on its own connection, which lives on; nothing of it harms others."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ksi.daemon.daemon import Daemon
from ksi.errors import LONGEST_QUOTE
from ksi.events.specs import SPECS
from tests.integration.conftest import Connect
from tests.integration.serving import daemon_and_wire
from tests.integration.wire import Json, Refused, Wire, in_state

MIB = 1024 * 1024

NOT_JSON = {
    "broken JSON": b'{"event": "system:ready", "data": {}',
    "a word": b"hello",
    "two values": b'{"event": "system:ready"} {"event": "system:ready"}',
    "nested 100,000 deep": b'{"event": "system:ready", "data": {"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
    "objects nested 100,000 deep": b'{"event": "system:ready", "data": ' + b'{"x":' * 100_000 + b"1" + b"}" * 100_001,
    "invalid UTF-8": b'{"event": "completion:async", "data": {"prompt": "\xff\xfe"}}',
    "an overlong encoding": b'{"event": "completion:async", "data": {"prompt": "\xc0\x80"}}',
    "an encoded surrogate": b'{"event": "completion:async", "data": {"prompt": "\xed\xa0\x80"}}',
    "a lone surrogate": rb'{"event": "completion:async", "data": {"prompt": "\ud800 and more"}}',
    "a lone low surrogate": rb'{"event": "completion:async", "data": {"prompt": "\udc00"}}',
    "1e400": b'{"event": "completion:async", "data": {"prompt": "x", "delay": 1e400}}',
    "NaN": b'{"event": "completion:async", "data": {"prompt": "x", "delay": NaN}}',
    "Infinity": b'{"event": "completion:async", "data": {"prompt": "x", "delay": Infinity}}',
    "a NUL byte": b'{"event": "system:ready"}\x00',
    "UTF-16": '{"event": "system:ready"}'.encode("utf-16"),
    "gzip": b"\x1f\x8b\x08\x00",
    "an HTTP request": b"GET / HTTP/1.1\r",
}

NO_EVENT = {
    "an array": b"[]",
    "a string": b'"system:ready"',
    "null": b"null",
    "an empty object": b"{}",
    "no event": b'{"data": {}}',
    "an event that is a number": b'{"event": 1}',
    "data that is null": b'{"event": "system:ready", "data": null}',
    "data that is a list": b'{"event": "system:ready", "data": []}',
    "a correlation id that is an object": b'{"event": "system:ready", "correlation_id": {}}',
}


async def lives(wire: Wire) -> None:
    """The connection and the daemon behind it still serve."""
    assert (await wire.ask("completion:request", prompt="still there?"))["result"] == "echo: still there?"
    assert (await wire.ask("system:health"))["status"] == "healthy"


@pytest.mark.promise("S1")
@pytest.mark.parametrize("line", NOT_JSON.values(), ids=NOT_JSON)
async def test_invalid_json_is_refused_and_the_connection_stays_open(wire: Wire, line: bytes) -> None:
    wire.raw(line + b"\n")
    reply = await wire.line()
    assert reply["error"]["code"] == "invalid_json"
    assert reply["event"] is None
    await lives(wire)


@pytest.mark.promise("S1")
@pytest.mark.parametrize("line", NO_EVENT.values(), ids=NO_EVENT)
async def test_json_that_is_no_event_is_refused(wire: Wire, line: bytes) -> None:
    wire.raw(line + b"\n")
    assert (await wire.line())["error"]["code"] == "invalid_envelope"
    await lives(wire)


@pytest.mark.promise("S1")
async def test_empty_lines_and_carriage_returns_are_no_trouble(wire: Wire) -> None:
    wire.raw(b"\n\r\n   \n\t\n")
    wire.raw(b'{"event": "system:ready", "data": {}, "client_id": "old", "timestamp": 1}\r\n')
    assert (await wire.line())["data"]["ready"] is True
    assert wire.lines == []


@pytest.mark.promise("S1")
async def test_lines_that_come_in_pieces_or_many_at_once_are_served_each(wire: Wire) -> None:
    line = json.dumps({"event": "completion:request", "data": {"prompt": "ä€😀"}}).encode() + b"\n"
    for byte in line:
        wire.raw(bytes([byte]))
        await wire.drain()
    wire.raw(line * 50)
    results = [(await wire.line())["data"]["result"] for _ in range(51)]
    assert results == ["echo: ä€😀"] * 51


@pytest.mark.promise("S1")
async def test_nesting_near_the_limit_is_served_or_refused_and_never_half_taken(wire: Wire) -> None:
    await wire.ask("completion:async", prompt="first", session_id="deep", provider_options={"delay": 0.05})
    for depth in range(940, 1010):
        value = b"[" * depth + b"]" * depth
        line = b'{"event": "completion:async", "data": {"prompt": "x", "request_id": "deep-%d", "session_id": "deep", '
        wire.raw(line % depth + b'"metadata": {"n": ' + value + b"}}}\n")
        reply = await wire.next(lambda message: message["event"] != "completion:result")
        if "error" in reply:
            assert reply["error"]["code"] in ("invalid_json", "invalid_data")
            assert (await wire.refused("completion:get", request_id=f"deep-{depth}")).code == "not_found"
        else:
            result = await wire.pushed("completion:result", request_id=f"deep-{depth}")
            assert result["status"] == "completed"
    await lives(wire)


@pytest.mark.promise("S1")
async def test_a_line_of_seventeen_mebibytes_is_too_large_and_the_next_one_is_served(wire: Wire) -> None:
    wire.raw(b'{"event": "completion:request", "data": {"prompt": "' + b"x" * (17 * MIB) + b'"}}\n')
    await wire.drain()
    error = (await wire.line())["error"]
    assert error["code"] == "payload_too_large"
    assert error["details"] == {"limit": 16 * MIB}
    await lives(wire)
    assert wire.lines == [], "one error for one line"


@pytest.mark.promise("S1")
async def test_a_line_of_exactly_the_limit_is_taken(wire: Wire) -> None:
    head, tail = b'{"event": "system:discover", "data": {"event": "', b'"}}'
    wire.raw(head + b"x" * (16 * MIB - len(head) - len(tail)) + tail + b"\n")
    assert (await wire.line())["error"]["code"] in ("unknown_event", "invalid_data")
    await lives(wire)


@pytest.mark.promise("S1")
async def test_half_a_line_and_then_silence_keeps_no_other_waiting(wire: Wire, connect: Connect) -> None:
    wire.raw(b'{"event": "system:ready", "da')
    await wire.drain()
    other = await connect()
    await lives(other)
    wire.raw(b'ta": {}}\n')
    assert (await wire.line())["data"]["ready"] is True


@pytest.mark.promise("S1")
async def test_half_a_line_of_a_client_that_leaves_is_forgotten(connect: Connect, wire: Wire) -> None:
    leaving = await connect()
    leaving.raw(b'{"event": "completion:async", "data": {"prompt": "x", "request_id": "half"')
    await leaving.drain()
    await leaving.leave()
    await lives(wire)
    assert (await wire.refused("completion:get", request_id="half")).code == "not_found"


# Events and fields


@pytest.mark.promise("S1")
async def test_an_unknown_event_is_refused_with_a_guess_at_the_typo(wire: Wire) -> None:
    error = await wire.refused("completion:asynch", prompt="x")
    assert error.code == "unknown_event"
    assert error.details["nearest"] == "completion:async"
    assert "completion:async" in error.message
    assert (await wire.refused("no:such:thing")).code == "unknown_event"
    assert (await wire.refused("")).code == "unknown_event"
    assert (await wire.refused("x" * 10_000)).code == "unknown_event"


@pytest.mark.promise("S1")
@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if not spec.incoming])
async def test_an_event_that_only_the_daemon_sends_has_the_wrong_direction(wire: Wire, name: str) -> None:
    assert (await wire.refused(name)).code == "invalid_direction"


WRONG: list[tuple[str, Json, str]] = [
    ("completion:get", {}, "request_id"),
    ("completion:cancel", {}, "request_id"),
    ("completion:wait", {"request_id": 7}, "request_id"),
    ("completion:wait", {"request_id": "x", "timeout": 0}, "timeout"),
    ("completion:get", {"request_id": ""}, "request_id"),
    ("completion:get", {"request_id": "x" * 70_000}, "request_id"),
    ("completion:get", {"request_id": "x", "after_seq": "1"}, "after_seq"),
    ("completion:async", {}, "prompt"),
    ("completion:async", {"prompt": ""}, "prompt"),
    ("completion:async", {"prompt": " \n\t"}, "prompt"),
    ("completion:async", {"prompt": None}, "prompt"),
    ("completion:async", {"prompt": 5}, "prompt"),
    ("completion:async", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
    ("completion:async", {"messages": []}, "messages"),
    ("completion:async", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("completion:async", {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ("completion:async", {"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    (
        "completion:async",
        {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]},
        "messages[1].role",
    ),
    ("completion:async", {"prompt": "x", "priority": "urgent"}, "priority"),
    ("completion:async", {"prompt": "x", "priority": 1}, "priority"),
    ("completion:async", {"prompt": "x", "on_busy": "wait"}, "on_busy"),
    ("completion:async", {"prompt": "x", "session_id": ""}, "session_id"),
    ("completion:async", {"prompt": "x", "session_id": "a", "conversation_id": "b"}, "conversation_id"),
    ("completion:async", {"prompt": "x", "fork": True}, "fork"),
    ("completion:async", {"prompt": "x", "delay": -1}, "delay"),
    ("completion:async", {"prompt": "x", "delay": "1"}, "delay"),
    ("completion:async", {"prompt": "x", "delay": 1e300}, "delay"),
    ("completion:async", {"prompt": "x", "delay": 1, "not_before": 2}, "not_before"),
    ("completion:async", {"prompt": "x", "not_before": 1e300}, "not_before"),
    ("completion:async", {"prompt": "x", "ttl": 0}, "ttl"),
    ("completion:async", {"prompt": "x", "ttl": 1e300}, "ttl"),
    ("completion:async", {"prompt": "x", "timeout": 0}, "timeout"),
    ("completion:async", {"prompt": "x", "timeout": 1e308}, "timeout"),
    ("completion:async", {"prompt": "x", "timeout": 1e300}, "timeout"),
    ("completion:async", {"prompt": "x", "temperature": 3}, "temperature"),
    ("completion:async", {"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ("completion:async", {"prompt": "x", "max_tokens": 10**30}, "max_tokens"),
    ("completion:async", {"prompt": "x", "stop": [1]}, "stop[0]"),
    ("completion:async", {"prompt": "x", "metadata": []}, "metadata"),
    ("completion:async", {"prompt": "x", "stream": "yes"}, "stream"),
    ("completion:queue_status", {"list": "everything"}, "list"),
    ("completion:queue_status", {"list": "failed", "limit": 0}, "limit"),
    ("completion:queue_status", {"list": "failed", "limit": 10**9}, "limit"),
    ("completion:queue_status", {"list": "failed", "cursor": "x"}, "cursor"),
    ("completion:session_status", {"cursor": "../../x"}, "cursor"),
    ("conversation:acquire_lock", {"conversation_id": "x"}, "request_id"),
    ("conversation:acquire_lock", {"request_id": "x"}, "conversation_id"),
    ("conversation:acquire_lock", {"request_id": "x", "conversation_id": "x", "timeout": 1e300}, "timeout"),
    ("conversation:acquire_lock", {"request_id": "x", "conversation_id": "x", "timeout": 1e308}, "timeout"),
    ("conversation:release_lock", {"request_id": "x", "fence": "1"}, "fence"),
    ("monitor:subscribe", {"patterns": []}, "patterns"),
    ("monitor:subscribe", {"pattern": "x" * 300}, "pattern"),
]


@pytest.mark.promise("S1", "Q1")
@pytest.mark.parametrize(
    ("event", "data", "path"), WRONG, ids=[f"{e.partition(':')[2]}-{p}-{n}" for n, (e, _, p) in enumerate(WRONG)]
)
async def test_a_missing_or_wrong_field_is_named_by_its_path(wire: Wire, event: str, data: Json, path: str) -> None:
    error = await wire.refused(event, **data)
    assert error.code == "invalid_data"
    named = error.details["path"]
    assert named == path or named.startswith(path)
    assert path.partition("[")[0] in error.message
    await lives(wire)


@pytest.mark.promise("S1")
async def test_unknown_fields_are_harmless_and_named_with_a_guess(wire: Wire) -> None:
    reply = await wire.ask("completion:request", prompt="x", pirority="high", nonsense=1, max_token=5)
    assert reply["result"] == "echo: x"
    first, second, third = reply["warnings"]
    assert "'pirority'" in first
    assert "'priority'" in first
    assert "'nonsense'" in second
    assert "did you mean" not in second
    assert "'max_tokens'" in third
    for event in ("system:health", "completion:status", "monitor:subscribe", "system:discover"):
        assert (await wire.ask(event, unheard_of=1))["warnings"], event
    submitted = await wire.ask("completion:async", prompt="x", sesion_id="y")
    assert "'session_id'" in submitted["warnings"][0]
    locked = await wire.ask("conversation:acquire_lock", request_id="l", conversation_id="c", waitt=True)
    assert "'wait'" in locked["warnings"][0]
    released = await wire.ask("conversation:release_lock", request_id="l", fense=1)
    assert "'fence'" in released["warnings"][0]


@pytest.mark.promise("S1")
async def test_numbers_beyond_all_machines_do_no_harm(wire: Wire) -> None:
    huge = "1" + "0" * 300
    wire.raw(b'{"event": "system:ready", "data": {}, "correlation_id": %s}\n' % huge.encode())
    assert (await wire.line())["correlation_id"] == int(huge)
    reply = await wire.ask("completion:request", prompt="x", metadata={"n": int(huge), "m": -(10**40), "f": 1.5e300})
    assert reply["metadata"]["f"] == 1.5e300
    assert reply["status"] == "completed"
    assert (await wire.refused("conversation:release_lock", request_id="x", fence=int(huge))).code == "not_lock_holder"
    await lives(wire)


@pytest.mark.promise("R2", "S1")
@pytest.mark.parametrize("after", [-1_000, -2, 5_000, 10**30])
async def test_an_after_seq_that_no_chunk_has_is_answered_all_the_same(wire: Wire, after: int) -> None:
    script = {"pieces": 3, "piece_delay": 0.05}
    await wire.ask("completion:async", prompt="abc", request_id="r", stream=True, provider_options=script)
    await wire.pushed("completion:chunk", request_id="r", seq=0)
    await wire.post("completion:get", {"request_id": "r", "after_seq": after})
    reply = await wire.post("completion:wait", {"request_id": "r", "after_seq": after, "stream": True})
    if "error" in reply:
        assert reply["error"]["code"] == "invalid_data"
    else:
        assert reply["data"]["result"] == "echo: abc"
    await lives(wire)


# Ids and names

NAMES = {
    "a slash": "team/agent/7",
    "a way up": "../../x",
    "an absolute path": "/etc/passwd",
    "a newline": "two\nlines",
    "a NUL": "nul\x00inside",
    "a leading dash": "--resume=other",
    "a dot": ".",
    "two dots": "..",
    "10,000 characters": "x" * 10_000,
    "a quote": "'; DROP TABLE request; --",
    "a wildcard": "%_*?[x]",
    "a tab and a comma": "a\tb,c",
    "an escape": "\x1b[2J",
    "emoji": "😀" * 50,
    "a space": " ",
    "a format": "{request_id} %s ${HOME}",
    "a hash of its own": "a" * 64 + ".jsonl",
}


@pytest.mark.promise("S1", "S3", "R3")
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
async def test_a_strange_name_is_a_name_like_any_other(served: Daemon, wire: Wire, name: str) -> None:
    data: dict[str, Any] = {"prompt": "x", "request_id": name, "session_id": name, "agent_id": name}
    reply = await wire.ask("completion:request", **data)
    assert (reply["request_id"], reply["session_id"], reply["agent_id"]) == (name, name, name)
    assert reply["result"] == "echo: x"
    assert (await wire.ask("completion:get", request_id=name))["status"] == "completed"
    assert (await wire.ask("completion:async", **data))["status"] == "completed"
    assert (await wire.ask("completion:cancel", request_id=name))["status"] == "already_final"
    session = await wire.ask("completion:session_status", session_id=name)
    assert (session["turns"], session["agents"]) == (1, [name])
    assert (await wire.ask("conversation:lock_status", conversation_id=name))["locked"] is False
    lock = f"{name} lock"
    assert (await wire.ask("conversation:acquire_lock", request_id=lock, conversation_id=name))["acquired"] is True
    assert (await wire.ask("conversation:release_lock", request_id=lock))["conversation_id"] == name
    listed = await wire.ask("completion:queue_status", list="finished")
    assert [row["request_id"] for row in listed["items"]] == [name]
    by_agent = await wire.ask("completion:session_status", agent_id=name)
    assert [one["session_id"] for one in by_agent["sessions"]] == [name]


def log_files(folder: Path) -> dict[Path, str]:
    """All response logs anywhere below a folder, each for this user only."""
    files = list(folder.rglob("*.jsonl"))
    for path in files:
        mode = path.lstat().st_mode
        assert stat.S_ISREG(mode)
        assert stat.S_IMODE(mode) & 0o077 == 0
    return {path: path.read_text() for path in files}


@pytest.mark.promise("S3", "R3")
async def test_no_name_leads_a_file_out_of_the_response_log(tmp_path: Path) -> None:
    home = tmp_path / "a" / "b" / "home"
    home.mkdir(parents=True)
    sessions = {*NAMES.values(), "plain", "Plain.name_1-2"}
    async with daemon_and_wire(home) as (_, wire):
        for name in sessions:
            await wire.ask("completion:request", prompt="x", session_id=name)
    folder = home / "var" / "logs" / "responses"
    files = log_files(tmp_path)
    assert {path.parent for path in files} == {folder}
    assert {"plain.jsonl", "Plain.name_1-2.jsonl"} <= {path.name for path in files}
    assert all(re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", path.name) for path in files)
    assert {json.loads(line)["ksi"]["session_id"] for text in files.values() for line in text.splitlines()} == sessions


@pytest.mark.promise("S1")
async def test_an_unknown_model_is_refused_with_the_served_ones(wire: Wire) -> None:
    error = await wire.refused("completion:async", prompt="x", model="stab/x")
    assert error.code == "unknown_model"
    assert "stub/" in error.message
    assert (await wire.refused("completion:request", prompt="x", model="haiku")).code == "unknown_model"
    assert (await wire.refused("completion:request", prompt="x", model="x" * 60_000)).code == "unknown_model"
    assert (await wire.refused("completion:async", prompt="x", model="../../stub/x")).code == "unknown_model"
    assert (await wire.ask("completion:queue_status"))["conversations"] == 0


@pytest.mark.promise("S1")
async def test_a_prompt_of_ten_megabytes_is_answered_and_kept(wire: Wire) -> None:
    prompt = "word " * 2_000_000
    reply = await wire.ask("completion:request", prompt=prompt, request_id="big", session_id="big")
    assert reply["result"] == f"echo: {prompt}"
    assert (await wire.ask("completion:get", request_id="big"))["result"] == f"echo: {prompt}"
    again = await wire.ask("completion:request", prompt="and small", session_id="big")
    assert again["result"] == "echo: and small"


@pytest.mark.promise("S1")
async def test_options_that_the_provider_does_not_take_fail_that_request_alone(wire: Wire) -> None:
    await wire.ask("completion:async", prompt="x", request_id="odd", provider_options={"no_such_option": 1})
    reply = await in_state(wire, "odd", "failed")
    assert reply["error"]["code"] == "invalid_request"
    assert "no_such_option" in reply["error"]["message"]
    await lives(wire)


LONG = "x" * 4_000
EXACT = frozenset({"system:shutdown", "queue:drain", "queue:pause", "monitor:subscribe"})
"""Events that would end or stop the test's daemon, or make it say more than its replies."""


@pytest.mark.promise("S1")
async def test_no_error_of_any_event_repeats_much_of_its_input(wire: Wire) -> None:
    asked = 0
    for name, spec in SPECS.items():
        if spec.request is None or name in EXACT:
            continue
        fields = [field.encode_name for field in msgspec.structs.fields(spec.request)]
        named: dict[str, Any] = {field: LONG for field in ("request_id", "session_id") if field in fields}
        for field in fields:
            values: list[Any] = [LONG, "x" * 900, "x'\"`" * 300, [LONG], {LONG: LONG}, {"a": LONG}]
            for value in values:
                empty: Json = {}
                for beside in (empty, named):
                    asked += 1
                    data: Json = {"prompt": "hi", **beside, field: value}
                    try:
                        await wire.ask(name, **data)
                    except Refused as error:
                        told = json.dumps([error.message, error.details])
                        assert told.count("x") < 3 * LONGEST_QUOTE, (name, field, told)
    assert asked > 500
    with pytest.raises(Refused) as refused:
        await wire.ask("x" * 60_000)
    assert len(refused.value.message) < 2 * LONGEST_QUOTE
