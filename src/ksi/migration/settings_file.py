"""Setting keys in a ksi.toml without touching anything else in it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any

from ksi.errors import MigrationError

Key = tuple[str, str]
"""A section and a key in it."""

_TABLE = re.compile(r"^[ \t]*\[", re.MULTILINE)
_VALUE = r"(?:\"(?:[^\"\\\n]|\\.)*\"|'[^'\n]*'|[^\s#]+)"


def with_settings(text: str, settings: Mapping[Key, str | int]) -> str:
    """A ksi.toml with these keys: a key's line is changed, or added below its section, or both are added at the end.

    Raises:
        MigrationError: it is written in a way that this does not understand; nothing but the keys would be safe.
    """
    changed, expected = text, _tree(text)
    for (section, key), value in settings.items():
        changed = _change(changed, section, key, _written(value))
        table = expected.setdefault(section, {})
        if isinstance(table, dict):
            table[key] = value
    if _tree(changed) != expected:
        wanted = ", ".join(f"{section}.{key} = {_written(value)}" for (section, key), value in settings.items())
        raise MigrationError(f"ksi.toml sets its version in an unusual way; set {wanted} by hand")
    return changed


def settings_in(text: str) -> dict[str, Any]:
    """The keys that a ksi.toml has.

    Raises:
        MigrationError: it cannot be read.
    """
    return _tree(text)


def _change(text: str, section: str, key: str, value: str) -> str:
    newline = "\r\n" if "\r\n" in text else "\n"
    header = _header(section).search(text)
    if header is not None:
        following = _TABLE.search(text, header.end())
        end = following.start() if following is not None else len(text)
        found = _line(key).search(text, header.end(), end)
        if found is not None:
            return f"{text[: found.start()]}{found[1]}{value}{text[found.end() :]}"
        rest = text[header.end() :]
        return f"{text[: header.end()]}{newline}{key} = {value}{rest if rest else newline}"
    dotted = _line(key, section).search(text)
    if dotted is not None:
        return f"{text[: dotted.start()]}{dotted[1]}{value}{text[dotted.end() :]}"
    gap = "" if not text else newline if text.endswith("\n") else newline * 2
    return f"{text}{gap}[{section}]{newline}{key} = {value}{newline}"


def _header(section: str) -> re.Pattern[str]:
    return re.compile(rf"^[ \t]*\[[ \t]*{_either(section)}[ \t]*\][ \t]*(?:#.*)?$", re.MULTILINE)


def _line(key: str, section: str | None = None) -> re.Pattern[str]:
    before = "" if section is None else rf"{section}[ \t]*\.[ \t]*"
    return re.compile(rf"^([ \t]*{before}{_either(key)}[ \t]*=[ \t]*){_VALUE}", re.MULTILINE)


def _either(word: str) -> str:
    return rf"(?:{word}|\"{word}\"|'{word}')"


def _written(value: str | int) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _tree(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise MigrationError(f"ksi.toml cannot be read: {error}") from None
