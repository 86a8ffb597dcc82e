"""The page of the Python client: every block runs as it stands, and every public name is on it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ksi
from tests.daemon_process import DaemonProcess, clean_environ, make_home

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "python.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_every_public_name_is_on_the_page() -> None:
    assert [name for name in ksi.__all__ if not re.search(rf"\b(ksi\.)?{name}\b", PAGE)] == []
    assert len(BLOCKS) == 6


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_block_runs_as_it_stands(block: str, tmp_path: Path) -> None:
    home = make_home(tmp_path)
    with DaemonProcess(home):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", block],
            env={**clean_environ(), "KSI_HOME": str(home)},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout
