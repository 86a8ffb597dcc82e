"""A loaded snapshot on Redis: the commands that write it, each of which is idempotent within a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from ksi.request import Outcome, State, answer_chars, said_chars
from ksi.store.admission import Routing
from ksi.store.chains import charge
from ksi.store.image.chains import Chain, Injection, Link
from ksi.store.image.data import Conversation, ExternalLock, Image, Member, Request, TurnRecord
from ksi.store.questions import is_asking, write_question
from ksi.store.redis.passages import keep_whole
from ksi.store.redis.values import NO_TURN, encode, key16, pad20, rank20

Command = tuple[str | bytes, ...]
"""Its name, a key without its namespace, and the rest."""

PAGE = 400
"""Commands that are written in one step."""

PAGE_BYTES = 1 << 20

_SERIES = ("member", "turn", "fence", "conversation", "fork", "chain", "injection")


def pages(commands: Iterator[Command]) -> Iterator[list[Command]]:
    """Commands in pieces that hold the server up for a moment only."""
    page: list[Command] = []
    size = 0
    for command in commands:
        page.append(command)
        size += sum(len(part) for part in command)
        if len(page) >= PAGE or size >= PAGE_BYTES:
            yield page
            page, size = [], 0
    if page:
        yield page


class Writing:
    """The commands that write an image for a daemon; `shift` brings monotonic times to the server's."""

    def __init__(self, data: Image, daemon: str, life: str, shift: int) -> None:
        self._data = data
        self._daemon = daemon
        self._life = life
        self._shift = shift
        self._owners = {id(spent.attempt): spent.key for spent in data.spent}
        """The keys of requests, by the identity of an attempt."""

    def figures(self) -> bytes:
        """The record `count`."""
        counts = {state.value: number for state, number in self._data.states.items()}
        series = {name: self._data.last_number(name) for name in _SERIES}
        ready = map(self._data.ready_request, self._data.numbered.values())
        bound = sum(request is not None and self._data.waits_for(request) is not None for request in ready)
        return encode({**counts, **series, "account": len(self._data.spent), "bound": bound})

    def commands(self) -> Iterator[Command]:
        """All but `count`."""
        data = self._data
        for route in sorted(data.routes):
            yield _entry("routes", route)
        for node, heard in data.heard.items():
            yield "ZADD", "heard", "NX", str(heard + self._shift), node
            yield "ZREM", "lost", node
        yield "HSET", "logged", self._daemon, key16(data.watermark)
        for conversation in data.numbered.values():
            yield from self._conversation(conversation)
        for chain in data.chains.numbered.values():
            yield from self._chain(chain)
        for member in data.members.values():
            if isinstance(member, Request):
                yield from self._request(member)
            elif isinstance(member, ExternalLock):
                yield from self._lock(member)
        for number, record in data.turns.items():
            yield from self._turn(number, record)
        for (number,) in data.log.walk(()):
            yield _entry(f"log:{self._daemon}", key16(number))
        for injection in data.injections.numbered.values():
            yield from self._injection(injection)
        yield from self._account()
        for name, kept in data.records.kept.items():
            yield "HSET", "providers", name, key16(kept.version).encode() + kept.value

    def _conversation(self, conversation: Conversation) -> Iterator[Command]:
        number = key16(conversation.number)
        root = key16(conversation.root)
        ready = self._data.ready_request(conversation)
        waits_for = None if ready is None else self._data.waits_for(ready)
        binding = self._data.binding(conversation)
        kept = conversation.members or conversation.children or conversation.reminders
        idle = None if kept else pad20(conversation.active_at) + number
        lined = self._data.head_of_line(conversation) is not None
        head = conversation.head
        session = None if head is None else self._data.turns[head].attempt.provider_session
        parent = conversation.parent
        yield _record(
            f"c:{number}",
            number=number,
            name=conversation.name,
            created=pad20(conversation.created_at),
            active=pad20(conversation.active_at),
            members=str(conversation.members),
            children=str(conversation.children),
            turns=str(len(conversation.turns)),
            root=root,
            parent=None if parent is None else key16(parent.number),
            head=None if head is None else key16(head),
            head_session=session,
            session=conversation.provider_session,
            provider=conversation.provider,
            logger=None if head is None else self._daemon,
            holder=None if conversation.holder is None else key16(conversation.holder.key),
            since=None if conversation.since is None else pad20(conversation.since),
            ready=None if ready is None else _place(ready),
            ready_route=None if ready is None else ready.route,
            ready_node=waits_for,
            node=None if binding is None else binding.node,
            keeper=None if binding is None else binding.provider,
            idle=idle,
            lined="1" if lined else None,
            reminding=True if conversation.reminders else None,
        )
        yield _entry("sessions", number)
        if idle is not None:
            yield _entry("idle", idle)
        if lined:
            yield _entry("lined", number)
        if conversation.holder is not None:
            yield _entry("held", number)
        if ready is not None:
            lane = ready.route if waits_for is None else f"{ready.route}\n{waits_for}"
            yield _entry(f"ready:{lane}", _place(ready))
            yield _entry("routes", lane)
        yield "SET", f"name:{conversation.name}", number
        for alias in conversation.aliases:
            yield "SET", f"name:{alias}", number
            yield "SADD", f"cx:{number}", alias
        for place, agent in enumerate(conversation.agents):
            yield "ZADD", f"ca:{number}", str(place), agent
            yield _entry(f"as:{agent}", number)
        for fork in conversation.forks:
            yield "SET", f"f:{key16(fork)}", encode(self._data.forks[fork])
            yield _entry("forks", key16(fork))
            yield _entry(f"tree:{root}", key16(fork))
            yield "SADD", f"cf:{number}", key16(fork)
        for reminder in conversation.reminders:
            yield _entry(f"rm:{number}", key16(reminder))

    def _request(self, request: Request) -> Iterator[Command]:
        key = key16(request.key)
        costs = [charge(attempt, 0) for attempt in request.attempts if attempt.outcome is not Outcome.FENCED]
        put_off = request.state in (State.RETRYING, State.PARKED)
        yield _record(
            f"r:{key}",
            key=key,
            id=request.request_id,
            conversation=key16(request.conversation.number),
            state=request.state.value,
            rank=rank20(request.rank),
            priority=str(int(request.priority)),
            enqueued=pad20(request.enqueued_at),
            route=request.route,
            model=request.model,
            agent=request.agent_id,
            hold="1" if request.hold_on_retry else "0",
            requeued_from=request.requeued_from,
            due=_time(request.due),
            expires=_time(request.expires),
            attempt=str(request.attempt),
            fence=str(request.fence),
            token="0",
            provider=request.provider,
            started=_time(request.started_at),
            finished=_time(request.finished_at),
            failed_at=str(request.attempts[-1].finished_at) if put_off else None,
            error=request.error,
            message=request.message,
            question=write_question(request.question),
            asks="1" if is_asking(request.state, request.question) else None,
            interruptions=str(request.interruptions),
            interrupted_by=request.interrupted_by,
            turn=None if request.turn is None else key16(request.turn),
            logger=None if request.turn is None else self._daemon,
            chain=None if request.link is None else key16(request.link.chain.number),
            spent=None if request.link is not None else str(sum(cost for cost, _ in costs)),
            guessed=None if request.link is not None else str(sum(cost for cost, guess in costs if guess)),
        )
        yield "SET", f"id:{request.request_id}", key
        yield "SET", f"b:{key}", request.body
        for attempt in request.attempts:
            entry = f"{attempt.number:08d}".encode()
            if attempt.outcome is Outcome.COMPLETED:
                yield "RPUSH", f"a:{key}", b"T" + entry
            else:
                kind = {Outcome.INTERRUPTED: b"I", Outcome.FENCED: b"F"}.get(attempt.outcome, b"O")
                yield "RPUSH", f"a:{key}", kind + entry + encode(attempt)
        if request.link is not None:
            yield from self._link(request, request.link)
        yield from self._places(request, key)

    def _places(self, request: Request, key: str) -> Iterator[Command]:
        """The indexes that contain a request."""
        match request.state:
            case State.QUEUED if not request.holds:
                yield _entry(f"l:{key16(request.conversation.number)}", _place(request))
            case State.SCHEDULED | State.RETRYING | State.PARKED if request.due is not None:
                yield _entry("delayed", pad20(request.due) + key)
        asking = is_asking(request.state, request.question)
        if asking:
            yield _entry("asking", key)
        if request.state is State.PARKED and not asking:
            yield _entry(f"parked:{request.route}", pad20(request.due or 0) + key)
        if request.expires is not None and request.state in (State.SCHEDULED, State.QUEUED):
            yield _entry("perish", pad20(request.expires) + key)
        if request.state.final:
            yield _entry("finished", pad20(request.finished_at or 0) + key)
        if request.state is State.FAILED:
            yield _entry("failed", pad20(request.finished_at or 0) + key)

    def _link(self, request: Request, link: Link) -> Iterator[Command]:
        key, chain = key16(request.key), key16(link.chain.number)
        carried = self._data.injections.named[request.request_id] if link.carries else None
        yield _record(
            f"k:{key}",
            parent=link.parent,
            parent_key=None if link.parent_key is None else key16(link.parent_key),
            depth=link.depth,
            limits=msgspec.to_builtins(link.limits),
            block=msgspec.to_builtins(link.block),
            estimate=link.estimate,
            output_cap=link.output_cap,
            guard=link.guard,
            routing=int(link.routing),
            reserved=0,
            tokens=link.tokens,
            estimated=link.estimated,
            carries=None if carried is None else key16(carried.number),
        )
        if link.mark is not None:
            yield "HSET", f"m:{key}", "mark", link.mark
        if link.result is not None:
            yield "HSET", f"m:{key}", "result", link.result
        yield _entry(f"chm:{chain}", key)
        if not request.state.final:
            yield _entry(f"cho:{chain}", key)
        if link.routing is Routing.UNROUTED:
            yield _entry("unrouted", key)

    def _lock(self, lock: ExternalLock) -> Iterator[Command]:
        key = key16(lock.key)
        deadline = None if lock.deadline is None else pad20(lock.deadline + self._shift)
        ends = pad20(lock.ends + self._shift)
        yield _record(
            f"r:{key}",
            key=key,
            external="1",
            id=lock.request_id,
            conversation=key16(lock.conversation.number),
            rank=rank20(lock.rank),
            priority=str(int(lock.priority)),
            enqueued=pad20(lock.enqueued_at),
            metadata=None if lock.metadata is None else lock.metadata.decode("latin-1"),
            patience=None if lock.patience is None else str(lock.patience),
            deadline=deadline,
            life=self._life,
            fence=str(lock.fence) if lock.holds else None,
            ends=ends if lock.holds else None,
            expires_at=str(lock.expires_at) if lock.holds else None,
        )
        yield "SET", f"id:{lock.request_id}", key
        yield _entry(f"ext:{self._life}", key)
        if lock.holds:
            yield _entry("locks", ends + key)
            return
        yield _entry("waiters", key)
        yield _entry(f"l:{key16(lock.conversation.number)}", _place(lock))
        if deadline is not None:
            yield _entry("deadlines", deadline + key)

    def _turn(self, number: int, record: TurnRecord) -> Iterator[Command]:
        """A turn, as `settle` writes it; its body too, if its request is gone."""
        turn, attempt = record.turn, record.attempt
        key = self._owners[id(attempt)]
        agent = (record.agent_id or "").encode()
        reminders = encode(turn.reminders) if turn.reminders else b""
        size = len(turn.body) + said_chars(attempt) + sum(map(len, turn.reminders))
        answer = answer_chars(attempt)
        header = NO_TURN if turn.previous is None else key16(turn.previous)
        header += key16(key) + key16(self._data.conversations[record.conversation].number)
        header += f"{size:012d}{answer:012d}B{len(agent):06d}{len(reminders):08d}"
        yield "SET", f"t:{key16(number)}", header.encode() + agent + reminders + encode(attempt)
        yield "SET", f"b:{key16(key)}", turn.body

    def _chain(self, chain: Chain) -> Iterator[Command]:
        number = key16(chain.number)
        yield _record(
            f"ch:{number}",
            number=number,
            name=chain.name,
            limits=msgspec.to_builtins(chain.limits),
            created=chain.created_at,
            started=chain.started_at,
            used=chain.used,
            estimated=chain.estimated,
            reserved=0,
            guards=chain.guard_messages,
            notices=chain.notices,
            resets=chain.resets,
            deepest=chain.deepest,
            reset_key=key16(chain.reset_key),
            closed=chain.closed or None,
            tripped=msgspec.to_builtins(chain.tripped),
        )
        yield "SET", f"chain:{chain.name}", number
        yield _entry("chains", number)

    def _injection(self, injection: Injection) -> Iterator[Command]:
        number = key16(injection.number)
        yield _record(
            f"i:{number}",
            number=number,
            id=injection.injection_id,
            chain=injection.chain,
            parent=injection.parent,
            parent_key=key16(injection.parent_key),
            target=injection.target,
            trigger=injection.trigger,
            created=injection.created_at,
            direct=injection.direct,
            state=str(injection.state),
            finished=injection.finished_at,
            request_id=injection.request_id,
            reason=msgspec.to_builtins(injection.reason),
        )
        yield "SET", f"inj:{injection.injection_id}", number
        yield "SET", f"ix:{number}", keep_whole(injection.text.encode())
        if injection.child is not None:
            yield "SET", f"ic:{number}", encode(injection.child)
        yield _entry("injections", number)
        yield _entry(f"injections:{injection.state}", number)
        if injection.finished_at is not None:
            yield _entry("injections_ended", pad20(injection.finished_at) + number)

    def _account(self) -> Iterator[Command]:
        for number, spent in enumerate(self._data.spent, 1):
            attempt = msgspec.structs.replace(spent.attempt, text=None, raw=None)
            flag = "F" if attempt.outcome is Outcome.FENCED else "B"
            entry = msgspec.structs.replace(spent, attempt=attempt)
            head = pad20(attempt.finished_at) + key16(number) + flag
            yield "ZADD", "account", "0", head.encode() + encode(entry)


def _entry(index: str, member: str) -> Command:
    return "ZADD", index, "0", member


def _record(name: str, /, **fields: Any) -> Command:
    return "SET", name, encode({field: value for field, value in fields.items() if value is not None})


def _place(member: Member) -> str:
    return rank20(member.rank) + key16(member.key)


def _time(time: int | None) -> str | None:
    return None if time is None else pad20(time)
