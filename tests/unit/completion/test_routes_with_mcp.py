"""A request with MCP servers goes to providers that take them, and to no other."""

from __future__ import annotations

import pytest

from ksi.completion.pool.routes import Router
from ksi.config.schema import ModelConfig, ProviderConfig
from ksi.errors import InvalidData, UnknownModel


def provider(*patterns: str, priority: int = 10) -> ProviderConfig:
    return ProviderConfig(kind="stub", models=patterns, priority=priority)


ROUTER = Router(
    {
        "plain": provider("a/*", "b/*", priority=1),
        "tools": provider("a/*", "t/*", priority=2),
        "more": provider("t/*", priority=3),
    },
    {"b/x": ModelConfig(fallbacks=("a/y", "t/z"))},
    with_mcp={"tools", "more"},
)


@pytest.mark.promise("F4", "T2")
def test_with_mcp_only_providers_that_take_it_are_in_the_route() -> None:
    assert ROUTER.route("a/m") == "plain,tools"
    assert ROUTER.route("a/m", mcp=True) == "tools"
    assert ROUTER.route("a/m") == "plain,tools"


@pytest.mark.promise("F4")
def test_with_mcp_a_model_may_be_served_by_its_fallbacks_alone() -> None:
    assert ROUTER.route("b/x", mcp=True) == "tools=a/y,tools=t/z,more=t/z"


def test_if_no_provider_supports_mcp_the_request_is_refused_with_those_that_do() -> None:
    with pytest.raises(InvalidData, match=r"served by plain, without MCP servers of requests.*tools, more") as refused:
        ROUTER.route("b/m", mcp=True)
    assert refused.value.facts["path"] == "mcp_config"
    with pytest.raises(InvalidData, match="none is configured"):
        Router({"plain": provider("a/*")}, {}).route("a/m", mcp=True)


def test_an_unknown_model_is_unknown_with_mcp_too() -> None:
    with pytest.raises(UnknownModel):
        ROUTER.route("z/m", mcp=True)
