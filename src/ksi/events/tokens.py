"""The types of the events about HTTP tokens, and the scopes that a token can have."""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ksi.events.common import Data

ScopeName = Literal["submit", "read", "operate"]

TokenName = Annotated[str, Meta(min_length=1, max_length=64)]


class Scope(IntEnum):
    """The permissions of a token; each scope includes those before it."""

    SUBMIT = 0
    """Send requests, and look at one's own."""
    READ = 1
    """Look at everything."""
    OPERATE = 2
    """Change everything."""

    @property
    def word(self) -> str:
        """Its name on the wire."""
        return self.name.lower()


class TokenBudget(Data):
    """The limit of a token: one of `usd`, `tokens` and `requests`."""

    usd: Annotated[float, Meta(gt=0)] | None = None
    """US dollars, or ..."""
    tokens: Annotated[int, Meta(gt=0)] | None = None
    """... input and output tokens, or ..."""
    requests: Annotated[int, Meta(gt=0)] | None = None
    """... calls of providers. One of the three."""
    per: Literal["hour", "day", "week", "month"] = "day"
    """`hour`, `day`, `week` or `month`, by the calendar."""
    on_exceed: Literal["wait", "refuse"] = "refuse"
    """`refuse`: a request that would exceed it is refused with `budget_exceeded`; `wait`: it waits in its place."""


class TokenCreateData(Data):
    """A new token."""

    name: TokenName
    """Letters, digits, `.`, `_` and `-`, at most 64. Its requests are accounted to the agent of this name, or to one
    below it, such as `name/helper`."""
    scope: ScopeName = "submit"
    """`submit`: send requests, and look at its own. `read`: look at everything, too. `operate`: change everything,
    too."""
    priority: Literal["critical", "high", "normal", "low", "background"] | None = None
    """The priority of requests that name none."""
    budget: TokenBudget | None = None
    """The limit of all its requests together, under whatever agents below it they are. It is kept as the budget
    `token:NAME`, which `budget:raise` raises and `token:revoke` drops."""


class TokenNameData(Data):
    """Names one token."""

    name: TokenName
    """The token. The owner's is replaced by `token:renew`."""


class TokenBody(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A token without its secret, which is not stored."""

    name: str
    """Its name."""
    scope: ScopeName
    """Its scope: `submit`, `read` or `operate`."""
    priority: str | None = None
    """The priority of requests that name none."""
    created_at: float
    """Unix time."""


class TokenCreateReply(TokenBody, kw_only=True, omit_defaults=True):
    """A new token with its secret, which is never shown again."""

    token: str
    """The secret. It is not shown again."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""


class TokensReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """All tokens except the owner's, by name."""

    tokens: list[TokenBody]
    """The tokens, by name. The owner's token, which is in `var/run/token`, is not listed."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""


class OwnerTokenReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The place of the owner's new token."""

    path: str
    """The file with the new token."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""
