"""Helpers to read a vendor's JSON, in which anything may stand. Pure."""

from __future__ import annotations

from typing import Any

from ksi.errors import InvalidData


def as_object(value: Any, path: str) -> dict[str, Any]:
    """The value, which must be an object.

    Raises:
        InvalidData: it is none.
    """
    if not isinstance(value, dict):
        raise InvalidData(f"{path}: expected an object", path=path)
    return value


def as_list(value: Any, path: str) -> list[Any]:
    """The value, which must be a list.

    Raises:
        InvalidData: it is none.
    """
    if not isinstance(value, list):
        raise InvalidData(f"{path}: expected a list", path=path)
    return value


def as_text(value: Any, path: str) -> str:
    """The value, which must be a string.

    Raises:
        InvalidData: it is none.
    """
    if not isinstance(value, str):
        raise InvalidData(f"{path}: expected a string", path=path)
    return value


def whole_number(value: Any, path: str) -> int | None:
    """The value, which must be a whole number, or None if there is none.

    Raises:
        InvalidData: it is something else.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise InvalidData(f"{path}: expected a whole number", path=path)


def number(value: Any, path: str) -> float | None:
    """The value, which must be a number, or None if there is none.

    Raises:
        InvalidData: it is something else.
    """
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise InvalidData(f"{path}: expected a number", path=path)
