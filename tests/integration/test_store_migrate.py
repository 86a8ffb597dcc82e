"""Moving all that a store holds from SQLite to Redis and back, with the real command."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from ksi.cli import main
from ksi.clock import Chance, SystemClock
from ksi.errors import StoreInUse
from ksi.host.pid_file import PidFile
from ksi.store.base import Store
from ksi.store.redis.address import Address
from ksi.store.redis.snapshot import RedisSnapshots
from ksi.store.redis.store import RedisStore
from ksi.store.snapshot.records import Figures, Record, SavedInjection, SavedLock, SavedSpare
from ksi.store.sqlite.store import SqliteStore
from ksi.store.values import Offer, StoreRules
from tests.conformance import test_chain_snapshot, test_snapshot
from tests.conformance.world import RedisHome, World
from tests.redis_server import RedisServer, cluster


class SqliteFile:
    """A database at one place."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def store(self, rules: StoreRules, chance: Chance) -> Store:
        """See `Home.store`."""
        return SqliteStore(self.path, rules, chance, durability="normal")

    async def crash(self, store: Store) -> None:
        """See `Home.crash`: closed, which ends nothing that runs."""
        await store.close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home without a daemon."""
    (tmp_path / "ksi.toml").write_text("")
    return tmp_path


@pytest.fixture
def address(redis_server: RedisServer) -> str:
    """A namespace of its own."""
    return f"{redis_server.url}?namespace={uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[str]:
    """A cluster of three."""
    with cluster(3) as url:
        yield url


def migrate(home: Path, source: str, target: str) -> Result:
    return CliRunner().invoke(main, ["--home", str(home), "store", "migrate", source, target])


async def records_of(path: Path) -> list[Record]:
    """A database's records; fences leap at each loading, and a lock's expiry is reset."""
    store = SqliteStore(path, StoreRules(), Chance(), durability="normal")
    now = SystemClock().now()
    await store.open(now, lambda: None)
    records = [record async for piece in store.export(now) for record in piece]
    await store.close()
    return [bare(record) for record in records]


def bare(record: Record) -> Record:
    """A record without fields that need not be kept: fences leap, and usage needs no text if the request is gone."""
    if isinstance(record, Figures):
        return msgspec.structs.replace(record, fence=0)
    if isinstance(record, SavedSpare) and record.body is None:
        attempt = msgspec.structs.replace(record.saved.attempt, text=None)
        return msgspec.structs.replace(record, saved=msgspec.structs.replace(record.saved, attempt=attempt, raw=None))
    return record


@pytest.mark.promise("R5", "D1")
@pytest.mark.parametrize("part", [test_snapshot, test_chain_snapshot], ids=["requests", "chains"])
@pytest.mark.parametrize("place", ["server", "cluster"])
async def test_all_goes_from_sqlite_to_redis_and_back(
    home: Path, redis_server: RedisServer, three_nodes: str, part: Any, place: str
) -> None:
    address = f"{redis_server.url if place == 'server' else three_nodes}?namespace={uuid.uuid4().hex}"
    world = World(
        SqliteFile(home / "old.db"),
        StoreRules(
            keep_finished=test_snapshot.RULES["keep_finished"], keep_sessions=test_snapshot.RULES["keep_sessions"]
        ),
    )
    await world.open()
    await part.a_life(world)
    await world.crash()
    await world.store.close()
    before = await records_of(home / "old.db")
    there = await in_thread(home, "sqlite:///old.db", address)
    assert there.exit_code == 0, there.output
    assert "verified" in there.output
    assert await records_of(home / "old.db") == before
    back = await in_thread(home, address, "sqlite:///new.db")
    assert back.exit_code == 0, back.output
    assert await records_of(home / "new.db") == before
    assert any(isinstance(record, SavedLock | SavedInjection) for record in before)


@pytest.mark.promise("D4")
async def test_a_dialogue_that_was_held_on_this_machine_is_bound_to_it_there(home: Path, address: str) -> None:
    (home / "ksi.toml").write_text('[store]\nnode_id = "this-one"\n[providers.claude-cli]\nkind = "claude-cli"\n')
    world = World(SqliteFile(home / "old.db"), StoreRules())
    await world.open()
    offers = {name: Offer(name, name, 9) for name in ("claude-cli", "team")}
    for name, offer in offers.items():
        enqueued = await world.enqueue(name, f"with {name}", [offer], route=name)
        assert enqueued.claim is not None
        await world.complete(enqueued.claim, provider_session=f"session of {name}")
    await world.store.close()
    moved = await in_thread(home, "sqlite:///old.db", address)
    assert moved.exit_code == 0, moved.output
    there = RedisStore(Address(address), StoreRules(), Chance(), daemon="other", node="other")
    await there.open(world.clock.now(), lambda: None)
    nodes = [session.node for session in (await there.sessions(5)).items]
    assert nodes == [None, "this-one"], "the newest first"
    for name, offer in offers.items():
        new = world.new(f"again {name}", f"with {name}", route=name)
        claim = (await there.enqueue(new, [offer], world.clock.now())).claim
        assert (claim is None) is (name == "claude-cli")
    await there.close()


async def in_thread(home: Path, source: str, target: str) -> Result:
    """The command, which has an event loop of its own."""
    import asyncio

    return await asyncio.to_thread(migrate, home, source, target)


@pytest.mark.promise("R5")
async def test_a_store_that_holds_something_is_not_written_over(home: Path, address: str) -> None:
    world = World(SqliteFile(home / "old.db"), StoreRules())
    await world.open()
    await world.enqueue("a")
    await world.store.close()
    assert (await in_thread(home, "sqlite:///old.db", address)).exit_code == 0
    again = await in_thread(home, "sqlite:///old.db", address)
    assert again.exit_code != 0
    assert "empty" in again.output


def test_while_a_daemon_runs_nothing_is_moved(home: Path, address: str) -> None:
    (home / "var" / "run").mkdir(parents=True)
    daemon = PidFile(home / "var" / "run" / "daemon.pid")
    daemon.take()
    result = migrate(home, "sqlite:///old.db", address)
    daemon.release()
    assert result.exit_code != 0
    assert "a daemon runs here already" in result.output


def test_a_store_is_not_moved_into_itself(home: Path) -> None:
    assert "are the same store" in migrate(home, "configured", "configured").output


@pytest.mark.parametrize("urls", [("memory://", "sqlite:///a.db"), ("sqlite:///a.db", "memory://")])
def test_nothing_is_moved_to_or_from_memory(home: Path, urls: tuple[str, str]) -> None:
    result = migrate(home, *urls)
    assert result.exit_code != 0
    assert "there is no store in memory" in result.output
    assert not (home / "a.db").exists()


@pytest.mark.promise("R5", "D1")
async def test_with_another_daemon_alive_nothing_is_saved_or_loaded(address: str) -> None:
    now = SystemClock().now()
    stores = [RedisStore(Address(address), StoreRules(), Chance(), daemon=name, node="here") for name in ("a", "b")]
    for store in stores:
        await store.open(now, lambda: None)
    with pytest.raises(StoreInUse):
        await anext(stores[0].export(now))
    with pytest.raises(StoreInUse):
        await stores[0].load([], now)
    await stores[1].close()
    assert [piece async for piece in stores[0].export(now)]
    await stores[0].close()


@pytest.mark.promise("R5", "D3")
async def test_a_load_that_a_kill_broke_off_is_taken_away_at_the_next_opening(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = World(RedisHome(redis_server.url), StoreRules())
    await source.open()
    for number in range(5):
        await source.enqueue(f"r{number}", f"talk {number}")
    records = await test_snapshot.saved(source)
    target = World(RedisHome(redis_server.url), StoreRules())
    await target.open()
    whole, there = RedisSnapshots._write, target.store
    assert isinstance(there, RedisStore)

    async def killed(store: Any, data: Any, now: Any) -> None:
        urgent = store._calls.urgent

        async def only_pages(verb: str, *args: Any, **more: Any) -> Any:
            if verb == "go_on":
                await there.leave()
            return await urgent(verb, *args, **more)

        store._calls.urgent = only_pages
        await whole(store, data, now)

    monkeypatch.setattr(RedisSnapshots, "_write", killed)
    with pytest.raises(Exception, match="not open"):
        await target.store.load(records, target.clock.now())
    monkeypatch.undo()
    await target.crash()
    totals = await target.store.totals()
    assert (totals.queued, totals.conversations) == (0, 0)
    await target.store.load(records, target.clock.now())
    assert (await target.store.totals()).queued == 5
    await target.store.close()
    await source.store.close()
