"""Fills a home's queue while no daemon runs there: the store's own verb, in as large steps as it takes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import msgspec
import uvloop

from ksi.clock import Chance, SystemClock, microseconds
from ksi.config import Config
from ksi.daemon import store_rules
from ksi.request import RequestBody, encode_body
from ksi.store.base import NewRequest
from ksi.store.sqlite import SqliteStore

STEP = 10_000
"""Requests between two words of progress."""


def fill(
    config: Config, depth: int, conversations: int, model: str, route: str, say: Callable[[int], None] | None = None
) -> int:
    """Let at least `depth` requests wait for `route`, in so many conversations; returns how many were added.

    What waits already counts, whatever its route. `say` hears how many are added so far.
    """
    return uvloop.run(_fill(config, depth, conversations, model, route, say or (lambda _: None)))


async def _fill(
    config: Config, depth: int, conversations: int, model: str, route: str, say: Callable[[int], None]
) -> int:
    # Nobody reads positions here, so none is counted: with a thousand in each line that is most of the work.
    rules = msgspec.structs.replace(store_rules(config), position_limit=1)
    chance = Chance(random.Random(0))
    store = SqliteStore(config.path("var/db/ksi.db"), rules, chance, durability="normal")
    clock = SystemClock()
    head_start = microseconds(config.queue.head_start.normal)
    await store.open(clock.now(), lambda: None)
    try:
        missing = depth - (await store.totals()).queued
        first = clock.now().wall

        def request(number: int) -> NewRequest:
            now = clock.now()
            conversation = f"waiting-{number % conversations}"
            body = RequestBody(
                prompt=f"Say in one sentence what number {number} is for.",
                model=model,
                session_id=conversation,
                agent_id=f"agent-{number % 10}",
            )
            return NewRequest(
                request_id=f"waiting-{first}-{number:012d}",
                conversation=conversation,
                body=encode_body(body),
                route=route,
                rank=now.wall - head_start,
                model=model,
                agent_id=body.agent_id,
            )

        for begin in range(0, missing, STEP):
            numbers = range(begin, min(missing, begin + STEP))
            now = clock.now()
            await asyncio.gather(*(store.enqueue(request(number), (), now) for number in numbers))
            say(numbers[-1] + 1)
    finally:
        await store.close()
    return max(0, missing)
