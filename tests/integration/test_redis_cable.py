"""The way to the server is cut, or swallows everything, under load: daemons wait, and nothing is lost or done twice."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path

import pytest

from ksi.store.redis import link as redis_link
from ksi.testing import running_daemon
from tests.integration.cable import Cable, cable
from tests.integration.crash_load import Load, check_ending, check_response_log, check_trail, finish
from tests.integration.redis_team import LEASE, Team, check_record, team
from tests.integration.test_crash import CONFIG
from tests.integration.test_redis_crash import several
from tests.integration.wire import Json, Wire, answer, in_state, until
from tests.redis_server import RedisServer
from tests.tally import Tally

HELD = """
[providers.held]
kind = "stub"
"""

ACKS = 40
"""Each daemon takes at least so much before and after."""

SHORT = LEASE / 5
"""With the time since the last renewal, and until the way is found again, still within a lease."""
LONG = 12.0
"""Longer than a lease, and than a call waits for its answer before it is sent again."""


def way(port: int, namespace: str) -> str:
    """A server's address by a cable."""
    return f"redis://127.0.0.1:{port}?namespace={namespace}"


class Weather:
    """Load on daemons whose way to the server is harmed meanwhile, and the invariants at the end."""

    def __init__(self, daemons: Team, dice: random.Random) -> None:
        self._daemons = daemons
        self._seed = dice.getrandbits(32)
        self._loads = [
            Load(random.Random(self._seed + number), f"cut-{number}", conversations=40, submitters=3)
            for number, _ in enumerate(daemons.daemons)
        ]
        self._held: list[str] = []
        self._clients = [
            asyncio.create_task(load.live(daemons.path(number))) for number, load in enumerate(self._loads)
        ]

    async def hold(self, number: int) -> None:
        """Have a daemon run something that takes as long as its lease."""
        name = f"held-{number}"
        self._held.append(name)
        options = {"delay": LEASE}
        async with await Wire.open(self._daemons.path(number)) as wire:
            await wire.ask(
                "completion:async", request_id=name, prompt="hello", model="held/echo", provider_options=options
            )
            await in_state(wire, name, "running")

    async def goes_on(self) -> None:
        """Wait until each daemon has taken in more."""
        async with asyncio.timeout(60):
            await asyncio.gather(*(load.reach(load.acks + ACKS) for load in self._loads))

    async def end(self) -> int:
        """Send no more, wait for the rest, and check all. Returns how many runs were interrupted."""
        for client in self._clients:
            client.cancel()
        ends = await asyncio.gather(*self._clients, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends
        asked = {name: one for load in self._loads for name, one in load.asked.items()}
        async with await Wire.open(self._daemons.path(self._seed % len(self._loads))) as wire:
            await finish(wire, *self._loads)
            taken = [name for name, one in asked.items() if not one.refused]
            answers = {
                name: await wire.ask("completion:get", request_id=name) for name in itertools.chain(taken, self._held)
            }
            figures: Json = await wire.ask("completion:queue_status")
        assert figures["locked_conversations"] == 0
        assert [problem for load in self._loads for problem in load.problems] == []
        for name in taken:
            check_ending(asked[name], answers[name])
        for name in self._held:
            assert answers[name]["status"] == "completed"
            assert answers[name]["interruptions"] >= 1
        tally = Tally()
        begun = check_record(self._daemons.record, answers, tally)
        for name in taken:
            check_trail(asked[name], answers[name], begun.get(name, set()), in_step=False)
        self._daemons.end()
        check_response_log(self._daemons.logs, answers, tally)
        assert (tally.lost, tally.doubled, tally.overlapping) == ([], [], [])
        interruptions: int = sum(reply.get("interruptions", 0) for reply in answers.values())
        away = sum(load.away for load in self._loads)
        print(f"{len(answers)} requests, {interruptions} interruptions, {away} times away")
        return interruptions


@pytest.mark.timeout(300)
@pytest.mark.promise("D2", "D3", "L1", "Q3")
async def test_daemons_cut_off_beyond_their_lease_lose_their_runs_to_the_one_that_is_not(
    redis_server: RedisServer, tmp_path: Path, dice: random.Random
) -> None:
    with cable(redis_server) as one, cable(redis_server) as other:
        ways = [f"{redis_server.url}?namespace=cut", way(one.port, "cut"), way(other.port, "cut")]
        with team(tmp_path, ways, 3, several(CONFIG) + HELD) as daemons:
            weather = Weather(daemons, dice)
            await weather.goes_on()
            await asyncio.gather(weather.hold(1), weather.hold(2))
            one.cut()
            other.freeze()
            await asyncio.sleep(LONG)  # what is proved is what becomes of such a time
            one.mend()
            other.thaw()
            await weather.goes_on()
            # Bytes written to connections that were given up arrive after all those written to the next ones.
            other.thaw_all()
            await weather.goes_on()
            assert await weather.end() >= 2


@pytest.mark.promise("D3", "L1", "Q3")
@pytest.mark.parametrize("seconds", [SHORT, 2 * LEASE], ids=["short", "long"])
async def test_a_time_without_a_server_is_no_daemon_s_death(
    redis_server: RedisServer, tmp_path: Path, dice: random.Random, seconds: float
) -> None:
    with cable(redis_server) as one, cable(redis_server) as other:
        namespace = f"away-{seconds}"
        ways = [way(one.port, namespace), way(other.port, namespace)]
        with team(tmp_path, ways, 2, several(CONFIG)) as daemons:
            weather = Weather(daemons, dice)
            await weather.goes_on()
            one.cut()
            other.freeze()
            await asyncio.sleep(seconds)  # what is proved is what becomes of such a time
            one.mend()
            other.thaw()
            await weather.goes_on()
            assert await weather.end() == 0


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the daemon in this process find soon that its server is away."""
    for name in ("PATIENCE", "ANSWER_TIME", "CONNECT_TIME"):
        monkeypatch.setattr(redis_link, name, 0.2)
    # A call made while the server owes an answer is not sent.
    monkeypatch.setattr(redis_link, "QUIET", 0.0)


async def swallowed(line: Cable, words: bytes) -> bool:
    """See `Cable.swallowed`."""
    return line.swallowed(words)


@pytest.mark.promise("D3", "S1")
async def test_a_client_learns_that_the_store_is_away_and_a_sent_call_is_answered_when_it_is_back(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)
    with cable(redis_server) as line:
        settings: Json = {"store": {"url": way(line.port, "told")}}
        async with running_daemon(settings=settings) as daemon, await Wire.open(daemon.config.socket_path) as wire:
            line.freeze_at(b"sent")
            sent = wire.post("completion:async", {"prompt": "hello", "request_id": "sent"})
            await until(lambda: swallowed(line, b"sent"))
            for harm in (line.cut, line.mend):
                refused = await wire.refused("completion:async", prompt="hello", request_id="refused")
                assert (refused.code, refused.retryable) == ("store_unavailable", True)
                assert "try again" in refused.message
                assert not sent.done()
                harm()
            line.thaw()
            assert (await answer(sent))["request_id"] == "sent"
            await in_state(wire, "sent", "completed")
            assert (await wire.refused("completion:get", request_id="refused")).code == "not_found"


@pytest.mark.promise("D3", "R6")
async def test_a_server_that_does_not_answer_keeps_no_daemon_from_stopping(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)
    monkeypatch.setattr("ksi.store.redis.store.CLOSE_TIMEOUT", 0.2)
    monkeypatch.setattr("ksi.completion.queue_manager.GIVE_BACK", 0.5)
    with cable(redis_server) as line:
        settings: Json = {"store": {"url": way(line.port, "stop")}, "service": {"shutdown_grace": 0.2}}
        async with running_daemon(settings=settings) as daemon:
            wire = await Wire.open(daemon.config.socket_path)
            await wire.ask("completion:async", prompt="hello", provider_options={"delay": 600})
            line.freeze_at(b"claim")
            daemon.queue.on_work()
            await until(lambda: swallowed(line, b"claim"))
            asked = wire.post("completion:async", {"prompt": "hello"})
        assert (await asked)["error"]["code"] in ("store_unavailable", "shutting_down")
        await wire.leave()
