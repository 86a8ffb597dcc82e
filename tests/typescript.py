"""A small generator of a typed TypeScript client, from `GET /v1/schema` and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]

CLIENT = """\
export class RemoteError extends Error {
  constructor(readonly code: Code, message: string, readonly retryable: boolean, readonly details: unknown) {
    super(message);
  }
}

export class Client {
  constructor(private readonly url: string, private readonly token: string) {}

  async send<E extends keyof Requests>(event: E, data: Requests[E]): Promise<Replies[E]> {
    const answer = await fetch(`${this.url}/v1/events`, {
      method: "POST",
      headers: { Authorization: `Bearer ${this.token}`, "Content-Type": "application/json" },
      body: JSON.stringify({ event, data }),
    });
    const said = (await answer.json()) as { data: Replies[E] } | { error: Failure & { code: Code } };
    if ("error" in said) {
      throw new RemoteError(said.error.code, said.error.message, said.error.retryable, said.error.details);
    }
    return said.data;
  }
}

export type Push = { [E in keyof Pushes]: { event: E; data: Pushes[E]; timestamp: number } }[keyof Pushes];
"""


def generate(schema: Json) -> str:
    """The whole module."""
    events: dict[str, Json] = schema["events"]
    parts = [*(_declared(name, one) for name, one in schema["$defs"].items())]
    for table, direction, field in (
        ("Requests", "in", "request"),
        ("Replies", "in", "reply"),
        ("Pushes", "out", "data"),
    ):
        rows = [
            f"  {json.dumps(name)}: {kind(event[field])};"
            for name, event in events.items()
            if event["direction"] == direction
        ]
        parts.append("\n".join((f"export interface {table} {{", *rows, "}")))
    parts.append(f"export type Code = {' | '.join(map(json.dumps, schema['codes']))};")
    return "\n\n".join((*parts, CLIENT))


def _declared(name: str, one: Json) -> str:
    said = re.sub(r"\*/", "* /", one.get("description", ""))
    head = f"/** {said} */\n" if said else ""
    if one.get("type") != "object" or "properties" not in one:
        return f"{head}export type {name} = {kind(one)};"
    return f"{head}export interface {name} {{\n" + "\n".join(_fields(one)) + "\n}"


def _fields(one: Json) -> Iterator[str]:
    for name, field in one["properties"].items():
        mark = "" if name in one.get("required", ()) else "?"
        yield f"  {name}{mark}: {kind(field)};"


def kind(one: Json) -> str:
    """A schema as a type. A kind of schema that it does not know fails."""
    if "$ref" in one:
        return str(one["$ref"].removeprefix("#/$defs/"))
    if "anyOf" in one:
        return " | ".join(dict.fromkeys(kind(each) for each in one["anyOf"]))
    if "enum" in one:
        return " | ".join(json.dumps(each) for each in one["enum"])
    match one.get("type"):
        case "string":
            return "string"
        case "integer" | "number":
            return "number"
        case "boolean":
            return "boolean"
        case "null":
            return "null"
        case "array":
            return f"Array<{kind(one.get('items', {}))}>"
        case "object":
            more = one.get("additionalProperties")
            return f"Record<string, {kind(more) if isinstance(more, dict) else 'unknown'}>"
        case None if not one.keys() - {"default", "description", "title"}:
            return "unknown"
    raise ValueError(f"no type for {one}")
