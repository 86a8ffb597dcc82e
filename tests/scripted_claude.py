"""A stand-in for Claude Code that does what its first argument says, for what the real one does only when it is broken.

Words: answers · no-init · mid-stream · after-result · garbage · noise · big-line · endless-line · nothing · crash ·
other-session · deaf · litter · old. Each but the last two answers `--version` and `auth status` as a good one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def hang() -> None:
    """Stay, whatever is asked for politely."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(60)


def option(name: str) -> str | None:
    """The value of `--name=value`."""
    return next((word.partition("=")[2] for word in sys.argv if word.startswith(f"--{name}=")), None)


class Session:
    """What it works on, and its transcript."""

    def __init__(self, word: str) -> None:
        resumed = option("resume")
        self.id = option("session-id") or (Path(resumed).stem if resumed else str(uuid.uuid4()))
        if word == "other-session" and resumed:
            self.id = str(uuid.uuid4())
        folder = Path(os.environ["CLAUDE_CONFIG_DIR"]) / "projects" / "scripted"
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{self.id}.jsonl"

    def write(self, kind: str, name: str, **message: Any) -> None:
        line = {"type": kind, "uuid": name, "message": {"role": kind, **message}}
        with self.path.open("a") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")


def turn(word: str, session: Session, prompt: Any) -> None:
    """One turn."""
    if word == "no-init":
        hang()
    if word == "crash":
        print("something terrible happened", file=sys.stderr)
        sys.exit(3)
    if word == "garbage":
        for _ in range(200):
            print("Segmentation fault? {not json", flush=True)
        hang()
    if word == "endless-line":
        while True:
            sys.stdout.write("x" * (1 << 20))
    if word == "noise":
        print("Warning: a library has something to say", flush=True)
    say(type="system", subtype="init", session_id=session.id, model="scripted", claude_code_version="9.9.9")
    session.write("user", prompt["uuid"], content=prompt["message"]["content"])
    text = "x" * 5_000_000 if word == "big-line" else "Hello."
    say(type="stream_event", event={"type": "message_start", "message": {}})
    say(
        type="stream_event",
        event={"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}},
    )
    if word == "mid-stream":
        hang()
    if word == "litter":
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        Path(os.environ["LITTER"]).write_text(str(child.pid))
        hang()
    answer = str(uuid.uuid4())
    content = [{"type": "text", "text": text}]
    session.write("assistant", answer, content=content, stop_reason="end_turn")
    say(type="assistant", uuid=answer, session_id=session.id, message={"model": "scripted", "content": content})
    say(
        type="result",
        subtype="success",
        is_error=False,
        num_turns=1,
        result=text,
        session_id=session.id,
        stop_reason="end_turn",
        total_cost_usd=0.25,
        usage={"input_tokens": 1, "output_tokens": 2},
    )


def main() -> None:
    """Do what the word says."""
    word = sys.argv[1]
    if "--version" in sys.argv:
        print("1.0.3 (Claude Code)" if word == "old" else "9.9.9 (Claude Code)")
        return
    if sys.argv[2:] == ["auth", "status"]:
        say(loggedIn=word != "logged-out")
        return
    if "-p" not in sys.argv:
        return
    if word == "nothing":
        return
    if word == "deaf":
        hang()
    session = Session(word)
    for line in sys.stdin:
        turn(word, session, json.loads(line))
        if word == "after-result":
            hang()


if __name__ == "__main__":
    main()
