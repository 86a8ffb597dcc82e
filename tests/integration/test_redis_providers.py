"""Several daemons on one server share the state of providers: breakers, quotas, limits, an operator's switch."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from ksi.store.news import Kind, News
from ksi.store.redis.address import Address
from ksi.store.redis.news import Listener
from tests.daemon_process import DaemonProcess, make_home
from tests.endpoint import Answer, ScriptedEndpoint
from tests.integration.wire import Json, Wire, answer, in_state, until
from tests.redis_server import RedisServer, running

CONFIG = """\
[service]
default_model = "team/one"
shutdown_grace = 1.0

[store]
url = "{url}"
node_id = "node-{number}"

[queue]
lease = 30

[retry]
max_attempts = 1

[breaker]
failures = 4
open_for = {open_for}
probes_to_close = 3

[providers.team]
models = ["team/*"]
max_concurrency = 12
"""
STUB = 'kind = "stub"\nrecord = "../record.tsv"\n'
BROKEN = Answer(status=500)
AWAY = Answer(status=429, headers={"Retry-After": "60"})


class House:
    """Two daemons, with one connection to each."""

    def __init__(self, folder: Path, url: str, provider: str, open_for: float) -> None:
        self.record = folder / "record.tsv"
        self.daemons = [
            DaemonProcess(
                make_home(folder / f"h{number}", CONFIG.format(url=url, number=number, open_for=open_for) + provider)
            )
            for number in range(2)
        ]
        self.wires: list[Wire] = []

    @property
    def a(self) -> Wire:
        return self.wires[0]

    @property
    def b(self) -> Wire:
        return self.wires[1]

    async def listen(self, number: int) -> Wire:
        """A connection that hears of providers."""
        wire = await Wire.open(self.daemons[number].socket_path)
        await wire.ask("monitor:subscribe", events=["provider:*"])
        return wire

    async def leave(self) -> None:
        """Go away from both."""
        for wire in self.wires:
            await wire.leave()

    async def restart(self, number: int) -> None:
        """Stop a daemon in order, and start it again."""
        await self.wires[number].leave()
        await asyncio.to_thread(self.daemons[number].end, signal.SIGTERM)
        await asyncio.to_thread(self.daemons[number].start)
        self.wires[number] = await self.listen(number)

    def lines(self) -> list[tuple[str, str]]:
        """The stub's records: word and request."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return [(line.split("\t")[0], line.split("\t")[3]) for line in lines]


@asynccontextmanager
async def house(
    server: RedisServer, folder: Path, provider: str = STUB, *, open_for: float = 600.0
) -> AsyncIterator[House]:
    """Two daemons that serve while the block runs, in a namespace of their own."""
    made = House(folder, f"{server.url}?namespace={folder.name}", provider, open_for)
    async with AsyncExitStack() as stack:
        for daemon in made.daemons:
            daemon.spawn()
            stack.callback(daemon.end, signal.SIGTERM)
        for number, daemon in enumerate(made.daemons):
            assert daemon.wait_ready(), "a daemon ended before it was ready"
            made.wires.append(await made.listen(number))
        stack.push_async_callback(made.leave)
        yield made


def asked_at(endpoint: ScriptedEndpoint) -> str:
    """A provider that asks this endpoint."""
    return f'kind = "openai"\nbase_url = "{endpoint.openai_url}"\n'


async def ask(wire: Wire, **data: object) -> Json:
    """Ask and wait for the end."""
    return await wire.ask("completion:request", prompt="hello", **data)


async def status(wire: Wire) -> Json:
    """The provider's record as a daemon shows it."""
    reply = await wire.ask("completion:provider_status")
    team: Json = reply["providers"]["team"]
    return team


async def both_hear(made: House, before: str, after: str) -> None:
    """Both daemons say that the provider changed."""
    for wire in made.wires:
        await wire.pushed("provider:state_changed", provider="team", before=before, after=after)


@pytest.mark.promise("D1", "F3")
async def test_failures_of_all_daemons_count_together_and_all_leave_the_provider_alone(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with ScriptedEndpoint(BROKEN) as endpoint, house(redis_server, tmp_path, asked_at(endpoint)) as made:
        for wire in (made.a, made.b, made.a):
            assert (await ask(wire))["status"] == "failed"
        assert (await status(made.a))["breaker"] == "closed"
        assert (await ask(made.b))["status"] == "failed"
        await both_hear(made, "closed", "open")
        shown = [await status(wire) for wire in made.wires]
        assert [one["breaker"] for one in shown] == ["open", "open"]
        assert [one["calls"] for one in shown] == [2, 2]
        assert shown[0]["open_until"] == pytest.approx(shown[1]["open_until"], abs=1.0)
        for wire, name in ((made.a, "x"), (made.b, "y")):
            await wire.ask("completion:async", request_id=name, prompt="hello")
            assert (await wire.ask("completion:get", request_id=name))["status"] == "queued"
            assert "failed too often" in " ".join((await wire.ask("system:health"))["problems"])
        assert len(endpoint.requests) == 4
        endpoint.answers[0] = Answer()
        assert (await made.b.ask("provider:reset", provider="team"))["breaker"] == "closed"
        await both_hear(made, "open", "closed")
        for name in ("x", "y"):
            await in_state(made.a, name, "completed")


@pytest.mark.promise("D1", "F3")
async def test_answers_at_one_daemon_count_against_failures_at_another(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with ScriptedEndpoint(Answer()) as endpoint, house(redis_server, tmp_path, asked_at(endpoint)) as made:
        for _ in range(8):
            assert (await ask(made.b))["status"] == "completed"
        endpoint.answers[0] = BROKEN
        assert (await ask(made.a))["status"] == "failed"
        await until(lambda: samples(redis_server, tmp_path.name, 9))
        for _ in range(5):
            assert (await ask(made.a))["status"] == "failed"
        assert (await status(made.a))["breaker"] == "closed"
        for _ in range(2):
            assert (await ask(made.a))["status"] == "failed"
        await both_hear(made, "closed", "open")


async def samples(server: RedisServer, namespace: str, count: int) -> bool:
    """True if the team's record has this many calls."""
    kept = server.ask("HGET", f"{{ksi:{namespace}}}:providers", "team")
    return kept.count(b"\xc2") + kept.count(b"\xc3") >= count


@pytest.mark.promise("D1", "F3", "Q6")
async def test_one_probe_at_a_time_tries_a_provider_over_all_daemons_and_their_success_closes_it_for_all(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with house(redis_server, tmp_path, open_for=1.5) as made:
        broken = {"fail": "provider_error"}
        for wire in (made.a, made.b) * 2:
            await ask(wire, provider_options=broken)
        await both_hear(made, "closed", "open")
        failed = len(made.lines())
        names = [f"r{number}" for number in range(10)]
        for number, name in enumerate(names):
            wire = made.wires[number % 2]
            await wire.ask("completion:async", request_id=name, prompt="hello", provider_options={"delay": 0.1})
        await both_hear(made, "open", "half_open")
        await both_hear(made, "half_open", "closed")
        for name in names:
            await in_state(made.a, name, "completed")
        tried = [word for word, _ in made.lines()[failed:]]
        assert tried[:6] == ["begin", "end"] * 3, "the three probes that closed it ran one after the other"
        assert len(tried) == 2 * len(names)


@pytest.mark.promise("D1", "F3")
async def test_a_probe_that_fails_at_one_daemon_holds_all_of_them_back(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with house(redis_server, tmp_path, open_for=2.0) as made:
        broken = {"fail": "provider_error"}
        for wire in (made.a, made.b) * 2:
            await ask(wire, provider_options=broken)
        await both_hear(made, "closed", "open")
        failed = len(made.lines())
        await made.a.ask("completion:async", request_id="probe", prompt="hello", provider_options=broken)
        for name in ("x", "y"):
            await made.b.ask("completion:async", request_id=name, prompt="hello")
        await both_hear(made, "open", "half_open")
        await both_hear(made, "half_open", "open")
        assert made.lines()[failed:] == [("begin", "probe"), ("end", "probe")]
        for name in ("x", "y"):
            await in_state(made.b, name, "completed")


@pytest.mark.promise("D1", "F3")
async def test_failures_that_come_all_at_once_at_both_open_it_once(redis_server: RedisServer, tmp_path: Path) -> None:
    async with house(redis_server, tmp_path) as made:
        options = {"fail": "provider_error", "delay": 0.3}
        asked = [
            wire.post("completion:request", {"prompt": "hello", "provider_options": options})
            for wire in made.wires
            for _ in range(6)
        ]
        for one in asked:
            assert (await answer(one))["status"] == "failed"
        await both_hear(made, "closed", "open")
        shown = [await status(wire) for wire in made.wires]
        assert [one["breaker"] for one in shown] == ["open", "open"]
        # Reported once: late outcomes from before the first opening count nothing.
        heard = [line for wire in made.wires for line in wire.lines if line["event"] == "provider:state_changed"]
        assert heard == []


@pytest.mark.promise("D1", "F3")
async def test_an_operator_s_change_at_one_daemon_holds_at_all_and_outlives_them(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with house(redis_server, tmp_path) as made:
        assert (await made.a.ask("provider:disable", provider="team"))["enabled"] is False
        await both_hear(made, "enabled", "disabled")
        assert (await status(made.b))["enabled"] is False
        await made.b.ask("completion:async", request_id="waits", prompt="hello")
        assert (await made.b.ask("completion:get", request_id="waits"))["status"] == "queued"
        await made.restart(1)
        assert (await status(made.b))["enabled"] is False
        assert made.lines() == []
        assert (await made.b.ask("provider:enable", provider="team"))["enabled"] is True
        await made.a.pushed("provider:state_changed", before="disabled", after="enabled")
        await in_state(made.a, "waits", "completed")


@pytest.mark.promise("D1", "F5")
async def test_a_quota_that_one_daemon_met_parks_the_provider_for_all(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with ScriptedEndpoint(AWAY) as endpoint, house(redis_server, tmp_path, asked_at(endpoint)) as made:
        await made.a.ask("completion:async", request_id="met", prompt="hello")
        await both_hear(made, "closed", "parked")
        parked = [(await status(wire))["parked_until"] for wire in made.wires]
        assert parked[0] == pytest.approx(parked[1], abs=1.0)
        await made.b.ask("completion:async", request_id="waits", prompt="hello")
        await made.restart(1)
        assert (await status(made.b))["parked_until"] == pytest.approx(parked[0], abs=1.0)
        assert (await made.b.ask("completion:get", request_id="waits"))["status"] == "queued"
        assert len(endpoint.requests) == 1
        endpoint.answers[0] = Answer()
        assert (await made.b.ask("provider:reset", provider="team"))["parked_until"] is None
        await made.a.pushed("provider:state_changed", before="parked", after="closed")
        for name in ("met", "waits"):
            await in_state(made.a, name, "completed")


@pytest.mark.promise("D1", "F5")
async def test_a_limit_per_minute_holds_over_all_daemons_together(redis_server: RedisServer, tmp_path: Path) -> None:
    async with house(redis_server, tmp_path, STUB + "requests_per_minute = 4\n") as made:
        for number in range(12):
            await made.wires[number % 2].ask("completion:async", request_id=f"r{number}", prompt="hello")

        async def four_ended() -> bool:
            figures = await made.a.ask("completion:queue_status")
            return bool(figures["completed"] == 4 and figures["active"] == 0)

        await until(four_ended)
        assert len(made.lines()) == 8
        assert [(await status(wire))["calls"] for wire in made.wires] == [2, 2]


@pytest.mark.promise("D1", "F5")
async def test_a_limit_of_tokens_holds_over_all_daemons_together(redis_server: RedisServer, tmp_path: Path) -> None:
    async with house(redis_server, tmp_path, STUB + "tokens_per_minute = 1000\n") as made:
        used = {"usage": {"input_tokens": 900, "output_tokens": 200}}
        assert (await ask(made.a, provider_options=used))["status"] == "completed"
        await made.b.ask("completion:async", request_id="waits", prompt="hello")
        await made.b.ask("completion:queue_status")
        assert (await made.a.ask("completion:get", request_id="waits"))["status"] == "queued"
        assert len(made.lines()) == 2


@pytest.mark.promise("D1", "F5")
async def test_a_minute_that_is_over_lets_waiting_requests_go_without_anybodys_help(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with house(redis_server, tmp_path, STUB + "requests_per_minute = 60\n") as made:
        asked = [wire.post("completion:request", {"prompt": "hello"}) for wire in made.wires for _ in range(31)]
        for one in asked:
            assert (await answer(one))["status"] == "completed"


@pytest.mark.promise("D1", "F3")
async def test_a_word_that_is_lost_costs_a_moment(redis_server: RedisServer, tmp_path: Path) -> None:
    async with house(redis_server, tmp_path) as made:
        redis_server.ask("CLIENT", "KILL", "TYPE", "pubsub")
        await made.a.ask("provider:disable", provider="team")
        await both_hear(made, "enabled", "disabled")


@pytest.mark.promise("D1", "D3")
async def test_news_are_heard_after_a_long_silence_and_after_a_server_that_said_nothing() -> None:
    with running() as server:
        heard: list[News] = []
        listener = Listener(Address(server.url), "news", heard.append, quiet=0.1)
        try:
            await listener.ready(10.0)

            async def asked_twice() -> bool:
                server.ask("CONFIG", "RESETSTAT")
                await until(lambda: pinged(server))
                return True

            await asked_twice()
            await asked_twice()
            server.ask("EVAL", "redis.call('PUBLISH', 'news', cmsgpack.pack({kind = 'work'}))", "0")
            await until(lambda: came(heard, Kind.WORK))
            assert [news.kind for news in heard] == [Kind.MISSED, Kind.WORK]
            server.ask("CLIENT", "PAUSE", "500", "ALL")
            await until(lambda: came(heard[2:], Kind.MISSED))
        finally:
            await listener.close()


async def pinged(server: RedisServer) -> bool:
    """True if a client asked the server for a sign of life."""
    return b"cmdstat_ping" in server.ask("INFO", "commandstats")


async def came(heard: list[News], kind: Kind) -> bool:
    """True if news of a kind came."""
    return any(news.kind is kind for news in heard)
