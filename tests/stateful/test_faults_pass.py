"""A whole daemon over a store that says no at any of its verbs, in simulated time: when that has passed, all goes on.

The store is a real one behind a wrapper, which fails verbs as Hypothesis chooses. Nothing that was acknowledged is
lost, nothing runs twice, everybody hears of every end once, and the daemon is ready and healthy again.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
import structlog
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from ksi.clock import Chance
from ksi.config.reader import load
from ksi.daemon.daemon import Daemon
from ksi.daemon.parts import store_rules
from ksi.errors import StoreFull, StoreUnavailable
from ksi.store.base import Store
from ksi.store.sqlite.store import SqliteStore
from ksi.testing import SimulatedClock, settle_down
from tests.integration.wire import Json, Refused, Wire, answer, until
from tests.reference_store.store import MemoryStore

T = TypeVar("T")

VERBS = sorted(
    name
    for name, verb in inspect.getmembers(Store, inspect.isfunction)
    if inspect.iscoroutinefunction(verb) and name not in ("open", "close")
)

FAULTS: dict[str, Callable[[], Exception]] = {
    "full": lambda: StoreFull("no room"),
    "away": lambda: StoreUnavailable("away"),
}

FINAL = {"completed", "failed", "cancelled", "expired", "blocked"}

PATIENCE = 60.0
"""Real seconds that everything gets to come to its end; threads write the response log meanwhile."""


class Faulty:
    """A store whose verbs fail as the weather is. What fails has changed nothing, as every store promises."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.weather: dict[str, str] = {}
        """The fault of each verb that fails now."""
        self.refusals: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._store, name)
        if name not in VERBS:
            return verb

        async def call(*args: Any, **kwargs: Any) -> Any:
            fault = self.weather.get(name)
            if fault is not None:
                self.refusals[name] += 1
                raise FAULTS[fault]()  # noqa: RSE102 - it makes the error
            return await verb(*args, **kwargs)

        return call


class Machine(RuleBasedStateMachine):
    """Clients ask for all kinds of things while the store says no to some of it."""

    STORE = "sqlite"

    @initialize()
    def begin(self) -> None:
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
        self.runner = asyncio.Runner()
        self.sent: dict[str, Json] = {}
        """What clients want to be done, by request id. They send it again until it is acknowledged."""
        self.acknowledged: set[str] = set()
        self.cancelled: set[str] = set()
        self.awaited: dict[str, asyncio.Future[Json]] = {}
        self.asked: list[asyncio.Future[Json]] = []
        self.locks: set[str] = set()
        self._left: Json = {}
        """What was not done yet at the last look."""
        self.run(self._begin())

    async def _begin(self) -> None:
        self.undo = AsyncExitStack()
        self.home = Path(self.undo.enter_context(tempfile.TemporaryDirectory(prefix="ksi-faults-")))
        self.clock = SimulatedClock()
        config = load(
            self.home,
            {},
            {
                "service": {"default_model": "stub/echo", "shutdown_grace": 0.0},
                "lock": {"expiry": 5.0},
                "providers": {
                    "local": {"enabled": False},
                    "stub": {"kind": "stub", "max_concurrency": 3, "delay": 0.01, "record": "record.tsv"},
                },
            },
        )
        chance = Chance(random.Random(1))
        rules = store_rules(config)
        inner: Store = MemoryStore(rules, chance)
        if self.STORE == "sqlite":
            inner = SqliteStore(self.home / "ksi.db", rules, chance, durability="normal")
        self.store = Faulty(inner)
        self.daemon = Daemon(config, self.clock, chance, {}, cast(Store, self.store))
        await self.daemon.start()
        self.undo.push_async_callback(self.daemon.stop)
        self.wire = await Wire.open(config.socket_path)
        self.undo.push_async_callback(self.wire.leave)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def teardown(self) -> None:
        if not hasattr(self, "runner"):
            return
        try:
            try:
                self.run(self._all_ends())
            finally:
                self.run(self.undo.aclose())
        finally:
            self.runner.close()
            structlog.reset_defaults()

    # -- what happens -------------------------------------------------------------------------------------------------

    @rule(verbs=st.lists(st.sampled_from(VERBS), max_size=6), fault=st.sampled_from(sorted(FAULTS)))
    def fail_some(self, verbs: list[str], fault: str) -> None:
        """Some verbs fail from now on, and all others work."""
        self.store.weather = dict.fromkeys(verbs, fault)

    @rule(fault=st.sampled_from(sorted(FAULTS)))
    def fail_all(self, fault: str) -> None:
        """The store says no to everything."""
        self.store.weather = dict.fromkeys(VERBS, fault)

    @rule(seconds=st.sampled_from([0.01, 0.1, 0.5, 1.0, 3.0, 20.0]))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.run(self.clock.advance(seconds))

    @rule(
        conversation=st.sampled_from([None, "talk", "other"]),
        more=st.sampled_from(
            [{}, {"delay": 2.0}, {"injection_config": {"target_sessions": ["other"], "inject_result": True}}]
        ),
        count=st.integers(1, 3),
    )
    def submit(self, conversation: str | None, more: Json, count: int) -> None:
        """Requests whose results are pushed."""
        for _ in range(count):
            name = f"r{len(self.sent)}"
            self.sent[name] = {"request_id": name, "prompt": name, **more}
            if conversation is not None:
                self.sent[name]["session_id"] = conversation
            self.run(self._submit(name))

    @rule(conversation=st.sampled_from([None, "talk"]))
    def request(self, conversation: str | None) -> None:
        """A request that is waited for."""
        name = f"r{len(self.sent)}"
        self.sent[name] = {"request_id": name, "prompt": name}
        if conversation is not None:
            self.sent[name]["session_id"] = conversation
        self.awaited[name] = self.post("completion:request", **self.sent[name])

    @precondition(lambda self: self.acknowledged)
    @rule(number=st.integers(0, 1_000))
    def cancel(self, number: int) -> None:
        """A client cancels something of its own, and may be refused."""
        name = sorted(self.acknowledged)[number % len(self.acknowledged)]
        self.cancelled.add(name)
        self.asked.append(self.post("completion:cancel", request_id=name))

    @precondition(lambda self: self.acknowledged)
    @rule(number=st.integers(0, 1_000))
    def look(self, number: int) -> None:
        """A client waits for something of its own, and may be refused."""
        name = sorted(self.acknowledged)[number % len(self.acknowledged)]
        self.asked.append(self.post("completion:wait", request_id=name))

    @rule()
    def lock(self) -> None:
        """A client takes the lock of a conversation for a while."""
        name = f"l{len(self.locks)}"
        self.locks.add(name)
        self.asked.append(self.post("conversation:acquire_lock", request_id=name, conversation_id="talk"))

    def post(self, event: str, **data: Any) -> asyncio.Future[Json]:
        """Send an event, and let the daemon take it up; the reply may come whenever it can."""

        async def send() -> asyncio.Future[Json]:
            reply = self.wire.post(event, data)
            await settle_down()
            return reply

        return self.run(send())

    async def _submit(self, name: str) -> None:
        reply = await self._reply(self.wire.post("completion:async", self.sent[name]))
        if "error" not in reply:
            self.acknowledged.add(name)

    async def _reply(self, future: asyncio.Future[Json]) -> Json:
        async with asyncio.timeout(PATIENCE):
            return await future

    # -- and what must come of it -------------------------------------------------------------------------------------

    async def _all_ends(self) -> None:
        self.store.weather = {}
        for name in self.sent.keys() - self.acknowledged - self.awaited.keys():
            await self._submit(name)
        assert self.sent.keys() - self.awaited.keys() == self.acknowledged
        try:
            await until(self._quiet, patience=PATIENCE)
        except TimeoutError:
            raise AssertionError(f"it does not come to rest: {self._left}") from None
        refused = {name for name, future in self.awaited.items() if "error" in future.result()}
        states = {name: await self._state(name) for name in self.sent}
        wrong = {name: state for name, state in states.items() if state not in self._right(name, refused)}
        assert not wrong, wrong
        self._once({name for name, state in states.items() if state == "completed"})
        ready = await answer(self.wire.post("system:ready", {}))
        assert ready["ready"], ready
        assert all(ready["tasks"].values()), ready

    async def _quiet(self) -> bool:
        """Let time pass; true when nothing is left to do."""
        await self.clock.advance(1.0)
        figures = await answer(self.wire.post("completion:status", {}))
        health = await answer(self.wire.post("system:health", {}))
        problems = [one for one in health["problems"] if "MiB are free" not in one]
        pushed = {line["data"]["request_id"] for line in self.wire.lines if line["event"] == "completion:result"}
        waiting = {name: figures[name] for name in ("queued", "active", "scheduled", "retrying", "parked")}
        self._left = {
            **{name: number for name, number in waiting.items() if number},
            "problems": problems,
            "untold": self.acknowledged - pushed,
            "unanswered": [future for future in (*self.asked, *self.awaited.values()) if not future.done()],
            "unlogged": figures["completed"] - len(self._logged()),
        }
        return not any(self._left.values())

    def _right(self, name: str, refused: set[str]) -> set[str]:
        if name in refused:
            return {"not_found"}
        return {"completed", "cancelled"} if name in self.cancelled else {"completed"}

    async def _state(self, name: str) -> str:
        try:
            return str((await self.wire.ask("completion:get", request_id=name))["status"])
        except Refused as error:
            return error.code

    def _calls(self) -> list[str]:
        """The request of each call that the provider took."""
        record = self.home / "record.tsv"
        rows = [line.split("\t") for line in record.read_text().splitlines()] if record.exists() else []
        return [row[3] for row in rows if row[0] == "begin"]

    def _logged(self) -> list[str]:
        folder = self.home / "var" / "logs" / "responses"
        lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
        return [json.loads(line)["ksi"]["request_id"] for line in lines]

    def _once(self, completed: set[str]) -> None:
        """No call was made twice, no end told twice, and no line written twice."""
        pushes = Counter(line["data"]["request_id"] for line in self.wire.lines if line["event"] == "completion:result")
        assert {name: pushes[name] for name in self.acknowledged} == dict.fromkeys(self.acknowledged, 1)
        for what in (self._calls(), self._logged()):
            twice = {name: times for name, times in Counter(what).items() if times > 1}
            assert not twice, twice
        missing = completed - set(self._logged())
        assert not missing, missing


class InMemory(Machine):
    """The same over the reference."""

    STORE = "memory"


def _case(machine: type[Machine], examples: int) -> type:
    kept = settings(max_examples=examples, stateful_step_count=25, deadline=None)
    return type(f"Test{machine.__name__}", (machine.TestCase,), {"settings": kept})


TestSqlite = pytest.mark.promise("O10", "Q3", "F10")(_case(Machine, 15))
TestMemory = pytest.mark.promise("O10", "Q3", "F10")(_case(InMemory, 15))
