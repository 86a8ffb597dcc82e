"""The documents say what is there: links, examples, events, errors, configuration, names of the code, states."""

from __future__ import annotations

import ast
import importlib
import json
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, get_type_hints

import msgspec
import pytest

from ksi import errors, providers
from ksi.cli import COMMANDS
from ksi.completion.pool.kinds import build_providers
from ksi.config import reader
from ksi.config import schema as configuration
from ksi.errors import FailureClass, KsiError
from ksi.events.completions import CompletionData, RequestReply
from ksi.events.specs import SPECS
from ksi.protocol import Envelope, convert, field_names
from ksi.request import FINAL_STATES, FIRST_STATES, TRANSITIONS
from ksi.store.base import Store
from ksi.testing import SimulatedClock
from tools import reference

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
EVENTS = ROOT / "docs" / "reference" / "events.md"
ERRORS = ROOT / "docs" / "reference" / "errors.md"
CONFIGURATION = ROOT / "docs" / "reference" / "configuration.md"
SHIPPED = ROOT / "ksi.toml"

# What stands in a page's code blocks, its prose, its headings.


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced code of a page in one of these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def prose(page: Path) -> str:
    """A page without its fenced code."""
    return re.sub(r"^```\w*\n.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


@cache
def anchors(page: Path) -> frozenset[str]:
    """What a link can name in a page, as GitHub makes it from headings."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


def sections(page: Path, level: int) -> dict[str, str]:
    """A page's text under each heading of a level, by the heading."""
    parts = re.split(rf"^{'#' * level} +(.+)$", page.read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows, without headers' rules."""
    lines = [line.strip()[1:-1] for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]
    return [row for row in cells if not set(row[0]) <= {"-", " ", ""}]


def name_of(page: Path) -> str:
    """A page's path in the checkout."""
    return str(page.relative_to(ROOT))


# Links.


def test_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            path, _, anchor = target.partition("#")
            if "://" in path:
                continue
            there = (page.parent / path).resolve() if path else page
            if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
                broken.append(f"{name_of(page)}: {target}")
    assert broken == []


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    targets = re.findall(r"\]\(([^)#]+)", prose(index))
    linked = {index, *((index.parent / target).resolve() for target in targets)}
    assert [name_of(page) for page in PAGES if page.is_relative_to(index.parent) and page not in linked] == []


@pytest.mark.parametrize("page", reference.PAGES, ids=name_of)
def test_the_tables_of_the_reference_are_those_that_the_types_make(page: Path) -> None:
    text = page.read_text("utf-8")
    assert reference.REGION.findall(text)
    assert text == reference.filled(text), "run `.venv/bin/python tools/reference.py`"


# Examples.


def json_values(text: str) -> Iterator[Any]:
    """The JSON values of a block, one after the other."""
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        yield value
        at += len(text[at:]) - len(text[at:].lstrip())


def check_message(message: dict[str, Any]) -> None:
    """A request's data are its event's; a reply's or pushed event's too; an error's code exists."""
    if "error" in message:
        assert message["error"]["code"] in codes(), message
        return
    spec = SPECS[message["event"]]
    if "timestamp" not in message:
        assert spec.request is not None, message
        convert(msgspec.convert(message, Envelope).data, spec.request)
        assert message["data"].keys() <= field_names(spec.request), message
    elif spec.reply is not None:
        # A known id is answered as it stands.
        known = spec.name == "completion:async" and not message["data"].keys() <= field_names(spec.reply)
        kind = RequestReply if known else spec.reply
        assert message["data"].keys() <= field_names(kind), message
        convert(message["data"], kind)


def test_json_examples_are_messages_of_the_wire() -> None:
    examples = [message for page in PAGES for block in blocks(page, "json") for message in json_values(block)]
    assert len(examples) > 60
    for message in examples:
        check_message(message)


def test_events_in_shell_examples_are_messages_of_the_wire() -> None:
    shell = "\n".join(block for page in PAGES for block in blocks(page, "sh"))
    lines = re.findall(r"'(\{\"event\".*?\})'", shell)
    assert len(lines) > 3
    for line in lines:
        check_message(json.loads(line))
    sent = re.findall(r"ksi send (\S+:\S+)(?: '(\{.*?\})')?", shell)
    assert len(sent) > 15
    for event, data in sent:
        check_message({"event": event, "data": json.loads(data or "{}")})


def test_shell_examples_use_commands_that_exist() -> None:
    shell = "\n".join(block for page in PAGES for block in blocks(page, "sh"))
    used = {words.split()[-1] for words in re.findall(r"(?:^|[\s(])\./ksi((?: --\w+ \S+)* [a-z]+)", shell)}
    assert len(used) > 15
    assert used - {*COMMANDS, "test"} == set()


def test_python_examples_compile() -> None:
    examples = [(page, block) for page in PAGES for block in blocks(page, "python")]
    assert len(examples) > 5
    for page, block in examples:
        compile(block, name_of(page), "exec")


def test_toml_examples_load(tmp_path: Path) -> None:
    examples = [block for page in PAGES for block in blocks(page, "toml")]
    assert len(examples) > 10
    for block in examples:
        (tmp_path / "ksi.toml").write_text(block)
        reader.load(tmp_path, {})


# The event reference.


def event_sections() -> dict[str, str]:
    """The reference's text on each event, with the shared shapes that it refers to."""
    text = {heading.strip("`"): body for heading, body in sections(EVENTS, 3).items()}
    shared = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"): body for heading, body in text.items()}
    return {
        heading: body + "".join(shared.get(anchor, "") for anchor in re.findall(r"\]\(#([\w-]+)\)", body))
        for heading, body in text.items()
        if ":" in heading
    }


def test_the_event_reference_has_every_event_and_no_other() -> None:
    assert sorted(event_sections()) == sorted(SPECS)


@pytest.mark.parametrize("name", SPECS)
def test_the_event_reference_names_every_field(name: str) -> None:
    spec, text = SPECS[name], event_sections()[name]
    assert spec.doc in text
    fields = {row[0].strip("`") for row in rows(text)}
    for kind in (spec.request, spec.reply):
        if kind is not None:
            assert field_names(kind) - fields == set()


@pytest.mark.parametrize("name", SPECS)
def test_the_event_reference_explains_every_field_that_its_examples_show(name: str) -> None:
    text = event_sections()[name]
    named = {row[0].strip("`") for row in rows(text)}
    examples = [m for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL) for m in json_values(block)]
    mine = [message for message in examples if message["event"] == name]
    assert mine
    for message in mine:
        assert message.get("data", {}).keys() - named == set()


def test_the_fields_of_a_completion_are_those_of_its_type() -> None:
    # The tables of its fields' own types stand behind the first.
    own = sections(EVENTS, 3)["A completion's fields"].partition("\nIn `")[0]
    told = [row[0].strip("`") for row in rows(own)][1:]
    assert sorted(told) == sorted(field_names(CompletionData))


# The error reference.


def error_classes(base: type[KsiError] = KsiError) -> Iterator[type[KsiError]]:
    """All errors."""
    for kind in base.__subclasses__():
        yield kind
        yield from error_classes(kind)


def codes() -> set[str]:
    """All codes of the wire."""
    return {kind.code for kind in error_classes() if kind is not errors.ProviderError} | set(FailureClass)


def test_the_error_reference_has_every_code() -> None:
    told = {row[0].strip("`"): (row[1].strip("`"), row[2]) for row in rows(sections(ERRORS, 2)["Codes"])[1:]}
    groups = {errors.ProtocolError, errors.ServiceError, errors.StoreError, errors.ProviderError, errors.RemoteError}
    classes = [kind for kind in error_classes() if kind not in groups and kind.__module__ == errors.__name__]
    assert told == {kind.code: (kind.__name__, "yes" if kind.retryable else "no") for kind in classes}


def test_the_error_reference_has_every_failure_class() -> None:
    told = {row[0].strip("`"): row[1] for row in rows(sections(ERRORS, 2)["Failure classes"])[1:]}
    assert told == {failure.value: "yes" if failure.retryable else "no" for failure in FailureClass}


def test_the_error_reference_draws_the_tree() -> None:
    tree = sections(ERRORS, 2)["The tree"]
    ours = (kind for kind in error_classes() if kind.__module__ == errors.__name__)
    assert [kind.__name__ for kind in ours if not re.search(rf"── {kind.__name__}\b", tree)] == []


# The configuration: its reference, and the file that is shipped.


def parts() -> dict[str, type[msgspec.Struct]]:
    """The sections of the configuration, by their names."""
    tables = {"home", "providers", "sources", "models", "prices", "budgets"}
    return {name: kind for name, kind in get_type_hints(configuration.Config).items() if name not in tables}


def defaults(kind: type[msgspec.Struct], *without: str) -> dict[str, Any]:
    """The keys of a part with their defaults, as TOML would have them; "required" where there is none."""
    found: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        if field.name in without:
            continue
        value = field.default
        if value is msgspec.NODEFAULT:
            value = "required" if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        found[field.name] = msgspec.to_builtins(value)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def told_defaults(text: str) -> dict[str, Any]:
    """The keys and defaults of a table of the reference."""
    found: dict[str, Any] = {}
    for key, default, *_ in rows(text)[1:]:
        word = default.strip("`")
        found[key.strip("`")] = {"none": None, "required": "required"}.get(word, ...)
        if found[key.strip("`")] is ...:
            found[key.strip("`")] = json.loads(word)
    return found


def kinds() -> dict[str, Any]:
    """The modules and packages of `ksi.providers` that are a provider's kind, by the kind's name."""
    names = sorted(module.name for module in iter_modules(providers.__path__))
    modules = {name.replace("_", "-"): importlib.import_module(f"ksi.providers.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "build")}
    found = {
        module.name: importlib.import_module(f"ksi.providers.{module.name}")
        for module in iter_modules(providers.__path__)
    }
    return {name.replace("_", "-"): module for name, module in sorted(found.items()) if hasattr(module, "build")}


def test_the_configuration_reference_has_every_key_with_its_default() -> None:
    told = {heading.strip("`[]"): text for heading, text in sections(CONFIGURATION, 2).items()}
    for name, kind in parts().items():
        assert told_defaults(told[name]) == defaults(kind, "head_start"), name
    assert told_defaults(told["queue.head_start"]) == defaults(configuration.HeadStart)
    assert told_defaults(told["Models"]) == defaults(configuration.ModelConfig)
    assert told_defaults(told["Prices"]) == defaults(configuration.PriceConfig)
    assert told_defaults(told["Budgets"]) == defaults(configuration.BudgetConfig)
    common = told["Providers"].partition("### kind")[0]
    expected = defaults(configuration.ProviderConfig, "options")
    assert told_defaults(common) == expected


def test_the_configuration_reference_has_every_kind_of_provider() -> None:
    told = {
        heading.removeprefix("kind ").strip("`"): text.partition("\n## ")[0]
        for heading, text in sections(CONFIGURATION, 3).items()
        if heading.startswith("kind ")
    }
    assert sorted(told) == sorted(kinds())
    for name, module in kinds().items():
        assert told_defaults(told[name]) == defaults(module.Options), name


def uncommented() -> str:
    """The shipped file with every key taken out of its comment."""
    return re.sub(r"^#(?=\[|[a-z_]+ = )", "", SHIPPED.read_text("utf-8"), flags=re.MULTILINE)


def test_the_shipped_configuration_changes_nothing(tmp_path: Path) -> None:
    shipped = reader.load(ROOT, {})
    assert msgspec.structs.replace(shipped, home=tmp_path) == reader.load(tmp_path, {})


def test_the_shipped_configuration_shows_every_key_with_its_default() -> None:
    tree = tomllib.loads(uncommented())
    starts = tree["queue"].pop("head_start")
    assert starts == defaults(configuration.HeadStart)
    for name, kind in parts().items():
        known = defaults(kind, "head_start")
        assert sorted(tree[name]) == sorted(known), name
        # A key without a default has an example.
        assert {k: v for k, v in tree[name].items() if known[k] is not None} == {
            k: v for k, v in known.items() if v is not None
        }, name


def test_the_shipped_configuration_comments_every_key_and_every_provider() -> None:
    group_has_comment = False
    for line in SHIPPED.read_text("utf-8").splitlines():
        if line.startswith("# "):
            group_has_comment = True
        elif not line:
            group_has_comment = False
        elif re.match(r"#?[a-z_]+ = ", line):
            assert group_has_comment, line
    text = SHIPPED.read_text("utf-8")
    for key in defaults(configuration.ProviderConfig, "options", "kind"):
        assert re.search(rf"^#   {key}\b", text, re.MULTILINE), key


def test_everything_in_the_shipped_configuration_can_be_switched_on(tmp_path: Path) -> None:
    (tmp_path / "ksi.toml").write_text(uncommented())
    loaded = reader.load(tmp_path, {})
    assert set(build_providers(loaded, {}, SimulatedClock())) == set(loaded.providers)
    assert {provider.kind for provider in loaded.providers.values()} == set(kinds())


def test_the_stub_is_no_default() -> None:
    providers = reader.load(ROOT, {}).providers.values()
    assert [provider.kind for provider in providers] == ["local"]


# The architecture.

ARCHITECTURE = ROOT / "ARCHITECTURE.md"
STATES = ROOT / "docs" / "reference" / "states.md"
STORES = ROOT / "docs" / "discussions" / "inside-the-stores.md"


def test_the_architecture_is_read_in_ten_minutes() -> None:
    assert len(ARCHITECTURE.read_text("utf-8").splitlines()) <= 200


def test_the_drawn_states_are_the_state_table() -> None:
    (drawing,) = blocks(STATES, "mermaid")
    arrows = re.findall(r"^\s*(\S+) --> (\S+)$", drawing, re.MULTILINE)
    table = [(before.value, after.value) for before, afters in TRANSITIONS.items() for after in afters]
    table += [("[*]", first.value) for first in FIRST_STATES]
    table += [(final.value, "[*]") for final in FINAL_STATES]
    assert sorted(arrows) == sorted(table)


def test_the_states_are_explained() -> None:
    told = {row[0].strip("`") for row in rows(STATES.read_text("utf-8"))[1:]}
    assert told == {state.value for state in TRANSITIONS}


@cache
def names_of_the_code() -> frozenset[str]:
    """Every class, function and method as it can be named: `function`, `Class`, `Class.method`, `CONSTANT`."""
    found: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found |= {node.name, *(f"{node.name}.{member}" for member in members(node))}
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(found)


def members(node: ast.ClassDef) -> Iterator[str]:
    """A class's methods and fields."""
    for part in node.body:
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
            yield part.name
        elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            yield part.target.id


def test_documents_name_code_that_exists() -> None:
    unknown = []
    for page in PAGES:
        for word in re.findall(r"`([^`\n]+)`", prose(page)):
            if re.fullmatch(r"[A-Z]\w+\.\w+", word) and not word.endswith(".md") and word not in names_of_the_code():
                unknown.append(f"{name_of(page)}: {word}")
    assert unknown == []


def test_documents_name_files_that_exist() -> None:
    missing = []
    store = ROOT / "src" / "ksi" / "store"
    places = [ROOT, ROOT / "src" / "ksi", store, store / "sqlite", store / "redis"]
    planned = {place for row in rows((ROOT / "docs" / "promises.md").read_text("utf-8")) for place in row[3:4]}
    for page in PAGES:
        for word in re.findall(r"`([\w./-]+(?:\.(?:py|sql|toml|md|sh)|/))`", prose(page)):
            if word.startswith("var/") or any(word in place for place in planned):
                continue
            if not any((place / word).exists() for place in places):
                missing.append(f"{name_of(page)}: {word}")
    assert missing == []


def test_the_house_is_drawn_as_it_stands() -> None:
    house = blocks(ARCHITECTURE, "")[0]
    drawn = set(re.findall(r"^  ([\w.]+)/? ", house, re.MULTILINE))
    there = {p.name for p in (ROOT / "src" / "ksi").iterdir() if p.name != "__pycache__"}
    assert drawn - there == set()
    assert there - drawn == {"py.typed"}


def test_the_store_s_verbs_and_tables_are_named() -> None:
    store = sections(ARCHITECTURE, 2)["The store"] + STORES.read_text("utf-8")
    told = {word for row in rows(store) for word in re.findall(r"`(\w+)`", row[0])}
    schema = (ROOT / "src" / "ksi" / "store" / "sqlite" / "sql" / "schema.sql").read_text("utf-8")
    tables = set(re.findall(r"CREATE TABLE (\w+)", schema))
    assert {name for name in vars(Store) if not name.startswith("_")} | tables <= told
    indexes = re.findall(r"CREATE (?:UNIQUE )?INDEX (\w+) ON request ", schema)
    assert set(indexes) <= told


# The rest.


def test_the_changelog_has_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)


def test_the_readme_begins_with_the_two_commands() -> None:
    first, second = (block.strip() for block in blocks(ROOT / "README.md", "sh")[:2])
    assert first.startswith("./ksi ask ")
    assert second == "./ksi test"
