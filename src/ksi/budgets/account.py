"""The steps that change budgets' figures: set aside, settle, give back. A store hands them in and keeps them."""

from __future__ import annotations

from typing import Protocol

from ksi.budgets.rules import (
    UNUSED,
    Amount,
    Ask,
    Cap,
    Caps,
    Facts,
    Hold,
    Notice,
    Over,
    Share,
    Spent,
    Use,
    bound,
    fit,
    least_output,
    need,
    settled,
    told,
    told_over,
)

Place = tuple[str, str, int]
"""A budget's name, a subject, and the beginning of a window."""


class Figures(Protocol):
    """The stored part."""

    def get(self, place: Place, default: Use, /) -> Use:
        """The figures of a place."""
        ...

    def __getitem__(self, place: Place, /) -> Use: ...

    def __setitem__(self, place: Place, use: Use, /) -> None: ...


def look(figures: Figures, caps: Caps, facts: Facts, ask: Ask, context: int) -> Hold | Over:
    """True if a call fits; nothing is changed."""
    return fit(ask, context, bound(caps, facts, ask), figures)  # type: ignore[arg-type]  # it only reads


def least(cap: Cap, ask: Ask) -> int:
    """The minimum that a call takes of a budget, without its conversation."""
    return need(ask, cap, ask.input, least_output(ask))


def decided(cap: Cap, limit: int, used: int, held: int, wanted: int) -> bool:
    """True if a request that waits for a budget is to be looked at again: there is room for it, or it waits no longer,
    as what was only reserved is used up now."""
    if used + held + wanted <= limit:
        return True
    return cap.refuse and (used + wanted > limit or not held)


def set_aside(figures: Figures, hold: Hold) -> None:
    """A call begins."""
    for share, held in zip(hold.shares, hold.amounts(), strict=True):
        place = (share.name, share.subject, share.start)
        use = figures.get(place, UNUSED)
        figures[place] = Use(used=use.used, held=use.held.plus(held), told=use.told, told_of=use.told_of)


def exceeded(figures: Figures, over: Over) -> list[Notice]:
    """A call found its budget used up: returns the notices about that."""
    place = (over.cap.name, over.subject, over.cap.start)
    use, notices = told_over(over, figures.get(place, UNUSED))
    if notices:
        figures[place] = use
    return notices


def settle(figures: Figures, hold: Hold, spent: Spent | None, caps: Caps) -> list[Notice]:
    """A call ended: its reservation is returned, and its usage counts in the windows in which it began.

    Returns the notices.
    """
    notices: list[Notice] = []
    by_name = {cap.name: cap for cap in caps}
    for share, held in zip(hold.shares, hold.amounts(), strict=True):
        use = _end(figures, share, settled(hold, share, spent), held)
        cap = by_name.get(share.name)
        if cap is not None and cap.start == share.start:
            after, found = told(cap, share.subject, use)
            if found:
                figures[share.name, share.subject, share.start] = after
                notices += found
    return notices


def interrupted(figures: Figures, hold: Hold) -> None:
    """A call's daemon died, and nobody knows what it used: all that was set aside counts."""
    for share, held in zip(hold.shares, hold.amounts(), strict=True):
        _end(figures, share, held, held)


def _end(figures: Figures, share: Share, used: Amount, held: Amount) -> Use:
    place = (share.name, share.subject, share.start)
    use = figures.get(place, UNUSED)
    after = Use(used=use.used.plus(used), held=use.held.minus(held), told=use.told, told_of=use.told_of)
    figures[place] = after
    return after
