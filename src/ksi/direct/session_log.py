"""V1's session logs: a line per turn, `{"ksi": {...}, "response": {...}}`, read, written and found again.

The lines are those of the response log. V1 writes the turn's prompt next to the answer, because these files are its
only memory; lines of other writers have none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from ksi.clock import microseconds
from ksi.completion.upkeep.response_log import log_line, log_name
from ksi.content.blocks import Message
from ksi.host.platforms import folds_case
from ksi.host.private_files import make_folder
from ksi.request import RequestBody, Usage
from ksi.store.values import LoggedTurn

LATEST = 4_102_444_800.0
"""The year 2100 in Unix time: no turn was made after it."""

_COUNTS = {
    "input_tokens": ("input_tokens",),
    "output_tokens": ("output_tokens", "completion_tokens"),
    "cache_read_tokens": ("cache_read_tokens", "cache_read_input_tokens"),
    "cache_write_tokens": ("cache_write_tokens", "cache_creation_input_tokens"),
    "reasoning_tokens": ("reasoning_tokens",),
}
"""KSI's counts by the providers' names."""


class DamagedLine(ValueError):
    """A line that is no turn; the message says why."""


class V1Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One line. Times in microseconds."""

    provider: str
    finished_at: int
    duration: int
    text: str
    raw: bytes
    """The provider's reply, as unchanged JSON."""
    good: bool = True
    """False if the provider's answer reports an error."""
    request_id: str | None = None
    agent_id: str | None = None
    session_id: str | None = None
    """The conversation, if the line names it; otherwise the file's name does."""
    body: RequestBody | None = None
    """The prompt; None if it was not stored."""
    provider_session: str | None = None
    model: str | None = None
    stop_reason: str | None = None
    usage: Usage | None = None


class _Head(msgspec.Struct):
    provider: str
    timestamp: float | str
    request_id: str | None = None
    client_id: str | None = None
    session_id: str | None = None
    duration_ms: float | None = None
    request: RequestBody | None = None


class _Line(msgspec.Struct):
    ksi: _Head
    response: msgspec.Raw


_decoder = msgspec.json.Decoder(_Line)


def read_line(line: bytes) -> V1Turn:
    """A line as a turn.

    Raises:
        DamagedLine: it is none.
    """
    try:
        decoded = _decoder.decode(line)
        response = msgspec.json.decode(decoded.response)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedLine(str(error)) from None
    if not isinstance(response, dict):
        raise DamagedLine("its response is no object")
    head = decoded.ksi
    finished = microseconds(_time(head.timestamp))
    session = response.get("session_id")
    return V1Turn(
        provider=head.provider,
        finished_at=finished,
        duration=microseconds(min(max(head.duration_ms or 0.0, 0.0) / 1000, finished / 1e6)),
        text=_text(response),
        raw=bytes(decoded.response),
        good=response.get("is_error") is not True,
        request_id=head.request_id or None,
        agent_id=head.client_id or None,
        session_id=head.session_id or None,
        body=head.request,
        provider_session=session if isinstance(session, str) and session else None,
        model=_model(response),
        stop_reason=_word(response.get("stop_reason")),
        usage=_usage(response),
    )


def write_line(turn: LoggedTurn, body: RequestBody) -> bytes:
    """A turn as a line, with its prompt."""
    return log_line(turn, iso=True, request=msgspec.Raw(msgspec.json.encode(body)))


class SessionLog:
    """The folder of session logs, a file for each conversation."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, conversation: str) -> Iterator[V1Turn]:
        """A conversation's valid turns in order; damaged lines are skipped."""
        try:
            data = self._path(conversation).read_bytes()
        except FileNotFoundError:
            return
        for line in data.splitlines():
            try:
                turn = read_line(line)
            except DamagedLine:
                continue
            if turn.good and turn.session_id in (None, conversation):
                yield turn

    def size(self, conversation: str) -> int:
        """A conversation's log in bytes."""
        try:
            return self._path(conversation).stat().st_size
        except FileNotFoundError:
            return 0

    def append(self, conversation: str, line: bytes) -> None:
        """Add a line; behind one that was broken off it begins a new one.

        Raises:
            OSError: it cannot be written.
        """
        make_folder(self._folder)
        descriptor = os.open(self._path(conversation), os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            view = memoryview(line)
            while view:
                view = view[os.write(descriptor, view) :]
        finally:
            os.close(descriptor)

    def _path(self, conversation: str) -> Path:
        return self._folder / log_name(conversation, folded=folds_case(self._folder))


def dialogue(turn: V1Turn) -> tuple[Message, ...]:
    """The messages of a turn, the answer last; only the answer if the rest was not stored."""
    asked = turn.body.dialogue() if turn.body is not None else ()
    return (*asked, Message("assistant", turn.text))


def _time(stamp: float | str) -> float:
    """Unix time, from a number or an ISO 8601 word; one without a zone is UTC."""
    if isinstance(stamp, str):
        try:
            moment = datetime.fromisoformat(stamp)
        except ValueError:
            raise DamagedLine(f"its timestamp {stamp[:60]!r} is no time") from None
        stamp = (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()
    if not 0 < stamp < LATEST:
        raise DamagedLine(f"its timestamp {stamp!r} is no time")
    return stamp


def _text(response: dict[str, Any]) -> str:
    """The answer's text, as Claude Code, chat completions or the Messages API have it."""
    if isinstance(response.get("result"), str):
        return str(response["result"])
    choices = response.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        message = choices[0].get("message")
        if isinstance(message, dict) and isinstance(message.get("content"), str):
            return str(message["content"])
    content = response.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if parts and all(isinstance(part, str) for part in parts):
            return "".join(str(part) for part in parts)
    if response.get("is_error") is True:
        return ""
    raise DamagedLine("its response has no text")


def _model(response: dict[str, Any]) -> str | None:
    """The model that answered: as it is said, or the one that Claude Code's account names first."""
    used = response.get("modelUsage")
    named = next((name for name in used if isinstance(name, str)), None) if isinstance(used, dict) else None
    return _word(response.get("model")) or named


def _usage(response: dict[str, Any]) -> Usage | None:
    """The tokens as the provider reported them; None without a report."""
    told = response.get("usage")
    cost = _number(response.get("total_cost_usd"))
    if not isinstance(told, dict):
        return None
    counts = {name: next((n for word in words if (n := _count(told.get(word)))), 0) for name, words in _COUNTS.items()}
    if "prompt_tokens" in told:  # chat completions count what came from a cache with the rest
        details = told.get("prompt_tokens_details")
        cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else 0
        counts["cache_read_tokens"] = cached
        counts["input_tokens"] = max(0, _count(told["prompt_tokens"]) - cached)
    return Usage(**counts, cost_usd=cost) if any(counts.values()) else None


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**53 else 0


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 else None


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
