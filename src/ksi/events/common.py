"""The common parts of the data of many events. A client sends `Data` and gets a `Reply`; the daemon sends a `Push` by
itself. Times are in seconds.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

Name = Annotated[str, Meta(min_length=1, max_length=65_536)]


Pattern = Annotated[str, Meta(min_length=1, max_length=200)]


Seconds = Annotated[float, Meta(ge=0, le=1e11)]


Span = Annotated[float, Meta(gt=0, le=1e9)]


Seq = Annotated[int, Meta(ge=-1)]


Limit = Annotated[int, Meta(ge=1, le=1000)]


Json = dict[str, Any]


class Data(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The data of an incoming event."""


class Nothing(Data):
    """No fields."""


class RequestId(Data):
    """Names one request."""

    request_id: Name
    """The request's id."""


class PageData(Data):
    """A page of a list."""

    limit: Limit = 100
    """Maximum number of rows in a page."""
    cursor: str | None = None
    """The `cursor` of the previous page's reply."""


class UsageReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Tokens summed over a request's attempts; `unknown_attempts` had no report."""

    input_tokens: int = 0
    """Tokens read by the model, without input from a cache."""
    output_tokens: int = 0
    """Tokens written by the model."""
    total_tokens: int = 0
    """The sum of the input and output tokens."""
    cache_read_tokens: int = 0
    """Input that came from the provider's cache."""
    cache_write_tokens: int = 0
    """Input that was written to the provider's cache."""
    reasoning_tokens: int = 0
    """The part of the output that was thinking, if the provider reports it."""
    unknown_attempts: int = 0
    """The number of attempts without a report; their tokens are not in the sums."""


class ErrorBody(msgspec.Struct, kw_only=True):
    """Why a request has no answer."""

    code: str
    """A [failure class](errors.md#failure-classes)."""
    message: str
    """The reason, for people."""


class ReasonBody(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Why a request of a chain did not run."""

    code: str
    """The limit or the kind of pattern."""
    message: str
    """The reason, for people."""
    risk_score: float | None = None
    """The score of a pattern, from 0 to 1."""
    evidence: list[str] = []
    """The findings that led to it."""
