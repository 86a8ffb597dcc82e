"""The options of configuration and request for Claude Code, and the launch that follows from both."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from ksi.content.blocks import text_of
from ksi.errors import FailureClass, ProviderError
from ksi.providers.base import Call
from ksi.providers.claude_cli.host import ALLOWED, with_own_server
from ksi.providers.claude_cli.launch import OWN_SYSTEM, PLAIN_SYSTEM, Launch, mcp_text

WORK = "var/claude/work"
"""The folder below the home in which processes work unless `cwd` names another; it stays empty."""


FEATURES = frozenset({"response_format", "images", "documents", "document_urls"})
"""The request features that Claude Code supports; it has tools of its own, and accepts no others."""
_LARGEST_SCHEMA = 100_000
"""Bytes of a JSON Schema, which is an argument of the program."""
_LARGEST_MCP = 2**20
"""Bytes of a file with MCP servers, at most."""


class TurnOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of a turn: the configuration sets them for all requests, and a request for itself by
    `provider_options`.

    Without any of them Claude Code is a plain model: no tools, no files, no slash commands, no user's settings.
    """

    system_prompt: str = PLAIN_SYSTEM
    """The system prompt of requests without `system`. `claude-code`: Claude Code's own, to which a request's `system`
    is added."""
    tools: tuple[str, ...] = ()
    """Built-in tools that the model may see; `default` for all."""
    allowed_tools: tuple[str, ...] = ()
    """Tools that are used without permission, as `Bash(git *)` or `mcp__server__tool`; no person is there to answer."""
    permission_mode: str | None = None
    """Claude Code's permission mode."""
    permission_prompt: Literal["ksi"] | None = None
    """`ksi`: a person is asked for each permission that the options above do not give; without it such a call is
    denied."""
    cwd: str | None = None
    """The working folder, which must be there; relative to the home. Without it an empty one."""
    setting_sources: tuple[str, ...] = ()
    """Which of Claude Code's own settings count: `user`, `project`, `local`."""
    mcp_config: dict[str, Any] | str | None = None
    """MCP servers, as in `.mcp.json`, or the path of such a file. A request's own `mcp_config` wins."""
    ksi_tools: bool = False
    """If True, the model gets KSI's own tools: a request that it sends by them is a child of its request."""
    commands: bool = False
    """If True, a prompt that begins with a slash is a command of Claude Code."""
    mentions: bool = False
    """If True, `@path` in a prompt makes Claude Code read the file and send it."""
    extra_args: tuple[str, ...] = ()
    """More arguments of the program."""


TURN_OPTIONS = frozenset(TurnOptions.__struct_fields__)


class Options(TurnOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The configuration keys of kind `claude-cli`, in addition to the common ones. Times are in seconds."""

    command: tuple[str, ...] = ("claude",)
    """The program."""
    env: dict[str, str] = {}
    """Variables for the processes, over all others."""
    pass_env: tuple[str, ...] = ()
    """Names of the daemon's variables that they get, besides those that a login needs."""
    request_options: tuple[str, ...] | None = None
    """Which of the keys above a request may set, by `provider_options` or by its field `mcp_config`; without it all of
    them."""
    warm: int = 8
    """Processes that are kept between turns, at most."""
    warm_age: float = 300.0
    """How long one is kept after its last turn."""
    warm_memory: int = 4096
    """MiB of all that are kept, at most; pages that they share are counted for each."""
    permission_keep: float = 600.0
    """How long a process waits for a person's answer; later the turn is run again when it is there. One whose turn has
    used tools with effects waits as long as its question is open."""
    permission_timeout: float = 86_400.0
    """From then on a question that nobody answered is a no."""
    programs: Literal["run", "owner"] = "run"
    """Whose requests are those that the agents' own programs send over the socket. `run`: children of the request that
    the agent works on. `owner`: the owner's, without limits."""
    start_timeout: float = 60.0
    """Until a new process takes up its turn."""
    context_tokens: int = 200_000
    """The model's context."""

    def __post_init__(self) -> None:
        """Refuse names in `request_options` that are no options: they would open or close nothing."""
        unknown = [name for name in self.request_options or () if name not in TURN_OPTIONS]
        if unknown:
            known = ", ".join(sorted(TURN_OPTIONS))
            raise ValueError(f"request_options: a request has no option {unknown[0][:100]!r}; there are {known}")

    @property
    def open_to_requests(self) -> frozenset[str]:
        """The options that a request may set."""
        return TURN_OPTIONS if self.request_options is None else frozenset(self.request_options)


def turn_options(options: Options, call: Call) -> TurnOptions:
    """The configuration's options with the request's over them.

    Raises:
        ProviderError: the request sets an option that does not exist, or that it may not set.
    """
    given: dict[str, Any] = {name: getattr(options, name) for name in TURN_OPTIONS}
    asked = _asked(call)
    for name in asked:
        if name in TURN_OPTIONS and name not in options.open_to_requests:
            place = "mcp_config" if name == "mcp_config" else f"provider_options: {name}"
            raise _refused(
                f"{place} is not open to requests; leave it away, or add {name!r} to this provider's request_options "
                "in ksi.toml"
            )
    try:
        return msgspec.convert({**given, **asked}, TurnOptions)
    except msgspec.ValidationError as error:
        raise _refused(f"provider_options: {error}") from None


def _asked(call: Call) -> dict[str, Any]:
    """All options that the request sets. Its field `mcp_config` is one of them, and wins over `provider_options`."""
    own = {} if call.mcp_config is None else {"mcp_config": call.mcp_config}
    return {**call.options, **own}


def launch_of(wanted: TurnOptions, call: Call, home: Path) -> Launch:
    """The launch of a process for the call.

    Raises:
        ProviderError: the MCP configuration cannot be read, by the fault of who gave it.
    """
    own = wanted.system_prompt == OWN_SYSTEM
    system = text_of(call.system) if call.system else None
    return Launch(
        model=call.model,
        folder=str(home / Path(wanted.cwd or WORK).expanduser()),
        system=None if own else system or wanted.system_prompt,
        added_system=system if own else None,
        tools=",".join(wanted.tools),
        allowed_tools=(*wanted.allowed_tools, ALLOWED) if wanted.ksi_tools else wanted.allowed_tools,
        permission_mode=wanted.permission_mode,
        asks=wanted.permission_prompt is not None,
        setting_sources=",".join(wanted.setting_sources),
        mcp_config=_mcp(wanted, call, home),
        max_tokens=call.max_tokens,
        json_schema=_schema(call),
        mentions=wanted.mentions,
        extra_args=wanted.extra_args,
    )


def _mcp(wanted: TurnOptions, call: Call, home: Path) -> str | None:
    """The MCP servers as JSON. A file is read again for each turn, because changed content needs another process."""
    text = mcp_text(wanted.mcp_config, home)
    if text is None:
        return _own({}) if wanted.ksi_tools else None
    try:
        if not text.lstrip().startswith("{"):
            text = _file(Path(text))
        servers = msgspec.json.decode(text, type=_McpConfig).mcpServers
    except OSError as error:
        problem = f"{text} cannot be read: {error.strerror}"
    except (msgspec.MsgspecError, ValueError) as error:
        problem = f"no configuration of MCP servers, as `.mcp.json` has it: {error}"
    else:
        return _own(servers) if wanted.ksi_tools else text
    # A request's fault is its own; the configuration's is the provider's, and another one may do better.
    asked = "mcp_config" in _asked(call)
    failure = FailureClass.INVALID_REQUEST if asked else FailureClass.PROVIDER_ERROR
    raise ProviderError(failure, f"mcp_config: {problem}")


def _own(servers: dict[str, Any]) -> str:
    """The servers, including KSI's own, as JSON."""
    return msgspec.json.encode({"mcpServers": with_own_server(servers)}, order="deterministic").decode()


def _schema(call: Call) -> str | None:
    """The schema that the request wants its answer to fit."""
    form = call.features.response_format
    if form is None:
        return None
    schema = msgspec.json.encode(form["json_schema"].get("schema") or {}, order="deterministic")
    if len(schema) > _LARGEST_SCHEMA:
        raise _refused(
            f"response_format: its schema is larger than {_LARGEST_SCHEMA} bytes, which Claude Code can take"
        )
    return schema.decode()


class _McpConfig(msgspec.Struct):
    mcpServers: dict[str, dict[str, Any]]  # noqa: N815 - the file's own name


def _file(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file")
    if path.stat().st_size > _LARGEST_MCP:
        raise ValueError(f"{path} is larger than {_LARGEST_MCP} bytes")
    return path.read_text("utf-8")


def _refused(message: str) -> ProviderError:
    return ProviderError(FailureClass.INVALID_REQUEST, message)
