"""A scripted model endpoint on loopback: OpenAI's chat completions and Anthropic's messages, and all that can go wrong.

In a test: `async with ScriptedEndpoint(Answer(pieces=("Hello",))) as endpoint: ... endpoint.url ...`. In a process of
its own, answering all alike: `python -m tests.endpoint [--port N] [--pieces N] [--delay S]`; it prints its URL first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import ssl
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from ksi.request import Usage

REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    429: "Too Many Requests",
}
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The endpoint's behaviour for one request. Times in seconds; `usage` as KSI counts, None for no report."""

    pieces: tuple[str, ...] = ("Hello", " there.")
    usage: Usage | None = Usage(input_tokens=10, output_tokens=5)
    model: str | None = None
    """None: the model that was asked for."""
    stop_reason: str | None = None
    """None: `stop` or `end_turn`, as the API has it."""
    status: int = 200
    error_type: str | None = None
    error_code: str | None = None
    error_message: str = "scripted"
    headers: Mapping[str, str] = msgspec.field(default_factory=dict)
    body: bytes | None = None
    """Sent in the place of any JSON or event stream, as it is."""
    content_type: str | None = None
    raw: bytes | None = None
    """Sent in the place of a whole HTTP answer, and the connection closed."""
    hang_up: bool = False
    """Close the connection without an answer."""
    silent: bool = False
    """Say nothing until the client leaves."""
    delay: float = 0.0
    after: asyncio.Event | None = None
    """Say nothing before this is set."""
    piece_delay: float = 0.0
    stall_after: int | None = None
    """Streamed: after so many pieces say nothing more until the client leaves."""
    cut_after: int | None = None
    """Streamed: after so many pieces break the connection. Whole: break it in the middle of the body."""
    end_after: int | None = None
    """Streamed: after so many pieces end the body in order, without the events that belong at its end."""
    fail_after: int | None = None
    """Streamed: after so many pieces send an error event of `error_type`."""
    end_delay: float = 0.0
    """Streamed: wait so long between the last event and the end of the body."""
    linger: bool = False
    """Streamed: keep the body open after the last event."""
    parts: tuple[bytes, ...] | None = None
    """Sent one after the other as a chunked event stream, in the place of the events of the API."""
    then: Literal["end", "stall", "reset"] | bytes = "end"
    """The end after the parts: the body's end, silence, a reset connection, or these bytes again and again."""
    newline: bytes = b"\n"
    """How the stream ends its lines."""

    @property
    def text(self) -> str:
        """All pieces."""
        return "".join(self.pieces)


class Seen:
    """One request as it came; `gone` is set when the client left before it had the whole answer."""

    def __init__(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> None:
        self.method = method
        parts = urlsplit(target)
        self.target = target
        """The target of the request line: a path, and to a proxy a whole URL."""
        self.path = parts.path
        self.query = parts.query
        self.headers = headers
        self.body = body
        self.gone = asyncio.Event()

    @property
    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)


Script = Callable[[Seen], Answer]


class ScriptedEndpoint:
    """The server. Answers come from the script; the last given one is repeated."""

    def __init__(
        self,
        *answers: Answer,
        script: Script | None = None,
        port: int = 0,
        record: bool = True,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.answers = deque(answers or (Answer(),))
        self.requests: list[Seen] = []
        self.looks: list[Seen] = []
        """GETs."""
        self.models_status = 200
        """How a look at the models is answered."""
        self._tls = tls
        self.connections = 0
        """Connections opened so far."""
        self._script = script or self._next
        self._port = port
        self._record = record
        self._arrived = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> ScriptedEndpoint:
        self._server = await asyncio.start_server(
            self._connected, "127.0.0.1", self._port, limit=1 << 26, backlog=512, ssl=self._tls
        )
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        """The base URL of the Anthropic API, as ANTHROPIC_BASE_URL wants it."""
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self._port}"

    @property
    def openai_url(self) -> str:
        """The base URL of the OpenAI API."""
        return f"{self.url}/v1"

    async def wait_for_requests(self, count: int, timeout: float = 10.0) -> list[Seen]:
        """The requests so far, when there are at least so many."""
        async with asyncio.timeout(timeout), self._arrived:
            await self._arrived.wait_for(lambda: len(self.requests) >= count)
        return self.requests

    def _next(self, seen: Seen) -> Answer:
        return self.answers.popleft() if len(self.answers) > 1 else self.answers[0]

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        try:
            while (seen := await _read_request(reader)) is not None:
                if self._record and seen.method == "POST":
                    async with self._arrived:
                        self.requests.append(seen)
                        self._arrived.notify_all()
                if self._record and seen.method == "GET":
                    self.looks.append(seen)
                if not await self._answer(seen, reader, writer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client left: `gone` says so where it matters
        finally:
            with contextlib.suppress(ConnectionError):
                writer.close()

    async def _answer(self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """True if the connection can be used again."""
        try:
            return await _Exchange(seen, reader, writer).run(self._script, self.models_status)
        except ConnectionError:
            seen.gone.set()
            raise


async def _read_request(reader: asyncio.StreamReader) -> Seen | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    method, target, _ = first.split(" ", 2)
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = b""
    if headers.get("transfer-encoding") == "chunked":
        while size := int((await reader.readline()).split(b";")[0], 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    elif length := int(headers.get("content-length", 0)):
        body = await reader.readexactly(length)
    return Seen(method, target, headers, body)


class _Exchange:
    """One request and its answer."""

    def __init__(self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._seen = seen
        self._reader = reader
        self._writer = writer

    async def run(self, script: Script, models_status: int) -> bool:
        """True if the connection can be used again."""
        path = self._seen.path
        if self._seen.method == "POST" and path.endswith(("/messages", "/chat/completions")):
            return await self._completion(script(self._seen), chat=path.endswith("/chat/completions"))
        if self._seen.method == "POST" and path.endswith("/messages/count_tokens"):
            return await self._whole(200, _encode({"input_tokens": max(1, len(self._seen.body) // 4)}))
        if self._seen.method in ("GET", "HEAD") and path in ("/", "/health", "/v1/models"):
            return await self._whole(models_status, _encode({"data": [], "object": "list"}))
        return await self._whole(404, _encode(_error("not_found_error", f"no route {path}", None)))

    async def _completion(self, answer: Answer, *, chat: bool) -> bool:
        if answer.silent:
            return await self._stall()
        if answer.hang_up:
            return False
        if answer.delay:
            await asyncio.sleep(answer.delay)
        if answer.after is not None:
            await answer.after.wait()
        if answer.raw is not None:
            self._writer.write(answer.raw)
            await self._writer.drain()
            return False
        if answer.parts is not None:
            return await self._parts(answer, answer.parts)
        if answer.body is not None:
            return await self._whole(answer.status, answer.body, answer)
        if answer.status != 200:
            word = answer.error_type or ERROR_TYPES.get(answer.status, "api_error")
            return await self._whole(
                answer.status, _encode(_error(word, answer.error_message, answer.error_code)), answer
            )
        asked = self._seen.json
        model = answer.model or asked["model"]
        if asked.get("stream"):
            return await self._stream(
                answer, _ChatEvents(answer, model, asked) if chat else _MessageEvents(answer, model)
            )
        return await self._whole(
            200, _encode(chat_answer(answer, model) if chat else message_answer(answer, model)), answer
        )

    async def _whole(self, status: int, body: bytes, answer: Answer | None = None) -> bool:
        headers = {
            "Content-Type": (answer and answer.content_type) or "application/json",
            "Content-Length": str(len(body)),
        }
        self._head(status, {**headers, **(answer.headers if answer else {})})
        if answer is not None and answer.cut_after is not None:
            self._writer.write(body[: len(body) // 2])
            await self._writer.drain()
            return False
        if self._seen.method != "HEAD":
            self._writer.write(body)
        await self._writer.drain()
        return True

    async def _stream(self, answer: Answer, events: _Events) -> bool:
        self._head(
            200,
            {
                "Content-Type": answer.content_type or "text/event-stream",
                "Transfer-Encoding": "chunked",
                "Cache-Control": "no-cache",
                **answer.headers,
            },
        )
        self._send(events.begin(), answer)
        for number in range(len(answer.pieces) + 1):
            if number == answer.stall_after:
                return await self._stall()
            if number == answer.cut_after:
                await self._writer.drain()
                return False
            if number == answer.fail_after:
                self._send(events.error(), answer)
            if number in (answer.end_after, answer.fail_after):
                return await self._end()
            if number < len(answer.pieces):
                if answer.piece_delay:
                    await asyncio.sleep(answer.piece_delay)
                self._send(events.piece(answer.pieces[number]), answer)
                await self._writer.drain()
        self._send(events.end(), answer)
        if answer.linger:
            return await self._stall()
        if answer.end_delay:
            await self._writer.drain()
            await asyncio.sleep(answer.end_delay)
        return await self._end()

    async def _parts(self, answer: Answer, parts: tuple[bytes, ...]) -> bool:
        kind = answer.content_type or "text/event-stream"
        self._head(answer.status, {"Content-Type": kind, "Transfer-Encoding": "chunked", **answer.headers})
        for part in parts:
            self._chunk(part)
            await self._writer.drain()
        if answer.then == "end":
            return await self._end()
        if answer.then == "stall":
            return await self._stall()
        if answer.then == "reset":
            await asyncio.sleep(0.02)
            linger = struct.pack("ii", 1, 0)
            self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self._writer.transport.abort()
            return False
        left = asyncio.create_task(self._stall())
        while not left.done():
            self._chunk(answer.then)
            await asyncio.wait([left], timeout=0.02)
        return await left

    def _chunk(self, data: bytes) -> None:
        self._writer.write(b"%x\r\n%b\r\n" % (len(data), data))

    async def _stall(self) -> bool:
        """Say nothing until the client leaves."""
        await self._writer.drain()
        with contextlib.suppress(ConnectionError):
            while await self._reader.read(1024):
                pass
        self._seen.gone.set()
        return False

    async def _end(self) -> bool:
        self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()
        return True

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Scripted')}", *(f"{k}: {v}" for k, v in headers.items())]
        self._writer.write("\r\n".join((*lines, "", "")).encode("latin-1"))

    def _send(self, events: Iterator[tuple[str | None, bytes]], answer: Answer) -> None:
        line = answer.newline
        text = b"".join(
            (b"event: " + name.encode() + line if name else b"") + b"data: " + data + line + line
            for name, data in events
        )
        if text:
            self._chunk(text)


class _Events:
    """The parts of a stream: pairs of an event's name and its data."""

    def __init__(self, answer: Answer, model: str) -> None:
        self._answer = answer
        self._model = model

    def begin(self) -> Iterator[tuple[str | None, bytes]]:
        """The parts before the text."""
        raise NotImplementedError

    def piece(self, text: str) -> Iterator[tuple[str | None, bytes]]:
        """A piece of text."""
        raise NotImplementedError

    def end(self) -> Iterator[tuple[str | None, bytes]]:
        """The parts after it."""
        raise NotImplementedError

    def error(self) -> Iterator[tuple[str | None, bytes]]:
        """A failure in the middle."""
        raise NotImplementedError


class _ChatEvents(_Events):
    def __init__(self, answer: Answer, model: str, asked: Mapping[str, Any]) -> None:
        super().__init__(answer, model)
        self._usage_wanted = bool((asked.get("stream_options") or {}).get("include_usage"))

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> tuple[None, bytes]:
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": self._model}
        return None, _encode({**head, "choices": choices, **more})

    def _delta(self, delta: dict[str, Any], reason: str | None = None) -> tuple[None, bytes]:
        return self._event([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}])

    def begin(self) -> Iterator[tuple[str | None, bytes]]:
        yield self._delta({"role": "assistant", "content": ""})

    def piece(self, text: str) -> Iterator[tuple[str | None, bytes]]:
        yield self._delta({"content": text})

    def end(self) -> Iterator[tuple[str | None, bytes]]:
        yield self._delta({}, self._answer.stop_reason or "stop")
        if self._usage_wanted and self._answer.usage is not None:
            yield self._event([], usage=chat_usage(self._answer.usage))
        yield None, b"[DONE]"

    def error(self) -> Iterator[tuple[str | None, bytes]]:
        answer = self._answer
        yield None, _encode(_error(answer.error_type or "server_error", answer.error_message, answer.error_code))


class _MessageEvents(_Events):
    def _event(self, kind: str, **more: Any) -> tuple[str, bytes]:
        return kind, _encode({"type": kind, **more})

    def begin(self) -> Iterator[tuple[str | None, bytes]]:
        message = {**message_answer(self._answer, self._model), "content": [], "stop_reason": None}
        if self._answer.usage is not None:
            message["usage"] = {**message_usage(self._answer.usage), "output_tokens": 1}
        yield self._event("message_start", message=message)
        yield self._event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        yield self._event("ping")

    def piece(self, text: str) -> Iterator[tuple[str | None, bytes]]:
        yield self._event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})

    def end(self) -> Iterator[tuple[str | None, bytes]]:
        usage = self._answer.usage
        yield self._event("content_block_stop", index=0)
        yield self._event(
            "message_delta",
            delta={"stop_reason": self._answer.stop_reason or "end_turn", "stop_sequence": None},
            usage={"output_tokens": usage.output_tokens} if usage is not None else {},
        )
        yield self._event("message_stop")

    def error(self) -> Iterator[tuple[str | None, bytes]]:
        answer = self._answer
        yield "error", _encode(_error(answer.error_type or "overloaded_error", answer.error_message, answer.error_code))


def chat_answer(answer: Answer, model: str) -> dict[str, Any]:
    """A whole chat completion."""
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.stop_reason or "stop"}
    body = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": model, "choices": [choice]}
    return body if answer.usage is None else {**body, "usage": chat_usage(answer.usage)}


def chat_usage(usage: Usage) -> dict[str, Any]:
    """Usage as OpenAI counts it: cached tokens are within the prompt's."""
    prompt = usage.input_tokens + usage.cache_read_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": usage.output_tokens,
        "total_tokens": prompt + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cache_read_tokens, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens, "audio_tokens": 0},
    }


def message_answer(answer: Answer, model: str) -> dict[str, Any]:
    """A whole message."""
    body = {
        "id": "msg_scripted",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [{"type": "text", "text": answer.text}],
        "stop_reason": answer.stop_reason or "end_turn",
        "stop_sequence": None,
    }
    return body if answer.usage is None else {**body, "usage": message_usage(answer.usage)}


def message_usage(usage: Usage) -> dict[str, Any]:
    """Usage as Anthropic counts it."""
    return {
        "input_tokens": usage.input_tokens,
        "cache_creation_input_tokens": usage.cache_write_tokens,
        "cache_read_input_tokens": usage.cache_read_tokens,
        "output_tokens": usage.output_tokens,
        "service_tier": "standard",
    }


def _error(word: str, message: str, code: str | None) -> dict[str, Any]:
    """An error body that is one of both APIs'."""
    return {"type": "error", "error": {"type": word, "message": message, "code": code}, "request_id": "req_scripted"}


_encode = msgspec.json.encode


async def _serve(port: int, answer: Answer) -> None:
    async with ScriptedEndpoint(answer, port=port, record=False) as endpoint:
        sys.stdout.write(f"{endpoint.url}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--pieces", type=int, default=2, help="pieces of a streamed answer")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    arguments = parser.parse_args()
    answer = Answer(pieces=("word ",) * arguments.pieces, delay=arguments.delay)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(arguments.port, answer))


if __name__ == "__main__":
    main()
