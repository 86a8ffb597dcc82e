"""Decisions about budgets that all stores share, and their refusals."""

from __future__ import annotations

from collections.abc import Sequence

from ksi.budgets.rules import NANO, Ask, Demand, Hold, Over, Unit
from ksi.errors import BudgetExceeded
from ksi.store.chains import Block
from ksi.tokens import BYTES_PER_TOKEN

CODE = "budget_exceeded"

LONGEST_WINDOW = 62 * 86_400_000_000
"""Microseconds for which the figures of budgets are kept at least: the last two months."""

LOOKS, REFUSING_LOOKS = 64, 1_000
"""Requests that wait for one budget and are looked at after the end of a call; more of one that refuses, since nobody
else tells them that it is used up."""

UNSAID_OUTPUT = 4_096
"""Assumed output tokens of a request without a known limit."""


def ask_at(demand: Demand, provider: str, model: str, size: int) -> Ask:
    """The estimated usage of a request at a provider; `size` is that of its body, in bytes.

    One that came when no budget was known is guessed by its size, without a price: its cost counts at its end.
    """
    found = next((ask for ask in demand if ask.provider == provider), None)
    return rough(provider, model, size) if found is None else found


def rough(provider: str, model: str, size: int) -> Ask:
    """An estimate of a request's usage."""
    return Ask(provider, model, int(size / BYTES_PER_TOKEN), UNSAID_OUTPUT, False, 0.0, 0.0, 0)


def refused(looks: Sequence[Hold | Over]) -> BudgetExceeded | None:
    """The reason why a new request is refused, by its budgets at each provider of its route; None if it is accepted."""
    overs = [look for look in looks if isinstance(look, Over)]
    if not overs or len(overs) < len(looks):
        return None
    stopped = [over for over in overs if ends(over)]
    return over_budget(stopped[0]) if len(stopped) == len(overs) else None


def ends(over: Over) -> bool:
    """True if a request does not wait for its budget: it may not, or it would wait for ever."""
    return over.never or (over.spent and over.cap.refuse)


def over_budget(over: Over) -> BudgetExceeded:
    """A budget has no room, and the request does not wait for it."""
    return BudgetExceeded(
        sentence(over),
        budget=over.cap.name,
        scope=over.subject,
        unit=over.cap.unit.value,
        limit=figure(over.cap.unit, over.limit),
        used=figure(over.cap.unit, over.used),
        reserved=figure(over.cap.unit, over.held),
        since=over.cap.start,
        resets_at=over.cap.end,
        raised_by="an operator, with budget:raise",
    )


def sentence(over: Over) -> str:
    """Why a call does not fit."""
    unit, who = over.cap.unit, "" if over.subject == "all" else f" of {over.subject}"
    if over.unpriced:
        return (
            f"budget {over.cap.name!r}{who} counts dollars, and no price is known for {over.unpriced!r}; set "
            f'[prices."{over.unpriced}"], or `unpriced` in the budget'
        )
    if over.need > over.limit:
        return (
            f"this request may use {amount(unit, over.need)}, more than the whole of budget {over.cap.name!r}{who}, "
            f"{amount(unit, over.limit)}; set a lower max_tokens"
        )
    used = f"{amount(unit, over.used)} of {amount(unit, over.limit)} used"
    used += f" and {amount(unit, over.held)} set aside for what runs" if over.held else ""
    return (
        f"budget {over.cap.name!r}{who} has no room for this request: {used}; an operator can raise it "
        f"(`ksi budgets raise {over.cap.name}`)"
    )


def block_of(over: Over) -> Block:
    """The end of a waiting request for which its budget has no room."""
    return Block(code=CODE, message=sentence(over))


def figure(unit: Unit, value: int) -> float:
    """An amount as people count it."""
    return value / NANO if unit is Unit.USD else value


def amount(unit: Unit, value: int) -> str:
    """An amount in words."""
    if unit is Unit.USD:
        return f"${value / NANO:,.4f}".rstrip("0").rstrip(".") if value % (NANO // 100) else f"${value / NANO:,.2f}"
    return f"{value:,} {unit.value}"
