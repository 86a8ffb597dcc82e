"""A batch's files: names of lines, mistakes, torn ends, order."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import click
import pytest

from ksi.cli.batch_files import Input, Results


def names(path: Path, text: str, run: str = "") -> list[str]:
    path.write_text(text)
    prompts = Input(path, run)
    prompts.close()
    return [item.name for item in prompts.items]


@pytest.mark.promise("U3")
def test_a_line_keeps_its_name_in_any_place_and_twins_are_distinguished(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    one, two = names(path, '"a"\n"b"\n')
    assert all(re.fullmatch("batch_[0-9a-f]{26}", name) for name in (one, two))
    assert names(path, '{"prompt": "new"}\n\n  "b"  \n"a"')[1:] == [two, one]
    first, second, third = names(path, '"a"\n"a"\n"a"\n')
    assert (first, len({first, second, third})) == (one, 3)
    assert not set(names(path, '"a"\n"b"\n', run="once more")) & {one, two}


@pytest.mark.promise("U3")
def test_a_line_is_a_string_or_an_object(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf"caf\xc3\xa9"\r\n{"prompt": "x", "custom_id": {"any": 1}}\r\n')
    prompts = Input(path, "")
    assert [prompts.fields(item) for item in prompts.items] == [
        {"prompt": "café"},
        {"prompt": "x", "custom_id": {"any": 1}},
    ]
    prompts.close()


@pytest.mark.promise("U3")
@pytest.mark.parametrize(
    ("line", "mistake"),
    [
        ("{", "not JSON"),
        ("[1]", "neither an object nor a string"),
        ('{"promt": "x"}', "unknown field 'promt'; did you mean 'prompt'?"),
        ('{"prompt": "x", "max_tokens": 0}', "max_tokens"),
        ('{"prompt": "x", "request_id": "r"}', "use custom_id"),
        ('{"prompt": "x", "stream": true}', "stream"),
        ("{}", "give either prompt or messages"),
        ('" "', "must not be empty"),
    ],
)
def test_every_line_is_checked_before_anything_is_asked(tmp_path: Path, line: str, mistake: str) -> None:
    with pytest.raises(click.UsageError, match="no request was sent") as caught:
        names(tmp_path / "in.jsonl", f'"fine"\n\n{line}\n')
    assert f"line 3: {mistake}" in caught.value.message or mistake in caught.value.message
    assert "line 3: " in caught.value.message


def test_broken_bytes_are_a_mistake_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'"fine"\n"caf\xe9"\n')
    with pytest.raises(click.UsageError, match="line 2: not JSON"):
        Input(tmp_path / "in.jsonl", "")


def entries(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.promise("U3")
@pytest.mark.parametrize("torn", ['{"item": "c", "resu', '{"item": "c\xc3', "{"])
def test_a_torn_last_line_is_cut_off_and_an_added_one_is_separate(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"item": "a"}\n{"item": "b"}\n' + torn)
    results = Results(path)
    assert set(results.known) == {"a", "b"}
    results.add({"item": "c", "result": "x"})
    results.close(keep_empty=True)
    assert [entry["item"] for entry in entries(path)] == ["a", "b", "c"]


@pytest.mark.promise("U3")
def test_a_whole_last_line_without_its_newline_counts(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"item": "a"}\n{"item": "b"}')
    results = Results(path)
    results.add({"item": "c"})
    results.close(keep_empty=True)
    assert [entry["item"] for entry in entries(path)] == ["a", "b", "c"]


@pytest.mark.promise("U3")
def test_another_program_s_file_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text('my notes\n{"item": "a"}\n')
    with pytest.raises(click.UsageError, match="line 1, is no result of a batch"):
        Results(path)
    assert path.read_text().startswith("my notes\n")
    with pytest.raises(click.UsageError, match="is no file"):
        Results(Path(os.devnull))


@pytest.mark.promise("U3")
def test_two_batches_cannot_write_one_file(tmp_path: Path) -> None:
    results = Results(tmp_path / "out.jsonl")
    with pytest.raises(click.UsageError, match="another batch writes"):
        Results(tmp_path / "out.jsonl")
    results.close(keep_empty=False)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.promise("U3")
def test_results_are_brought_into_order_each_once_and_the_latest(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    real = tmp_path / "real.jsonl"
    path.symlink_to(real)
    real.touch(mode=0o640)
    results = Results(path)
    for entry in ({"item": "old", "line": 1}, {"item": "b", "result": 1}, {"item": "a"}, {"item": "b", "result": 2}):
        results.add(entry)
    results.rewrite({"a": 1, "b": 2, "c": 3})
    results.close(keep_empty=True)
    assert entries(real) == [
        {"item": "a", "line": 1},
        {"item": "b", "line": 2, "result": 2},
        {"item": "old", "line": 1},
    ]
    assert path.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    again = Results(path)
    inode = real.stat().st_ino
    again.rewrite({"a": 1, "b": 2, "c": 3})
    assert real.stat().st_ino == inode  # nothing to do
    again.rewrite({}, without={"a", "b", "old"})
    again.close(keep_empty=False)
    assert not real.exists()
