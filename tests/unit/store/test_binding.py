"""Which machine a conversation's next turn belongs on (D4)."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.completion.pool.routes import Step, parse_route
from ksi.request import Attempt, Outcome, Turn
from ksi.store.binding import Binding, binding_of, node_of, serves

pytestmark = pytest.mark.promise("D4")

names = st.sampled_from(["a", "ab", "a-b", "b"])
steps = st.builds(Step, names, st.sampled_from([None, "a", "b/small"]), st.booleans())
HEAD = Turn(1, b"", "", "claude", "session", 0, None, node="here")


@given(st.lists(steps, min_size=1, max_size=4), names)
def test_a_provider_serves_the_routes_that_have_it_as_a_step(route: list[Step], provider: str) -> None:
    word = ",".join(step.word for step in route)
    assert serves(word, provider) == any(step.provider == provider for step in parse_route(word))


def test_a_head_whose_session_lives_on_a_machine_binds_its_provider_s_routes() -> None:
    binding = binding_of(HEAD)
    assert binding == Binding("here", "claude")
    assert binding.binds("team,claude=claude/haiku")
    assert not binding.binds("team")


@pytest.mark.parametrize("head", [None, msgspec.structs.replace(HEAD, node=None)])
def test_a_conversation_without_such_a_head_is_bound_nowhere(head: Turn | None) -> None:
    assert binding_of(head) is None


def test_an_attempt_without_a_session_lives_nowhere() -> None:
    attempt = Attempt(number=1, provider="p", outcome=Outcome.COMPLETED, started_at=0, finished_at=0, node="here")
    assert node_of(attempt) is None
    assert node_of(msgspec.structs.replace(attempt, provider_session="session")) == "here"
