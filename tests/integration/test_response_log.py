"""The response log follows the store: each completed turn once, in its session's file, whatever happens in between."""

from __future__ import annotations

import json
from pathlib import Path

import apsw
import pytest

from tests.endpoint import Answer, ScriptedEndpoint
from tests.integration.serving import daemon_and_wire
from tests.integration.wire import Json, until


def folder(home: Path) -> Path:
    return home / "var" / "logs" / "responses"


def entries(home: Path, session: str) -> list[Json]:
    """A session's lines, each of them whole."""
    path = folder(home) / f"{session}.jsonl"
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def logged(home: Path, session: str) -> list[str]:
    return [entry["ksi"]["request_id"] for entry in entries(home, session)]


def forget_watermark(home: Path) -> None:
    """A crash between the writing of the lines and of their positions."""
    database = apsw.Connection(str(home / "var" / "db" / "ksi.db"))
    database.execute("UPDATE total SET value = 0 WHERE name = 'log_watermark'")
    assert database.changes() == 1
    database.close()


@pytest.mark.promise("R3")
async def test_a_line_per_completed_turn_as_v1_wrote_it(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path) as (_, wire):
        reply = await wire.ask("completion:request", prompt="x", request_id="r1", session_id="c", agent_id="a")
        await wire.ask("completion:request", prompt="x", session_id="c", provider_options={"fail": "invalid_request"})
        await wire.ask("completion:request", prompt="zwei\nZeilen", request_id="r2", session_id="c")
        nameless = await wire.ask("completion:request", prompt="y", request_id="r3")
    first, second = entries(tmp_path, "c")
    assert first["ksi"] == {
        "provider": "stub",
        "request_id": "r1",
        "session_id": "c",
        "client_id": "a",
        "timestamp": pytest.approx(reply["finished_at"], abs=1),
        "duration_ms": first["ksi"]["duration_ms"],
    }
    assert (first["response"]["result"], first["response"]["session_id"]) == ("echo: x", "c")
    assert first["response"]["usage"]["output_tokens"] == 2
    assert (second["ksi"]["request_id"], second["response"]["result"]) == ("r2", "echo: zwei\nZeilen")
    assert logged(tmp_path, nameless["session_id"]) == ["r3"]


@pytest.mark.promise("R3")
async def test_it_is_written_while_the_daemon_runs(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path) as (_, wire):
        for number in range(5):
            await wire.ask("completion:request", prompt="x", request_id=f"r{number}", session_id="c")

        async def all_there() -> bool:
            path = folder(tmp_path) / "c.jsonl"
            return path.exists() and len(logged(tmp_path, "c")) == 5

        await until(all_there)


@pytest.mark.promise("R3")
async def test_a_provider_s_reply_is_kept_in_one_line_whatever_its_layout(tmp_path: Path) -> None:
    sent = {
        "id": "x",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "two\nlines"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2},
        "model": "m",
        "own field": [1, None],
    }
    async with ScriptedEndpoint(Answer(body=json.dumps(sent, indent=2).encode())) as endpoint:
        providers = {"team": {"kind": "openai", "base_url": endpoint.openai_url}}
        async with daemon_and_wire(tmp_path, providers=providers) as (_, wire):
            reply = await wire.ask("completion:request", prompt="x", session_id="c", model="team/m")
            assert reply["result"] == "two\nlines"
    (entry,) = entries(tmp_path, "c")
    assert entry["response"] == sent


@pytest.mark.promise("R3")
@pytest.mark.parametrize("size", [10, 400_000], ids=["small", "large"])
async def test_lines_that_a_dead_daemon_wrote_without_saying_so_are_not_written_again(
    tmp_path: Path, size: int
) -> None:
    names = [f"r{number}" for number in range(8)]
    async with daemon_and_wire(tmp_path) as (_, wire):
        for name in names:
            await wire.ask("completion:request", prompt="x" * size, request_id=name, session_id="c")
    assert logged(tmp_path, "c") == names
    forget_watermark(tmp_path)
    async with daemon_and_wire(tmp_path) as (_, wire):
        await wire.ask("completion:request", prompt="x", request_id="new", session_id="c")
    assert logged(tmp_path, "c") == [*names, "new"]


@pytest.mark.promise("R3")
@pytest.mark.parametrize("size", [10, 3_000_000], ids=["small", "large"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0], ids=["its beginning", "half of it", "all but its end"])
async def test_a_line_that_a_crash_cut_off_is_written_whole(tmp_path: Path, size: int, kept: float) -> None:
    async with daemon_and_wire(tmp_path) as (_, wire):
        await wire.ask("completion:request", prompt="x", request_id="r1", session_id="c")
        await wire.ask("completion:request", prompt="x" * size, request_id="r2", session_id="c")
    path = folder(tmp_path) / "c.jsonl"
    data = path.read_bytes()
    start = data.index(b"\n") + 1
    path.write_bytes(data[: start + 1 + round((len(data) - start - 2) * kept)])
    forget_watermark(tmp_path)
    async with daemon_and_wire(tmp_path):
        pass
    assert logged(tmp_path, "c") == ["r1", "r2"]
    assert path.read_bytes() == data


@pytest.mark.promise("R3")
async def test_a_file_that_cannot_be_written_costs_no_line_of_another_file_twice(tmp_path: Path) -> None:
    blocked = folder(tmp_path) / "blocked.jsonl"
    blocked.mkdir(parents=True)
    async with daemon_and_wire(tmp_path) as (_, wire):
        for session in ("a", "blocked", "z"):
            await wire.ask("completion:request", prompt="x", request_id=f"in {session}", session_id=session)

        async def first_try() -> bool:
            return (folder(tmp_path) / "a.jsonl").exists()

        await until(first_try)
        await wire.ask("completion:request", prompt="x", request_id="again", session_id="a")
        blocked.rmdir()

        async def made_good() -> bool:
            return blocked.is_file() and (folder(tmp_path) / "z.jsonl").exists()

        await until(made_good)
    assert logged(tmp_path, "a") == ["in a", "again"]
    assert logged(tmp_path, "blocked") == ["in blocked"]
    assert logged(tmp_path, "z") == ["in z"]


@pytest.mark.promise("R3", "R6")
async def test_a_daemon_starts_and_stops_though_a_file_cannot_be_written(tmp_path: Path) -> None:
    blocked = folder(tmp_path) / "blocked.jsonl"
    blocked.mkdir(parents=True)
    for number in range(2):
        async with daemon_and_wire(tmp_path) as (_, wire):
            await wire.ask("completion:request", prompt="x", request_id=f"r{number}", session_id="blocked")
            await wire.ask("completion:request", prompt="x", request_id=f"s{number}", session_id="free")
    blocked.rmdir()
    async with daemon_and_wire(tmp_path):
        pass
    assert logged(tmp_path, "blocked") == ["r0", "r1"]
    assert logged(tmp_path, "free") == ["s0", "s1"]


@pytest.mark.promise("R3")
async def test_switched_off_it_writes_nothing_and_later_nothing_of_that_time(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path, log={"responses": False}) as (_, wire):
        await wire.ask("completion:request", prompt="x", request_id="r1", session_id="c")
    assert not folder(tmp_path).exists()
    async with daemon_and_wire(tmp_path) as (_, wire):
        await wire.ask("completion:request", prompt="x", request_id="r2", session_id="c")
    assert logged(tmp_path, "c") == ["r2"]


@pytest.mark.promise("R3", "R1")
async def test_an_answer_s_line_is_in_its_file_before_the_answer_is_published(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path) as (_, wire):
        for number in range(20):
            await wire.ask("completion:request", prompt="x", request_id=f"r{number}", session_id="c")
            assert logged(tmp_path, "c")[-1] == f"r{number}"
        await wire.ask("completion:async", prompt="x", request_id="later", session_id="c")
        await wire.pushed("completion:result", request_id="later")
        assert logged(tmp_path, "c")[-1] == "later"


@pytest.mark.promise("R3")
async def test_an_answer_is_published_though_its_line_cannot_be_written(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path) as (_, wire):
        await wire.ask("completion:request", prompt="x", request_id="r1", session_id="c")
        (folder(tmp_path) / "c.jsonl").rename(tmp_path / "aside")
        (folder(tmp_path) / "c.jsonl").mkdir()
        reply = await wire.ask("completion:request", prompt="x", request_id="r2", session_id="c")
        assert reply["status"] == "completed"
        (folder(tmp_path) / "c.jsonl").rmdir()
        (tmp_path / "aside").rename(folder(tmp_path) / "c.jsonl")
        await wire.ask("completion:request", prompt="x", request_id="r3", session_id="c")

        async def written() -> bool:
            return logged(tmp_path, "c") == ["r1", "r2", "r3"]

        await until(written)
