"""Files and folders for one user alone."""

from __future__ import annotations

import ast
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

import ksi
from ksi.host.private_files import close_to_others, is_still, make_folder, open_to_append


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.promise("O1", "S3")
def test_a_folder_and_all_that_is_made_above_it_are_for_this_user_only(tmp_path: Path, umask: int) -> None:
    folder = tmp_path / "var" / "logs" / "responses"
    make_folder(folder)
    make_folder(folder)
    assert [mode(path) for path in (folder, folder.parent, folder.parent.parent)] == [0o700] * 3


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_in_the_place_of_a_file_no_folder_is_made(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OSError, match="file"):
        make_folder(tmp_path / place)


@pytest.mark.promise("O1", "S3")
def test_a_file_is_made_for_this_user_only_and_one_that_was_open_to_others_is_closed(
    tmp_path: Path, umask: int
) -> None:
    path = tmp_path / "daemon.log"
    os.close(open_to_append(path))
    assert mode(path) == 0o600
    path.chmod(0o644)
    descriptor = open_to_append(path)
    os.write(descriptor, b"added")
    os.close(descriptor)
    assert mode(path) == 0o600
    assert path.read_bytes() == b"added"


@pytest.mark.promise("O1", "S3")
def test_folders_below_the_home_are_closed_to_others_and_the_home_is_left_as_it_is(tmp_path: Path) -> None:
    home = tmp_path / "home"
    folder = home / "var" / "db"
    folder.mkdir(parents=True)
    for path in (home, folder.parent, folder):
        path.chmod(0o777)
    close_to_others(folder, home)
    assert [mode(path) for path in (home, folder.parent, folder)] == [0o777, 0o700, 0o700]
    close_to_others(home / "nowhere" / "at all", home)
    elsewhere = tmp_path / "shared"
    elsewhere.mkdir()
    elsewhere.chmod(0o777)
    close_to_others(elsewhere, home)
    assert mode(elsewhere) == 0o777


def test_a_path_leads_to_an_open_file_until_it_is_removed_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    descriptor = open_to_append(path)
    assert is_still(path, descriptor)
    path.rename(tmp_path / "moved")
    assert not is_still(path, descriptor)
    path.write_text("another")
    assert not is_still(path, descriptor)
    (tmp_path / "moved").rename(path)
    assert is_still(path, descriptor)
    os.close(descriptor)
    assert not is_still(path, descriptor)


SOURCES = sorted(Path(ksi.__file__).parent.rglob("*.py"))


@pytest.mark.promise("O1", "S3")
def test_no_module_makes_folders_that_the_umask_opens() -> None:
    assert len(SOURCES) > 200
    for source in SOURCES:
        if source.name == "private_files.py":
            continue
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr != "makedirs", source
                if node.func.attr == "mkdir":
                    # With `parents`, Python makes the folders above by the umask.
                    named = {word.arg: ast.literal_eval(word.value) for word in node.keywords}
                    assert named.get("mode") == 0o700, (source, node.lineno)
                    assert "parents" not in named, (source, node.lineno)
