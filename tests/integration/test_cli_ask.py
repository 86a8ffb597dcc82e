"""`ksi ask` and `ksi wait` when things go otherwise: closed pipes, lost daemons, cut answers, odd bytes."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ksi.cli.settings import Exit
from tests.daemon_process import DaemonProcess, clean_environ, make_home
from tests.endpoint import Answer, ScriptedEndpoint
from tests.integration.test_cli import command, ksi, rows

Spawn = Callable[..., "subprocess.Popen[bytes]"]
DROPS = """
[providers.drops]
kind = "stub"
pieces = 20
piece_delay = 0.2
text = "one two three four five six seven eight nine ten eleven twelve"
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = make_home(tmp_path_factory.mktemp("home"))
    (folder / "ksi.toml").write_text((folder / "ksi.toml").read_text() + DROPS)
    with DaemonProcess(folder) as daemon:
        yield daemon.home


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts commands that continue by themselves; the remaining ones are killed at the end."""
    with ExitStack() as stack:

        def start(home: Path, *args: str, stdin: int = subprocess.DEVNULL, **environ: str) -> subprocess.Popen[bytes]:
            process = stack.enter_context(
                subprocess.Popen(
                    command(home, *args),
                    stdin=stdin,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env={**clean_environ(), **environ},
                )
            )
            stack.callback(process.kill)
            return process

        yield start


def said(process: subprocess.Popen[bytes], words: str) -> str:
    """The text on stderr, up to these words."""
    assert process.stderr is not None
    text = ""
    while words not in text:
        assert select.select([process.stderr], [], [], 60)[0], text
        piece = os.read(process.stderr.fileno(), 65_536).decode()
        assert piece, text
        text += piece
    return text


def request(home: Path, request_id: str) -> Any:
    (reply,) = rows(ksi(home, "show", request_id, "--json"))
    return reply


# The reader has gone


@pytest.mark.promise("U2", "F8")
def test_a_pipe_that_is_closed_before_any_text_cancels(home: Path, spawn: Spawn) -> None:
    asking = spawn(home, "ask", "--model", "slow/x", "--id", "closed-early", "--session", "closed", "Hello")
    while not any(row["conversation_id"] == "closed" for row in rows(ksi(home, "locks", "--json"))):
        assert asking.poll() is None
    assert asking.stdout is not None
    asking.stdout.close()
    assert "closed-early cancelled" in said(asking, "cancelled")
    assert asking.wait(60) == Exit.CANCELLED
    assert request(home, "closed-early")["status"] == "cancelled"


@pytest.mark.promise("U2", "F8")
def test_head_cancels_the_unread_rest(home: Path) -> None:
    words = " ".join(command(home, "ask", "--model", "drops/x", "--id", "head", "Hello"))
    shell = f"{words} | head -c 3"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, timeout=60, env=clean_environ())
    assert done.stdout == b"one"
    assert b"Traceback" not in done.stderr
    assert b"head cancelled" in done.stderr
    assert request(home, "head")["status"] == "cancelled"


@pytest.mark.promise("U2")
def test_an_answer_that_cannot_be_written_is_kept_and_said_to_be(home: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        for extra in ((), ("--no-stream",), ("--json",)):
            words = command(home, "ask", *extra, "--id", f"full{extra}", "Hello")
            done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, timeout=60, env=clean_environ())
            assert done.returncode == Exit.FAILED
            assert b"Traceback" not in done.stderr
            assert b"No space left on device); it is kept: ksi show" in done.stderr
            assert request(home, f"full{extra}")["result"] == "echo: Hello"
        listing = subprocess.run(
            command(home, "events"), stdout=full, stderr=subprocess.PIPE, timeout=60, env=clean_environ()
        )
    assert listing.returncode == Exit.FAILED
    assert listing.stderr == b"ksi: the output could not be written: No space left on device\n"


@pytest.mark.promise("U2")
def test_nothing_is_asked_if_stdout_is_closed(home: Path) -> None:
    shell = f"{' '.join(command(home, 'ask', '--id', 'unheard', 'Hello'))} >&-"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, timeout=60, env=clean_environ())
    assert done.returncode == Exit.USAGE
    assert b"stdout is closed" in done.stderr
    assert ksi(home, "show", "unheard").returncode == Exit.NOT_FOUND
    status = f"{' '.join(command(home, 'status'))} >&-"
    assert subprocess.run(["sh", "-c", status], timeout=60, env=clean_environ()).returncode == 0


# The prompt


@pytest.mark.promise("U2")
def test_continue_goes_on_with_the_agents_last_conversation_and_fork_leaves_it(home: Path) -> None:
    (first,) = rows(ksi(home, "ask", "--agent", "ann", "--json", "one"))
    (other,) = rows(ksi(home, "ask", "--agent", "bob", "--json", "two"))
    (again,) = rows(ksi(home, "ask", "--agent", "ann", "--continue", "--json", "three"))
    (fork,) = rows(ksi(home, "ask", "--agent", "ann", "--continue", "--fork", "--json", "four"))
    assert again["session_id"] == first["session_id"] != other["session_id"]
    assert fork["session_id"] != first["session_id"]
    assert "echo: three" in ksi(home, "log", fork["session_id"]).stdout
    assert ksi(home, "ask", "--agent", "nobody", "--continue", "x").returncode == Exit.USAGE
    assert ksi(home, "ask", "--fork", "x").returncode == Exit.USAGE


@pytest.mark.promise("U2")
def test_everything_that_can_be_said_goes_into_the_request(home: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("milk\n")
    options = ("--id", "said", "--temperature", "0", "--stop", "END", "--stop", "FIN", "--timeout", "30")
    asked = ksi(home, "ask", *options, "--on-busy", "reject", "--attach", str(tmp_path / "note.txt"), "Read this")
    assert asked.stdout == "echo: Read this\n\nnote.txt:\n```\nmilk\n```\n"
    (again,) = rows(
        ksi(
            home,
            "send",
            "completion:async",
            json.dumps(
                {
                    "request_id": "said",
                    "prompt": "Read this\n\nnote.txt:\n```\nmilk\n```",
                    "temperature": 0,
                    "stop": ["END", "FIN"],
                    "timeout": 30,
                    "on_busy": "reject",
                }
            ),
        )
    )
    assert again["status"] == "completed", "the same content under the same id"
    assert ksi(home, "ask", "--id", "said", "another").returncode == Exit.USAGE


@pytest.mark.promise("U2")
def test_a_silent_stdin_is_mentioned(home: Path, spawn: Spawn) -> None:
    asking = spawn(home, "ask", "Hello", stdin=subprocess.PIPE)
    said(asking, "--no-stdin does not wait for it")
    assert asking.stdin is not None
    asking.stdin.write(b"there")
    asking.stdin.close()
    assert asking.stdout is not None
    assert asking.stdout.read() == b"echo: Hello\n\nthere\n"
    other = spawn(home, "ask", "--no-stdin", "Hello", stdin=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.read() == b"echo: Hello\n"


@pytest.mark.promise("U2")
def test_bytes_that_are_no_utf_8_end_with_a_sentence(home: Path) -> None:
    done = subprocess.run(
        [*command(home, "ask"), b"caf\xe9"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        env=clean_environ(),
    )
    assert done.returncode == Exit.USAGE
    assert b"byte 0xe9" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.promise("U2")
@pytest.mark.parametrize("charset", ["latin-1", "ascii", "cp1252"])
def test_an_answer_survives_a_terminal_without_its_characters(home: Path, charset: str) -> None:
    done = subprocess.run(
        command(home, "ask", "--", "emoji \U0001f600 ok"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        env={**clean_environ(), "PYTHONIOENCODING": charset},
    )
    assert (done.returncode, done.stdout) == (0, b"echo: emoji \\U0001f600 ok\n")
    as_json = subprocess.run(
        command(home, "ask", "--json", "--", "emoji \U0001f600 ok"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        env={**clean_environ(), "PYTHONIOENCODING": charset},
    )
    assert json.loads(as_json.stdout)["result"] == "echo: emoji \U0001f600 ok"


# The reason of its wait, and its end


@pytest.mark.promise("U2")
def test_stderr_names_the_reason_of_a_wait(own_home: Path, spawn: Spawn) -> None:
    with DaemonProcess(own_home):
        ksi(own_home, "providers", "disable", "stub")
        asking = spawn(own_home, "ask", "--id", "patient", "Hello")
        told = said(asking, "; see `ksi providers enable stub`")
        assert "patient waits: provider stub is disabled since " in told
        ksi(own_home, "providers", "enable", "stub")
        assert asking.stdout is not None
        assert asking.stdout.read() == b"echo: Hello\n"
        holder = spawn(own_home, "ask", "--model", "slow/x", "--session", "taken", "--id", "holder", "Hello")
        while not rows(ksi(own_home, "locks", "--json")):
            assert holder.poll() is None
        asking = spawn(own_home, "ask", "--session", "taken", "--id", "waiter", "Hello")
        said(asking, "waiter waits for its conversation; holder holds it now")
        ksi(own_home, "cancel", "holder")
        assert asking.wait(60) == 0


@pytest.fixture
def own_home(tmp_path: Path) -> Iterator[Path]:
    yield make_home(tmp_path)
    ksi(tmp_path, "stop")


@pytest.mark.promise("U2", "Q3")
def test_a_lost_daemon_is_named_at_once_with_the_request_and_wait_goes_on(own_home: Path, spawn: Spawn) -> None:
    (own_home / "ksi.toml").write_text((own_home / "ksi.toml").read_text() + DROPS)
    daemon = DaemonProcess(own_home)
    daemon.start()
    asking = spawn(own_home, "ask", "--model", "drops/x", "--id", "orphan", "Hello")
    assert asking.stdout is not None
    assert asking.stdout.read(3) == b"one"
    daemon.end(signal.SIGKILL)
    text = said(asking, "`ksi wait orphan` waits again later")
    assert "the daemon is gone; orphan is kept" in text
    asking.kill()
    waited = ksi(own_home, "wait", "orphan")  # it starts the daemon again
    assert waited.returncode == 0, waited.stderr
    assert waited.stdout.endswith("eleven twelve\n")
    assert len(request(own_home, "orphan")["attempts"]) == 2


@pytest.mark.promise("U2")
def test_wait_prints_an_earlier_answer_and_leaves_a_request_that_it_gives_up(home: Path) -> None:
    ksi(home, "ask", "--id", "of-before", "Hello")
    assert ksi(home, "wait", "of-before").stdout == "echo: Hello\n"
    assert ksi(home, "wait", "of-bef").stdout == "echo: Hello\n"
    assert rows(ksi(home, "wait", "of-before", "--json"))[0]["result"] == "echo: Hello"
    assert ksi(home, "wait", "nobody").returncode == Exit.NOT_FOUND
    ksi(home, "send", "completion:async", '{"request_id": "endless", "prompt": "x", "model": "slow/x"}')
    given_up = ksi(home, "wait", "endless", "--timeout", "0.1")
    assert given_up.returncode == Exit.LATER
    assert "it continues" in given_up.stderr
    assert request(home, "endless")["status"] == "running"
    ksi(home, "cancel", "endless")
    assert ksi(home, "wait", "endless").returncode == Exit.CANCELLED


ENDPOINT = '[service]\ndefault_model = "team/large"\n[providers.team]\nkind = "openai"\nbase_url = "{url}"\n'


@pytest.mark.promise("U2")
async def test_an_answer_that_was_cut_at_a_limit_says_so_and_is_no_success(own_home: Path) -> None:
    async with ScriptedEndpoint(Answer(stop_reason="length"), Answer(stop_reason="length"), Answer()) as endpoint:
        make_home(own_home, ENDPOINT.format(url=endpoint.openai_url))
        cut = await asyncio.to_thread(ksi, own_home, "ask", "--max-tokens", "2", "--id", "torso", "Hello")
        as_json = await asyncio.to_thread(ksi, own_home, "ask", "--max-tokens", "2", "--json", "Hello")
        whole = await asyncio.to_thread(ksi, own_home, "ask", "Hello")
        await asyncio.to_thread(ksi, own_home, "stop")
    assert (cut.returncode, cut.stdout) == (Exit.CUT, "Hello there.\n")
    assert "the answer of torso is incomplete: it was cut at its limit of tokens" in cut.stderr
    assert as_json.returncode == Exit.CUT
    assert json.loads(as_json.stdout)["result"] == "Hello there."
    assert (whole.returncode, "cut" in whole.stderr) == (0, False)


@pytest.mark.promise("U2")
async def test_a_schema_and_an_image_go_with_the_request(own_home: Path, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    asked = ("ask", "--schema", str(tmp_path / "schema.json"))
    async with ScriptedEndpoint(Answer(pieces=('{"a"', ": 1}")), Answer()) as endpoint:
        make_home(own_home, ENDPOINT.format(url=endpoint.openai_url))
        answered = await asyncio.to_thread(ksi, own_home, *asked, "Hello")
        prose = await asyncio.to_thread(ksi, own_home, *asked, "Hello")
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        seen = await asyncio.to_thread(
            ksi, own_home, "ask", "--id", "seen", "--attach", str(tmp_path / "a.png"), "See?"
        )
        shown = await asyncio.to_thread(ksi, own_home, "show", "seen")
        await asyncio.to_thread(ksi, own_home, "stop")
    assert (answered.returncode, answered.stdout) == (0, '{"a": 1}\n')
    assert endpoint.requests[0].json["response_format"]["json_schema"]["schema"] == schema
    assert prose.returncode == Exit.FAILED
    assert "ignored the schema" in prose.stderr
    assert seen.returncode == Exit.DONE
    picture, words = endpoint.requests[2].json["messages"][0]["content"]
    assert picture["image_url"]["url"] == "data:image/png;base64,iVBORw0KGgo="
    assert words == {"type": "text", "text": "See?"}
    assert "[image] image/png 12 characters" in shown.stdout
