"""`ksi events`: the events that clients and the daemon send."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from ksi.cli.completing import complete_event
from ksi.cli.render import figures, json_line, say, table
from ksi.cli.settings import json_option

if TYPE_CHECKING:
    from ksi.events.specs import EventSpec

Json = Mapping[str, Any]

MOST_NAMES = 7
"""Maximum number of fields to list for a nested type; of a larger one the first three are shown."""


@click.command(
    epilog="""\b
Examples:
  ksi events
  ksi events completion:async
  ksi events --json | jq .name
"""
)
@click.argument("event", required=False, shell_complete=complete_event)
@json_option
def events(event: str | None, as_json: bool) -> None:
    """List the events, or describe the fields of one EVENT. Works without a daemon.

    `in` is sent to the daemon, `out` is pushed by it. With --json each comes with its JSON Schema.
    """
    from ksi.errors import NotFound
    from ksi.events.specs import SPECS, schema
    from ksi.protocol import nearest

    if event is not None and event not in SPECS:
        guess = nearest(event, SPECS)
        raise NotFound(f"no event is named {event!r}" + (f"; did you mean {guess!r}?" if guess else "; see ksi events"))
    chosen = [SPECS[event]] if event is not None else list(SPECS.values())
    if as_json:
        for spec in chosen:
            json_line({"name": spec.name, "direction": _direction(spec), "doc": spec.doc, "schema": schema(spec)})
    elif event is None:
        table(
            ("event", "way", "what it is for", "fields"),
            [(spec.name, _direction(spec), spec.doc, _summary(schema(spec))) for spec in chosen],
        )
    else:
        _describe(chosen[0], schema(chosen[0]))


def _direction(spec: EventSpec) -> str:
    return "in" if spec.incoming else "out"


def _summary(schemas: Json) -> str:
    """The names of an event's fields; required ones have a star."""
    shown = schemas.get("request", schemas.get("data"))
    if shown is None:
        return "-"
    return " ".join(name + ("*" if required else "") for name, _, required, _, _ in fields_of(shown, schemas)) or "-"


def _describe(spec: EventSpec, schemas: Json) -> None:
    figures({"event": spec.name, "way": _direction(spec), "for": spec.doc})
    for label, title in (("request", "data"), ("reply", "reply"), ("data", "data")):
        if label not in schemas:
            continue
        say()
        rows = [
            (name, kind, "yes" if required else "", "" if default is None else repr(default), meaning)
            for name, kind, required, default, meaning in fields_of(schemas[label], schemas)
        ]
        if rows:
            table(("field", "type", "required", "default", "meaning"), rows, title=title)
        else:
            say(f"{title}: no fields")


def fields_of(schema: Json, schemas: Json) -> Iterator[tuple[str, str, bool, Any, str]]:
    """Name, type, necessity, default and meaning of each field."""
    resolved = _resolve(schema, schemas)
    required = resolved.get("required", ())
    for name, kind in resolved.get("properties", {}).items():
        word, needed = _type_word(kind, schemas), name in required
        # An optional field is left out rather than null.
        if needed and {"type": "null"} in kind.get("anyOf", ()):
            word += " | null"
        yield name, word, needed, kind.get("default"), kind.get("description", "")


def _resolve(schema: Json, schemas: Json) -> Json:
    reference = schema.get("$ref")
    if reference is None:
        return schema
    found = schemas["$defs"][reference.rpartition("/")[2]]
    assert isinstance(found, Mapping)
    return found


def _type_word(schema: Json, schemas: Json) -> str:
    """A JSON Schema in words: `"a" | "b"`, `list of text`, `number ≥ 0`..."""
    if "$ref" in schema:
        resolved = _resolve(schema, schemas)
        if "properties" in resolved:
            names = list(resolved["properties"])
            return "{" + ", ".join(names if len(names) <= MOST_NAMES else [*names[:3], "..."]) + "}"
        return _type_word(resolved, schemas)
    if "anyOf" in schema:
        options = [_type_word(option, schemas) for option in schema["anyOf"]]
        return " | ".join(word for word in options if word != "null")
    if "enum" in schema:
        return " | ".join(f'"{value}"' for value in schema["enum"])
    if "const" in schema:
        return f'"{schema["const"]}"'
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {_type_word(schema.get('items', {}), schemas)}"
    words = {"string": "text", "boolean": "true | false", "object": "object"}.get(kind, str(kind))
    for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤")):
        if key in schema:
            words += f" {sign} {schema[key]:,}"
    return words
