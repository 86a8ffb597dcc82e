"""Setting `service.version` in a ksi.toml without touching anything else in it."""

from __future__ import annotations

import re
import tomllib
from typing import Any

from ksi.errors import MigrationError

_HEADER = re.compile(r"^[ \t]*\[[ \t]*(?:service|\"service\"|'service')[ \t]*\][ \t]*(?:#.*)?$", re.MULTILINE)
_TABLE = re.compile(r"^[ \t]*\[", re.MULTILINE)
_KEY = re.compile(r"^([ \t]*(?:version|\"version\"|'version')[ \t]*=[ \t]*)[^\s#]+", re.MULTILINE)
_DOTTED = re.compile(r"^([ \t]*service[ \t]*\.[ \t]*version[ \t]*=[ \t]*)[^\s#]+", re.MULTILINE)


def with_version(text: str, version: int) -> str:
    """A ksi.toml with this version: its line is changed, or added below `[service]`, or both are added at the end.

    Raises:
        MigrationError: it is written in a way that this does not understand; nothing but the version would be safe.
    """
    changed = _change(text, version)
    if _tree(changed) != _expected(text, version):
        raise MigrationError(f"ksi.toml sets its version in an unusual way; set service.version = {version} by hand")
    return changed


def _change(text: str, version: int) -> str:
    newline = "\r\n" if "\r\n" in text else "\n"
    header = _HEADER.search(text)
    if header is not None:
        following = _TABLE.search(text, header.end())
        end = following.start() if following is not None else len(text)
        key = _KEY.search(text, header.end(), end)
        if key is not None:
            return f"{text[: key.start()]}{key[1]}{version}{text[key.end() :]}"
        rest = text[header.end() :]
        return f"{text[: header.end()]}{newline}version = {version}{rest if rest else newline}"
    dotted = _DOTTED.search(text)
    if dotted is not None:
        return f"{text[: dotted.start()]}{dotted[1]}{version}{text[dotted.end() :]}"
    gap = "" if not text else newline if text.endswith("\n") else newline * 2
    return f"{text}{gap}[service]{newline}version = {version}{newline}"


def _expected(text: str, version: int) -> dict[str, Any]:
    tree = _tree(text)
    service = tree.setdefault("service", {})
    if isinstance(service, dict):
        service["version"] = version
    return tree


def _tree(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise MigrationError(f"ksi.toml cannot be read: {error}") from None
