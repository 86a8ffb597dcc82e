"""`ksi search`, `export`, `rename` and `delete` as people and scripts use them."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from ksi.cli.settings import Exit
from tests.daemon_process import make_home
from tests.integration.test_cli import ksi, rows

pytestmark = pytest.mark.promise("V4")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    make_home(tmp_path)
    for prompt in ("How far is Orléans?", "# Is that far?\n\nBy train?"):
        assert ksi(tmp_path, "ask", "--session", "trip", "--system", "Be brief.", prompt).returncode == 0
    yield tmp_path
    ksi(tmp_path, "stop")


def test_an_owner_takes_a_conversation_from_its_search_to_its_end(home: Path) -> None:
    found = ksi(home, "search", "orleans")
    assert found.returncode == 0
    assert "trip" in found.stdout
    assert "How far is Orléans?" in found.stdout
    assert len(rows(ksi(home, "search", "far", "--json"))) == 2
    nothing = ksi(home, "search", "nowhere")
    assert (nothing.returncode, nothing.stdout) == (Exit.NOT_FOUND, "")
    assert ksi(home, "search", "--", "--").returncode == Exit.USAGE

    out = home / "trip.md"
    assert ksi(home, "export", "trip", "-o", str(out)).returncode == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    text = out.read_text()
    assert text.startswith("# trip\n")
    assert text.index("How far is Orléans?") < text.index("By train?")
    assert "### System\n\nBe brief.\n" in text
    assert "\n\\# Is that far?\n" in text
    refused = ksi(home, "export", "trip", "-o", str(out))
    assert refused.returncode == Exit.FAILED
    assert "trip.md" in refused.stderr
    whole = json.loads(ksi(home, "export", "trip", "--json").stdout)
    assert next(turn["content"]["prompt"] for turn in whole["turns"]) == "How far is Orléans?"

    assert "trip is now journey" in ksi(home, "rename", "trip", "journey").stdout
    assert ksi(home, "log", "trip").returncode == 0
    asked = ksi(home, "delete", "journey")
    assert asked.returncode == Exit.USAGE
    assert "--yes" in asked.stderr
    gone = ksi(home, "delete", "journey", "--yes")
    assert "deleted journey: 2 turns, 2 requests" in gone.stdout
    assert "KSI cannot reach:" in gone.stdout
    assert ksi(home, "log", "journey").returncode == Exit.NOT_FOUND
    assert ksi(home, "delete", "journey", "--yes").returncode == Exit.NOT_FOUND
