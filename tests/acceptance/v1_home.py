"""A home as version 1 left it: its configuration, its session logs, some of their lines damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Json = dict[str, Any]

CONFIG = """\
# Our machine. Do not touch.
[service]
version = 1      # the old one, still
default_model = "stub/echo"
shutdown_grace = 0.2

[providers.stub]   # scripted
kind = "stub"
"""

OLD_SERVICE = "ksi_daemon/plugins/completion/completion_service.py"
SESSION = "11111111-2222-4333-8444-555555555555"
"""Claude's own id of a dialogue."""
NEXT_SESSION = "66666666-2222-4333-8444-555555555555"
BEGAN = 1_760_000_000.0
"""Unix time of the first turn: months before any test runs."""


def claude_line(text: str, at: float | str, request_id: str | None = None, **more: Any) -> Json:
    """A turn as V1 logged Claude Code's."""
    ksi: Json = {"provider": "claude-cli", "timestamp": at, "duration_ms": 1500.0}
    if request_id is not None:
        ksi["request_id"] = request_id
    if "client_id" in more:
        ksi["client_id"] = more.pop("client_id")
    response = {
        "type": "result",
        "subtype": "success",
        "is_error": False,
        "result": text,
        "session_id": SESSION,
        "usage": {
            "input_tokens": 3,
            "output_tokens": 20,
            "cache_read_input_tokens": 1000,
            "cache_creation_input_tokens": 50,
        },
        "total_cost_usd": 0.25,
        "modelUsage": {"claude-haiku-4-5": {"costUSD": 0.25}},
        **more,
    }
    return {"ksi": ksi, "response": response}


def chat_line(text: str, at: float, request_id: str) -> Json:
    """A turn of an endpoint that speaks chat completions."""
    usage = {"prompt_tokens": 30, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 10}}
    choices = [{"message": {"role": "assistant", "content": text}}]
    return {
        "ksi": {"provider": "gpt", "request_id": request_id, "timestamp": at, "duration_ms": 10},
        "response": {"model": "gpt-5", "choices": choices, "usage": usage},
    }


DAMAGED = (
    b'{"ksi": {"provider": "claude-cli", "request_id": "torn',
    b"no JSON at all",
    b'{"other": "object"}',
    b"\xff\xfe",
)


def make_v1_home(home: Path, *, config: str | None = CONFIG, old_tree: bool = False) -> Path:
    """Three conversations in as many files, one of them below, with four damaged lines."""
    write_log(
        home,
        "alpha",
        claude_line("First.", "2025-10-09T08:53:20Z", "req-a1", client_id="agent-1"),
        DAMAGED[0],
        claude_line("Second.", BEGAN + 60, "req-a2", session_id=NEXT_SESSION),
        DAMAGED[1],
        DAMAGED[2],
        claude_line("Nothing came.", BEGAN + 70, is_error=True),
    )
    write_log(home, "2025/beta", chat_line("Hello", BEGAN + 30, "req-b1"), chat_line("Again", BEGAN + 90, "req-b1"))
    write_log(home, "gamma", claude_line("Only one.", BEGAN + 10, session_id="gamma"), DAMAGED[3])
    if config is not None:
        (home / "ksi.toml").write_text(config)
    if old_tree:
        (home / OLD_SERVICE).parent.mkdir(parents=True)
        (home / OLD_SERVICE).write_bytes(b"# the old service\r\nprint('x')\n")
    return home


def write_log(home: Path, name: str, *lines: Json | bytes) -> None:
    """A session log; a damaged one has no end of the last line."""
    path = home / "var" / "logs" / "responses" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    path.write_bytes(data if isinstance(lines[-1], bytes) else data + b"\n")


def snapshot(home: Path, *without: str) -> dict[str, bytes]:
    """All files of a home by their paths, but those of a running daemon's folder, its clock, and below `without`."""
    left_out = ("var/run", "var/clock.json", *without)
    files = (path for path in home.rglob("*") if path.is_file())
    found = {str(path.relative_to(home)): path.read_bytes() for path in files}
    return {path: data for path, data in found.items() if not path.startswith(left_out)}
