"""An exported conversation reads as it was said."""

from __future__ import annotations

import pytest

from ksi.cli.export import _quiet

pytestmark = pytest.mark.promise("V4")


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("plain \\ text  with\ttabs", "plain \\ text  with\ttabs"),
        ("# A heading\n\ntext", "\\# A heading\n\ntext"),
        ("#hashtag and `code` stay", "#hashtag and `code` stay"),
        ("```sh\n# a comment\n```\n# outside", "```sh\n# a comment\n```\n\\# outside"),
        ("~~~\n```\n# inside\n~~~\n## outside", "~~~\n```\n# inside\n~~~\n\\## outside"),
        ("````\n```\n# inside\n```\n````", "````\n```\n# inside\n```\n````"),
        ("cut in its code:\n```python\nprint(1)", "cut in its code:\n```python\nprint(1)\n```"),
        ("```\n``` not the end\n```", "```\n``` not the end\n```"),
    ],
)
def test_text_keeps_its_form_and_takes_nothing_of_the_file_with_it(said: str, written: str) -> None:
    assert _quiet(said) == written
