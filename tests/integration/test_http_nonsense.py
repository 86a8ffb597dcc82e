"""Whatever comes to the HTTP door is answered in the form of its path or cut off, and the daemon lives on."""

from __future__ import annotations

import asyncio
import gzip
import json
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from ksi.config.schema import Http
from ksi.http import doors, server
from tests.daemon_process import DaemonProcess, make_home
from tests.http_door import Door, door
from tests.integration.serving import AT_ONCE
from tests.integration.wire import until

PATIENCE = 60.0

SHAPES: dict[str, Callable[[Any], Any]] = {
    "/v1/events": lambda body: body["error"]["code"],
    "/v1/messages": lambda body: body["error"]["code"] if body["type"] == "error" else None,
    "/v1/chat/completions": lambda body: body["error"]["code"] if "param" in body["error"] else None,
    "/v1/responses": lambda body: body["error"]["code"] if "param" in body["error"] else None,
}
"""Readers of the error code in each API's form."""

NONSENSE = {
    "nothing": b"",
    "half": b'{"event": "system:ready", "mod',
    "a list": b"[1]",
    "a text": b'"x"',
    "no UTF-8": b'{"event": "\xff"}',
    "two": b"{}{}",
    "deep": b'{"a":' * 100_000,
    "not a number": b'{"event": NaN}',
    "zeros": bytes(1000),
}


async def talk(here: Door, data: bytes, *, half: bool = False) -> bytes:
    """Send bytes by themselves; all that comes until the end of the connection."""
    host, _, port = here.url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        async with asyncio.timeout(PATIENCE):
            writer.write(data)
            if half:
                writer.write_eof()
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.transport.abort()


def request(here: Door, *lines: str, method: str = "POST", host: str = "localhost", body: bytes = b"") -> bytes:
    head = [
        f"{method} /v1/events HTTP/1.1",
        f"Host: {host}",
        f"Authorization: Bearer {here.token}",
        "Connection: close",
    ]
    return "\r\n".join([*head, *lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


READY = b'{"event":"system:ready"}'


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


@pytest.mark.promise("H1", "H4")
@pytest.mark.parametrize("path", SHAPES)
async def test_a_body_that_is_no_json_object_is_refused_in_the_path_s_own_form(path: str) -> None:
    async with door() as here:
        for name, body in NONSENSE.items():
            reply = await here.post(path, body)
            assert reply.status == 400, (name, reply.body)
            assert SHAPES[path](reply.json) in ("invalid_json", "invalid_envelope", "invalid_data"), (name, reply.body)
        assert (await here.event("system:ready")).status == 200


@pytest.mark.promise("H1", "H4")
@pytest.mark.parametrize("path", SHAPES)
async def test_a_body_above_the_limit_is_refused_also_one_that_unpacks_to_more(path: str) -> None:
    async with door(http={"max_body": 10_000}) as here:
        big = json.dumps({"x": "y" * 20_000}).encode()
        for body, headers in ((big, {}), (gzip.compress(big), {"Content-Encoding": "gzip"})):
            reply = await here.post(path, body, **headers)
            assert (reply.status, SHAPES[path](reply.json)) == (413, "payload_too_large")
        broken = await here.post(path, b"\x1f\x8bnonsense", Content_Encoding="gzip")
        assert (broken.status, SHAPES[path](broken.json)) == (400, "invalid_request")
        assert (await here.event("system:ready")).status == 200


@pytest.mark.promise("H1")
async def test_an_unknown_path_or_method_is_refused_in_the_nearest_form() -> None:
    async with door() as here:
        nothing = await here.get("/v2/%00%ff/../x")
        assert (nothing.status, nothing.json["error"]["code"]) == (404, "not_found")
        assert (await here.get("/v1/messages/x")).json["type"] == "error"
        assert "param" in (await here.get("/v1/chat/x")).json["error"]
        wrong = await here.get("/v1/messages")
        assert (wrong.status, wrong.json["error"]["code"]) == (405, "method_not_allowed")


@pytest.mark.promise("H1")
@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1:99@evil.example",
        "",
        "0.0.0.0",
        "localhost, evil.example",
        "[::",
    ],
)
async def test_a_foreign_name_that_resolves_to_this_machine_is_refused(host: str) -> None:
    async with door() as here:
        answer = await talk(here, request(here, host=host, body=READY))
        assert status(answer) == 403
        assert b"forbidden_host" in answer


@pytest.mark.promise("H1")
async def test_a_name_that_is_configured_is_let_in() -> None:
    async with door(http={"hosts": ("ksi.lan",)}) as here:
        for host in ("KSI.lan:80", "ksi.lan", "[::1]:7411", "LocalHost"):
            assert status(await talk(here, request(here, host=host, body=READY))) == 200


@pytest.mark.promise("H1")
@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "", "file://", "http://[::"])
async def test_a_page_of_another_origin_is_refused_and_no_answer_invites_it(origin: str) -> None:
    async with door() as here:
        asked = [
            request(here, f"Origin: {origin}", body=READY),
            request(here, f"Origin: {origin}", "Access-Control-Request-Method: POST", method="OPTIONS"),
        ]
        for data in asked:
            answer = await talk(here, data)
            assert status(answer) == 403
            assert b"forbidden_origin" in answer
            assert b"access-control" not in answer.lower()


@pytest.mark.promise("H1")
async def test_heads_that_are_none_are_cut_off_and_the_daemon_lives_on() -> None:
    async with door() as here:
        heads = {
            "flood": request(here, *[f"x-{number}: y" for number in range(10_000)], body=READY),
            "long line": request(here, f"x: {'y' * 1_000_000}", body=READY),
            "long path": b"GET /" + b"y" * 1_000_000 + b" HTTP/1.1\r\n\r\n",
            "no HTTP": b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" * 20 + b"\r\n\r\n",
            "two lengths": request(here, "Transfer-Encoding: chunked", body=READY),
            "two hosts": request(here, "Host: evil.example", body=READY),
            "negative": b"POST /v1/events HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
            "no token in it": b"POST /v1/events HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\xfe\r\n\r\n",
        }
        for name, data in heads.items():
            answer = await talk(here, data, half=True)
            assert status(answer) in (0, 400, 401), (name, answer)
        assert (await here.event("system:ready")).status == 200


@pytest.mark.promise("H1")
async def test_a_head_or_a_body_that_does_not_come_holds_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SILENT", 0.0)
    monkeypatch.setattr(doors, "BODY_TIMEOUT", 0.1)
    async with door() as here:
        slow_head = asyncio.create_task(talk(here, b"POST /v1/events HTTP/1.1\r\nHost: loc"))
        async with asyncio.timeout(PATIENCE):
            while not slow_head.done():
                assert here.daemon.http is not None
                await here.daemon.http._look()
                await asyncio.sleep(0.01)
        assert await slow_head == b""
        slow_body = await talk(here, request(here, body=READY)[:-5])
        assert status(slow_body) == 408


@pytest.mark.promise("H1")
async def test_a_client_that_sends_no_more_has_left_and_its_event_goes_on() -> None:
    providers: dict[str, Any] = {"slow": {"kind": "stub", "delay": 600}, "local": {"kind": "local", "enabled": False}}
    async with door(providers=providers, service=AT_ONCE) as here:
        ask = {"event": "completion:request", "data": {"prompt": "x", "model": "slow/x", "request_id": "r1"}}
        host, _, port = here.url.removeprefix("http://").rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request(here, body=json.dumps(ask).encode()))
        async with asyncio.timeout(PATIENCE):
            while (await here.event("completion:get", request_id="r1")).status == 404:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            writer.write_eof()
            assert await reader.read() == b""
        writer.close()
        assert (await here.told("completion:get", request_id="r1"))["status"] == "running"


@pytest.mark.promise("H1")
async def test_connections_above_the_limit_are_refused_and_others_go_on() -> None:
    async with door(http={"max_connections": 3}) as here, AsyncExitStack() as stack:
        for _ in range(3):
            await stack.enter_async_context(here.stream("/v1/events"))
        refused = await talk(here, request(here, body=READY))
        assert status(refused) == 503
        assert b"too_many_connections" in refused


@pytest.mark.promise("H1")
def test_a_thousand_held_connections_end_in_order_when_the_daemon_stops(tmp_path: Path) -> None:
    with many_files():
        process = DaemonProcess(make_home(tmp_path))
        process.start()
        answers, code = asyncio.run(hold(process, 1_000))
    assert code == 0
    assert [answer[-5:] for answer in answers] == [b"0\r\n\r\n"] * 1_000
    assert not (tmp_path / "var/run/http.json").exists()


@pytest.mark.promise("H1", "O2", "O11")
async def test_the_address_is_written_again_if_it_could_not_be_written_or_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LOOK", 0.02)
    told = tmp_path / "var/run/http.json"
    in_the_way = told.with_name("http.json.new")
    in_the_way.mkdir(parents=True)
    async with door(home=tmp_path) as here:
        assert not told.exists()

        async def troubled() -> bool:
            health = (await here.post("/v1/events", {"event": "system:health"})).json["data"]
            return any("ksi-http" in problem for problem in health["problems"])

        async def found() -> bool:
            return told.exists() and json.loads(told.read_bytes())["url"] == here.url

        await until(troubled)
        in_the_way.rmdir()
        await until(found)
        told.unlink()
        await until(found)


async def hold(process: DaemonProcess, count: int) -> tuple[list[bytes], int | None]:
    """The output of this many streams until the daemon was stopped, and its exit code."""
    run = process.home / "var/run"
    host, _, port = json.loads((run / "http.json").read_text())["url"].removeprefix("http://").rpartition(":")
    token = (run / "token").read_text().strip()
    asked = f"GET /v1/events HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\r\n".encode()

    async def one() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(asked)
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        return reader, writer

    async with asyncio.timeout(4 * PATIENCE):
        held = [await one() for _ in range(count)]
        stopping = asyncio.create_task(asyncio.to_thread(process.end, signal.SIGTERM))
        answers = await asyncio.gather(*(reader.read() for reader, _ in held))
        for _, writer in held:
            writer.close()
        return answers, await stopping


@contextmanager
def many_files() -> Iterator[None]:
    """Let this process and its children have as many files open as they may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.promise("H1")
@pytest.mark.parametrize("named", [True, False])
async def test_a_taken_port_stops_nothing_and_is_a_problem_only_if_it_was_configured(
    named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        if not named:
            monkeypatch.setattr("ksi.http.server.Http", lambda: Http(listen=taken))
        async with door(http={"listen": taken}) as here:
            assert here.url != f"http://{taken}"
            health = (await here.post("/v1/events", {"event": "system:health"})).json["data"]
            assert [taken.partition(":")[2] in problem for problem in health["problems"]] == [True] * named
