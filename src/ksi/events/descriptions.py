"""Field meanings, read from the text under each field in the source: one text for code, schemas and documents."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from types import ModuleType
from typing import Any

import msgspec
from msgspec.inspect import CustomType, Type, multi_type_info


def descriptions(kind: type) -> dict[str, str]:
    """The texts under the fields of a class, or the members of an enumeration, its bases' included."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        module = inspect.getmodule(base)
        if module is not None and module.__name__.startswith("ksi."):
            found |= _texts(module).get(base.__name__, {})
    return found


def plain(text: str) -> str:
    """A text without the links of a document."""
    return re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)


def structs_in(types: Iterable[Any]) -> dict[str, type[msgspec.Struct]]:
    """All structs that values of these types can hold, by name."""
    found: dict[str, type[msgspec.Struct]] = {}
    for info in multi_type_info(types):
        for kind in _walk(info, set()):
            found.setdefault(kind.__name__, kind)
    return found


def held_by(kind: Any) -> list[type[msgspec.Struct]]:
    """The structs that a field of this type holds itself, without those inside them."""
    return list(_held(multi_type_info([kind])[0]))


def _held(value: Any) -> Iterator[type[msgspec.Struct]]:
    if isinstance(value, msgspec.inspect.StructType):
        yield value.cls
    elif isinstance(value, Type) and not isinstance(value, CustomType):
        for name in value.__struct_fields__:
            yield from _held(getattr(value, name))
    elif isinstance(value, tuple):
        for part in value:
            yield from _held(part)


def _walk(value: Any, seen: set[Any]) -> Iterator[type[msgspec.Struct]]:
    if isinstance(value, msgspec.inspect.StructType):
        if value.cls in seen:
            return
        seen.add(value.cls)
        yield value.cls
    if isinstance(value, Type | msgspec.inspect.Field) and not isinstance(value, CustomType):
        for name in value.__struct_fields__:
            yield from _walk(getattr(value, name), seen)
    elif isinstance(value, tuple):
        for part in value:
            yield from _walk(part, seen)


@cache
def _texts(module: ModuleType) -> Mapping[str, Mapping[str, str]]:
    """By class, then by field. Empty without the source."""
    try:
        tree = ast.parse(inspect.getsource(module))
    except OSError:
        return {}
    return {node.name: dict(_texts_of(node)) for node in tree.body if isinstance(node, ast.ClassDef)}


def _texts_of(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, behind in zip(node.body, node.body[1:], strict=False):
        target = field.target if isinstance(field, ast.AnnAssign) else None
        if isinstance(field, ast.Assign):
            (target, *_) = field.targets  # type: ignore[assignment]
        if not isinstance(target, ast.Name) or not isinstance(behind, ast.Expr):
            continue
        if isinstance(behind.value, ast.Constant) and isinstance(behind.value.value, str):
            yield target.id, " ".join(behind.value.value.split())
