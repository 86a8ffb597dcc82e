"""V1's turns as a store's records, put among those that a store has already.

Turns that the store has are left out, so bringing the same logs in again adds nothing. Attempts are renumbered in the
order of their ends: reports on usage depend on that order. A conversation that both know continues in the order of
time.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator

import msgspec

from ksi.clock import Moment
from ksi.direct.session_log import V1Turn
from ksi.migration.v1_data import Entry, Identity, V1Data, digest
from ksi.request import Attempt, Outcome, Priority, RequestBody, State, encode_body
from ksi.store.snapshot.records import (
    Figures,
    Record,
    SavedAttempt,
    SavedConversation,
    SavedLock,
    SavedRequest,
    SavedSpare,
    pack,
)

NOT_KEPT = "(this prompt was not kept: the log of version 1 had answers only)"
"""Replaces the prompt in a turn's history if V1 stored none."""

Records = Callable[[], Iterable[Record]]
"""A store's records, from the beginning at each call; none for a store that is not there."""


class _Turn(msgspec.Struct):
    """A turn's place, before and after."""

    identity: int
    conversation: str
    finished_at: int
    previous: int | None


class _Known:
    """The part of the store that new turns depend on."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.figures = Figures(ended={}, fence=0, logged=0, routes=())
        self.conversations: dict[str, SavedConversation] = {}
        self.owners: dict[str, str] = {}
        """Provider sessions, and the conversation that each means."""
        self.request_ids: set[str] = set()
        self.identities: set[Identity] = set()
        self.turns: dict[int, _Turn] = {}
        self.attempts: list[tuple[int, int]] = []
        """Id and end of each attempt."""
        self.last_key = 0
        for record in records:
            self._note(record)
        self.attempts.sort()

    def _note(self, record: Record) -> None:
        match record:
            case Figures():
                self.figures = record
            case SavedConversation():
                self.conversations[record.name] = record
                self.owners.update(dict.fromkeys(record.aliases, record.name))
            case SavedRequest():
                self.request_ids.add(record.request_id)
                self.last_key = max(self.last_key, record.key)
                for saved in record.attempts:
                    self._note_attempt(saved, record.conversation)
            case SavedLock():
                self.request_ids.add(record.request_id)
                self.last_key = max(self.last_key, record.key)
            case SavedSpare():
                self.last_key = max(self.last_key, record.key)
                self._note_attempt(record.saved, record.conversation)
            case _:
                pass

    def _note_attempt(self, saved: SavedAttempt, conversation: str) -> None:
        attempt = saved.attempt
        self.attempts.append((saved.id, attempt.finished_at))
        self.identities.add((conversation, attempt.finished_at, digest(attempt.text or "")))
        if saved.is_turn:
            self.turns[saved.id] = _Turn(saved.id, conversation, attempt.finished_at, saved.previous)

    def chain(self, conversation: str) -> tuple[list[_Turn], int | None]:
        """A conversation's own turns back from its head, and the turn of its parent that the first came after."""
        view = self.conversations.get(conversation)
        at = view.head if view is not None else None
        own = []
        while at is not None and (turn := self.turns.get(at)) is not None and turn.conversation == conversation:
            own.append(turn)
            at = turn.previous
        return own, at


_CLAUDE = "claude-cli/sonnet"
"""Version 1's model of Claude Code for requests that named none."""


class _Placed(msgspec.Struct, frozen=True):
    """A new turn: its entry, conversation, and whether the provider's session is this conversation's."""

    entry: Entry
    conversation: str
    own_session: bool


class Counts(msgspec.Struct):
    """The records to import. `conversations` counts those that get turns."""

    turns: int = 0
    failed: int = 0
    """Answers that say they are errors: they count as usage only."""
    conversations: int = 0
    known: int = 0
    """Lines that are there already: in the store, or twice in the logs."""
    without_prompt: int = 0


class Merge:
    """New turns among a store's records."""

    def __init__(
        self, records: Records, data: V1Data, now: Moment, *, keep_finished: int, stateful: Callable[[str], bool]
    ) -> None:
        """`keep_finished` in microseconds; `stateful` says whether a provider of this name keeps dialogues itself."""
        self._records = records
        self._data = data
        self._now = now
        self._keep_finished = keep_finished
        self._stateful = stateful
        self._known = _Known(records())
        self.counts = Counts()
        self._placed = self._place()
        self._aliases: dict[str, list[str]] = {}
        for session, owner in self._owners.items():
            if session not in self._known.owners:
                self._aliases.setdefault(owner, []).append(session)
        self._number()
        self._link()

    # -- decide ---------------------------------------------------------------------------------------------------

    def _place(self) -> list[_Placed]:
        """The conversation of each new line. A provider's session means the conversation in which it first came up."""
        known = self._known
        self._owners = dict(known.owners)
        names = set(known.conversations)
        placed = []
        for entry in self._data.entries:
            name = entry.conversation
            conversation = name if name in names else self._owners.get(name, name)
            names.add(conversation)
            session = entry.provider_session
            if session is not None and session != conversation and session not in names:
                self._owners.setdefault(session, conversation)
            identity = (conversation, entry.finished_at, entry.digest)
            if identity in known.identities:
                self.counts.known += 1
                continue
            known.identities.add(identity)
            own = session is not None and conversation in (session, self._owners.get(session))
            placed.append(_Placed(entry, conversation, own))
        self.counts.turns = sum(p.entry.good for p in placed)
        self.counts.failed = len(placed) - self.counts.turns
        self.counts.conversations = len({p.conversation for p in placed})
        return placed

    def _number(self) -> None:
        """Ids in the order of ends; the store's own keep theirs among themselves."""
        self._ids: dict[int, int] = {}
        self._new_ids: list[int] = [0] * len(self._placed)
        latest = 0
        old = []
        for identity, finished_at in self._known.attempts:
            latest = max(latest, finished_at)
            old.append((latest, 0, identity))
        new = [(placed.entry.finished_at, 1, number) for number, placed in enumerate(self._placed)]
        self._last_id = 0
        for self._last_id, (_, is_new, which) in enumerate(heapq.merge(old, new), 1):
            if is_new:
                self._new_ids[which] = self._last_id
            else:
                self._ids[which] = self._last_id

    def _link(self) -> None:
        """The predecessor of each turn, and the heads of the conversations that get turns."""
        self._previous = {
            self._ids[turn.identity]: None if turn.previous is None else self._ids.get(turn.previous)
            for turn in self._known.turns.values()
        }
        self._heads: dict[str, int] = {}
        self._added: Counter[str] = Counter()
        self._began: dict[str, int] = {}
        coming: dict[str, list[tuple[int, int]]] = {}
        for number, placed in enumerate(self._placed):
            began = self._began.setdefault(placed.conversation, placed.entry.finished_at)
            self._began[placed.conversation] = min(began, placed.entry.finished_at)
            if placed.entry.good:
                self._added[placed.conversation] += 1
                coming.setdefault(placed.conversation, []).append((placed.entry.finished_at, self._new_ids[number]))
        for conversation, new in coming.items():
            own, before = self._known.chain(conversation)
            old = [(turn.finished_at, self._ids[turn.identity]) for turn in reversed(own)]
            at = None if before is None else self._ids.get(before)
            for _, identity in heapq.merge(old, new):
                self._previous[identity] = at
                at = identity
            assert at is not None
            self._heads[conversation] = at

    # -- give -----------------------------------------------------------------------------------------------------

    @property
    def mark(self) -> int:
        """The last assigned id: later ids of the store are above it."""
        return self._last_id

    def expected(self) -> dict[str, int]:
        """The turns of each conversation that gets some, all counted."""
        had = self._known.conversations
        return {name: (had[name].turns if name in had else 0) + n for name, n in self._added.items()}

    @property
    def added(self) -> int:
        """How many attempts are new."""
        return len(self._placed)

    def records(self) -> Iterator[Record]:
        """All records, in a snapshot's order.

        Raises:
            DamagedLine, OSError: a log was changed meanwhile, or cannot be read.
        """
        agents = self._agents()
        yield self._figures()
        spares: list[SavedSpare] = []
        new_told = False
        for record in self._records():
            if isinstance(record, Figures):
                continue
            if isinstance(record, SavedConversation):
                yield self._conversation(record, agents.get(record.name, ()))
                continue
            if not new_told:
                new_told = True
                yield from self._new_conversations(agents)
            if isinstance(record, SavedRequest):
                yield msgspec.structs.replace(record, attempts=tuple(self._renumbered(a) for a in record.attempts))
            elif isinstance(record, SavedSpare):
                yield msgspec.structs.replace(record, saved=self._renumbered(record.saved))
            else:
                yield record
        if not new_told:
            yield from self._new_conversations(agents)
        yield from self._new_members(spares)
        yield from spares

    def _figures(self) -> Figures:
        figures = self._known.figures
        ended = Counter(figures.ended)
        ended[State.COMPLETED.value] += self.counts.turns
        return msgspec.structs.replace(figures, ended=dict(ended), logged=self._last_id)

    def _agents(self) -> dict[str, tuple[str, ...]]:
        """The agents of the conversations that get turns, known ones first."""
        found: dict[str, dict[str, None]] = {}
        for placed, turn in self._turns():
            if turn.agent_id is not None:
                found.setdefault(placed.conversation, {})[turn.agent_id] = None
            self.counts.without_prompt += turn.good and turn.body is None
        return {name: tuple(agents) for name, agents in found.items()}

    def _turns(self) -> Iterator[tuple[_Placed, V1Turn]]:
        """New turns file by file: each is opened once."""
        for _, placed, turn in self._numbered_turns():
            yield placed, turn

    def _numbered_turns(self) -> Iterator[tuple[int, _Placed, V1Turn]]:
        order = sorted(range(len(self._placed)), key=lambda number: self._placed[number].entry.file)
        read = self._data.turns(self._placed[number].entry for number in order)
        for number, (_, turn) in zip(order, read, strict=True):
            yield number, self._placed[number], turn

    def _conversation(self, record: SavedConversation, agents: Collection[str]) -> SavedConversation:
        name = record.name
        head = None if record.head is None else self._ids.get(record.head)
        if name not in self._began:
            return msgspec.structs.replace(record, head=head, aliases=self._aliases_of(record))
        return msgspec.structs.replace(
            record,
            created_at=min(record.created_at, self._began[name]),
            active_at=max(record.active_at, self._now.wall),
            turns=record.turns + self._added[name],
            head=self._heads.get(name, head),
            agents=tuple(dict.fromkeys((*record.agents, *agents))),
            aliases=self._aliases_of(record),
        )

    def _aliases_of(self, record: SavedConversation) -> tuple[str, ...]:
        return (*record.aliases, *self._aliases.get(record.name, ()))

    def _new_conversations(self, agents: dict[str, tuple[str, ...]]) -> Iterator[SavedConversation]:
        """In the order of their first turns. They count as active now, and are kept as long as new ones."""
        for name, began in self._began.items():
            if name not in self._known.conversations:
                yield SavedConversation(
                    name=name,
                    created_at=began,
                    active_at=max(began, self._now.wall),
                    turns=self._added[name],
                    head=self._heads.get(name),
                    agents=agents.get(name, ()),
                    aliases=tuple(self._aliases.get(name, ())),
                )

    def _renumbered(self, saved: SavedAttempt) -> SavedAttempt:
        identity = self._ids[saved.id]
        return msgspec.structs.replace(saved, id=identity, previous=self._previous.get(identity))

    def _new_members(self, spares: list[SavedSpare]) -> Iterator[SavedRequest]:
        """New turns as requests that can be asked for, if their retention has not passed; the others go to `spares`."""
        taken = set(self._known.request_ids)
        for key, (number, placed, turn) in enumerate(self._numbered_turns(), self._known.last_key + 1):
            identity = self._new_ids[number]
            attempt = self._attempt(placed, turn)
            body = turn.body or RequestBody(
                prompt=NOT_KEPT,
                model=attempt.asked or (_CLAUDE if turn.provider == "claude-cli" else None),
                session_id=placed.conversation,
                agent_id=turn.agent_id,
            )
            saved = SavedAttempt.of(identity, attempt, self._previous.get(identity))
            fresh = turn.finished_at + self._keep_finished > self._now.wall
            if turn.good and fresh and turn.request_id is not None and turn.request_id not in taken:
                taken.add(turn.request_id)
                yield SavedRequest(
                    key=key,
                    request_id=turn.request_id,
                    conversation=placed.conversation,
                    state=State.COMPLETED,
                    priority=Priority.NORMAL,
                    rank=attempt.started_at,
                    route=turn.provider,
                    model=attempt.asked or "",
                    agent_id=turn.agent_id,
                    enqueued_at=attempt.started_at,
                    begun=1,
                    provider=turn.provider,
                    started_at=attempt.started_at,
                    finished_at=attempt.finished_at,
                    body=pack(encode_body(body)),
                    attempts=(saved,),
                )
            else:
                spares.append(
                    SavedSpare(
                        key=key,
                        conversation=placed.conversation,
                        agent_id=turn.agent_id,
                        body=pack(encode_body(body)) if turn.good else None,
                        saved=saved,
                    )
                )

    def _attempt(self, placed: _Placed, turn: V1Turn) -> Attempt:
        session = turn.provider_session if placed.own_session and self._stateful(turn.provider) else None
        return Attempt(
            number=1,
            provider=turn.provider,
            outcome=Outcome.COMPLETED if turn.good else Outcome.FAILED,
            started_at=turn.finished_at - turn.duration,
            finished_at=turn.finished_at,
            asked=f"{turn.provider}/{turn.model}" if turn.model is not None else None,
            model=turn.model,
            text=turn.text,
            usage=turn.usage,
            stop_reason=turn.stop_reason,
            provider_session=session,
            error=None if turn.good else "provider_error",
            raw=turn.raw,
        )
