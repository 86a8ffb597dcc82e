"""What Claude Code did on its way, as blocks."""

from __future__ import annotations

from typing import Any

import pytest

from ksi.providers.claude_cli.trail import LONGEST, MOST, Trail


def result(content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "a", "content": content, **more}


@pytest.mark.promise("A3")
def test_an_answer_without_work_has_no_blocks() -> None:
    trail = Trail()
    trail.add([{"type": "thinking", "thinking": ""}, {"type": "tool_use", "id": "s", "name": "StructuredOutput"}])
    trail.add([{"type": "tool_result", "tool_use_id": "s", "content": "ok"}, {"type": "text", "text": "x"}])
    assert trail.content("answer") == ()


@pytest.mark.promise("A3")
@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("found", "found"),
        ([{"type": "text", "text": "a"}, {"type": "image", "source": {}}, 5], "a\n[image]"),
        (None, ""),
        (5, ""),
        ("x" * (LONGEST + 3), "x" * LONGEST + "\n[3 more characters were not kept]"),
    ],
)
def test_a_result_is_given_as_bounded_text(content: Any, told: str) -> None:
    trail = Trail()
    trail.add([result(content, is_error=True)])
    assert trail.content("answer")[0] == {
        "type": "server_tool_result",
        "tool_use_id": "a",
        "content": told,
        "is_error": True,
    }


@pytest.mark.promise("A3")
def test_the_first_steps_are_kept_and_the_others_counted() -> None:
    trail = Trail()
    trail.add([result(str(number)) for number in range(MOST + 2)])
    assert len(trail.content("answer")) == MOST + 1
    assert trail.more == 2
