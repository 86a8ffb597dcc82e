"""SpentLimit quotas by Claude Code's word: every known spelling of its sentence, and its `rate_limit_event`."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.providers.claude_cli.limits import named_zone, says_no_money, says_spent, spent
from ksi.providers.claude_cli.stream import Limited

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
BERLIN = ZoneInfo("Europe/Berlin")
"""An hour ahead of UTC at that time."""


def returns(said: str, *, now: datetime = NOW, limited: Limited | None = None) -> str | None:
    """When the limit of a sentence returns, in UTC; the program's clocks are those of Berlin."""
    wait = spent(said, limited, now=now.timestamp(), zone=BERLIN).wait
    return None if wait is None else f"{datetime.fromtimestamp(now.timestamp() + wait, UTC):%Y-%m-%d %H:%M}"


@pytest.mark.promise("F5")
@pytest.mark.parametrize(
    ("said", "at"),
    [
        ("You've hit your session limit · resets 3pm", "2026-03-01 14:00"),
        ("You've hit your session limit · resets 3:10pm (Europe/Berlin)", "2026-03-01 14:10"),
        ("You've hit your 5-hour limit · resets 12:51pm (UTC)", "2026-03-01 12:51"),
        ("5-hour limit reached ∙ resets 3pm", "2026-03-01 14:00"),
        ("Session limit reached ∙ resets 4:30pm\n /upgrade to increase your usage limit.", "2026-03-01 15:30"),
        ("You've hit your limit · resets 1:30am (Asia/Dhaka)", "2026-03-01 19:30"),
        ("You've hit your limit · resets 11am", "2026-03-02 10:00"),
        ("You've hit your limit · resets 12am (America/New_York)", "2026-03-02 05:00"),
        ("You've hit your limit · resets 12pm (America/New_York)", "2026-03-01 17:00"),
        ("Claude usage limit reached. Your limit will reset at 1pm (Etc/GMT+5).", "2026-03-01 18:00"),
        ("Claude usage limit reached. Your limit will reset at 9pm (Asia/Calcutta).", "2026-03-01 15:30"),
        ("Claude AI usage limit reached|1772384400", "2026-03-01 17:00"),
        ("API Error: Claude AI usage limit reached|1772384400000", "2026-03-01 17:00"),
        ("You've hit your weekly limit · resets Mar 4, 9am (Europe/Berlin)", "2026-03-04 08:00"),
        ("You've hit your weekly limit · resets Mar 4 at 9am", "2026-03-04 08:00"),
        ("Weekly limit reached ∙ resets Mar 6, 8:39 PM", "2026-03-06 19:39"),
        ("Opus weekly limit reached ∙ resets Mar 6", "2026-03-05 23:00"),
        ("You've hit your Opus limit · resets Mar 3, 8:39pm (UTC)", "2026-03-03 20:39"),
        ("You've hit your weekly limit · resets 10pm", "2026-03-01 21:00"),
        (
            "You've hit your monthly spend limit · raise it at x · your weekly limit resets Mar 3, 8pm",
            "2026-03-03 19:00",
        ),
        ("You've hit your session limit · resets 3pm · progress saved", "2026-03-01 14:00"),
        ("You've hit your limit · resets 15:30", "2026-03-01 14:30"),
        ("You've hit your session limit · resets in 2h 5m", "2026-03-01 14:05"),
        (
            "You have reached your specified API usage limits. You will regain access on 2026-03-05 at 00:00 UTC.",
            "2026-03-05 00:00",
        ),
    ],
)
def test_the_time_of_return_is_read_from_every_known_spelling(said: str, at: str) -> None:
    assert says_spent(said) or says_no_money(said)
    assert returns(said) == at


@pytest.mark.promise("F5")
def test_a_day_and_month_that_passed_are_next_year_s() -> None:
    eve = datetime(2026, 12, 30, 12, 0, tzinfo=UTC)
    assert returns("weekly limit · resets Jan 2, 9am", now=eve) == "2027-01-02 08:00"
    assert returns("weekly limit · resets Jan 2, 2027, 9am (UTC)", now=eve) == "2027-01-02 09:00"


@pytest.mark.promise("F5")
def test_clocks_are_changed_between_now_and_then() -> None:
    before = datetime(2026, 3, 28, 20, 0, tzinfo=UTC)
    assert returns("You've hit your limit · resets 9am (Europe/Berlin)", now=before) == "2026-03-29 07:00"


@pytest.mark.promise("F5")
@pytest.mark.parametrize(
    "said",
    [
        "You've hit your session limit · resets 12:30pm",  # half an hour ago; tomorrow is no session's end
        "You've hit your session limit · resets Mar 4, 9am",
        "You've hit your weekly limit · resets Jan 3, 2031, 9am (UTC)",
        "You've hit your weekly limit · resets Apr 20, 9am",
        "You've hit your limit · resets 25pm",
        "You've hit your limit · resets 0am",
        "You've hit your limit · resets 3:75pm",
        "You've hit your limit · resets 29:10",
        "You've hit your limit · resets Feb 30, 9am",
        "You've hit your limit · resets Mar 4, 13pm",
        "You've hit your limit · resets soon",
        "You've hit your limit",
        "Claude AI usage limit reached|1672384400",
        "Claude AI usage limit reached|99999999999",
        "Claude AI usage limit reached|0",
    ],
)
def test_a_time_that_the_limit_cannot_have_is_not_believed(said: str) -> None:
    assert returns(said) is None


@pytest.mark.promise("F5")
@pytest.mark.parametrize(
    ("kind", "said", "window", "models"),
    [
        ("five_hour", "", "five_hour", ""),
        ("seven_day", "", "seven_day", ""),
        ("seven_day_opus", "", "seven_day_opus", "*opus*"),
        ("seven_day_sonnet", "", "seven_day_sonnet", "*sonnet*"),
        ("seven_day_sonnet", "You've hit your weekly limit", "seven_day_sonnet", ""),
        ("seven_day_overage_included", "You've hit your Fable limit", "seven_day_overage_included", "*fable*"),
        ("overage", "You've hit your limit", "overage", ""),
        ("of_next_year", "", "of_next_year", ""),
        (None, "You've hit your session limit", "five_hour", ""),
        (None, "5-hour limit reached", "five_hour", ""),
        (None, "You've hit your weekly limit", "seven_day", ""),
        (None, "Opus weekly limit reached", "seven_day_opus", "*opus*"),
        (None, "You've hit your Opus limit", "seven_day_opus", "*opus*"),
        (None, "You've hit your Sonnet limit", "seven_day_sonnet", "*sonnet*"),
        (None, "You've hit your Opus 4.5 limit", None, "*opus*"),
        (None, "You're out of usage credits", "overage", ""),
        (None, "You've hit your limit", None, ""),
    ],
)
def test_a_limit_has_its_window_and_its_models(kind: str | None, said: str, window: str | None, models: str) -> None:
    limited = Limited("rejected", None, kind) if kind is not None else None
    found = spent(said, limited, now=NOW.timestamp())
    assert (found.window, found.models) == (window, models)


@pytest.mark.promise("F5")
def test_the_event_s_time_is_the_exact_one_and_the_sentence_helps_where_it_is_nonsense() -> None:
    said = "You've hit your session limit · resets 3pm"
    at = NOW.timestamp()
    assert returns(said, limited=Limited("rejected", at + 3_660, "five_hour")) == "2026-03-01 13:01"
    assert returns(said, limited=Limited("rejected", (at + 3_660) * 1000, "five_hour")) == "2026-03-01 13:01"
    for nonsense in (None, 0.0, -5.0, at - 60, at + 6 * 3600, 253_402_300_799.0):
        assert returns(said, limited=Limited("rejected", nonsense, "five_hour")) == "2026-03-01 14:00"
    assert returns("", limited=Limited("allowed_warning", at + 60, "five_hour")) is None


def test_zones_are_known_by_name() -> None:
    assert named_zone("Europe/Berlin") == BERLIN
    assert named_zone("utc") is UTC
    for nonsense in (None, "Mars/Olympus", "../../etc/passwd", "/etc/passwd", ""):
        assert named_zone(nonsense) is None
    assert returns("limit reached · resets 3pm (Mars/Olympus)") == "2026-03-01 14:00"


@given(st.text(), st.floats(0, 4e9), st.none() | st.floats(allow_nan=True))
def test_whatever_is_said_a_believed_wait_is_ahead_and_within_a_month(
    said: str, now: float, resets_at: float | None
) -> None:
    for text in (said, f"limit · resets {said}", f"limit reached|{said}"):
        found = spent(text, Limited("rejected", resets_at, None), now=now, zone=BERLIN)
        assert found.wait is None or 0 < found.wait <= 32 * 86_400
