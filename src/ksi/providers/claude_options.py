"""What configuration and request ask of Claude Code, and the launch that follows from both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from ksi.errors import FailureClass, ProviderError
from ksi.providers.base import Call
from ksi.providers.claude_launch import OWN_SYSTEM, PLAIN_SYSTEM, Launch, mcp_text

WORK = "var/claude/work"
"""The folder that processes work in unless somebody says otherwise, below the home; it stays empty."""


_LARGEST_MCP = 2**20
"""Bytes of a file with MCP servers, at most."""


class Wishes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a configuration sets for all requests, and a request for itself by `provider_options`.

    Without any of it Claude Code is a plain model: no tools, no files, no slash commands, nobody's settings.
    """

    system_prompt: str = PLAIN_SYSTEM
    """Where the request has no `system`. `claude-code` means Claude Code's own, to which a request's `system` is
    added."""
    tools: tuple[str, ...] = ()
    """Built-in tools that the model may see: names, or `default` for all."""
    allowed_tools: tuple[str, ...] = ()
    """Tools that are used without asking, as `Bash(git *)` or `mcp__server__tool`; there is nobody who could answer."""
    permission_mode: str | None = None
    cwd: str | None = None
    """The working folder, which must be there; relative to the home."""
    setting_sources: tuple[str, ...] = ()
    """Which of Claude Code's own settings count: `user`, `project`, `local`."""
    mcp_config: dict[str, Any] | str | None = None
    """MCP servers: an object as in `.mcp.json`, or the path of such a file. A request's `mcp_config` wins."""
    commands: bool = False
    """Whether a prompt that begins with a slash is a command of Claude Code."""
    mentions: bool = False
    """Whether `@path` in a prompt makes Claude Code read the file and send it."""
    extra_args: tuple[str, ...] = ()
    """More arguments of the program, added at the end."""


WISHES = frozenset(Wishes.__struct_fields__)


class Options(Wishes, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The configuration keys of kind `claude-cli`, beside what every provider has. Times in seconds."""

    command: tuple[str, ...] = ("claude",)
    env: dict[str, str] = {}
    """Variables for the processes, over all others."""
    pass_env: tuple[str, ...] = ()
    """Names of the daemon's variables that the processes get beside those that a login needs."""
    request_options: tuple[str, ...] | None = None
    """What a request may set by `provider_options`; without it, everything."""
    warm: int = 8
    """Processes that are kept between turns, at most."""
    warm_age: float = 300.0
    """How long a process is kept after its last turn."""
    warm_memory: int = 4096
    """Mebibytes of all that are kept, at most; pages that they share are counted for each."""
    start_timeout: float = 60.0
    """Until a new process takes up its turn."""
    context_tokens: int = 200_000


def wishes_of(options: Options, call: Call) -> Wishes:
    """The configuration's wishes with the request's over them.

    Raises:
        ProviderError: the request asks for what there is not, or what it may not.
    """
    given: dict[str, Any] = {name: getattr(options, name) for name in WISHES}
    allowed = WISHES if options.request_options is None else options.request_options
    for name in call.options:
        if name in WISHES and name not in allowed:
            raise _refused(f"provider_options: {name!r} is not open to requests; the configuration decides it")
    try:
        return msgspec.convert({**given, **call.options}, Wishes)
    except msgspec.ValidationError as error:
        raise _refused(f"provider_options: {error}") from None


def launch_of(wishes: Wishes, call: Call, home: Path) -> Launch:
    """What the call's process must be started with.

    Raises:
        ProviderError: the MCP configuration cannot be read, by the fault of who gave it.
    """
    own = wishes.system_prompt == OWN_SYSTEM
    return Launch(
        model=call.model,
        folder=str(home / Path(wishes.cwd or WORK).expanduser()),
        system=None if own else call.system or wishes.system_prompt,
        added_system=call.system if own else None,
        tools=",".join(wishes.tools),
        allowed_tools=wishes.allowed_tools,
        permission_mode=wishes.permission_mode,
        setting_sources=",".join(wishes.setting_sources),
        mcp_config=_mcp(wishes, call, home),
        max_tokens=call.max_tokens,
        mentions=wishes.mentions,
        extra_args=wishes.extra_args,
    )


def _mcp(wishes: Wishes, call: Call, home: Path) -> str | None:
    """The MCP servers as JSON, a file's as they stand there now: another content is another process."""
    asked = call.mcp_config is not None or "mcp_config" in call.options
    text = mcp_text(call.mcp_config if call.mcp_config is not None else wishes.mcp_config, home)
    if text is None:
        return None
    try:
        if not text.lstrip().startswith("{"):
            text = _file(Path(text))
        msgspec.json.decode(text, type=_McpConfig)
    except OSError as error:
        problem = f"{text} cannot be read: {error.strerror}"
    except (msgspec.MsgspecError, ValueError) as error:
        problem = f"no configuration of MCP servers, as `.mcp.json` has it: {error}"
    else:
        return text
    # A request's fault is its own; the configuration's is the provider's, and another one may do better.
    failure = FailureClass.INVALID_REQUEST if asked else FailureClass.PROVIDER_ERROR
    raise ProviderError(failure, f"mcp_config: {problem}")


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
