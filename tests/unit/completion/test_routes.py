"""Routes: which providers serve a model, in which order, and what is left of one after a failure."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.completion.pool.routes import Router, Step, model_at, parse_route, tried
from ksi.config.schema import ModelConfig, ProviderConfig
from ksi.errors import UnknownModel


def router(models: dict[str, ModelConfig] | None = None, **providers: tuple[int, str]) -> Router:
    configs = {
        name: ProviderConfig(kind="stub", models=tuple(patterns.split()), priority=priority)
        for name, (priority, patterns) in providers.items()
    }
    return Router(configs, models or {})


@pytest.mark.promise("F4")
def test_a_route_has_the_providers_of_a_model_by_priority_then_as_configured() -> None:
    built = router(late=(20, "team/*"), first=(1, "team/*"), second=(1, "team/small *"), other=(1, "other/*"))
    assert built.route("team/small") == "first,second,late"
    assert built.route("other/x") == "second,other"


@pytest.mark.promise("F4")
def test_a_model_s_fallbacks_follow_its_own_providers_in_order() -> None:
    fallbacks = ModelConfig(fallbacks=("b/one", "c/two", "none/x"))
    built = router({"a/big": fallbacks}, a=(1, "a/*"), b=(1, "b/*"), b2=(2, "b/*"), c=(1, "c/*"))
    route = built.route("a/big")
    assert route == "a,b=b/one,b2=b/one,c=c/two"
    assert built.route("a/small") == "a"
    assert [model_at(route, name, "a/big") for name in ("a", "b", "b2", "c")] == ["a/big", "b/one", "b/one", "c/two"]


@pytest.mark.promise("F4")
def test_a_fallback_may_be_served_by_the_same_provider() -> None:
    built = router({"a/big": ModelConfig(fallbacks=("a/small",))}, a=(1, "a/*"))
    route = built.route("a/big")
    assert route == "a,a=a/small"
    assert model_at(route, "a", "a/big") == "a/big"
    assert model_at(tried(route, "a"), "a", "a/big") == "a/small"


@pytest.mark.promise("F4")
def test_a_model_that_only_its_fallbacks_can_serve_is_served_by_them() -> None:
    assert router({"gone/x": ModelConfig(fallbacks=("a/x",))}, a=(1, "a/*")).route("gone/x") == "a=a/x"


@pytest.mark.parametrize(
    ("model", "hint"),
    [("temq/small", "'team'"), ("nothing/like", "served: team/*"), ("team", "served: team/*")],
)
def test_an_unknown_model_is_refused_with_a_guess(model: str, hint: str) -> None:
    with pytest.raises(UnknownModel) as refused:
        router(team=(1, "team/*")).route(model)
    assert hint in refused.value.message
    assert refused.value.details == {"model": model}


@pytest.mark.promise("F4")
def test_a_tried_provider_is_behind_the_others_and_is_not_forgotten() -> None:
    once = tried("a,b=x/y,c", "a")
    assert once == "b=x/y,c,~a"
    twice = tried(once, "b")
    assert twice == "c,~a,~b=x/y"
    assert model_at(twice, "b", "a/big") == "x/y"
    assert parse_route(twice) == (Step("c"), Step("a", tried=True), Step("b", "x/y", tried=True))
    assert tried(twice, "a") == "c,~b=x/y,~a"
    assert tried(twice, "stranger") == twice


names = st.from_regex(r"[a-z][a-z0-9_-]{0,6}", fullmatch=True)
steps = st.builds(Step, names, st.none() | names.map(lambda name: f"{name}/{name}"), st.booleans())


@pytest.mark.promise("F4")
@given(st.lists(steps, min_size=1, max_size=5))
def test_a_route_is_read_as_it_was_written(route: list[Step]) -> None:
    assert list(parse_route(",".join(step.word for step in route))) == route


@pytest.mark.promise("F4")
@given(st.lists(names, min_size=1, max_size=5, unique=True), st.data())
def test_trying_loses_no_provider_and_comes_to_an_end(providers: list[str], data: st.DataObject) -> None:
    route = ",".join(providers)
    for left in range(len(providers), 0, -1):
        fresh = [step.provider for step in parse_route(route) if not step.tried]
        assert len(fresh) == left
        route = tried(route, data.draw(st.sampled_from(fresh)))
        assert sorted(step.provider for step in parse_route(route)) == sorted(providers)
    assert all(step.tried for step in parse_route(route))
