"""The schema documents of the wire, made from the types: JSON Schema of every event, and AsyncAPI 3."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import Any

import msgspec

from ksi.errors import FailureClass, KsiError, ProviderError
from ksi.events.specs import SCOPES, SPECS, EventSpec

Json = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"


class Failure(msgspec.Struct, kw_only=True):
    """Why an event has no reply."""

    code: str
    message: str
    retryable: bool
    details: dict[str, Any]


@cache
def json_schema() -> Json:
    """Every event's types under `$defs`, and under `events` which of them it takes and gives. Do not change it."""
    types = list(dict.fromkeys(kind for spec in SPECS.values() for kind in _kinds(spec)))
    (*shown,), components = msgspec.json.schema_components([*types, Failure])
    references = dict(zip(types, shown, strict=False))
    document = {
        "$schema": DIALECT,
        "$id": "urn:ksi:events",
        "title": "KSI's events",
        "events": {spec.name: _event(spec, references) for spec in SPECS.values()},
        "error": shown[-1],
        "codes": codes(),
        "$defs": components,
    }
    # Defaults may be tuples; the schema must be JSON.
    return msgspec.json.decode(msgspec.json.encode(document), type=Json)


def codes() -> list[str]:
    """Every code that an error can have."""
    fixed = {kind.code for kind in _tree(KsiError) if not issubclass(kind, ProviderError)}
    return sorted(fixed | {one.value for one in FailureClass})


def _tree(base: type[KsiError]) -> list[type[KsiError]]:
    return [base, *(one for kind in base.__subclasses__() for one in _tree(kind))]


def _kinds(spec: EventSpec) -> list[type[msgspec.Struct]]:
    return [kind for kind in (spec.request, spec.reply) if kind is not None]


def _event(spec: EventSpec, references: dict[type[msgspec.Struct], Json]) -> Json:
    free = {"type": "object"}
    given = references[spec.reply] if spec.reply is not None else free
    if spec.request is None:
        return {"direction": "out", "description": spec.doc, "data": given}
    return {
        "direction": "in",
        "description": spec.doc,
        "scope": SCOPES[spec.name].word,
        "request": references[spec.request],
        "reply": given,
    }


@cache
def asyncapi() -> Json:
    """The same as an AsyncAPI 3 document: events in by POST, events out as server-sent events. Do not change it."""
    schemas = json_schema()
    events: dict[str, Json] = schemas["events"]
    came = {name: event for name, event in events.items() if event["direction"] == "in"}
    pushed = {name: event for name, event in events.items() if event["direction"] == "out"}
    messages = {name: _message(name, event["request"], event["description"]) for name, event in came.items()}
    messages |= {f"{name}.reply": _message(name, event["reply"], "The answer.") for name, event in came.items()}
    messages |= {name: _message(name, event["data"], event["description"]) for name, event in pushed.items()}
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "KSI", "version": version("ksi")},
        "defaultContentType": "application/json",
        "servers": {
            "local": {
                "host": "127.0.0.1:7411",
                "protocol": "http",
                "security": [{"$ref": "#/components/securitySchemes/token"}],
            }
        },
        "channels": {
            "requests": _channel("Events in, by POST.", came),
            "replies": _channel("Their answers, in the same HTTP exchange.", [f"{name}.reply" for name in came]),
            "pushes": _channel("Events out, by GET as server-sent events.", pushed),
        },
        "operations": {
            **{_label(name): _asked(name, event) for name, event in came.items()},
            **{
                _label(name): {
                    "action": "send",
                    "channel": {"$ref": "#/channels/pushes"},
                    "messages": [{"$ref": f"#/channels/pushes/messages/{_label(name)}"}],
                }
                for name in pushed
            },
        },
        "components": {
            "messages": {_label(name): message for name, message in messages.items()},
            "schemas": {
                **_moved(schemas["$defs"]),
                "Error": _envelope({"$ref": "#/components/schemas/Failure"}, "error"),
            },
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _label(name: str) -> str:
    """A name as keys of the document may be."""
    return name.replace(":", "_")


def _channel(doc: str, names: Any) -> Json:
    return {
        "address": "/v1/events",
        "description": doc,
        "messages": {_label(name): {"$ref": f"#/components/messages/{_label(name)}"} for name in names},
    }


def _asked(name: str, event: Json) -> Json:
    return {
        "action": "receive",
        "summary": event["description"],
        "description": f"Needs the scope {event['scope']}.",
        "channel": {"$ref": "#/channels/requests"},
        "messages": [{"$ref": f"#/channels/requests/messages/{_label(name)}"}],
        "reply": {
            "channel": {"$ref": "#/channels/replies"},
            "messages": [{"$ref": f"#/channels/replies/messages/{_label(f'{name}.reply')}"}],
        },
    }


def _message(name: str, data: Json, doc: str) -> Json:
    return {"name": name, "summary": doc, "payload": _envelope(_moved(data), "data", name)}


def _envelope(inner: Json, field: str, name: str | None = None) -> Json:
    event: Json = {"type": "string"} if name is None else {"const": name}
    return {
        "type": "object",
        "required": ["event", field],
        "properties": {
            "event": event,
            field: inner,
            "correlation_id": {"type": ["string", "integer"]},
            "timestamp": {"type": "number"},
        },
    }


def _moved(value: Any) -> Any:
    """A schema whose references lead into this document's components."""
    if isinstance(value, dict):
        return {
            key: inner.replace("#/$defs/", "#/components/schemas/") if key == "$ref" else _moved(inner)
            for key, inner in value.items()
        }
    return [_moved(inner) for inner in value] if isinstance(value, list) else value
