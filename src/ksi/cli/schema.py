"""`ksi ask --schema`: an answer's JSON Schema, for providers that take one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ksi.cli.render import note
from ksi.cli.settings import Exit
from ksi.cli.waiting import serves

if TYPE_CHECKING:
    from ksi.client import Client

TAKES_SCHEMA = "openai"
"""The kind of provider whose requests carry a schema."""


async def schema_options(client: Client, path: Path, model: str | None) -> dict[str, Any]:
    """The `provider_options` that ask for an answer by the schema in a file.

    Raises:
        click.UsageError: the file has no schema, or a provider of the model takes none.
        As `Client.send_event`.
    """
    schema = read_schema(path)
    full = model or str((await client.send_event("system:context")).get("default_model", ""))
    full = full if "/" in full else f"claude-cli/{full}"
    providers = (await client.send_event("completion:provider_status")).get("providers", {})
    for name, report in providers.items():
        if serves(report, full) and report.get("kind") != TAKES_SCHEMA:
            raise click.UsageError(
                f"--schema: provider {name} of kind {report.get('kind')} takes no schema; kind {TAKES_SCHEMA} does"
            )
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    }


def read_schema(path: Path) -> dict[str, Any]:
    """A JSON Schema from a file.

    Raises:
        click.UsageError: the file cannot be read, or is no JSON object.
    """
    import msgspec

    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise click.UsageError(f"--schema: {path} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise click.UsageError(f"--schema: {path} is no JSON Schema: {error}") from None


def check_json(text: str, request_id: str) -> Exit:
    """Whether the answer is JSON at all; an endpoint may have passed over the schema."""
    import msgspec

    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        note(f"ksi: the answer of {request_id} is not JSON: its provider passed over the schema")
        return Exit.FAILED
    return Exit.DONE
