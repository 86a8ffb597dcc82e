"""Fill the tables of docs/reference/ from the types: `.venv/bin/python tools/reference.py`. The tests compare them.

A page says where a table stands: everything between `<!-- fields: TYPE, ... -->`, `<!-- keys: TYPE -->`,
`<!-- codes -->`, `<!-- tree -->`, `<!-- failures -->` or `<!-- metrics -->` and the next `<!-- end -->` is made
here. The rest is written by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from ksi import errors
from ksi.cli.reference import fields_of
from ksi.config import schema as config
from ksi.errors import FailureClass, KsiError
from ksi.events.descriptions import descriptions, held_by, structs_in
from ksi.events.specs import SPECS, schema_of
from ksi.http.metrics import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "docs" / "reference" / name for name in ("events.md", "errors.md", "configuration.md", "metrics.md")]
REGION = re.compile(r"<!-- (fields|keys|codes|tree|failures|metrics)(?:: ([\w, .-]+))? -->\n.*?<!-- end -->", re.DOTALL)


def filled(page: str) -> str:
    """A page with its tables as the types have them."""
    return REGION.sub(_region, page)


def _region(found: re.Match[str]) -> str:
    kind, names = found[1], [name.strip() for name in (found[2] or "").split(",")]
    makers: Mapping[str, Callable[[], str]] = {
        "fields": lambda: fields(names),
        "keys": lambda: keys(names[0]),
        "codes": codes,
        "tree": tree,
        "failures": failures,
        "metrics": metrics,
    }
    begin = found[0].partition("\n")[0]
    return f"{begin}\n\n{makers[kind]()}\n\n<!-- end -->"


def metrics() -> str:
    """Every metric that the daemon tells."""
    rows = (
        (f"`{one.name}`", one.kind, ", ".join(f"`{label}`" for label in one.labels), one.help)
        for one in FAMILIES.values()
    )
    return table("| metric | kind | labels | meaning |", rows)


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    rule = "| " + " | ".join("---" for _ in head.split("|")[1:-1]) + " |"
    lines = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n".join([head, rule, *lines])


def fields(names: list[str]) -> str:
    """A type's fields, then those of the types that its fields hold, each after a line that says where."""
    known = structs_in(kind for spec in SPECS.values() for kind in (spec.request, spec.reply) if kind is not None)
    parts = []
    for place, name in enumerate(names):
        if place:
            parts.append(f"{_place(known, names[:place], name)}:")
        shown, texts = schema_of(known[name]), _linked(known[name])
        rows = (
            (f"`{field}`", kind, "required" if needed else _default(default), texts.get(field, meaning))
            for field, kind, needed, default, meaning in fields_of(shown["it"], shown)
        )
        parts.append(table("| field | type | | meaning |", rows))
    return "\n\n".join(parts)


def _linked(kind: type[msgspec.Struct]) -> dict[str, str]:
    """The fields' texts with their links, by the fields' names on the wire."""
    texts = descriptions(kind)
    return {field.encode_name: texts[field.name] for field in msgspec.structs.fields(kind) if field.name in texts}


def _place(known: Mapping[str, type[msgspec.Struct]], owners: list[str], name: str) -> str:
    """Where a type is used: the fields of the types before it."""
    used = [
        f"`{field.encode_name}`"
        for owner in owners
        for field in msgspec.structs.fields(known[owner])
        if known[name] in held_by(field.type)
    ]
    return f"In {' and '.join(used)}"


def _default(default: Any) -> str:
    return "" if default in (None, [], {}, False) else f"`{json.dumps(default)}`"


def keys(name: str) -> str:
    """A section of the configuration, or the options of a kind of provider."""
    of_kind = name.removeprefix("kind ")
    kind = (
        import_module(f"ksi.providers.{of_kind.replace('-', '_')}").Options
        if of_kind != name
        else getattr(config, name)
    )
    texts = descriptions(kind)
    rows = [
        (f"`{field.encode_name}`", _shown(field), texts.get(field.name, ""))
        for field in msgspec.structs.fields(kind)
        if field.name not in ("head_start", "options")
    ]
    return table("| key | default | meaning |", rows)


def _shown(field: msgspec.structs.FieldInfo) -> str:
    if field.default_factory is not msgspec.NODEFAULT:
        value = field.default_factory()
    elif field.default is not msgspec.NODEFAULT:
        value = field.default
    else:
        return "required"
    return "none" if value is None else f"`{json.dumps(msgspec.to_builtins(value))}`"


def classes(base: type[KsiError] = KsiError) -> Iterator[type[KsiError]]:
    """All errors of the tree, each before its kinds."""
    for kind in base.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield kind
            yield from classes(kind)


def codes() -> str:
    """The codes of the wire."""
    without = (errors.ProtocolError, errors.ServiceError, errors.StoreError, errors.ProviderError, errors.RemoteError)
    rows = [
        (
            f"`{kind.code}`",
            f"`{kind.__name__}`",
            "yes" if kind.retryable else "no",
            " ".join((kind.__doc__ or "").split()),
        )
        for kind in classes()
        if kind not in without
    ]
    return table("| code | class | retryable | meaning |", rows)


def tree() -> str:
    """The classes, each under its own."""
    return "\n".join(["```", KsiError.__name__, *_branches(KsiError, ""), "```"])


def _branches(base: type[KsiError], lead: str) -> Iterator[str]:
    kinds = [kind for kind in base.__subclasses__() if kind.__module__ == errors.__name__]
    for place, kind in enumerate(kinds, 1):
        last = place == len(kinds)
        yield f"{lead}{'└' if last else '├'}── {kind.__name__}"
        yield from _branches(kind, lead + ("    " if last else "│   "))


def failures() -> str:
    """The classes of failed attempts."""
    texts = descriptions(FailureClass)
    rows = [(f"`{one.value}`", "yes" if one.retryable else "no", texts.get(one.name, "")) for one in FailureClass]
    return table("| class | tried again | meaning |", rows)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text("utf-8")), "utf-8")
