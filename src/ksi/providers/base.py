"""The provider protocol: a call in, pieces of text out, and one Completion at the end.

A provider is one module, `ksi.providers.<kind>` with `-` as `_`. It exports `Options`, a frozen msgspec Struct of the
configuration keys that only it knows, and `build(setting: Setting, options: Options) -> Provider`.

It turns every fault into a `ProviderError` with its class (F1), makes no retries of its own (F2), reports usage as it
was told it (T1), and leaves nothing running behind a closed iterator (F7).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec

from ksi.clock import Clock
from ksi.request import Usage


class Message(msgspec.Struct, frozen=True):
    """One message of a dialogue; `role` is user, assistant or system."""

    role: str
    content: str


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt, as a provider sees it. Times in seconds."""

    request_id: str
    attempt: int
    conversation: str
    model: str
    """As the provider knows it: the part after the slash."""
    messages: Sequence[Message]
    """The history within the token limit, and last the current prompt. No system message: see `system`."""
    history: int = 0
    """How many of `messages`, from the front, are earlier turns: a stateful provider has them under its session."""
    system: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    stop: Sequence[str] = ()
    stream: bool = False
    """Whether somebody reads the pieces; a provider may answer in one piece all the same."""
    provider_session: str | None = None
    """A stateful provider's own name for the dialogue, at whose head this goes on; None begins a new one."""
    last_message: str | None = None
    """The provider's id of the last good message in that dialogue: what came behind it is not ours, or failed (F9)."""
    fork_session: bool = False
    """Begin a provider session of its own, a copy of `provider_session` up to `last_message`, and leave that alone."""
    fork: str | None = None
    """The fork that the answer is, where it begins a provider session: `node_lost`, as the one before it lives on a
    machine that is gone (D4)."""
    mcp_config: Any = None
    options: Mapping[str, Any] = msgspec.field(default_factory=dict)
    """The request's `provider_options`."""


class StopReason(StrEnum):
    """Why a model ended its answer. `max_tokens` and `context_window` cut it."""

    END_TURN = "end_turn"
    STOP_SEQUENCE = "stop_sequence"
    MAX_TOKENS = "max_tokens"
    TOOL_USE = "tool_use"
    REFUSAL = "refusal"
    CONTENT_FILTER = "content_filter"
    CONTEXT_WINDOW = "context_window"
    PAUSE_TURN = "pause_turn"


class Chunk(msgspec.Struct, frozen=True):
    """A piece of the answer's text."""

    text: str


class ToolUsed(msgspec.Struct, frozen=True):
    """The turn calls a tool that may change something outside of it: such a turn must not be run again by itself.

    It comes before the tool has done its work. A call that is denied afterwards was told all the same.
    """

    name: str


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer."""

    text: str
    model: str
    """The model that answered, as the provider names it."""
    usage: Usage | None = None
    """None where the provider reported none."""
    cache_write_hour_tokens: int = 0
    """How many of `usage.cache_write_tokens` stay in the cache for an hour. Where there are such, and no cost is told,
    `usage.cost_usd` is UNPRICED until somebody who knows the prices has worked it out (`Prices.with_hour_cache`)."""
    stop_reason: str | None = None
    """Why it ended, as one of `StopReason`'s words whatever the provider calls it; its own word where we know none."""
    note: str | None = None
    """What a program should know beside the text, in one sentence: tools that were denied, for example."""
    provider_session: str | None = None
    """Where a stateful provider keeps the dialogue now."""
    last_message: str | None = None
    """Its id of the answer's last message: the next call's `Call.last_message`."""
    fork: str | None = None
    """Seen on the way (L7): `new_session`, another session than the resumed one came back unasked; `foreign_turn`, the
    transcript held messages that we did not write."""
    raw: bytes | None = None
    """What the provider sent, as JSON, untouched; None where it came in pieces."""
    mcp: bool = False
    """It had MCP servers, from the request or from the provider's own configuration."""


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What the daemon tells a provider when it builds it. Times in seconds."""

    name: str
    clock: Clock
    home: Path
    log_dir: Path
    environ: Mapping[str, str]
    max_concurrency: int = 4
    timeout: float = 600.0
    idle_timeout: float = 120.0


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a provider can do."""

    stateful: bool = False
    """Keeps dialogues itself, under provider sessions; others get the history with each call."""
    stream: bool = True
    mcp: bool = False
    process: bool = False
    """Runs as processes on this node: its concurrency is counted per node (D4)."""
    sessions_on_node: bool = False
    """Its provider sessions live on the machine where they began: only daemons there can go on in them (D4)."""
    context_tokens: int = 8_192
    """How much a call may hold, prompt and answer."""
    free: bool = False
    """Its calls cost nothing."""
    price_list: str | None = None
    """Whose public prices its calls have: a provider's name, or the address at which it is asked (T2)."""


class Provider(Protocol):
    """What answers completions."""

    name: str
    capabilities: Capabilities

    async def start(self) -> None:
        """Get ready. Must not fail for a fault that a later call can tell: say that there, and in `problem`."""
        ...

    async def stop(self) -> None:
        """End all that it started."""
        ...

    def complete(self, call: Call) -> AsyncGenerator[Chunk | ToolUsed | Completion, None]:
        """Answer a call: any number of Chunks and ToolUsed, then one Completion.

        Closing the iterator early ends the work at the provider.

        Raises:
            ProviderError: with its class; nothing else is raised for what the provider or network did.
        """
        ...

    def problem(self) -> str | None:
        """What keeps it from working, with what to do about it, in one sentence; None when nothing is known."""
        ...


@runtime_checkable
class ReportingProvider(Provider, Protocol):
    """A provider that has more to show than every provider has."""

    def report(self) -> dict[str, Any]:
        """What it is and what it holds, as JSON: for the eye of an operator."""
        ...


@runtime_checkable
class LoginProvider(Provider, Protocol):
    """A provider whose login can lapse and come back while the daemon runs (F11)."""

    async def login_works(self) -> bool | None:
        """Whether it can be asked again after a login failed, found out without a call that costs anything; None where
        only a real call can tell."""
        ...


class StatefulProvider(Provider, Protocol):
    """A provider that keeps dialogues itself."""

    def knows(self, session: str) -> bool:
        """Whether it keeps a dialogue under this name, so that a conversation of that name can adopt it (L9)."""
        ...


def bare_model(model: str) -> str:
    """The provider's own name of a model: what stands behind the first slash."""
    return model.partition("/")[2] or model
