"""The types of the events about budgets. Times are Unix time; amounts are US dollars, tokens or calls."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ksi.events.common import Data, Name, Span

UnitWord = Literal["usd", "tokens", "requests"]
Share = Annotated[float, Meta(gt=0, le=1)]


class BudgetNameData(Data):
    """Which budget."""

    budget: Name
    """Its name."""


class BudgetSetData(BudgetNameData):
    """A budget, as `[budgets.NAME]` has it; it takes the place of one that was set under the same name."""

    scope: Name = "all"
    """The requests that it limits: `all`, `agent:NAME`, `token:NAME` (an HTTP token with all agents under it),
    `model:NAME`, `provider:NAME` or `session:NAME`. `*` in place of the name binds each one by itself, a name with `*`
    at its end all that begin so together."""
    usd: Annotated[float, Meta(gt=0)] | None = None
    """US dollars, or ..."""
    tokens: Annotated[int, Meta(gt=0)] | None = None
    """... input and output tokens, or ..."""
    requests: Annotated[int, Meta(gt=0)] | None = None
    """... calls of providers. One of the three."""
    per: Literal["hour", "day", "week", "month"] = "day"
    """`hour`, `day`, `week` or `month`, by the calendar."""
    time_zone: str = ""
    """The calendar's, as `Europe/Berlin`; empty: this machine's."""
    on_exceed: Literal["wait", "refuse"] = "wait"
    """`wait`: a request that would exceed it waits in its place; `refuse`: it is refused with `budget_exceeded`."""
    warn_at: Annotated[tuple[Share, ...], Meta(max_length=8)] = (0.8,)
    """Shares of the limit at which `budget:warning` is sent."""
    unpriced: Literal["refuse"] | Annotated[float, Meta(ge=0)] = "refuse"
    """For a budget in dollars, the treatment of a model without a price: `refuse` it, or a number of US dollars to
    count for a million tokens."""
    by: str = ""
    """The person who sets it."""


class BudgetRaiseData(BudgetNameData):
    """More for a budget, until a time."""

    amount: Annotated[float, Meta(gt=0)]
    """How much more, in the budget's unit."""
    scope: Name | None = None
    """The one whose limit is meant, as `agent:nightly`, if the budget binds each one separately; without it, that of
    all."""
    seconds: Span | None = None
    """For so long; without it until the present window ends."""
    by: str = ""
    """The person who raises it."""
    why: str = ""
    """Why, for others who wonder."""


class BudgetStatusData(Data):
    """Which budgets to report on."""

    budget: Name | None = None
    """This one; without it all."""
    scope: Name | None = None
    """Only budgets that count for this one, as `agent:nightly`."""
    limit: Annotated[int, Meta(ge=1, le=1_000)] = 20
    """Subjects of each budget, those that used most of it first."""


class BudgetSubject(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How far one subject is with a budget."""

    scope: str
    """The subject of these figures, as `agent:nightly`."""
    used: float
    """Used in this window, in the budget's unit."""
    reserved: float = 0.0
    """Reserved for running requests."""
    limit: float
    """The limit, including raises."""
    left: float
    """The rest of the limit."""
    requests: int = 0
    """Calls in this window."""
    tokens: int = 0
    """Their input and output tokens."""
    cost_usd: float = 0.0
    """The cost of these tokens in US dollars, as far as prices are known."""
    waiting: int = 0
    """Requests that wait for this budget."""
    forecast: float | None = None
    """The forecast for the window's end, at the rate of the last hours."""
    exhausted_at: float | None = None
    """Unix time when the limit will be reached at this rate."""


class BudgetRaiseBody(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A raise by an operator."""

    amount: float
    """How much more."""
    scope: str = ""
    """The one whose limit was raised; empty for all."""
    until: float
    """Until when."""
    at: float
    """When it was raised."""
    by: str = ""
    """By whom."""
    why: str = ""
    """The given reason."""


class BudgetBody(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A budget and how far it is."""

    budget: str
    """Its name."""
    scope: str
    """The requests that it limits."""
    unit: UnitWord
    """The counted unit: `usd`, `tokens` or `requests`."""
    limit: float
    """The limit for each one it binds, without raises."""
    per: Literal["hour", "day", "week", "month"]
    """The length of a window."""
    time_zone: str = ""
    """The calendar's zone; absent if it is this machine's."""
    on_exceed: Literal["wait", "refuse"]
    """The treatment of requests that would exceed it."""
    warn_at: tuple[float, ...] = ()
    """Shares of the limit at which a warning is sent."""
    source: Literal["configured", "set"]
    """Its origin: the configuration, or `budget:set`."""
    since: float
    """When the present window began."""
    resets_at: float
    """When it ends."""
    subjects: list[BudgetSubject]
    """Those with figures in this window, the largest usage first."""
    raises: list[BudgetRaiseBody] = []
    """The raises that hold."""


class BudgetReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Budgets and how far they are."""

    budgets: list[BudgetBody]
    """Each budget, by name."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""


class BudgetPush(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A budget has reached a threshold, or is used up."""

    budget: str
    """Its name."""
    scope: str
    """The subject that it counts for, as `agent:nightly`."""
    unit: UnitWord
    """The counted unit."""
    used: float
    """The used part of it."""
    limit: float
    """The limit."""
    threshold: float | None = None
    """The share of the limit that was reached; absent if it is used up."""
    since: float
    """When the window began."""
    resets_at: float
    """When it ends."""
    message: str
    """All of it in one sentence."""
