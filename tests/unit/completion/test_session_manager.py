"""What a conversation brings into a call: its history, cut to fit, and where a stateful provider stands."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksi.clock import Chance, Moment
from ksi.completion import session_manager
from ksi.completion.session_manager import (
    ANSWER_SHARE,
    Exchange,
    Past,
    SessionManager,
    count,
    fit,
)
from ksi.config.schema import Session
from ksi.content.blocks import Message, text_of
from ksi.providers.base import Call, Capabilities, Chunk, Completion
from ksi.request import Attempt, Outcome, RequestBody, State, Turn, decode_body, encode_body
from ksi.store.values import Claimed, Finish, NewRequest, Offer, SessionView, StoreRules
from ksi.testing import SimulatedClock
from ksi.tokens import estimate_tokens
from tests.effort import effort
from tests.reference_store.store import MemoryStore

OFFER = Offer("p", "p", 1_000)
OTHER = Offer("p", "other", 1_000)


class FakeProvider:
    """Can what it is told."""

    def __init__(self, *, context: int = 10_000, stateful: bool = False, name: str = "p", known: str = "") -> None:
        self.name = name
        self.capabilities = Capabilities(context_tokens=context, stateful=stateful)
        self._known = known

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def problem(self) -> str | None:
        return None

    def knows(self, session: str) -> bool:
        return session == self._known

    async def complete(self, call: Call) -> AsyncGenerator[Chunk | Completion, None]:
        yield Completion(text="", model="")


class CountingStore(MemoryStore):
    """Says how often history was read."""

    reads = 0

    async def history(self, head: int, max_chars: int) -> list[Turn]:
        self.reads += 1
        return await super().history(head, max_chars)


class Talk:
    """One conversation, turn after turn."""

    def __init__(self, **settings: Any) -> None:
        self.clock = SimulatedClock()
        self.store = CountingStore(StoreRules(), Chance(random.Random(1)))
        self.sessions = SessionManager(self.store, Session(**settings))
        self.turns = 0

    def restart(self, **settings: Any) -> None:
        """A daemon that remembers nothing."""
        self.sessions = SessionManager(self.store, Session(**settings))

    async def claim(self, prompt: str = "now", name: str = "talk", offer: Offer = OFFER, **fields: Any) -> Claimed:
        """The next request of the conversation, running."""
        self.turns += 1
        body = encode_body(RequestBody(prompt=prompt, **fields))
        new = NewRequest(request_id=f"r{self.turns}", conversation=name, body=body, route="p", rank=self.turns)
        enqueued = await self.store.enqueue(new, [offer], self.clock.now())
        assert enqueued.claim is not None
        return enqueued.claim

    async def settle(self, claim: Claimed, text: str, *, remember: bool = True, **fields: Any) -> int:
        """Its answer."""
        now = self.clock.now().wall
        known: dict[str, Any] = {"provider": claim.provider, "started_at": now, "finished_at": now}
        attempt = Attempt(number=1, outcome=Outcome.COMPLETED, text=text, **(known | fields))
        settled = await self.store.settle(claim, attempt, Finish(state=State.COMPLETED), self.clock.now())
        assert settled.turn is not None
        if remember:
            self.sessions.turn_made(claim, decode_body(claim.body), settled.turn, attempt)
        return settled.turn

    async def turn(self, prompt: str, text: str, *, remember: bool = True, name: str = "talk", **fields: Any) -> int:
        """One whole exchange."""
        return await self.settle(await self.claim(prompt, name), text, remember=remember, **fields)

    async def call(self, claim: Claimed, provider: FakeProvider | None = None, **options: Any) -> Call:
        """What would be sent."""
        body = decode_body(claim.body)
        return await self.sessions.prepare(claim, body, "p/model", provider or FakeProvider(), stream=False, **options)


def said(call: Call) -> list[str]:
    return [text_of(message.content) for message in call.messages]


def dialogue(*pairs: tuple[str, str]) -> list[Message]:
    return [message for user, text in pairs for message in (Message("user", user), Message("assistant", text))]


# -- what fits --------------------------------------------------------------------------------------------------------


def past_of(sizes: Sequence[int]) -> Past:
    turns = tuple(
        Exchange(number, (Message("user", f"q{number}"), Message("assistant", f"a{number}")), tokens, tokens * 4)
        for number, tokens in enumerate(sizes)
    )
    messages = tuple(message for turn in turns for message in turn.messages)
    return Past(len(sizes), turns, messages, sum(sizes), sum(sizes) * 4, True)


@pytest.mark.promise("L9")
@given(sizes=st.lists(st.integers(1, 50), max_size=12), limit=st.integers(0, 300))
def test_the_fit_is_whole_turns_the_newest_in_order_never_over_the_limit_and_no_fewer_than_possible(
    sizes: list[int], limit: int
) -> None:
    past = past_of(sizes)
    kept = list(fit(past, limit, "p", Capabilities(), (Message("user", "now"),)))
    suffixes = [list(past.messages[2 * first :]) for first in range(len(sizes) + 1)]
    assert kept in suffixes
    number = len(kept) // 2
    assert sum(sizes[len(sizes) - number :]) <= limit
    if number < len(sizes):
        assert sum(sizes[len(sizes) - number - 1 :]) > limit


def test_a_turn_that_is_too_long_hides_the_older_ones_too() -> None:
    kept = fit(past_of([1, 1, 100, 1, 1]), 50, "p", Capabilities(), (Message("user", "now"),))
    assert [message.content for message in kept] == ["q3", "a3", "q4", "a4"]


@given(st.lists(st.text(st.characters(codec="utf-8")), max_size=5))
def test_tokens_are_never_less_than_a_message_and_grow_with_the_text(texts: list[str]) -> None:
    messages = [Message("user", text) for text in texts]
    assert count(messages) >= 5 * len(texts)
    for text in texts:
        assert estimate_tokens(text + "more") > estimate_tokens(text) >= 1
        assert estimate_tokens(text) >= len(text.encode()) / 4


def test_half_a_character_can_be_counted() -> None:
    assert estimate_tokens("\ud800") == 1


# -- a stateless provider's call --------------------------------------------------------------------------------------


@pytest.mark.promise("L9")
@pytest.mark.parametrize("warm", [True, False])
async def test_a_call_has_the_history_and_last_the_new_prompt(warm: bool) -> None:
    talk = Talk()
    await talk.turn("q1", "a1")
    await talk.turn("q2", "a2")
    if not warm:
        talk.restart()
    call = await talk.call(await talk.claim("q3"))
    assert list(call.messages) == [*dialogue(("q1", "a1"), ("q2", "a2")), Message("user", "q3")]
    assert (call.provider_session, call.last_message, call.fork_session) == (None, None, False)


async def test_a_call_has_the_request_s_fields() -> None:
    talk = Talk()
    options: dict[str, Any] = {"stop": ("x",), "max_tokens": 7, "temperature": 0.5, "system": "be brief"}
    claim = await talk.claim("q", provider_options={"a": 1}, mcp_config={"b": 2}, **options)
    call = await talk.call(claim)
    assert (call.request_id, call.attempt, call.conversation, call.model) == ("r1", 1, "talk", "model")
    assert (call.stop, call.max_tokens, call.temperature, call.system) == (("x",), 7, 0.5, "be brief")
    assert (call.options, call.mcp_config, call.stream) == ({"a": 1}, {"b": 2}, False)


@pytest.mark.promise("L9")
@settings(max_examples=effort(40, 400))
@given(
    sizes=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 400)), max_size=8),
    context=st.integers(50, 2_000),
    max_tokens=st.none() | st.integers(1, 500),
    system=st.integers(0, 300),
    history_tokens=st.none() | st.integers(0, 500),
    warm=st.booleans(),
    shrink=st.sampled_from([1, 2]),
)
async def test_whatever_the_sizes_the_call_fits_and_keeps_system_and_prompt(
    sizes: list[tuple[int, int]],
    context: int,
    max_tokens: int | None,
    system: int,
    history_tokens: int | None,
    warm: bool,
    shrink: int,
) -> None:
    talk = Talk(history_tokens=history_tokens)
    turns = [("q" * asked or "?", "a" * answered) for asked, answered in sizes]
    for asked, answered in turns:
        await talk.turn(asked, answered)
    if not warm:
        talk.restart(history_tokens=history_tokens)
    claim = await talk.claim("now", system="s" * system or None, max_tokens=max_tokens)
    call = await talk.call(claim, FakeProvider(context=context), shrink=shrink)
    *past, last = call.messages
    assert last == Message("user", "now")
    assert call.system == ("s" * system or None)
    assert past in [dialogue(*turns[first:]) for first in range(len(turns) + 1)]
    fixed = count([last]) + (estimate_tokens(call.system) if call.system else 0)
    left = context - fixed - (max_tokens or context // ANSWER_SHARE)
    limit = max(0, left if history_tokens is None else min(left, history_tokens))
    if shrink > 1:
        limit = min(limit, count(dialogue(*turns))) // shrink
    assert count(past) <= limit
    if len(past) < 2 * len(turns):
        assert count(dialogue(*turns[len(turns) - len(past) // 2 - 1 :])) > limit


@pytest.mark.promise("L9")
async def test_parts_of_a_turn_besides_its_words_take_no_space_from_the_history() -> None:
    """Each turn comes with a long system text and metadata; they are stored with it, and are none of its history."""
    talk = Talk()
    for number in range(30):
        claim = await talk.claim(f"q{number}", system="s" * 5_000, metadata={"m": "x" * 5_000})
        await talk.settle(claim, f"a{number}", remember=False)
    talk.restart()
    claim = await talk.claim("now")
    call = await talk.call(claim, FakeProvider(context=2_000))
    assert len(call.messages) == 61
    assert said(call)[:2] == ["q0", "a0"]


@pytest.mark.promise("L9")
async def test_many_short_turns_are_all_there_after_a_restart() -> None:
    talk = Talk()
    for number in range(200):
        claim = await talk.claim(str(number), session_id="s" * 50, agent_id="a" * 50, model="stub/echo")
        await talk.settle(claim, "ok", remember=False)
    talk.restart(history_tokens=3_000)
    call = await talk.call(await talk.claim("now"), FakeProvider(context=100_000))
    assert len(call.messages) == 401


@pytest.mark.promise("L9")
async def test_half_of_a_history_that_is_far_below_the_limit_is_half_of_it_all_the_same() -> None:
    talk = Talk()
    for number in range(4):
        await talk.turn(f"q{number}", f"a{number}")
    claim = await talk.claim("now")
    assert len((await talk.call(claim, FakeProvider(context=1_000_000))).messages) == 9
    assert said(await talk.call(claim, FakeProvider(context=1_000_000), shrink=2)) == ["q2", "a2", "q3", "a3", "now"]


async def test_a_history_of_giants_is_not_read_to_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_manager, "MOST_READ", 20_000)
    talk = Talk()
    for number in range(20):
        claim = await talk.claim(f"q{number}", metadata={"m": "x" * 5_000})
        await talk.settle(claim, f"a{number}", remember=False)
    talk.restart()
    claim = await talk.claim("now")
    call = await talk.call(claim, FakeProvider(context=2_000))
    assert 4 <= len(call.messages) // 2 < 15
    reads = talk.store.reads
    await talk.call(claim, FakeProvider(context=2_000))
    assert talk.store.reads == reads


@pytest.mark.promise("F9")
async def test_a_turn_that_did_not_complete_leaves_no_trace() -> None:
    talk = Talk()
    await talk.turn("q1", "a1")
    claim = await talk.claim("bad")
    failed = Attempt(number=1, provider="p", outcome=Outcome.FAILED, started_at=1, finished_at=2, text="half")
    await talk.store.settle(claim, failed, Finish(state=State.FAILED, error="timeout"), talk.clock.now())
    assert said(await talk.call(await talk.claim("q2"))) == ["q1", "a1", "q2"]


async def test_a_forked_conversation_goes_on_from_its_parent_s_turns_and_each_keeps_its_own() -> None:
    talk = Talk()
    await talk.turn("q1", "a1")
    body = encode_body(RequestBody(prompt="other", session_id="talk", fork=True))
    new = NewRequest(request_id="f", conversation="child", body=body, route="p", rank=9, fork_of="talk")
    claim = (await talk.store.enqueue(new, [OFFER], talk.clock.now())).claim
    assert claim is not None
    assert said(await talk.call(claim)) == ["q1", "a1", "other"]
    await talk.settle(claim, "branch")
    await talk.turn("q2", "a2")
    assert said(await talk.call(await talk.claim("q3"))) == ["q1", "a1", "q2", "a2", "q3"]
    assert said(await talk.call(await talk.claim("x", "child"))) == ["q1", "a1", "other", "branch", "x"]


# -- the cache --------------------------------------------------------------------------------------------------------


async def test_a_conversation_in_play_is_not_read_again() -> None:
    talk = Talk()
    for number in range(5):
        claim = await talk.claim(f"q{number}")
        await talk.call(claim)
        await talk.settle(claim, f"a{number}")
    assert talk.store.reads == 0


async def test_a_past_that_is_shorter_than_the_fit_is_read_again() -> None:
    talk = Talk()
    for number in range(10):
        await talk.turn(f"q{number}" * 50, f"a{number}" * 50, remember=False)
    claim = await talk.claim("now")
    small = await talk.call(claim, FakeProvider(context=400))
    large = await talk.call(claim, FakeProvider(context=10_000))
    assert len(small.messages) < len(large.messages) == 21


async def test_a_head_that_moved_elsewhere_is_not_taken_from_the_cache() -> None:
    talk = Talk()
    await talk.turn("q1", "a1")
    await talk.turn("q2", "a2", remember=False)
    assert said(await talk.call(await talk.claim("q3"))) == ["q1", "a1", "q2", "a2", "q3"]


@pytest.mark.promise("S4")
async def test_the_cache_is_bounded_and_drops_the_least_recently_used() -> None:
    talk = Talk(cache_bytes=20_000)
    names = [f"c{number}" for number in range(30)]
    for name in names:
        await talk.turn("q" * 250, "a" * 250, name=name)
    assert talk.sessions._cached_bytes <= 20_000
    assert talk.sessions._cached_bytes == sum(past.size for past in talk.sessions._cache.values())
    kept = list(talk.sessions._cache)
    assert kept == names[-len(kept) :]
    assert len(kept) > 5
    await talk.call(await talk.claim("x", kept[0]))
    await talk.turn("q" * 250, "a" * 250, name="another")
    assert kept[0] in talk.sessions._cache
    assert kept[1] not in talk.sessions._cache


async def test_one_long_conversation_does_not_push_all_others_out() -> None:
    talk = Talk(cache_bytes=20_000)
    await talk.turn("q", "a", name="short")
    await talk.turn("q" * 5_000, "a", name="long")
    assert list(talk.sessions._cache) == ["short"]
    assert len((await talk.call(await talk.claim("x", "long"))).messages) == 3


@pytest.mark.parametrize("cache_bytes", [0, 1])
async def test_without_a_cache_all_is_read_from_the_store(cache_bytes: int) -> None:
    talk = Talk(cache_bytes=cache_bytes)
    await talk.turn("q1", "a1")
    assert said(await talk.call(await talk.claim("q2"))) == ["q1", "a1", "q2"]
    assert talk.sessions._cached_bytes == 0


# -- a stateful provider's call ---------------------------------------------------------------------------------------


def keeper(**fields: Any) -> FakeProvider:
    return FakeProvider(stateful=True, **fields)


@pytest.mark.promise("L9", "F9")
async def test_a_stateful_provider_continues_at_its_head_and_gets_the_messages_it_has() -> None:
    talk = Talk()
    await talk.turn("q1", "a1", provider_session="ps", last_message="m1")
    call = await talk.call(await talk.claim("q2"), keeper())
    assert (call.provider_session, call.last_message, call.fork_session) == ("ps", "m1", False)
    assert list(call.messages[call.history :]) == [Message("user", "q2")]


@pytest.mark.promise("L7", "L9")
async def test_a_stateful_provider_has_the_history_at_hand_should_its_own_be_gone() -> None:
    talk = Talk()
    await talk.turn("q1", "a1", provider_session="ps", last_message="m1")
    call = await talk.call(await talk.claim("q2"), keeper())
    assert said(call) == ["q1", "a1", "q2"]
    assert call.history == 2


@pytest.mark.promise("L9")
async def test_a_conversation_that_comes_from_another_provider_brings_its_history_as_something_new() -> None:
    talk = Talk()
    await talk.settle(await talk.claim("q1", offer=OTHER), "a1", provider_session="ps", last_message="m1")
    call = await talk.call(await talk.claim("q2"), keeper())
    assert (call.provider_session, call.last_message, call.history) == (None, None, 0)
    assert said(call) == ["q1", "a1", "q2"]


async def test_a_turn_without_a_session_begins_a_new_one_from_the_history() -> None:
    talk = Talk()
    await talk.turn("q1", "a1")
    call = await talk.call(await talk.claim("q2"), keeper())
    assert (call.provider_session, call.history) == (None, 0)
    assert said(call) == ["q1", "a1", "q2"]


@pytest.mark.promise("L9")
async def test_a_dialogue_that_the_provider_knows_by_the_conversation_s_name_is_adopted() -> None:
    talk = Talk()
    call = await talk.call(await talk.claim("q1"), keeper(known="talk"))
    assert (call.provider_session, call.last_message, call.fork_session) == ("talk", None, False)
    assert said(call) == ["q1"]
    other = await talk.call(await talk.claim("q1", "elsewhere"), keeper(known="talk"))
    assert other.provider_session is None


@pytest.mark.promise("L7")
async def test_a_fork_copies_its_parent_s_session_and_leaves_that_alone() -> None:
    talk = Talk()
    await talk.turn("q1", "a1", provider_session="ps", last_message="m1")
    body = encode_body(RequestBody(prompt="other", session_id="talk", fork=True))
    new = NewRequest(request_id="f", conversation="child", body=body, route="p", rank=9, fork_of="talk")
    claim = (await talk.store.enqueue(new, [OFFER], talk.clock.now())).claim
    assert claim is not None
    call = await talk.call(claim, keeper())
    assert (call.provider_session, call.last_message, call.fork_session) == ("ps", "m1", True)
    await talk.settle(claim, "branch", provider_session="ps2", last_message="m2")
    again = await talk.call(await talk.claim("x", "child"), keeper())
    assert (again.provider_session, again.last_message, again.fork_session) == ("ps2", "m2", False)


async def test_a_stateless_provider_gets_no_session() -> None:
    talk = Talk()
    await talk.turn("q1", "a1", provider_session="ps", last_message="m1")
    call = await talk.call(await talk.claim("q2"))
    assert (call.provider_session, call.last_message, call.history) == (None, None, 0)


# -- machines ---------------------------------------------------------------------------------------------------------


def on_machine(node: str | None) -> Talk:
    """A conversation that a daemon on this machine leads."""
    talk = Talk()
    talk.sessions = SessionManager(talk.store, Session(), node)
    return talk


@pytest.mark.promise("D4")
async def test_a_session_on_another_machine_is_rebuilt_from_the_history_and_is_a_fork() -> None:
    talk = on_machine("b")
    await talk.turn("q1", "a1", provider_session="ps", last_message="m1", node="a")
    call = await talk.call(await talk.claim("q2"), keeper())
    assert (call.provider_session, call.last_message, call.history, call.fork) == (None, None, 0, "node_lost")
    assert said(call) == ["q1", "a1", "q2"]


@pytest.mark.promise("D4")
@pytest.mark.parametrize(("here", "there"), [("a", "a"), ("a", None), (None, None), (None, "a")])
async def test_a_session_on_this_machine_or_on_none_goes_on(here: str | None, there: str | None) -> None:
    talk = on_machine(here)
    await talk.turn("q1", "a1", provider_session="ps", last_message="m1", node=there)
    call = await talk.call(await talk.claim("q2"), keeper())
    assert (call.provider_session, call.fork) == ("ps", None)


@pytest.mark.promise("D4")
async def test_another_provider_s_session_on_another_machine_is_no_loss_to_this_one() -> None:
    talk = on_machine("b")
    await talk.settle(await talk.claim("q1", offer=OTHER), "a1", provider_session="ps", node="a")
    call = await talk.call(await talk.claim("q2"), keeper())
    assert (call.provider_session, call.fork) == (None, None)


# -- lives ------------------------------------------------------------------------------------------------------------


@pytest.mark.promise("L10")
@pytest.mark.parametrize(
    ("quiet", "turns", "locked", "life"),
    [
        (0, 0, False, "created"),
        (0, 0, True, "active"),
        (59, 1, False, "active"),
        (60, 1, False, "idle"),
        (60, 0, False, "idle"),
        (599, 3, True, "idle"),
        (600, 3, False, "expired"),
        (-5, 1, False, "active"),
    ],
)
def test_a_conversation_s_life_follows_from_its_last_activity(quiet: int, turns: int, locked: bool, life: str) -> None:
    sessions = SessionManager(MemoryStore(StoreRules(), Chance()), Session(idle_after=60, expire_after=600))
    view = SessionView(conversation="c", created_at=0, active_at=1_000_000, turns=turns, locked=locked)
    assert sessions.life(view, Moment(1_000_000 + quiet * 1_000_000, 0)) == life


def test_an_exchange_is_frozen() -> None:
    assert msgspec.structs.fields(Exchange)
    with pytest.raises(AttributeError):
        past_of([1]).turns[0].tokens = 5  # type: ignore[misc]
