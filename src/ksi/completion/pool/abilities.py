"""Finds a request's needs, and the providers of a model that can meet them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ksi.content.blocks import Block, Message, vendor_tool
from ksi.content.features import Asked, Features
from ksi.content.history import in_words
from ksi.content.native import FEATURES, block_needs, contents_of, needs
from ksi.errors import Unsupported
from ksi.providers.base import Capabilities
from ksi.request import RequestBody

VENDOR = "anthropic"
"""The dialect in which blocks are named: one of an unknown type, and a tool with a type, are taken for its vendor's."""


def _can(feature: str, can: Capabilities) -> bool:
    return feature in can.features or (can.dialect == VENDOR and feature not in FEATURES)


def takes(can: Capabilities) -> Callable[[Block], bool]:
    """The test whether a provider can take a block."""
    return lambda block: all(_can(feature, can) for feature in block_needs(block))


class Needs:
    """A request's needs, computed at the first use."""

    def __init__(self, body: RequestBody) -> None:
        self._body = body
        self._needs: Mapping[str, str] | None = None
        self.droppable = body.drop_unsupported

    def missing(self, can: Capabilities) -> list[str]:
        """The request's fields that a provider does not support."""
        native = self._body.native
        if native is not None and native.dialect == can.dialect:
            return []
        if self._needs is None:
            asked = self._body.asked()
            found = needs(asked.features, contents_of(asked.messages, asked.system))
            if native is not None and (asked.features.reasoning or {}).keys() == {"effort"}:
                # How hard to think is a hint there: Claude Code gives it with every call.
                found.pop("reasoning", None)
            self._needs = {**found, **{name: name for name in asked.unmapped}}
        return [
            field
            for feature, field in self._needs.items()
            if not (_can(feature, can) if native is None else feature in can.features)
        ]


def needs_of(body: RequestBody) -> Needs | None:
    """Return a request's needs; None for a request of text alone."""
    return None if body.plain else Needs(body)


def unsupported(model: str, lacking: Mapping[str, Sequence[str]]) -> Unsupported:
    """The refusal of a request that no provider of the model supports; `lacking` has the missing features of each."""
    fields = list(dict.fromkeys(field for missing in lacking.values() for field in missing))
    shown = ", ".join(fields[:10])
    return Unsupported(
        f"{', '.join(lacking)}, which serves {model[:100]!r}, does not support: {shown}; leave it out, ask a model of "
        "another provider, or send drop_unsupported: true to have it left out",
        fields=fields[:20],
        providers=list(lacking),
    )


def supported(asked: Asked, can: Capabilities) -> tuple[Asked, list[str]]:
    """Return a request without the fields that a provider cannot use, and the names of those fields."""
    kept = {
        name: getattr(asked.features, name)
        for name in Features.__struct_fields__
        if name in can.features and not (name == "response_format" and _is_any_json(asked.features, can))
    }
    if "tools" in kept and can.dialect != VENDOR:
        kept["tools"] = tuple(tool for tool in asked.features.tools if not vendor_tool(tool))
    if "service_tiers" in needs(asked.features, ()) and "service_tiers" not in can.features:
        kept.pop("service_tier", None)
    if not kept.get("tools"):
        kept.pop("tool_choice", None)
        kept.pop("parallel_tool_calls", None)
    features = Features(**kept)
    messages = tuple(Message(m.role, in_words(m.content, takes(can))) for m in asked.messages)
    system = in_words(asked.system, takes(can)) if asked.system is not None else None
    before = {**needs(asked.features, contents_of(asked.messages, asked.system)), **dict.fromkeys(asked.unmapped, "")}
    after = needs(features, contents_of(messages, system))
    dropped = [field or name for name, field in before.items() if name not in after]
    return (
        Asked(
            messages=messages,
            model=asked.model,
            system=system,
            max_tokens=asked.max_tokens,
            temperature=asked.temperature,
            stop=asked.stop,
            stream=asked.stream,
            features=features,
        ),
        dropped,
    )


def asked_at(body: RequestBody, can: Capabilities) -> tuple[Asked, list[str]]:
    """Return the request as this provider is asked, and the fields that were left out for it."""
    asked = body.asked()
    return supported(asked, can) if body.drop_unsupported or body.native is not None else (asked, [])


def _is_any_json(features: Features, can: Capabilities) -> bool:
    return (features.response_format or {}).get("type") == "json_object" and "json_object" not in can.features
