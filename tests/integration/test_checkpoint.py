"""Checkpoints of a whole daemon: saved while it works, continued, and refused completely if something is wrong."""

from __future__ import annotations

import asyncio
import errno
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ksi.completion.upkeep.checkpoint import TWICE
from ksi.errors import StoreFull
from ksi.store.snapshot.file import HEADER_SIZE, VERSION, CheckpointReader, CheckpointWriter
from ksi.store.snapshot.records import Figures, Record
from ksi.testing import SimulatedClock
from tests.daemon_process import DaemonProcess, make_home
from tests.endpoint import Answer, ScriptedEndpoint
from tests.integration.house import FAILS, House, provider, serving, trail
from tests.integration.wire import Json, Wire, answer, in_state, until

STUB: Json = {"team": {"kind": "stub", "models": ["team/*"], "max_concurrency": 4}}
SLOW: Json = {"delay": 600.0}


async def collected(house: House, path: Path) -> Json:
    return await house.wire.ask("checkpoint:collect", path=str(path))


def mode(path: Path | str) -> int:
    """The file's permissions."""
    return stat.S_IMODE(Path(path).stat().st_mode)


def names(folder: Path) -> list[str]:
    """The files in a folder, hidden ones too."""
    return sorted(entry.name for entry in folder.iterdir())


async def restored(house: House, path: Path) -> Json:
    return await house.wire.ask("checkpoint:restore", path=str(path))


@pytest.mark.promise("R5", "Q3", "F10")
async def test_a_restored_daemon_continues_the_queued_requests_and_reruns_the_running_ones(tmp_path: Path) -> None:
    file = tmp_path / "saved.ksi"
    async with serving(STUB) as house:
        await house.asked("First", session_id="talk", request_id="done")
        await house.begin("runs", "running", session_id="talk", provider_options=SLOW)
        await house.begin("waits", "queued", session_id="talk", prompt="Third")
        await house.begin("later", "scheduled", delay=1.5, prompt="Later")
        reply = await collected(house, file)
        assert (reply["requests"], reply["conversations"], reply["interrupted"]) == (4, 2, 1)
        assert reply["bytes"] + HEADER_SIZE == file.stat().st_size
        assert (await house.wire.ask("completion:get", request_id="runs"))["status"] == "running", "it was disturbed"

    async with serving(STUB, limits={"timeout": 0.2}, retry={"max_attempts": 1}) as house:
        reply = await restored(house, file)
        assert (reply["requests"], reply["interrupted"], reply["notice"]) == (4, 1, TWICE)
        assert "run in both" in reply["notice"]
        done = await house.wire.ask("completion:get", request_id="done")
        assert (done["status"], done["result"]) == ("completed", "echo: First")
        again = await in_state(house.wire, "runs", "failed")
        assert trail(again) == [("team", "interrupted", "daemon_restart"), ("team", "failed", "timeout")]
        assert again["interruptions"] == 1
        assert (await in_state(house.wire, "waits", "completed"))["result"] == "echo: Third"
        assert (await in_state(house.wire, "later", "completed"))["result"] == "echo: Later"
        status = await house.wire.ask("completion:queue_status")
        assert (status["completed"], status["failed"], status["conversations"]) == (3, 1, 2)
        known = await house.asked("First", session_id="talk", request_id="done")
        assert known["result"] == "echo: First", "its id is known, so it is not asked again"


@pytest.mark.promise("R5", "L9")
async def test_a_restored_conversation_has_its_history(tmp_path: Path) -> None:
    async with ScriptedEndpoint() as endpoint:
        providers = {"team": provider("openai", endpoint)}
        async with serving(providers) as house:
            for number in range(3):
                await house.asked(f"Turn {number}", session_id="talk")
            await collected(house, tmp_path / "saved.ksi")
        async with serving(providers) as house:
            await restored(house, tmp_path / "saved.ksi")
            await house.asked("Turn 3", session_id="talk")
            said = [message["content"] for message in endpoint.requests[-1].json["messages"]]
            assert said == ["Turn 0", "Hello there.", "Turn 1", "Hello there.", "Turn 2", "Hello there.", "Turn 3"]


@pytest.mark.promise("R5", "F2", "L8")
async def test_retries_routes_and_locks_go_on_in_a_restored_daemon(tmp_path: Path) -> None:
    clock = SimulatedClock()
    file = tmp_path / "saved.ksi"
    async with ScriptedEndpoint(FAILS) as first, ScriptedEndpoint(FAILS, Answer()) as second:
        providers = {"a": provider("openai", first, priority=1), "b": provider("openai", second, priority=2)}
        retry = {"initial_delay": 100.0, "max_delay": 100.0}
        async with serving(providers, clock=clock, retry=retry) as house:
            await house.begin("r1", "retrying", session_id="talk")

            async def both_have_failed() -> Json | None:
                reply = await in_state(house.wire, "r1", "retrying")
                return reply if len(reply["attempts"]) == 2 else None

            before = await until(both_have_failed)
            assert before is not None
            await house.begin("behind", "queued", session_id="talk")
            await house.wire.ask("conversation:acquire_lock", request_id="mine", conversation_id="outside")
            await house.begin("held up", "queued", session_id="outside")
            await collected(house, file)
        async with serving(providers, clock=clock, retry=retry) as house:
            await restored(house, file)
            after = await in_state(house.wire, "r1", "retrying")
            assert (after["due_at"], after["attempts"]) == (before["due_at"], before["attempts"])
            assert (await house.wire.ask("completion:get", request_id="behind"))["holder"] == "r1"
            await house.wire.ask("conversation:release_lock", request_id="mine")
            assert (await in_state(house.wire, "held up", "completed"))["provider"] == "b"
            await clock.advance(after["due_at"] - clock.now().unix)
            assert (await in_state(house.wire, "behind", "completed"))["provider"] == "b"


@pytest.mark.promise("R5")
async def test_a_checkpoint_under_load_holds_each_request_once_and_all_of_them_end(tmp_path: Path) -> None:
    file = tmp_path / "saved.ksi"
    async with serving(STUB) as house:
        asked = [
            house.wire.post(
                "completion:async",
                {
                    "request_id": f"r{number}",
                    "prompt": "Hi",
                    "model": "team/x",
                    "session_id": f"talk {number % 20}",
                    "provider_options": {"delay": 0.002 * (number % 4)},
                },
            )
            for number in range(400)
        ]
        await asyncio.gather(*(answer(one) for one in asked))

        async def some_are_done() -> bool:
            return bool((await house.wire.ask("completion:status"))["completed"] > 50)

        await until(some_are_done)
        reply = await collected(house, file)
        before = (await house.wire.ask("completion:status"))["completed"]
        assert reply["requests"] == 400
    async with serving(STUB) as house:
        reply = await restored(house, file)
        assert reply["interrupted"] <= 4
        replies = [await in_state(house.wire, f"r{number}", "completed") for number in range(400)]
        again = sum(bool(one.get("interruptions")) for one in replies)
        assert again == reply["interrupted"]
        status = await house.wire.ask("completion:queue_status")
        assert (status["completed"], status["queued"], status["active"]) == (400, 0, 0)
        turns = Counter(one["session_id"] for one in replies)
        for name, count in turns.items():
            assert (await house.wire.ask("completion:session_status", session_id=name))["turns"] == count
    assert before < 400, "there was nothing left to go on with"


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.promise("R5", "S2")
async def test_checkpoints_lie_below_the_home_unless_an_absolute_path_is_given_and_are_for_this_user_only(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "home" / "var" / "checkpoints"
    async with serving(STUB, home=tmp_path / "home") as house:
        await house.asked()
        made = await house.wire.ask("checkpoint:collect")
        named = await house.wire.ask("checkpoint:collect", path="monday.ksi")
        outside = await house.wire.ask("checkpoint:collect", path=str(tmp_path / "outside.ksi"))
    assert Path(made["path"]).parent == folder
    assert named["path"] == str(folder / "monday.ksi")
    assert outside["path"] == str(tmp_path / "outside.ksi")
    assert mode(folder) == 0o700
    for reply in (made, named, outside):
        assert mode(reply["path"]) == 0o600
    assert names(folder) == sorted([Path(made["path"]).name, "monday.ksi"]), "something was left"


@pytest.mark.promise("R5", "S1", "S3")
@pytest.mark.parametrize(
    ("path", "says"),
    [
        pytest.param("../out.ksi", "without `..`", id="out of the folder"),
        pytest.param("a/../../out.ksi", "without `..`", id="out of the folder, hidden"),
        pytest.param("a\0b", "without `..`", id="a zero byte"),
        pytest.param(".", "without `..`", id="the folder"),
        pytest.param("/", "without `..`", id="the root"),
        pytest.param("{tmp}/there.ksi", "is there already", id="a file that is there"),
        pytest.param("{tmp}", "is there already", id="a folder"),
        pytest.param("{tmp}/no/such/folder.ksi", "No such file or directory", id="no such folder"),
        pytest.param("{tmp}/there.ksi/x", "Not a directory", id="below a file"),
        pytest.param("{tmp}/" + "x" * 300, "File name too long", id="too long"),
    ],
)
async def test_an_impossible_path_is_reported(tmp_path: Path, path: str, says: str) -> None:
    (tmp_path / "there.ksi").write_text("mine")
    async with serving(STUB) as house:
        error = await house.wire.refused("checkpoint:collect", path=path.replace("{tmp}", str(tmp_path)))
        assert (error.code, error.details["path"]) == ("invalid_data", "path")
        assert says in error.message
        assert (await house.asked())["status"] == "completed"
    assert (tmp_path / "there.ksi").read_text() == "mine"
    assert names(tmp_path) == ["there.ksi"]


FIGURES = Figures(ended={}, fence=0, logged=0, routes=())


def write(path: Path, *records: Record) -> None:
    writer = CheckpointWriter(path)
    writer.add(records)
    writer.finish(1.0, "0")


@pytest.mark.promise("R5")
def test_a_checkpoint_without_room_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(tmp_path / "saved.ksi")

    def full(_descriptor: int, _data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "write", full)
        with pytest.raises(StoreFull, match="free some space"):
            writer.add([Figures(ended={}, fence=0, logged=0, routes=tuple(map(str, range(100_000))))])
            writer.finish(1.0, "0")
    writer.discard()
    assert names(tmp_path) == []


@pytest.mark.promise("R5")
def test_a_name_that_was_taken_meanwhile_is_not_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "saved.ksi"
    writer = CheckpointWriter(path)
    writer.add([FIGURES])
    path.write_text("another's")
    with pytest.raises(Exception, match="is there already"):
        writer.finish(1.0, "0")
    assert path.read_text() == "another's"
    assert names(tmp_path) == ["saved.ksi"]


@pytest.mark.promise("R5")
async def test_a_daemon_that_is_killed_while_it_saves_leaves_no_checkpoint_by_name(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    file = tmp_path / "saved.ksi"
    with DaemonProcess(home) as daemon:
        async with await Wire.open(daemon.socket_path) as wire:
            await wire.ask("provider:disable", provider="stub")
            for part in range(10):
                texts = [{"prompt": random.Random(n).randbytes(20_000).hex()} for n in range(part * 20, part * 20 + 20)]
                await asyncio.gather(*(answer(wire.post("completion:async", text)) for text in texts))
            wire.post("checkpoint:collect", {"path": str(file)})

            async def begun() -> bool:
                return any(name.startswith(".saved.ksi.") for name in names(tmp_path)) or file.exists()

            await until(begun)
            daemon.end(signal.SIGKILL)
    assert not file.exists()


# -- refused whole ----------------------------------------------------------------------------------------------------


def change_header(data: bytes, **fields: Any) -> bytes:
    header = json.loads(data[:HEADER_SIZE]) | fields
    return json.dumps(header).encode().ljust(HEADER_SIZE - 1) + b"\n" + data[HEADER_SIZE:]


def with_records(data: bytes, change: Callable[[list[bytes]], list[bytes]]) -> bytes:
    """The same with other lines, and a header that agrees with them."""
    lines = change(gzip.decompress(data[HEADER_SIZE:]).splitlines(keepends=True))
    return with_body(data, gzip.compress(b"".join(lines)))


def with_body(data: bytes, body: bytes) -> bytes:
    return change_header(data[:HEADER_SIZE] + body, sha256=hashlib.sha256(body).hexdigest(), bytes=len(body))


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


BAD: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "an empty file": ("foreign", lambda _: b""),
    "some text": ("foreign", lambda _: b"Hello there.\n" * 500),
    "another's JSON": ("foreign", lambda _: b'{"format": "other", "version": 1}'.ljust(2000)),
    "a bare archive": ("foreign", lambda data: data[HEADER_SIZE:]),
    "a database": ("foreign", lambda _: b"SQLite format 3\0" + bytes(4000)),
    "one that was not finished": ("foreign", lambda data: b" " * HEADER_SIZE + data[HEADER_SIZE:]),
    "half a header": ("foreign", lambda data: data[:100]),
    "a newer version": ("newer", lambda data: change_header(data, version=VERSION + 1)),
    "a newer version that we cannot read": (
        "newer",
        lambda _: b'{"format":"ksi-checkpoint","version":9}'.ljust(HEADER_SIZE),
    ),
    "a header without its sum": ("damaged", lambda _: b'{"format":"ksi-checkpoint","version":1}'.ljust(HEADER_SIZE)),
    "one bit at the beginning": ("damaged", lambda data: flipped(data, HEADER_SIZE + 12)),
    "one bit in the middle": ("damaged", lambda data: flipped(data, (HEADER_SIZE + len(data)) // 2)),
    "one bit at the end": ("damaged", lambda data: flipped(data, len(data) - 1)),
    "one byte less": ("damaged", lambda data: data[:-1]),
    "half of it": ("damaged", lambda data: data[: HEADER_SIZE + (len(data) - HEADER_SIZE) // 2]),
    "nothing behind the header": ("damaged", lambda data: data[:HEADER_SIZE]),
    "something behind it": ("damaged", lambda data: data + b"x"),
    "another sum": ("damaged", lambda data: change_header(data, sha256="0" * 64)),
    "another number of records": ("damaged", lambda data: change_header(data, records={"figures": 1})),
    "no archive": ("damaged", lambda data: with_body(data, b"plain text")),
    "an archive that breaks off": ("damaged", lambda data: with_body(data, data[HEADER_SIZE:-20])),
    "a record less": ("damaged", lambda data: with_records(data, lambda lines: lines[:-1])),
    "a record twice": ("damaged", lambda data: with_records(data, lambda lines: [*lines, lines[-1]])),
    "a record of another kind": (
        "damaged",
        lambda data: with_records(data, lambda lines: [*lines, b'{"record":"x"}\n']),
    ),
    "a record that is none": ("damaged", lambda data: with_records(data, lambda lines: [*lines[:-1], b"{\n"])),
    "a record that breaks off": (
        "damaged",
        lambda data: with_records(data, lambda lines: [*lines[:-1], lines[-1][:-9]]),
    ),
    "a record with a wrong value": (
        "damaged",
        lambda data: with_records(data, lambda lines: [*lines[:-1], lines[-1].replace(b'"key":', b'"key":"no" ,"k":')]),
    ),
    "no figures": ("damaged", lambda data: with_records(data, lambda lines: [*lines[1:], lines[0]])),
}


@pytest.mark.promise("R5")
async def test_a_damaged_foreign_or_newer_checkpoint_is_refused_completely(tmp_path: Path) -> None:
    good = tmp_path / "good.ksi"
    async with serving(STUB) as house:
        for number in range(30):
            await house.asked(f"{random.Random(number).randbytes(40).hex()}", session_id=f"talk {number % 7}")
        await house.begin("waits", "scheduled", delay=1000)
        await collected(house, good)
    async with serving(STUB) as house:
        told = {}
        for name, (_, spoil) in BAD.items():
            (tmp_path / "bad.ksi").write_bytes(spoil(good.read_bytes()))
            error = await house.wire.refused("checkpoint:restore", path=str(tmp_path / "bad.ksi"))
            told[name] = (error.code, error.details.get("reason"))
            assert str(tmp_path / "bad.ksi") in error.message or "contradicts itself" in error.message
            status = await house.wire.ask("completion:queue_status")
            assert (status["completed"], status["scheduled"], status["conversations"]) == (0, 0, 0), name
        assert told == {name: ("checkpoint_invalid", reason) for name, (reason, _) in BAD.items()}
        assert (await house.wire.refused("checkpoint:restore", path=str(tmp_path / "none.ksi"))).code == "not_found"
        (tmp_path / "folder").mkdir()
        error = await house.wire.refused("checkpoint:restore", path=str(tmp_path / "folder"))
        assert (error.code, error.details["reason"]) == ("checkpoint_invalid", "unreadable")
        assert (await restored(house, good))["requests"] == 31
        assert (await house.wire.ask("completion:queue_status"))["completed"] == 30


@pytest.mark.promise("R5")
@pytest.mark.parametrize("kind", ["request", "lock"])
async def test_only_an_empty_daemon_takes_a_checkpoint(tmp_path: Path, kind: str) -> None:
    async with serving(STUB) as house:
        await house.asked(request_id="theirs")
        await collected(house, tmp_path / "saved.ksi")
    async with serving(STUB) as house:
        if kind == "request":
            await house.asked(request_id="mine")
        else:
            await house.wire.ask("conversation:acquire_lock", request_id="mine", conversation_id="talk")
        error = await house.wire.refused("checkpoint:restore", path=str(tmp_path / "saved.ksi"))
        assert (error.code, error.retryable) == ("store_not_empty", False)
        assert (await house.wire.refused("completion:get", request_id="theirs")).code == "not_found"
        assert (await house.asked())["status"] == "completed"


@pytest.mark.promise("R5")
async def test_of_two_restores_at_once_one_is_done_and_the_other_finds_the_daemon_filled(tmp_path: Path) -> None:
    async with serving(STUB) as house:
        await house.asked()
        await collected(house, tmp_path / "saved.ksi")
    async with serving(STUB) as house:
        data = {"path": str(tmp_path / "saved.ksi")}
        replies = await asyncio.gather(*(house.wire.post("checkpoint:restore", data) for _ in range(2)))
        assert sorted(reply.get("error", {}).get("code", "done") for reply in replies) == ["done", "store_not_empty"]


# -- with the response log --------------------------------------------------------------------------------------------


async def all_is_logged(house: House) -> bool:
    store = house.daemon.store
    return not await store.log_after(await store.log_watermark(), 1)


@pytest.mark.promise("R3", "R5")
async def test_no_answer_is_in_the_response_log_twice_when_a_home_starts_again_from_a_checkpoint(
    tmp_path: Path,
) -> None:
    home, file = tmp_path / "home", tmp_path / "saved.ksi"
    async with serving(STUB, home=home) as house:
        for number in range(10):
            await house.asked(f"Before {number}", session_id="talk")
        await house.wire.ask("provider:disable", provider="stub")
        await house.begin("waits", "queued", model="stub/x", session_id="talk")
        await until(lambda: all_is_logged(house))
        await collected(house, file)
        await house.wire.ask("completion:cancel", request_id="waits")
        await house.asked("After it", session_id="talk")
    logged = home / "var" / "logs" / "responses" / "talk.jsonl"
    assert len(logged.read_text().splitlines()) == 11
    shutil.rmtree(home / "var" / "db")
    async with serving(STUB, home=home) as house:
        await restored(house, file)
        await house.wire.ask("provider:enable", provider="stub")
        await in_state(house.wire, "waits", "completed")
        assert (await house.wire.ask("system:health"))["status"] == "healthy"
    lines = [json.loads(line) for line in logged.read_text().splitlines()]
    requests = [line["ksi"]["request_id"] for line in lines]
    assert len(requests) == len(set(requests)) == 12
    assert requests[-1] == "waits"


def test_a_reader_returns_the_records_of_a_writer(tmp_path: Path) -> None:
    write(tmp_path / "saved.ksi", FIGURES)
    reader = CheckpointReader(tmp_path / "saved.ksi")
    reader.check()
    assert list(reader.records()) == [FIGURES]
    assert (reader.header.created_at, reader.header.ksi, reader.header.records) == (1.0, "0", {"figures": 1})
    reader.close()
    assert msgspec.json.decode((tmp_path / "saved.ksi").read_bytes()[:HEADER_SIZE])["version"] == VERSION
