"""Tables at a terminal: they fit, and cut neither an id nor a number."""

from __future__ import annotations

import os
import re

import pytest
from rich.cells import cell_len

from ksi.cli import render
from ksi.cli.render import Painter
from ksi.cli.tables import drawn

COLUMNS = ("request", "status", "conversation", "priority", "model", "agent", "attempt", "enqueued", "due", "error")
ID, OTHER, TALK = f"req_{'1a' * 13}", f"req_{'2b' * 13}", f"conv_{'3c' * 13}"
ROWS = (
    (ID, "queued", TALK, "normal", "claude-cli/sonnet", "planner", "1234567", "12:00:00", "-", "-"),
    (OTHER, "failed", TALK, "background", "team/large-1", "-", "1", "2026-01-01 12:00:00", "-", "no answer " * 20),
)
PLAIN = Painter(False)


def lines(width: int, title: str | None = None) -> list[str]:
    return list(drawn(COLUMNS, ROWS, title=title, width=width, paint=PLAIN))


@pytest.mark.promise("U1")
@pytest.mark.parametrize("width", [40, 60, 80, 100, 132, 200, 400])
def test_a_table_fits_and_cuts_neither_an_id_nor_a_number(width: int) -> None:
    shown = lines(width)
    assert all(cell_len(line) <= max(width, cell_len(f"  conversation {TALK}")) for line in shown)
    text = "\n".join(shown)
    for word in (ID, OTHER, TALK, "1234567", "2026-01-01 12:00:00", "claude-cli/sonnet", "background"):
        assert word in text, (width, word)


@pytest.mark.promise("U1")
def test_a_column_without_any_value_is_left_away() -> None:
    head = lines(400)[0]
    assert "due" not in head.split()
    assert "error" in head.split()


@pytest.mark.promise("U1")
def test_words_that_do_not_fit_are_cut_and_say_so() -> None:
    wide = list(drawn(("request", "error"), ((ID, "no answer " * 20),), title=None, width=80, paint=PLAIN))
    assert cell_len(wide[-1]) <= 80
    assert wide[-1].startswith(f"{ID}  no answer")
    assert wide[-1].endswith("…")


def test_a_table_without_rows_has_its_columns() -> None:
    assert list(drawn(("name", "n"), (), title="things", width=80, paint=PLAIN))[:2] == ["things", "name  n"]


def test_wide_characters_take_two_cells() -> None:
    shown = list(drawn(("name", "n"), (("日本", "1"), ("a", "2")), title=None, width=80, paint=PLAIN))
    assert shown[-2:] == ["日本  1", "a     2"]


@pytest.mark.promise("U1")
def test_states_have_colours_unless_no_color_forbids_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    rows = ((ID, "failed", "failed"), (OTHER, "completed", "x"))
    render.table(("request", "status", "model"), rows)
    render.figures({"status": "degraded", "other": "degraded"})
    out = capsys.readouterr().out
    assert out.count("\x1b[31mfailed") == 1  # the state, and not the model of that name
    assert "\x1b[32mcompleted" in out
    assert out.count("\x1b[33mdegraded") == 1
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            render.table(("request", "status", "model"), rows)
            assert "\x1b" not in capsys.readouterr().out


def test_the_width_is_the_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((97, 20)))
    assert render.terminal_width() == 97


@pytest.mark.promise("U1", "S3")
def test_json_holds_nothing_that_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "A\x1b]52;c;ZXZpbA==\x07B\x9b31m\x9d52;c;eA\x9c\u202eF\rG\x08\x7f\u200b\u2066\u00ad\x85\u2028Q\U000e0041 ☃é"
    render.json_line({"text": evil, evil: 1})
    out = capsys.readouterr().out
    assert out.rstrip("\n").isprintable()
    assert "☃é" in out
    import json

    assert json.loads(out) == {"text": evil, evil: 1}


@pytest.mark.promise("S3")
def test_names_of_figures_are_spelt_out_too(capsys: pytest.CaptureFixture[str]) -> None:
    render.figures({"ready for up/m\x1b[2J": 1})
    assert re.fullmatch(r"ready for up/m\\x1b\[2J  1\n", capsys.readouterr().out)
