"""What a Claude Code process is started with: arguments, environment and files. Nothing of a request but these."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

PLAIN_SYSTEM = "You are a helpful assistant."
OWN_SYSTEM = "claude-code"
"""The word for Claude Code's own system prompt, to which a request's is then added."""

_KEPT = frozenset(
    {
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "SHELL",
        "LANG",
        "TZ",
        "TMPDIR",
        "XDG_CONFIG_HOME",
        "XDG_RUNTIME_DIR",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "NODE_EXTRA_CA_CERTS",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "NO_PROXY",
        "http_proxy",
        "https_proxy",
        "no_proxy",
        "CLAUDE_CONFIG_DIR",
        "CLAUDE_CODE_OAUTH_TOKEN",
        "CLAUDE_CODE_CLIENT_CERT",
        "CLAUDE_CODE_CLIENT_KEY",
        "CLAUDE_CODE_CLIENT_KEY_PASSPHRASE",
        "CLAUDE_CODE_API_KEY_HELPER_TTL_MS",
        "CLOUD_ML_REGION",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "GOOGLE_CLOUD_PROJECT",
        "GCLOUD_PROJECT",
    }
)
_KEPT_PREFIXES = (
    "LC_",
    "ANTHROPIC_",
    "AWS_",
    "AZURE_",
    "CLOUDSDK_",
    "VERTEX_REGION_",
    "CLAUDE_CODE_USE_",
    "CLAUDE_CODE_SKIP_",
)
_ALWAYS = {
    "CLAUDE_CODE_MAX_RETRIES": "1",  # the event before the one retry names the status and the wait
    "CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK": "1",
    "CLAUDE_CODE_DISABLE_REFUSAL_RETRY": "1",
    "CLAUDE_CODE_DISABLE_REFUSAL_FALLBACK": "1",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "CLAUDE_CODE_DISABLE_BACKGROUND_TASKS": "1",
    "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
    "DISABLE_TELEMETRY": "1",
    "DISABLE_AUTOUPDATER": "1",
}
_RETRIES_AFTER_TOOLS = "4"
"""How often the program may ask again in a turn that has used tools with effects, and cannot be run again."""
_NO_MENTIONS = {"CLAUDE_CODE_DISABLE_ATTACHMENTS": "1"}


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """All that two turns must have in common to be made by one process, beside their session."""

    model: str
    folder: str
    system: str | None
    """None: Claude Code's own."""
    added_system: str | None
    tools: str
    """As `--tools` takes them; empty for none."""
    allowed_tools: tuple[str, ...] = ()
    permission_mode: str | None = None
    setting_sources: str = ""
    mcp_config: str | None = None
    """A JSON text."""
    max_tokens: int | None = None
    mentions: bool = False
    """Whether `@path` in a prompt is read and sent."""
    extra_args: tuple[str, ...] = ()


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """The session that a process works on: a new one, one that it goes on in, or one that it branches off from."""

    session: str
    """Its name from now on."""
    resumed: str | None = None
    """The session or transcript to begin from; None begins with nothing."""
    at: str | None = None
    """The last message to keep of it; None keeps all."""

    @property
    def branches(self) -> bool:
        """Whether it begins from another session than it is."""
        return self.resumed is not None and Path(self.resumed).stem != self.session


def arguments(launch: Launch, place: Place, files: Path) -> list[str]:
    """The arguments behind the program, with what is long or private in files of the new folder `files`.

    Raises:
        OSError: they cannot be written.
    """
    files.mkdir(parents=True, mode=0o700)
    made = ["-p", "--input-format=stream-json", "--output-format=stream-json", "--verbose"]
    made += ["--include-partial-messages", f"--model={launch.model}", "--tools", launch.tools]
    made += ["--strict-mcp-config", "--setting-sources", launch.setting_sources]
    if launch.system is not None:
        made += [f"--system-prompt-file={_written(files / 'system.txt', launch.system)}"]
    if launch.added_system is not None:
        made += [f"--append-system-prompt-file={_written(files / 'added_system.txt', launch.added_system)}"]
    if launch.mcp_config is not None:
        made += [f"--mcp-config={_written(files / 'mcp.json', launch.mcp_config)}"]
    if launch.allowed_tools:
        made += [f"--allowed-tools={','.join(launch.allowed_tools)}"]
    if launch.permission_mode is not None:
        made += [f"--permission-mode={launch.permission_mode}"]
    if place.resumed is not None:
        made += [f"--resume={place.resumed}"]
        if place.at is not None:
            made += [f"--resume-session-at={place.at}"]
    if place.branches:
        made += ["--fork-session"]
    if place.branches or place.resumed is None:
        made += [f"--session-id={place.session}"]
    return [*made, *launch.extra_args]


def environment(
    inherited: Mapping[str, str], launch: Launch, *, own: Mapping[str, str], passed: Sequence[str], timeout: float
) -> dict[str, str]:
    """A process's variables: of the daemon's what finds and authorises it, then what keeps it plain, then the
    configuration's `own`. `passed` are further names to keep; `timeout` is for one call of its API, in seconds."""
    made = {
        name: value
        for name, value in inherited.items()
        if name in _KEPT or name in passed or name.startswith(_KEPT_PREFIXES)
    }
    made |= _ALWAYS
    made["API_TIMEOUT_MS"] = str(round(timeout * 1000))
    if launch.tools or launch.mcp_config is not None:
        made["CLAUDE_CODE_MAX_RETRIES"] = _RETRIES_AFTER_TOOLS
    if not launch.mentions:
        made |= _NO_MENTIONS
    if launch.max_tokens is not None:
        made["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] = str(launch.max_tokens)
    return {**made, **own}


def inert(prompt: str) -> str:
    """A prompt that is no slash command: a space before the slash makes it text."""
    return f" {prompt}" if prompt.startswith("/") else prompt


_CLOSING = re.compile(r"<(?=/?(?:message|conversation)\b)", re.IGNORECASE)


def quoted(history: Sequence[tuple[str, str]], prompt: str) -> str:
    """A first prompt that brings along what was said elsewhere; `history` in pairs of role and text."""
    if not history:
        return prompt
    messages = "\n".join(f'<message role="{role}">\n{_CLOSING.sub("&lt;", text)}\n</message>' for role, text in history)
    return (
        "The conversation so far, which was held in another place, is quoted here. Go on from it.\n\n"
        f"<conversation>\n{messages}\n</conversation>\n\n{prompt}"
    )


def mcp_text(config: Any, home: Path) -> str | None:
    """An MCP configuration as JSON where it is one: of an object (with or without `mcpServers` around it), or a text.
    Any other text is the path that it names, below the home where it is relative."""
    if config is None or config == {}:
        return None
    if isinstance(config, str):
        return config if config.lstrip().startswith("{") else str(home / Path(config).expanduser())
    servers = config if "mcpServers" in config else {"mcpServers": config}
    return msgspec.json.encode(servers, order="deterministic").decode()


def _written(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path
