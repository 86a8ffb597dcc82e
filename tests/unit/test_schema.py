"""The schema documents: complete, in themselves whole, and enough to make a typed client from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tree_sitter_typescript
from tree_sitter import Language, Node, Parser

from ksi.events.specs import SCOPES, SPECS
from ksi.http.schema import asyncapi, json_schema
from ksi.protocol import field_names
from tests.typescript import generate


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "$ref":
                yield inner
            else:
                yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def resolve(document: Any, reference: str) -> Any:
    assert reference.startswith("#/")
    for step in reference[2:].split("/"):
        document = document[step]
    return document


@pytest.mark.promise("H4")
def test_the_schema_has_every_event_with_its_scope_and_every_field() -> None:
    schema = json_schema()
    assert schema["events"].keys() == SPECS.keys()
    for name, spec in SPECS.items():
        event = schema["events"][name]
        assert event.get("scope") == (SCOPES[name].word if spec.incoming else None)
        for field, kind in (("request", spec.request), ("reply" if spec.incoming else "data", spec.reply)):
            if kind is not None:
                assert resolve(schema, event[field]["$ref"])["properties"].keys() == field_names(kind)


@pytest.mark.promise("H4")
@pytest.mark.parametrize("document", [json_schema(), asyncapi()], ids=["schema", "asyncapi"])
def test_every_reference_leads_somewhere_in_the_same_document(document: Any) -> None:
    found = set(references(document))
    assert len(found) > 50
    for reference in found:
        assert isinstance(resolve(document, reference), dict)


@pytest.mark.promise("H4")
def test_the_asyncapi_document_has_incoming_events_with_their_replies_and_outgoing_ones() -> None:
    document = asyncapi()
    assert document["asyncapi"] == "3.0.0"
    operations = document["operations"]
    assert operations.keys() == {name.replace(":", "_") for name in SPECS}
    for name, spec in SPECS.items():
        operation = operations[name.replace(":", "_")]
        assert operation["action"] == ("receive" if spec.incoming else "send")
        (message,) = operation["messages"]
        # An operation's message is one of its channel's, as the standard has it.
        assert message["$ref"].startswith(operation["channel"]["$ref"] + "/messages/")
        payload = resolve(document, resolve(document, message["$ref"])["$ref"])["payload"]
        assert payload["properties"]["event"] == {"const": name}
        assert ("reply" in operation) is spec.incoming


def faults(node: Node) -> Iterator[str]:
    if node.is_error or node.is_missing:
        yield f"{node.type} at line {node.start_point.row + 1}"
    for child in node.children:
        yield from faults(child)


@pytest.mark.promise("H4")
def test_a_typescript_client_is_made_from_the_schema() -> None:
    source = generate(json_schema())
    tree = Parser(Language(tree_sitter_typescript.language_typescript())).parse(source.encode())
    assert list(faults(tree.root_node)) == []
    assert "export interface CompletionData {" in source
    assert '  "completion:request": CompletionData;' in source
    assert "  prompt?: string | null;" in source
    declared = {
        child.named_children[0].child_by_field_name("name").text.decode()  # type: ignore[union-attr]
        for child in tree.root_node.named_children
        if child.type == "export_statement"
    }
    assert {"Requests", "Replies", "Pushes", "Code", "Client", "RemoteError", "Push"} <= declared
