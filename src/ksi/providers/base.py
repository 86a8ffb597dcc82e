"""The provider protocol: a call in, pieces of text out, and one Completion at the end.

A provider is one module, `ksi.providers.<kind>` with `-` as `_`. It exports `Options`, a frozen msgspec Struct of the
configuration keys that only it knows, and `build(setting: Setting, options: Options) -> Provider`.

It turns every fault into a `ProviderError` with its class, makes no retries of its own, passes usage on as it was
reported, and leaves nothing running behind a closed iterator.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec

from ksi.clock import Clock
from ksi.content.blocks import Block, Content, Message
from ksi.content.features import NO_FEATURES, Dialect, Features, Native
from ksi.request import Usage

ToolServer = Callable[[Any], Awaitable[dict[str, Any] | None]]
"""Takes a message of the Model Context Protocol, as decoded JSON, and gives the answer; None if it wants none."""


class Permission(msgspec.Struct, frozen=True):
    """A program asks whether its model may use a tool."""

    tool: str
    input: str
    """The tool's arguments, as JSON with sorted keys."""
    text: str
    """The question in words."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to it."""

    allowed: bool
    why: str = ""
    """The answer to the model if the word is no."""


class PermissionDesk(Protocol):
    """Answers permissions for one attempt."""

    @property
    def used_before(self) -> tuple[str, ...]:
        """The tools with effects that the turn had used when it was interrupted by its question."""
        ...

    @property
    def keeps(self) -> bool:
        """Whether the program may wait for the answer; else the turn is run again when it is there."""
        ...

    def verdict(self, permission: Permission) -> Verdict | None:
        """The answer; None if a person has to be asked."""
        ...


class PersonNeeded(Exception):
    """A turn stops here until a person has answered. The same request is called again then."""

    def __init__(
        self, permission: Permission, *, seconds: float, used: tuple[str, ...] = (), waiting: bool = False
    ) -> None:
        """No answer within `seconds` is a no. `used` are the tools with effects that the turn has used; `waiting`: the
        program waits for the answer, and the turn goes on in it."""
        super().__init__(permission.text)
        self.permission = permission
        self.seconds = seconds
        self.used = used
        self.waiting = waiting


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
    system: Content | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    stop: Sequence[str] = ()
    features: Features = NO_FEATURES
    """Tools, formats, reasoning and sampling that the request asks for."""
    native: Native | None = None
    """The original request, if it is in this provider's dialect: then it is sent with every field it has."""
    stream: bool = False
    """True if a client reads the pieces; a provider may answer in one piece all the same."""
    provider_session: str | None = None
    """A stateful provider's own name for the dialogue that this call continues; None begins a new one."""
    last_message: str | None = None
    """The provider's id of the last good message in that dialogue. Later messages are another writer's, or of a turn
    that failed; they must not be continued."""
    fork_session: bool = False
    """Begin a provider session of its own, a copy of `provider_session` up to `last_message`, and leave that alone."""
    fork: str | None = None
    """The kind of fork, if the answer begins a provider session: `node_lost`, as the previous one lives on a machine
    that is gone."""
    mcp_config: Any = None
    options: Mapping[str, Any] = msgspec.field(default_factory=dict)
    """The request's `provider_options`."""
    dropped: Sequence[str] = ()
    """Features of the request that are left out, because the provider does not support them."""
    traceparent: str | None = None
    """The attempt's span, for the provider's own; None if no traces are sent."""
    permissions: PermissionDesk | None = None
    """Answers permissions, if the provider's program can ask for them."""
    tools: ToolServer | None = None
    """KSI's own tools for this run alone, if the provider can give them to the model."""


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


class Thought(msgspec.Struct, frozen=True):
    """A piece of the model's thinking, if its vendor shows it."""

    text: str


class ToolPiece(msgspec.Struct, frozen=True):
    """A piece of a call of a tool that the request named. The first of a call may have no JSON yet."""

    id: str
    name: str
    json: str = ""
    """The next part of the call's input, as JSON text."""


class Frame(msgspec.Struct, frozen=True):
    """An event of a vendor's stream as it came, for a client that speaks the same dialect."""

    event: str
    data: bytes


Piece = Chunk | Thought | ToolPiece
"""A part of an answer that is under way."""


def piece_of(block: Block) -> Piece | None:
    """A whole block as one piece; None for a kind that no piece can carry."""
    match block.get("type"):
        case "text":
            return Chunk(str(block.get("text", "")))
        case "thinking":
            return Thought(str(block.get("thinking", "")))
        case "tool_use":
            text = msgspec.json.encode(block.get("input", {})).decode()
            return ToolPiece(str(block.get("id")), str(block.get("name")), text)
    return None


class ToolUsed(msgspec.Struct, frozen=True):
    """The turn calls a tool that may change something outside of it: such a turn must not be run again by itself.

    It comes before the tool has done its work, so a call that is denied afterwards is reported too.
    """

    name: str


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer."""

    text: str
    model: str
    """The model that answered, as the provider names it."""
    content: tuple[Block, ...] = ()
    """The answer's blocks, if it is more than its text."""
    usage: Usage | None = None
    """None if the provider reported none."""
    cache_write_hour_tokens: int = 0
    """The number of `usage.cache_write_tokens` that stay in the cache for an hour. If there are any and the provider
    tells no cost, `usage.cost_usd` is UNPRICED until `Prices.with_hour_cache` works it out."""
    stop_reason: str | None = None
    """The reason for its end, in the words of `StopReason`; the provider's own word if `StopReason` has none for it."""
    note: str | None = None
    """One sentence for programs, in addition to the text: for example the tools that were denied."""
    provider_session: str | None = None
    """The session under which a stateful provider keeps the dialogue now."""
    last_message: str | None = None
    """Its id of the answer's last message: the next call's `Call.last_message`."""
    fork: str | None = None
    """An unrequested fork: `new_session` if another session than the resumed one came back, `foreign_turn` if the
    transcript held messages that we did not write."""
    raw: bytes | None = None
    """The provider's answer as JSON, untouched; None if it came in pieces."""
    mcp: bool = False
    """It had MCP servers, from the request or from the provider's own configuration."""


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon's part of a provider's configuration. Times are in seconds."""

    name: str
    clock: Clock
    home: Path
    log_dir: Path
    environ: Mapping[str, str]
    max_concurrency: int = 4
    timeout: float = 600.0
    idle_timeout: float = 120.0

    @property
    def run_folder(self) -> Path:
        """The folder for files that live as long as the provider's processes."""
        return self.home / "var" / "run" / self.name


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """The abilities of a provider."""

    stateful: bool = False
    """It keeps dialogues itself, under provider sessions; others get the history with each call."""
    stream: bool = True
    mcp: bool = False
    """It takes MCP servers from requests."""
    asks: bool = False
    """Its program can ask for permissions."""
    own_tools: bool = False
    """It can hand KSI's own tools to the model."""
    process: bool = False
    """It runs as processes on this node, so its concurrency is counted per node."""
    sessions_on_node: bool = False
    """Its provider sessions live on the machine on which they began: only daemons there can continue them."""
    dialect: Dialect | None = None
    """The dialect in which requests can be passed on as they came."""
    features: frozenset[str] = frozenset()
    """Those of `ksi.content.native.FEATURES` that it can do."""
    context_tokens: int = 8_192
    """The tokens that a call may hold, prompt and answer."""
    output_tokens: int | None = None
    """The tokens of an answer at most, of a request that names no `max_tokens`; None: not known."""
    free: bool = False
    """Its calls cost nothing."""
    price_list: str | None = None
    """The public price list for its calls: a provider's name, or the address at which it is asked."""


Origin = Callable[[], str | None]
"""Tells the id of the request for which a program's process works, or worked last; None once that process has ended."""


class Provider(Protocol):
    """Answers completions."""

    name: str
    capabilities: Capabilities

    async def start(self) -> None:
        """Get ready. This must not fail for a fault that a later call can report: it is reported there, and in
        `problem`."""
        ...

    async def stop(self) -> None:
        """End its work and its processes."""
        ...

    def complete(self, call: Call) -> AsyncGenerator[Piece | Frame | ToolUsed | Completion, None]:
        """Answer a call: any number of pieces and ToolUsed, then one Completion; before the pieces of a
        streamed native call come its frames.

        Closing the iterator early ends the work at the provider.

        Raises:
            ProviderError: with its class; faults of the provider or network raise nothing else.
            PersonNeeded: a person has to answer first.
        """
        ...

    def problem(self) -> str | None:
        """One sentence that gives the reason why it cannot work, and advice; None if there is none."""
        ...


@runtime_checkable
class ReportingProvider(Provider, Protocol):
    """A provider that has more to show than every provider has."""

    def report(self) -> dict[str, Any]:
        """Its state as JSON, for operators."""
        ...


@runtime_checkable
class AskingProvider(Provider, Protocol):
    """A provider whose programs may wait for a person's answer between two calls of one request."""

    async def let_go(self, conversation: str) -> None:
        """End the program that waits for an answer in a conversation, if there is one."""
        ...


@runtime_checkable
class LoginProvider(Provider, Protocol):
    """A provider whose login can lapse and come back while the daemon runs."""

    async def login_works(self) -> bool | None:
        """Return True if the login works again after it failed, without a call that costs anything; None if only a
        real call can tell."""
        ...


@runtime_checkable
class StartingProvider(Provider, Protocol):
    """A provider whose processes start programs of their own, which may connect to KSI."""

    def origin(self, pid: int) -> Origin | None:
        """The origin of the program with this pid, if one of the provider's processes has started it."""
        ...


class StatefulProvider(Provider, Protocol):
    """A provider that keeps dialogues itself."""

    def knows(self, session: str) -> bool:
        """Return True if it keeps a dialogue under this name, so that a conversation of that name can adopt it."""
        ...

    def transcript(self, session: str) -> Path | None:
        """The file in which it keeps a dialogue on this machine; None if there is none."""
        ...


def bare_model(model: str) -> str:
    """The provider's own name of a model: the part after the first slash."""
    return model.partition("/")[2] or model
