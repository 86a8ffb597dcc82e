"""A stand-in for Claude Code that behaves as its first argument says, for faults that the real one has only when it is
broken.

Words: answers · no-init · mid-stream · after-result · garbage · noise · big-line · endless-line · nothing · crash ·
other-session · deaf · litter · chatter · works · torn · odd · refreshes ·
tells-stderr · tells-stdout · tells-result · logged-out · old. Each but the last two
answers `--version` and `auth status` as a good one; a logged-out one does so once the file that LOGIN names is there.
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
    """Its session, and its transcript."""

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


def raw(text: str) -> None:
    print(text, flush=True)


def refresh() -> bool:
    """Refresh the stored login where it is due, as slowly as a network, by a token that can be used once. Who uses one
    again logs everybody out. Whether it is logged in then."""
    path = Path(os.environ["CLAUDE_CONFIG_DIR"]) / ".credentials.json"
    login = json.loads(path.read_text())["claudeAiOauth"]
    if login["expiresAt"] / 1000 - time.time() > 300:
        return bool(login["accessToken"])
    with Path(os.environ["REFRESHES"]).open("a") as used:
        used.write(login["refreshToken"] + "\n")
    time.sleep(0.3)
    tokens = Path(os.environ["REFRESHES"]).read_text().split()
    good = len(set(tokens)) == len(tokens)
    new = {"accessToken": "new", "refreshToken": f"refresh-{len(tokens)}", "expiresAt": (time.time() + 28_800) * 1000}
    gone = {"accessToken": "", "refreshToken": "", "expiresAt": 0}
    path.write_text(json.dumps({"claudeAiOauth": new if good else gone}))
    return good


def secrets() -> str:
    """All that it was given in confidence."""
    servers = Path(option("mcp-config") or os.devnull).read_text()
    return " ".join([os.environ["ANTHROPIC_API_KEY"], os.environ["HTTPS_PROXY"], *sys.argv[2:], servers])


def turn(word: str, session: Session, prompt: Any) -> None:
    """One turn."""
    if word == "no-init":
        hang()
    if word == "refreshes" and not refresh():
        text = "Login expired \u00b7 Please run /login"
        say(
            type="assistant", uuid="u", error="authentication_failed", message={"model": "<synthetic>", "content": text}
        )
        say(type="result", subtype="success", is_error=True, num_turns=1, result=text, session_id=session.id)
        return
    if word == "tells-stderr":
        # The first of it is cut in the middle of a secret.
        print((os.environ["ANTHROPIC_API_KEY"] + ".") * 1000 + secrets() + " were given", file=sys.stderr)
        sys.exit(3)
    if word == "tells-stdout":
        for _ in range(200):
            print(secrets()[:120], flush=True)
        hang()
    if word == "tells-result":
        text = f"API Error: 400 {secrets()} are no good"
        say(type="result", subtype="success", is_error=True, num_turns=1, result=text, session_id=session.id)
        return
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
    if word == "chatter":
        for _ in range(8):
            time.sleep(0.25)
            say(type="system", subtype="task_progress", description="still at it")
    if word == "works":
        content = [{"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {"command": "make"}}]
        say(type="assistant", uuid="u", session_id=session.id, message={"model": "scripted", "content": content})
        hang()
    if word == "torn":
        raw('{"type":"user","message":{"content":[{"type":"tool_result","content":"cut \\ud83d"}]}}')
        sys.stdout.flush()
        sys.stdout.buffer.write(b'{"type":"user","message":{"content":"stray \xff bytes"}}\n')
        for half in ("smile \\ud83d", "\\ude00"):
            delta = '{"type":"content_block_delta","delta":{"type":"text_delta","text":"' + half + '"}}'
            raw('{"type":"stream_event","event":' + delta + "}")
    if word == "odd":
        for line in ('{"type":"assistant"}', '{"type":"rate_limit_event"}', '{"type":{}}', '{"kind":"new"}'):
            for _ in range(60):
                raw(line)
    if word == "litter":
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        Path(os.environ["LITTER"]).write_text(str(child.pid))
        hang()
    text = "Hello.smile \U0001f600" if word == "torn" else text
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
    """Behave as the word says."""
    word = sys.argv[1]
    if "--version" in sys.argv:
        print("1.0.3 (Claude Code)" if word == "old" else "9.9.9 (Claude Code)")
        return
    if sys.argv[2:] == ["auth", "status"]:
        say(loggedIn=word != "logged-out" or Path(os.environ.get("LOGIN", "no such file")).exists())
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
