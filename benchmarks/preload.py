"""Fills a home's queue while no daemon runs there: the store's own verb, in as large steps as it takes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import msgspec
import uvloop

from ksi.clock import Chance, Moment, SystemClock, microseconds
from ksi.completion.pause.pauses import Pause, Pauses, Scope, encode_pauses
from ksi.completion.pause.service import RECORD
from ksi.config.schema import Config
from ksi.daemon.parts import store_rules
from ksi.errors import ConfigError
from ksi.request import RequestBody, encode_body
from ksi.store.provider_records import KeptRecord
from ksi.store.sqlite.store import SqliteStore
from ksi.store.values import NewRequest, StoreRules

SESSIONS = "waiting"
"""What the names of the filled conversations begin with."""

_STEP = 10_000
"""Requests between two words of progress."""


def fill(
    config: Config,
    depth: int,
    conversations: int | None,
    model: str,
    say: Callable[[int], None] = lambda _: None,
    *,
    agents: int = 10,
) -> int:
    """Let at least `depth` requests wait; returns how many were added, each told to `say` in large steps.

    They are of one model and so many agents, in so many conversations or each in one of its own. Requests that wait
    already count.

    Raises:
        ConfigError: the home's store is not SQLite.
    """
    if not config.store.url.startswith("sqlite:///"):
        raise ConfigError("only an SQLite store can be filled", place="store.url")
    return uvloop.run(_fill(config, depth, conversations, model, agents, say))


def hold_back(config: Config) -> None:
    """Pause the home's queue, so that it is as long as it is when the load begins, and not when the daemon does."""
    uvloop.run(_hold_back(config))


async def _hold_back(config: Config) -> None:
    store, now = _store(config, store_rules(config)), SystemClock().now()
    await store.open(now, lambda: None)
    try:
        kept = (await store.provider_records(now)).records.get(RECORD, KeptRecord())
        paused = encode_pauses(Pauses((Pause(scope=Scope.ALL, since=now.wall, why="the load has not begun"),)))
        await store.put_provider_record(RECORD, kept.version, paused, now, tell=False)
    finally:
        await store.close()


def _store(config: Config, rules: StoreRules) -> SqliteStore:
    path = config.path(config.store.url.removeprefix("sqlite:///"))
    return SqliteStore(path, rules, Chance(random.Random(0)), durability="normal")


async def _fill(
    config: Config, depth: int, conversations: int | None, model: str, agents: int, say: Callable[[int], None]
) -> int:
    # Nobody reads positions here, so none is counted: with a thousand in each line that is most of the work.
    rules = msgspec.structs.replace(store_rules(config), position_limit=1)
    store = _store(config, rules)
    clock = SystemClock()
    head_start = microseconds(config.queue.head_start.normal)
    await store.open(clock.now(), lambda: None)
    try:
        missing = depth - (await store.totals()).queued
        first = clock.now()
        for begin in range(0, missing, _STEP):
            numbers = range(begin, min(missing, begin + _STEP))
            now = clock.now()
            news = (_request(number, first, now, head_start, conversations, model, agents) for number in numbers)
            await asyncio.gather(*(store.enqueue(new, (), now) for new in news))
            say(numbers.stop)
    finally:
        await store.close()
    return max(0, missing)


def _request(
    number: int, first: Moment, now: Moment, head_start: int, conversations: int | None, model: str, agents: int
) -> NewRequest:
    own = f"{first.wall}-{number}"
    conversation = f"{SESSIONS}-{own if conversations is None else number % conversations}"
    body = RequestBody(
        prompt=f"Say in one sentence what number {number} is for, and name one thing that it is often taken for.",
        model=model,
        session_id=conversation,
        agent_id=f"agent-{number % agents}",
    )
    return NewRequest(
        request_id=f"{SESSIONS}-{first.wall}-{number:012d}",
        conversation=conversation,
        body=encode_body(body),
        route=model.partition("/")[0],
        rank=now.wall - head_start,
        model=model,
        agent_id=body.agent_id,
    )
