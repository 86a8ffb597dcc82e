"""How the SQLite store writes chains and deliveries in rows, and reads them back."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ksi.store.admission import Routing, Standing
from ksi.store.chains import (
    Block,
    ChainLimits,
    ChainView,
    ChildRequest,
    Hop,
    InjectionState,
    InjectionView,
    MemberRow,
    Spending,
)
from ksi.store.passages import Passage, put_back, put_back_bytes
from ksi.store.snapshot.records import SavedChain, SavedInjection, SavedMember
from ksi.store.sqlite.rows import STATES, Row

# The order is part of the layout: statements name these numbers.
INJECTION_STATES: tuple[str, ...] = (
    InjectionState.QUEUED,
    InjectionState.TAKEN,
    InjectionState.DELIVERED,
    InjectionState.BLOCKED,
    InjectionState.FAILED,
    InjectionState.RETRIED,
)
INJECTION_CODES: dict[str, int] = {state: code for code, state in enumerate(INJECTION_STATES)}

_block_decoder = msgspec.json.Decoder(Block)
_texts_decoder = msgspec.json.Decoder(tuple[str, ...])
_child_decoder = msgspec.msgpack.Decoder(ChildRequest)


def write_block(block: Block | None) -> str | None:
    """A block's column."""
    return None if block is None else msgspec.json.encode(block).decode()


def read_block(text: str | None) -> Block | None:
    """A block from its column."""
    return None if text is None else _block_decoder.decode(text)


def write_child(child: ChildRequest | None) -> bytes | None:
    """The request of a direct delivery, for a retry."""
    return None if child is None else msgspec.msgpack.encode(child)


def read_child(data: bytes | None) -> ChildRequest | None:
    """The written rows."""
    return None if data is None else _child_decoder.decode(data)


def whole_text(text: str, place: int | None, passage: bytes | None) -> str:
    """A delivery's text, with the passage that was cut out of it."""
    return text if place is None or passage is None else put_back(text, place, Passage.kept(passage).text)


def whole_child(child: ChildRequest | None, place: int | None, passage: bytes | None) -> ChildRequest | None:
    """The same of its request."""
    if child is None or place is None or passage is None:
        return child
    return msgspec.structs.replace(child, body=put_back_bytes(child.body, place, passage))


class ChainRow(msgspec.Struct, frozen=True):
    """A chain's row; the fields are its columns in their order."""

    id: int
    name: str
    created_at: int
    started_at: int
    max_depth: int
    token_budget: int
    time_window: int
    used: int
    estimated: int
    reserved: int
    members: int
    unfinished: int
    deepest: int
    closed: int
    tripped: str | None
    guard_messages: int
    resets: int
    reset_key: int

    @property
    def limits(self) -> ChainLimits:
        """Its root's."""
        return ChainLimits(max_depth=self.max_depth, token_budget=self.token_budget, time_window=self.time_window)

    @property
    def spending(self) -> Spending:
        """Its figures as a check sees them."""
        return Spending(
            started_at=self.started_at,
            used=self.used,
            reserved=self.reserved,
            closed=bool(self.closed),
            tripped=read_block(self.tripped),
        )

    def standing(self, limits: ChainLimits, depth: int) -> Standing:
        """The position of a member with these limits."""
        return Standing(spending=self.spending, limits=limits, depth=depth, guards=self.guard_messages)

    def view(self, limits: ChainLimits | None = None, depth: int | None = None) -> ChainView:
        """Its figures: as a whole, or as a member of these limits sees them."""
        return ChainView(
            chain=self.name,
            created_at=self.created_at,
            limits=self.limits if limits is None else limits,
            spending=self.spending,
            members=self.members,
            depth=self.deepest if depth is None else depth,
            estimated=self.estimated,
            unfinished=self.unfinished,
            guard_messages=self.guard_messages,
            resets=self.resets,
        )


class Link(msgspec.Struct, frozen=True):
    """A member's row; the fields are its columns in their order."""

    chain: int
    parent: str | None
    parent_key: int | None
    depth: int
    max_depth: int
    token_budget: int
    time_window: int
    estimate: int
    output_cap: int | None
    guard: int
    routing: int
    reserved: int
    tokens: int
    estimated: int
    carries: int
    mark: bytes | None
    result: bytes | None
    block: str | None

    @property
    def limits(self) -> ChainLimits:
        """The minimum over itself and its ancestors."""
        return ChainLimits(max_depth=self.max_depth, token_budget=self.token_budget, time_window=self.time_window)

    @property
    def routes(self) -> Routing:
        """Its outbox state."""
        return Routing(self.routing)


def limit_values(limits: ChainLimits) -> tuple[int, int, int]:
    """The three columns of limits."""
    return limits.max_depth, limits.token_budget, limits.time_window


def read_injection(row: Row, text: str = "", child: ChildRequest | None = None) -> InjectionView:
    """A delivery from the columns of `injections`."""
    _, name, chain, parent, target, direct, trigger, state, created_at, finished_at, request_id, reason = row
    return InjectionView(
        injection_id=name,
        chain=chain,
        parent=parent,
        target=target,
        mode="direct" if direct else "next",
        trigger=trigger,
        state=INJECTION_STATES[state],
        created_at=created_at,
        finished_at=finished_at,
        request_id=request_id,
        reason=read_block(reason),
        text=text,
        child=child,
    )


def is_dead(code: int) -> bool:
    """True if a delivery in this state is a dead letter."""
    return INJECTION_STATES[code] in (InjectionState.BLOCKED, InjectionState.FAILED)


def read_hop(row: Row) -> Hop:
    """A hop from the columns of `trail`."""
    request_id, depth, conversation, agent, state, error, mark, result = row
    return Hop(
        request_id=request_id,
        depth=depth,
        conversation=conversation,
        agent_id=agent,
        state=STATES[state],
        error=error,
        mark=mark,
        result=result,
    )


def read_member(row: Row) -> MemberRow:
    """A chain's request from the columns of `members`, its key taken off."""
    request_id, parent, depth, conversation, agent, state, enqueued_at, finished_at, tokens, estimated, block = row
    return MemberRow(
        request_id=request_id,
        parent=parent,
        depth=depth,
        conversation=conversation,
        agent_id=agent,
        state=STATES[state],
        enqueued_at=enqueued_at,
        finished_at=finished_at,
        tokens=tokens,
        estimated=bool(estimated),
        reason=read_block(block),
    )


def read_reminders(text: str | None) -> tuple[str, ...]:
    """The reminders before a turn's prompt, from its column."""
    return () if text is None else tuple(_texts_decoder.decode(text))


def write_reminders(texts: Sequence[str]) -> str | None:
    """The same column."""
    return msgspec.json.encode(texts).decode() if texts else None


def read_saved_chain(row: Row) -> SavedChain:
    """A chain's record from the columns of `saved_chains`: its runs are charged by estimate, as cut off."""
    (
        name, created_at, started_at, depth, budget, window, used, estimated, closed, tripped, guard_messages, resets,
        reset_key, deepest, cut,
    ) = row  # fmt: skip
    return SavedChain(
        name=name,
        created_at=created_at,
        started_at=started_at,
        limits=ChainLimits(max_depth=depth, token_budget=budget, time_window=window),
        used=used + cut,
        estimated=estimated + cut,
        closed=bool(closed),
        tripped=read_block(tripped),
        guard_messages=guard_messages,
        resets=resets,
        reset_key=reset_key,
        deepest=deepest,
    )


def read_saved_member(row: Row) -> SavedMember:
    """How a request belongs to a chain, from the columns of `saved_member`."""
    (
        chain, parent, parent_key, depth, max_depth, budget, window, estimate, output_cap, guard, routing, carries,
        mark, result, block, tokens, estimated,
    ) = row  # fmt: skip
    return SavedMember(
        chain=chain,
        parent=parent,
        parent_key=parent_key,
        depth=depth,
        limits=ChainLimits(max_depth=max_depth, token_budget=budget, time_window=window),
        estimate=estimate,
        output_cap=output_cap,
        guard=bool(guard),
        injects=routing != Routing.NONE,
        routed=routing == Routing.ROUTED,
        carries=bool(carries),
        mark=mark,
        result=result,
        block=read_block(block),
        tokens=tokens,
        estimated=bool(estimated),
    )


def read_saved_injection(row: Row) -> SavedInjection:
    """A delivery's record from the columns of `saved_injections`."""
    (
        name, chain, parent, parent_key, target, direct, trigger, state, created_at, finished_at, request_id, reason,
        text, child, passage, place, child_place,
    ) = row  # fmt: skip
    taken = INJECTION_STATES[state] == InjectionState.TAKEN
    return SavedInjection(
        injection_id=name,
        chain=chain,
        parent=parent,
        parent_key=parent_key,
        target=target,
        direct=bool(direct),
        trigger=trigger,
        state=InjectionState.QUEUED if taken else INJECTION_STATES[state],
        created_at=created_at,
        finished_at=finished_at,
        request_id=None if taken else request_id,
        reason=read_block(reason),
        text=text,
        child=read_child(child),
        passage=passage,
        place=place,
        child_place=child_place,
    )
