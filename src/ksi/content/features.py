"""The features that a request uses, and requests in a vendor's dialect."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from ksi.content.blocks import Content, Message

Json = dict[str, Any]


class Features(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The features that a request uses, apart from its text, token limit, temperature and stop sequences."""

    tools: tuple[Json, ...] = ()
    """Each `{name, description, input_schema}`, or a vendor's own, which has a `type`."""
    tool_choice: Json | None = None
    """`{"type": "auto" | "any" | "none"}` or `{"type": "tool", "name": ...}`."""
    parallel_tool_calls: bool | None = None
    response_format: Json | None = None
    """`{"type": "json_schema", "json_schema": {"name", "schema", "strict"}}` or `{"type": "json_object"}`."""
    reasoning: Json | None = None
    """`{"effort": "low" | "medium" | "high" | ...}` or `{"budget_tokens": ...}`."""
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    service_tier: str | None = None

    @property
    def featureless(self) -> bool:
        """True if the request uses none of them."""
        return (
            not self.tools
            and self.tool_choice is None
            and self.parallel_tool_calls is None
            and self.response_format is None
            and self.reasoning is None
            and self.top_p is None
            and self.top_k is None
            and self.seed is None
            and self.service_tier is None
        )


NO_FEATURES = Features()

Dialect = Literal["anthropic", "chat"]
"""A vendor's form of requests and answers: Anthropic's Messages, or OpenAI's chat completions."""


class Native(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request in a vendor's dialect. It is sent to providers of that dialect with every field it has."""

    dialect: Dialect
    """`anthropic` (Anthropic's Messages) or `chat` (OpenAI's chat completions)."""
    body: Json
    """The request's body, in its vendor's form."""
    headers: dict[str, str] = {}
    """The request's headers, in lower case."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a dialect's request, in the normal form."""

    messages: tuple[Message, ...]
    model: str | None = None
    system: Content | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    features: Features = NO_FEATURES
    unmapped: tuple[str, ...] = ()
    """Meaningful fields that the normal form does not have: only a provider of the dialect supports them."""
