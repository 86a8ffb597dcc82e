"""`ksi ask --schema`: an answer's JSON Schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ksi.cli.render import note
from ksi.cli.settings import Exit


def response_format(path: Path) -> dict[str, Any]:
    """The `response_format` for an answer that fits the schema in a file.

    Raises:
        click.UsageError: the file has no schema.
    """
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": read_schema(path), "strict": True}}


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
    """True if the answer is JSON at all; an endpoint may have ignored the schema."""
    import msgspec

    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        note(f"ksi: the answer of {request_id} is not JSON: its provider ignored the schema")
        return Exit.FAILED
    return Exit.DONE
