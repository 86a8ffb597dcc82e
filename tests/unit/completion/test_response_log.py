"""The response log: each answer once, in its session's file, whatever happens in between."""

from __future__ import annotations

import asyncio
import os
import random
import re
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from ksi.clock import Chance
from ksi.completion.upkeep import response_log
from ksi.completion.upkeep.response_log import ResponseLog, log_line, log_name
from ksi.errors import ConfigError, StoreUnavailable
from ksi.host import private_files
from ksi.request import Attempt, Outcome, RequestBody, State, Usage, encode_body
from ksi.store.values import Finish, LoggedTurn, NewRequest, Offer, StoreRules
from ksi.testing import SimulatedClock, settle_down
from tests.effort import effort
from tests.reference_store.store import MemoryStore

PAUSE = response_log._PAUSE


class CrashError(BaseException):
    """The daemon dies here: nobody catches it."""


class Books(MemoryStore):
    """A store that can fail where the log asks it."""

    def __init__(self) -> None:
        super().__init__(StoreRules(), Chance(random.Random(1)))
        self.fault: BaseException | None = None
        """Raised where the watermark is to be moved."""
        self.read_fault: Exception | None = None

    async def set_log_watermark(self, watermark: int) -> None:
        if self.fault is not None:
            raise self.fault
        await super().set_log_watermark(watermark)

    async def log_after(self, *args: Any, **options: Any) -> list[LoggedTurn]:
        if self.read_fault is not None:
            raise self.read_fault
        return await super().log_after(*args, **options)


class Desk:
    """Answers that come, and the folder they are written to."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "logs" / "responses"
        self.clock = SimulatedClock(wall=1_800_000_000.0)
        self.store = Books()
        self.count = 0

    def log(self, *, enabled: bool = True) -> ResponseLog:
        """A daemon's log; another one is another daemon's."""
        return ResponseLog(self.store, self.folder, self.clock, enabled=enabled)

    async def answer(self, session: str = "talk", text: str = "hi", **fields: Any) -> str:
        """One more completed request; returns its id."""
        self.count += 1
        request_id = f"r{self.count}"
        body = encode_body(RequestBody(prompt="x"))
        new = NewRequest(
            request_id=request_id, conversation=session, body=body, route="p", rank=self.count, agent_id="agent"
        )
        enqueued = await self.store.enqueue(new, [Offer("p", "p", 10)], self.clock.now())
        assert enqueued.claim is not None
        now = self.clock.now().wall
        known: dict[str, Any] = {"started_at": now - 250_000, "finished_at": now, "model": "m", "stop_reason": "end"}
        attempt = Attempt(number=1, provider="p", outcome=Outcome.COMPLETED, text=text, **(known | fields))
        await self.store.settle(enqueued.claim, attempt, Finish(state=State.COMPLETED), self.clock.now())
        return request_id

    def entries(self, session: str = "talk") -> list[dict[str, Any]]:
        """A session's lines, each of them whole."""
        path = self.folder / log_name(session)
        if not path.exists():
            return []
        data = path.read_bytes()
        assert data.endswith(b"\n") or not data
        return [msgspec.json.decode(line) for line in data.splitlines()]

    def logged(self, session: str = "talk") -> list[str]:
        return [entry["ksi"]["request_id"] for entry in self.entries(session)]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture(autouse=True)
def in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log's thread takes its turn on the loop."""

    async def to_thread(function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    monkeypatch.setattr(asyncio, "to_thread", to_thread)


# -- lines ------------------------------------------------------------------------------------------------------------


@pytest.mark.promise("R3")
async def test_an_answer_is_a_line_as_v1_wrote_it(desk: Desk) -> None:
    await desk.answer(text="two\nlines", usage=Usage(input_tokens=3, output_tokens=2, cost_usd=0.5))
    await desk.log().start()
    (entry,) = desk.entries()
    assert entry == {
        "ksi": {
            "provider": "p",
            "request_id": "r1",
            "session_id": "talk",
            "client_id": "agent",
            "timestamp": 1_800_000_000.0,
            "duration_ms": 250.0,
        },
        "response": {
            "result": "two\nlines",
            "session_id": "talk",
            "model": "m",
            "stop_reason": "end",
            "usage": {
                "input_tokens": 3,
                "output_tokens": 2,
                "cache_read_tokens": 0,
                "cache_write_tokens": 0,
                "reasoning_tokens": 0,
            },
        },
    }


@pytest.mark.promise("T1")
async def test_no_report_of_usage_is_none_in_the_log_too(desk: Desk) -> None:
    await desk.answer(provider_session="ps")
    await desk.log().start()
    assert desk.entries()[0]["response"]["usage"] is None
    assert desk.entries()[0]["response"]["session_id"] == "ps"


@pytest.mark.promise("R3")
@pytest.mark.parametrize(
    "raw", [b'{"a": 1.10}', b'{\n  "a": [\r\n 1.10 ]\n}\n', '{"a": "é \\n \u2028"}'.encode(), b"null", b'"x"']
)
async def test_a_provider_s_reply_is_kept_in_one_line_whatever_its_layout(desk: Desk, raw: bytes) -> None:
    await desk.answer(raw=raw)
    await desk.log().start()
    data = (desk.folder / "talk.jsonl").read_bytes()
    assert data.count(b"\n") == 1
    assert b"\r" not in data
    assert desk.entries()[0]["response"] == msgspec.json.decode(raw)


@pytest.mark.promise("R3")
async def test_only_answers_are_logged(desk: Desk) -> None:
    new = NewRequest(request_id="bad", conversation="talk", body=b"{}", route="p", rank=1)
    claim = (await desk.store.enqueue(new, [Offer("p", "p", 1)], desk.clock.now())).claim
    assert claim is not None
    failed = Attempt(number=1, provider="p", outcome=Outcome.FAILED, started_at=1, finished_at=2, text="half")
    await desk.store.settle(claim, failed, Finish(state=State.FAILED), desk.clock.now())
    await desk.answer()
    await desk.log().start()
    assert desk.logged() == ["r1"]


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.promise("S3")
@pytest.mark.parametrize("session", ["a", "A-b_c.d", "conv_0123", "x" * 200, "a..b", "UPPER.jsonl", "0" * 64])
def test_a_plain_name_is_its_file_s(session: str) -> None:
    assert log_name(session) == f"{session}.jsonl"


@pytest.mark.promise("S3")
@pytest.mark.parametrize(
    "session",
    ["../../x", "/etc/passwd", ".", "..", ".hidden", "a/b", "a b", "é", "x" * 201, "a\n", "a\0", ""],
)
def test_any_other_name_is_hashed(session: str) -> None:
    assert re.fullmatch(r"[0-9a-f]{64}\.jsonl", log_name(session))


@pytest.mark.promise("S3", "O12")
@given(st.lists(st.text(alphabet="aAbB.é", max_size=6), unique=True, max_size=20))
def test_on_a_disk_that_folds_case_two_sessions_never_share_a_file_either(sessions: list[str]) -> None:
    names = [log_name(session, folded=True) for session in sessions]
    assert len({name.casefold() for name in names}) == len(names)


@pytest.mark.promise("O12")
async def test_sessions_that_differ_by_case_have_files_of_their_own_if_the_disk_ignores_case(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ksi.completion.upkeep.response_log.folds_case", lambda folder: True)
    log = desk.log()
    await log.start()
    await desk.answer("Talk", "one")
    await desk.answer("talk", "two")
    await log.stop()
    assert desk.logged("talk") == ["r2"]
    (other,) = {path.name for path in desk.folder.iterdir()} - {"talk.jsonl"}
    assert other == log_name("Talk", folded=True)


@pytest.mark.promise("S3")
@given(st.lists(st.text(max_size=20), unique=True, max_size=20))
def test_a_name_is_never_a_path_and_two_sessions_never_share_a_file(sessions: list[str]) -> None:
    names = [log_name(session) for session in sessions]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}\.jsonl", name) for name in names)


@pytest.mark.promise("S2", "S3")
async def test_the_files_are_for_this_user_only(desk: Desk) -> None:
    await desk.answer("../../outside")
    await desk.log().start()
    (file,) = desk.folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(desk.folder.stat().st_mode) == 0o700


# -- following the store ----------------------------------------------------------------------------------------------


@pytest.mark.promise("R3")
async def test_it_follows_while_the_daemon_runs_and_finishes_at_its_stop(desk: Desk) -> None:
    log = desk.log()
    assert not log.task.alive
    await log.start()
    assert log.task.alive
    await settle_down()
    await desk.answer()
    assert desk.logged() == []
    await desk.clock.advance(PAUSE)
    assert desk.logged() == ["r1"]
    await desk.answer()
    await log.stop()
    assert not log.task.alive
    assert desk.logged() == ["r1", "r2"]


@pytest.mark.promise("R3")
async def test_the_next_daemon_continues_after_the_last_one(desk: Desk) -> None:
    for _ in range(3):
        log = desk.log()
        await log.start()
        await desk.answer()
        await log.stop()
    assert desk.logged() == ["r1", "r2", "r3"]


@pytest.mark.promise("R3")
async def test_a_new_store_next_to_old_files_cuts_nothing_off(desk: Desk, tmp_path: Path) -> None:
    for _ in range(2):
        log = desk.log()
        await log.start()
        await desk.answer()
        await log.stop()
    new = Desk(tmp_path)
    log = new.log()
    await log.start()
    await new.answer(text="of the new store")
    await log.stop()
    assert [entry["response"]["result"] for entry in new.entries()] == ["hi", "hi", "of the new store"]


@pytest.mark.promise("R3")
async def test_many_answers_are_written_in_batches_and_in_order(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_log, "_BATCH", 4)
    for number in range(11):
        await desk.answer(f"s{number % 2}")
    await desk.log().start()
    assert desk.logged("s0") == ["r1", "r3", "r5", "r7", "r9", "r11"]
    assert desk.logged("s1") == ["r2", "r4", "r6", "r8", "r10"]


async def test_switched_off_it_writes_nothing_and_later_nothing_of_that_time(desk: Desk) -> None:
    off = desk.log(enabled=False)
    await off.start()
    await desk.answer()
    await off.stop()
    assert not desk.folder.exists()
    log = desk.log()
    await log.start()
    await desk.answer()
    await log.stop()
    assert desk.logged() == ["r2"]


async def test_a_folder_that_cannot_be_made_stops_the_start(desk: Desk) -> None:
    desk.folder.parent.parent.mkdir(exist_ok=True)
    desk.folder.parent.write_text("a file")
    with pytest.raises(ConfigError) as caught:
        await desk.log().start()
    assert caught.value.place == str(desk.folder)


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.promise("R3")
async def test_a_store_that_will_not_move_the_mark_costs_no_line_twice(desk: Desk) -> None:
    log = desk.log()
    await log.start()
    await settle_down()
    desk.store.fault = StoreUnavailable("no disk")
    await desk.answer()
    with capture_logs() as logs:
        await desk.clock.advance(PAUSE)
    assert [entry["log_level"] for entry in logs] == ["error"]
    assert log.task.alive
    await desk.answer()
    await desk.clock.advance(PAUSE)
    desk.store.fault = None
    await desk.clock.advance(PAUSE)
    await log.stop()
    assert desk.logged() == ["r1", "r2"]
    await desk.log().start()
    assert desk.logged() == ["r1", "r2"]


@pytest.mark.promise("R3")
async def test_a_mark_that_stood_still_and_then_a_crash_cost_no_line_twice(desk: Desk) -> None:
    log = desk.log()
    await log.start()
    await settle_down()
    desk.store.fault = StoreUnavailable("no disk")
    await desk.answer()
    await desk.clock.advance(PAUSE)
    await desk.answer()
    await desk.clock.advance(PAUSE)
    desk.store.fault = None
    await desk.log().start()
    assert desk.logged() == ["r1", "r2"]


@pytest.mark.promise("R3")
async def test_a_full_disk_in_the_middle_of_a_line_leaves_no_half_line(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = private_files.append
    full = True

    def append(path: Path | str, data: bytes, *, private: bool = False) -> None:
        if full and Path(path).name == "b.jsonl":
            real(path, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        real(path, data, private=private)

    monkeypatch.setattr(response_log, "append", append)
    log = desk.log()
    await log.start()
    await settle_down()
    for session in ("a", "b", "c"):
        await desk.answer(session)
    for _ in range(3):
        await desk.clock.advance(PAUSE)
    assert log.task.alive
    full = False
    await desk.answer("a")
    await desk.clock.advance(PAUSE)
    assert (desk.logged("a"), desk.logged("b"), desk.logged("c")) == (["r1", "r4"], ["r2"], ["r3"])
    await log.stop()


@pytest.mark.promise("R3")
async def test_a_defect_of_one_look_does_not_end_the_following(desk: Desk) -> None:
    log = desk.log()
    await log.start()
    await settle_down()
    desk.store.read_fault = RuntimeError("the database cannot be read")
    await desk.answer()
    with capture_logs() as logs:
        await desk.clock.advance(PAUSE)
    assert [entry["log_level"] for entry in logs] == ["error"]
    assert log.task.alive
    desk.store.read_fault = None
    await desk.clock.advance(PAUSE)
    assert desk.logged() == ["r1"]
    await log.stop()


@pytest.mark.promise("R3", "R6")
async def test_a_stop_while_lines_are_written_writes_none_of_them_twice(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = asyncio.Event()
    begun = 0

    async def write(function: Callable[..., Any], *args: Any) -> None:
        nonlocal begun
        begun += 1
        await go_on.wait()
        function(*args)

    async def to_thread(function: Callable[..., Any], *args: Any) -> None:
        # As a thread does: who waits for it can be stopped, the thread itself cannot.
        await asyncio.shield(asyncio.ensure_future(write(function, *args)))

    log = desk.log()
    await log.start()
    await settle_down()
    monkeypatch.setattr(asyncio, "to_thread", to_thread)
    await desk.answer()
    await desk.clock.advance(PAUSE)
    assert begun == 1
    stopping = asyncio.create_task(log.stop())
    await settle_down()
    await desk.answer()
    go_on.set()
    await asyncio.wait_for(stopping, 5)
    await settle_down()
    assert desk.logged() == ["r1", "r2"]


@pytest.mark.promise("R3")
@settings(max_examples=effort(30, 300), deadline=None)
@given(data=st.data())
async def test_whenever_the_daemon_dies_no_line_is_lost_none_is_there_twice_and_none_is_half(
    data: st.DataObject,
) -> None:
    """Lives that end at any write, after any part of it, or before the mark is moved."""
    real = private_files.append
    expected: dict[str, list[str]] = {"a": [], "b": []}
    with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
        desk = Desk(Path(home))
        patch.setattr(response_log, "_BATCH", data.draw(st.integers(1, 5), label="batch"))
        for _ in range(data.draw(st.integers(1, 4), label="lives")):
            for session in data.draw(st.lists(st.sampled_from("ab"), max_size=6), label="answers"):
                text = "x" * data.draw(st.sampled_from([0, 5, 3_000]))
                expected[session].append(await desk.answer(session, text))
            left = data.draw(st.integers(0, 12), label="whole writes")
            share = data.draw(st.sampled_from([0.0, 0.3, 1.0]), label="share of the last")
            dies_at_mark = data.draw(st.booleans(), label="at the mark")

            def append(path: Path | str, line: bytes, *, private: bool = False, share: float = share) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    real(path, line[: int(len(line) * share)])
                    raise CrashError
                real(path, line, private=private)

            for module in (response_log, private_files):
                patch.setattr(module, "append", append)
            desk.store.fault = CrashError() if dies_at_mark else None
            log = desk.log()
            try:
                await log.start()
                await log.stop()
            except CrashError:
                continue
        for module in (response_log, private_files):
            patch.setattr(module, "append", real)
        desk.store.fault = None
        await desk.log().start()
        assert {session: desk.logged(session) for session in expected} == expected


# -- what a loss of power leaves --------------------------------------------------------------------------------------


@pytest.mark.promise("R3", "O1")
@pytest.mark.parametrize("journal", [b"", b"\0" * 40, b'{"behind": 0, "si'], ids=["empty", "zeros", "torn"])
@pytest.mark.parametrize("written", [0, 1, 2, 3])
@pytest.mark.parametrize("torn", [b"", b'{"ksi": {"pro', b"\0" * 30], ids=["whole", "half a line", "zeros"])
async def test_a_damaged_journal_costs_no_line_and_doubles_none(
    desk: Desk, journal: bytes, written: int, torn: bytes
) -> None:
    await desk.answer(text="before")
    await desk.log().start()
    (before,) = desk.logged()
    names = [await desk.answer(text=f"answer {number}") for number in range(3)]
    whole = [log_line(turn) for turn in await desk.store.log_after(await desk.store.log_watermark(), 10)]
    path = desk.folder / "talk.jsonl"
    with path.open("ab") as file:
        file.write(b"".join(whole[:written]) + torn)
    desk.folder.with_name("responses.journal").write_bytes(journal)
    log = desk.log()
    with capture_logs() as logs:
        await log.start()
    (said,) = logs
    assert (said["log_level"], said["path"]) == ("warning", str(desk.folder.with_name("responses.journal")))
    assert desk.logged() == [before, *names]
    await desk.answer(text="later")
    await log.stop()
    assert len(desk.logged()) == 5


# -- the end of a session's file --------------------------------------------------------------------------------------


@pytest.mark.promise("O1")
async def test_a_file_ends_when_the_store_no_longer_keeps_its_session(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {"talk": True, "a/b": True, "young": True}

    async def session(name: str) -> object | None:
        return object() if kept[name] else None

    monkeypatch.setattr(desk.store, "session", session)
    for name in kept:
        await desk.answer(session=name)
    log = desk.log()
    await log.start()
    for name in ("talk", "a/b"):
        os.utime(desk.folder / log_name(name), (desk.clock.unix() - 100, desk.clock.unix() - 100))
    os.utime(desk.folder / log_name("young"), (desk.clock.unix() - 49, desk.clock.unix() - 49))
    assert await log.sweep(50.0) == 0, "the store still has them"
    size = sum(path.stat().st_size for path in desk.folder.iterdir())
    assert log.size == (3, size)
    kept.update(dict.fromkeys(kept, False))
    assert await log.sweep(50.0) == 2
    (left,) = desk.folder.iterdir()
    assert left.name == "young.jsonl"
    assert log.size == (1, left.stat().st_size)
    await log.stop()


@pytest.mark.promise("O1")
async def test_a_file_that_is_not_the_log_s_own_is_not_touched(desk: Desk) -> None:
    log = desk.log()
    await log.start()
    others = {
        "notes.txt": b"mine\n",
        "empty.jsonl": b"",
        "other.jsonl": b'{"ksi": {"session_id": "another"}, "response": {}}\n',
        "list.jsonl": b"[1, 2]\n",
    }
    for name, data in others.items():
        (desk.folder / name).write_bytes(data)
    (desk.folder / "folder").mkdir()
    (desk.folder / "link.jsonl").symlink_to(desk.folder / "notes.txt")
    for path in desk.folder.iterdir():
        os.utime(path, (0, 0), follow_symlinks=False)
    assert await log.sweep(50.0) == 0
    assert len(list(desk.folder.iterdir())) == 6
    await log.stop()


@pytest.mark.promise("O1")
async def test_a_file_of_the_first_service_that_names_its_session_only_by_itself_ends_too(desk: Desk) -> None:
    log = desk.log()
    await log.start()
    path = desk.folder / "old.jsonl"
    path.write_bytes(b'{"ksi": {"provider": "p", "timestamp": 1.0}, "response": {"result": "x"}}\n')
    os.utime(path, (0, 0))
    assert await log.sweep(50.0) == 1
    assert not path.exists()
    await log.stop()
