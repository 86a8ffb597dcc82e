"""Reading all that a namespace on Redis holds into an image, of which a snapshot is made."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import msgspec

from ksi.request import Attempt, Outcome, Priority, State, Turn
from ksi.store.admission import Routing
from ksi.store.binding import node_of
from ksi.store.chains import Block, ChainLimits
from ksi.store.image.chains import Chain, Injection, Link
from ksi.store.image.data import Conversation, ExternalLock, Image, Request, TurnRecord
from ksi.store.provider_records import HeldRecords, KeptRecord
from ksi.store.questions import read_question
from ksi.store.redis.passages import Kept
from ksi.store.redis.values import RANK_ZERO, ended_attempt, kept_account, kept_turn, key16
from ksi.store.values import Fork

Ask = Callable[..., Awaitable[Any]]
"""Sends a command and brings its answer."""

_PAGE = 200
"""Records that one command brings."""

_TOGETHER = 64
"""Commands that are under way at once."""

_INDEX_PAGE = 2_000

Packed = dict[str, Any]

T = TypeVar("T")


class Reading:
    """One reading of a namespace in which nothing changes meanwhile; `going_on` is awaited between its pages."""

    def __init__(
        self, ask: Ask, namespace: str, going_on: Callable[[], Awaitable[None]], data: Image | None = None
    ) -> None:
        """`data` receives the records."""
        self._ask = ask
        self._prefix = f"{namespace}:"
        self._going_on = going_on
        self._data = Image() if data is None else data
        self._names: dict[str, Conversation] = {}
        """By the number that the store writes."""
        self._holders: set[str] = set()
        """Keys of those who hold a conversation."""
        self._lined: list[str] = []
        """Numbers of conversations with a line."""
        self._links: dict[str, Chain] = {}
        """Chains, by the number that the store writes."""
        self._turns: dict[int, bytes] = {}
        self._completed: dict[int, Attempt] = {}
        """By key."""

    async def all(self) -> Image:
        """Everything."""
        await self._figures()
        await self._conversations()
        await self._read_turns()
        await self._chains()
        await self._members()
        self._put_turns()
        await self._injections()
        await self.records()
        await self._account()
        await self._watermark()
        return self._data

    # -- commands -----------------------------------------------------------------------------------------------------

    async def _each(self, command: str, names: Iterable[str], *rest: str) -> list[Any]:
        """The answers of one command for each of these keys."""
        answers: list[Any] = []
        for some in _batched(names, _TOGETHER):
            answers += await asyncio.gather(*(self._ask(command, self._prefix + name, *rest) for name in some))
            await self._going_on()
        return answers

    async def _values(self, kind: str, names: Sequence[str]) -> list[bytes | None]:
        found: list[bytes | None] = []
        for some in _batched(names, _PAGE):
            found += await self._ask("MGET", *(f"{self._prefix}{kind}:{name}" for name in some))
            await self._going_on()
        return found

    async def _packed(self, kind: str, names: Sequence[str]) -> list[Packed]:
        return [_unpack(found) for found in await self._values(kind, names) if found is not None]

    async def _passages(self, kind: str, values: Iterable[Kept]) -> dict[str, bytes]:
        """What was cut out of these values, by number, as it stands in text (`pt`) or within JSON (`pd`)."""
        numbers = sorted({value.passage for value in values if value.passage is not None})
        found = await self._values(kind, numbers)
        return {number: passage for number, passage in zip(numbers, found, strict=True) if passage is not None}

    async def _bodies(self, keys: Sequence[str]) -> list[bytes]:
        """Requests as they came."""
        kept = [Kept.of(body or b"") for body in await self._values("b", keys)]
        passages = await self._passages("pd", kept)
        return [body.whole(passages) for body in kept]

    async def _index(self, name: str) -> list[bytes]:
        found: list[bytes] = []
        after: bytes = b"-"
        while True:
            page = await self._ask("ZRANGEBYLEX", self._prefix + name, after, "+", "LIMIT", "0", str(_INDEX_PAGE))
            found += page
            if len(page) < _INDEX_PAGE:
                return found
            after = b"(" + page[-1]
            await self._going_on()

    async def _keys(self, name: str) -> list[str]:
        return [member.decode()[-16:] for member in await self._index(name)]

    # -- records ------------------------------------------------------------------------------------------------------

    async def _figures(self) -> None:
        packed = await self._ask("GET", f"{self._prefix}count")
        counts: dict[str, int] = {} if packed is None else _unpack(packed)
        for state in State:
            self._data.states[state] = int(counts.get(state.value, 0))
        self._data.count_on({name: int(counts.get(name, 0)) for name in ("member", "turn", "fence")})
        # Requests bound to one machine are in a lane of their own, which is named by their route and that machine.
        names = [name.decode() for name in await self._index("routes")]
        self._data.routes.update(name.rpartition("\n")[0] or name for name in names)

    async def records(self) -> None:
        """The state of providers, and the pauses."""
        found = await self._ask("HGETALL", f"{self._prefix}providers")
        pairs: Iterator[tuple[bytes, bytes]] = zip(found[::2], found[1::2], strict=True)
        kept = {name.decode(): KeptRecord(int(value[:16]), value[16:]) for name, value in pairs}
        self._data.records = HeldRecords(kept)

    async def _conversations(self) -> None:
        numbers = await self._keys("sessions")
        records = await self._packed("c", numbers)
        agents = await self._each("ZRANGE", (f"ca:{number}" for number in numbers), "0", "-1")
        aliases = await self._each("SMEMBERS", (f"cx:{number}" for number in numbers))
        forks = await self._each("SMEMBERS", (f"cf:{number}" for number in numbers))
        for record, known, others in zip(records, agents, aliases, strict=True):
            parent = record.get("parent")
            conversation = Conversation(
                number=int(record["number"]),
                name=record["name"],
                created_at=int(record["created"]),
                active_at=int(record["active"]),
                parent=None if parent is None else self._names[parent],
                head=_number(record.get("head")),
                agents=[agent.decode() for agent in known],
                aliases=sorted(alias.decode() for alias in others),
                since=_number(record.get("since")),
            )
            self._names[record["number"]] = conversation
            self._data.conversations[conversation.name] = self._data.numbered[conversation.number] = conversation
        self._holders = {record["holder"] for record in records if "holder" in record}
        self._lined = [record["number"] for record in records if "lined" in record]
        owners = {fork.decode(): owner for owner, own in zip(self._names.values(), forks, strict=True) for fork in own}
        for number, fork in zip(owners, await self._values("f", list(owners)), strict=True):
            if fork is not None:
                self._data.forks[int(number)] = msgspec.msgpack.decode(fork, type=Fork, strict=False)
                owners[number].forks.append(int(number))

    async def _read_turns(self) -> None:
        """All turns by their numbers: they are dense except for pruned ones."""
        for some in _batched(range(1, self._data.last_number("turn") + 1), _PAGE):
            kept = await self._values("t", [key16(number) for number in some])
            for number, turn in zip(some, kept, strict=True):
                if turn is not None and turn[32:48].decode() in self._names:
                    self._turns[number] = turn
                    self._completed[int(turn[16:32])] = kept_turn(turn).attempt

    async def _chains(self) -> None:
        numbers = await self._keys("chains")
        for record in await self._packed("ch", numbers):
            chain = Chain(
                number=int(record["number"]),
                name=record["name"],
                limits=msgspec.convert(record["limits"], ChainLimits, strict=False),
                created_at=int(record["created"]),
                started_at=int(record["started"]),
                used=int(record["used"]),
                estimated=int(record["estimated"]),
                reserved=int(record["reserved"]),
                closed=bool(record.get("closed")),
                tripped=_block(record.get("tripped")),
                guard_messages=int(record["guards"]),
                resets=int(record["resets"]),
                reset_key=int(record["reset_key"]),
                deepest=int(record["deepest"]),
            )
            self._links[record["number"]] = chain
            self._data.chains.add(chain)

    async def _members(self) -> None:
        """Requests and locks: ended, delayed, asking and running ones, holders, and the wait queues."""
        keys = set(self._holders)
        for index in ("finished", "delayed", "asking", "active"):
            keys.update(await self._keys(index))
        for number in self._lined:
            keys.update(await self._keys(f"l:{number}"))
        ordered = sorted(keys)
        records = await self._packed("r", ordered)
        requests = [record for record in records if "external" not in record]
        names = [record["key"] for record in requests]
        bodies = await self._bodies(names)
        trails = await self._each("LRANGE", (f"a:{name}" for name in names), "0", "-1")
        linked = [record["key"] for record in requests if "chain" in record]
        links = dict(zip(linked, await self._packed("k", linked), strict=True))
        marks = dict(
            zip(linked, await self._each("HMGET", (f"m:{key}" for key in linked), "mark", "result"), strict=True)
        )
        found = {record["key"]: (body, trail) for record, body, trail in zip(requests, bodies, trails, strict=True)}
        for record in records:
            key = record["key"]
            if "external" in record:
                member: Request | ExternalLock = self._lock(record)
            else:
                request = member = self._request(record, *found[key])
                if key in links:
                    request.link = self._link(record, links[key], *marks[key])
            if key in self._holders:
                member.conversation.holder = member
            self._data.members[member.key] = self._data.ids[member.request_id] = member

    def _request(self, record: Packed, body: bytes, trail: Sequence[bytes]) -> Request:
        turn = _number(record.get("turn"))
        entries = [b"T00000001", *trail] if "at_once" in record else trail
        attempts = [
            self._completed[int(record["key"])] if entry[:1] == b"T" else ended_attempt(entry, b"") for entry in entries
        ]
        return Request(
            key=int(record["key"]),
            request_id=record["id"],
            conversation=self._names[record["conversation"]],
            rank=int(record["rank"]) - RANK_ZERO,
            priority=Priority(int(record["priority"])),
            enqueued_at=int(record["enqueued"]),
            fence=int(record.get("fence", 0)),
            state=State(record["state"]),
            body=body,
            route=record["route"],
            model=record.get("model", ""),
            agent_id=record.get("agent"),
            hold_on_retry=record["hold"] == "1",
            requeued_from=record.get("requeued_from"),
            due=_number(record.get("due")),
            expires=_number(record.get("expires")),
            attempt=int(record.get("attempt", 0)),
            provider=record.get("provider"),
            started_at=_number(record.get("started")),
            finished_at=_number(record.get("finished")),
            attempts=attempts,
            error=record.get("error"),
            message=record.get("message"),
            question=read_question(record.get("question")),
            interruptions=int(record.get("interruptions", 0)),
            interrupted_by=record.get("interrupted_by"),
            cancelling="cancelling" in record,
            turn=turn,
        )

    def _lock(self, record: Packed) -> ExternalLock:
        metadata = record.get("metadata")
        return ExternalLock(
            key=int(record["key"]),
            request_id=record["id"],
            conversation=self._names[record["conversation"]],
            rank=int(record["rank"]) - RANK_ZERO,
            priority=Priority(int(record["priority"])),
            enqueued_at=int(record["enqueued"]),
            fence=int(record.get("fence", 0)),
            metadata=None if metadata is None else metadata.encode("latin-1"),
            deadline=None,
            patience=_number(record.get("patience")),
        )

    def _link(self, record: Packed, link: Packed, mark: bytes | None, result: bytes | None) -> Link:
        chain = self._links[record["chain"]]
        chain.members.append(int(record["key"]))
        chain.notices += bool(link.get("guard"))
        return Link(
            chain=chain,
            parent=link.get("parent"),
            parent_key=_number(link.get("parent_key")),
            depth=int(link["depth"]),
            limits=msgspec.convert(link["limits"], ChainLimits, strict=False),
            estimate=int(link["estimate"]),
            output_cap=_number(link.get("output_cap")),
            guard=bool(link.get("guard")),
            routing=Routing(int(link["routing"])),
            reserved=int(link["reserved"]),
            mark=mark,
            result=result,
            block=_block(link.get("block")),
            tokens=int(link["tokens"]),
            estimated=bool(link.get("estimated")),
            carries="carries" in link,
        )

    def _put_turns(self) -> None:
        for number, packed in self._turns.items():
            kept = kept_turn(packed)
            attempt = self._completed[kept.key]
            conversation = self._names[packed[32:48].decode()]
            member = self._data.members.get(kept.key)
            turn = Turn(
                id=number,
                body=member.body if isinstance(member, Request) else b"",
                text=attempt.text or "",
                provider=attempt.provider,
                provider_session=attempt.provider_session,
                finished_at=attempt.finished_at,
                previous=kept.previous,
                last_message=attempt.last_message,
                conversation=conversation.name,
                reminders=kept.reminders,
                node=node_of(attempt),
                content=attempt.content,
            )
            request_id = "" if member is None else member.request_id
            self._data.turns[number] = TurnRecord(
                turn=turn,
                request_id=request_id,
                conversation=conversation.name,
                agent_id=kept.agent_id,
                attempt=attempt,
            )
            conversation.turns.append(number)

    async def _injections(self) -> None:
        await self._orphans()
        numbers = await self._keys("injections")
        records = await self._packed("i", numbers)
        texts = [Kept.of(text or b"") for text in await self._values("ix", numbers)]
        children = [None if child is None else Kept.of(child) for child in await self._values("ic", numbers)]
        plain = await self._passages("pt", texts)
        within = await self._passages("pd", [child for child in children if child is not None])
        for record, text, child in zip(records, texts, children, strict=True):
            injection = Injection(
                number=int(record["number"]),
                injection_id=record["id"],
                chain=record["chain"],
                parent=record["parent"],
                parent_key=int(record["parent_key"]),
                target=record["target"],
                trigger=record["trigger"],
                text=text.whole(plain).decode(),
                created_at=int(record["created"]),
                child=None if child is None else child.child(within),
                direct=bool(record.get("direct")),
                state=record["state"],
                finished_at=_number(record.get("finished")),
                request_id=record.get("request_id"),
                reason=_block(record.get("reason")),
            )
            self._data.injections.add(injection)

    async def _orphans(self) -> None:
        """The bodies of turns whose request is gone."""
        bare = [number for number, record in self._data.turns.items() if not record.request_id]
        keys = [self._turns[number][16:32].decode() for number in bare]
        for number, body in zip(bare, await self._bodies(keys), strict=True):
            record = self._data.turns[number]
            record.turn = msgspec.structs.replace(record.turn, body=body)

    async def _account(self) -> None:
        """The usage, in the order of ends; an attempt that is kept elsewhere too is the same one."""
        trails = _Trails(self._data, self._completed)
        entries = await self._index("account")
        for entry in sorted(entries, key=lambda entry: entry[20:36]):
            spent = kept_account(entry)
            same = trails.same(spent.key, spent.attempt)
            self._data.spent.append(msgspec.structs.replace(spent, attempt=same))

    async def _watermark(self) -> None:
        """The position up to which every daemon's response log is written: the next one continues there."""
        last = self._data.last_number("turn")
        for daemon in await self._ask("HKEYS", f"{self._prefix}seen"):
            mark = await self._ask("HGET", f"{self._prefix}logged", daemon) or key16(0).encode()
            behind = await self._ask(
                "ZRANGEBYLEX", self._prefix.encode() + b"log:" + daemon, b"(" + mark, "+", "LIMIT", "0", "1"
            )
            if behind:
                last = min(last, int(behind[0]) - 1)
        self._data.watermark = last


class _Trails:
    """The attempts of kept requests and turns, to be found by an account's entry."""

    def __init__(self, data: Image, completed: dict[int, Attempt]) -> None:
        self._known: defaultdict[tuple[int, int, str], list[Attempt]] = defaultdict(list)
        for key, attempt in completed.items():
            self._known[key, attempt.number, _kind(attempt)].append(attempt)
        for key, attempt in _trailed(data):
            if attempt is not completed.get(key):
                self._known[key, attempt.number, _kind(attempt)].append(attempt)

    def same(self, key: int, attempt: Attempt) -> Attempt:
        """The kept attempt that this one is, or itself."""
        found = self._known.get((key, attempt.number, _kind(attempt)))
        return found.pop(0) if found else attempt


def _trailed(data: Image) -> Iterator[tuple[int, Attempt]]:
    for member in data.members.values():
        if isinstance(member, Request):
            yield from ((member.key, attempt) for attempt in member.attempts)


def _kind(attempt: Attempt) -> str:
    """The difference between attempts of one number: one continued after its lease had expired."""
    special = attempt.outcome in (Outcome.INTERRUPTED, Outcome.FENCED)
    return attempt.outcome.value if special else "own"


def _unpack(packed: bytes) -> Packed:
    found: Packed = msgspec.msgpack.decode(packed)
    return found


def _number(text: Any) -> int | None:
    return None if text is None else int(text)


def _block(packed: Any) -> Block | None:
    if packed is None:
        return None
    # An empty list comes out of the server's Lua as an empty map.
    return msgspec.convert({**packed, "evidence": tuple(packed.get("evidence") or ())}, Block, strict=False)


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some
