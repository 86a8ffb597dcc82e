"""The arguments, environment and files with which a Claude Code process is started."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ksi.content.blocks import Block, Content, Message, as_blocks, text_of
from ksi.host.private_files import make_folder
from ksi.providers.masking import pieces, worth_masking

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
_HARMLESS = _KEPT - {
    "CLAUDE_CODE_OAUTH_TOKEN",
    "CLAUDE_CODE_CLIENT_KEY_PASSPHRASE",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "http_proxy",
    "https_proxy",
} | {
    "TRACEPARENT",
    "ANTHROPIC_MODEL",
    "ANTHROPIC_SMALL_FAST_MODEL",
    "ANTHROPIC_DEFAULT_HAIKU_MODEL",
    "ANTHROPIC_DEFAULT_OPUS_MODEL",
    "ANTHROPIC_DEFAULT_SONNET_MODEL",
    "ANTHROPIC_VERTEX_PROJECT_ID",
    "AWS_DEFAULT_REGION",
    "AWS_PROFILE",
    "AWS_REGION",
    "API_TIMEOUT_MS",
    "CLAUDE_CODE_MAX_OUTPUT_TOKENS",
    "CLAUDE_CODE_DISABLE_ATTACHMENTS",
}
"""Variables whose values a message may repeat. All others are secret."""
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
    """The properties, besides their session, that two turns must share to run in one process."""

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
    json_schema: str | None = None
    """The JSON Schema that its answers fit."""
    mentions: bool = False
    """If True, the file of an `@path` in a prompt is read and sent."""
    asks: bool = False
    """Its permission prompts come to the host."""
    extra_args: tuple[str, ...] = ()


class SessionTarget(msgspec.Struct, frozen=True, kw_only=True):
    """The session of a process: a new one, one that it continues, or one that it branches off."""

    session: str
    """Its name from now on."""
    resumed: str | None = None
    """The session or transcript to begin from; None begins with nothing."""
    at: str | None = None
    """The last message to keep of it; None keeps all."""

    @property
    def branches(self) -> bool:
        """True if it begins from another session than its own."""
        return self.resumed is not None and Path(self.resumed).stem != self.session


def arguments(launch: Launch, place: SessionTarget, files: Path) -> list[str]:
    """The program's arguments, with long or private ones in files of the new folder `files`.

    A value stands behind the `=` of its option, so that it cannot be read as another option.

    Raises:
        OSError: they cannot be written.
    """
    make_folder(files.parent)
    files.mkdir(mode=0o700)
    made = ["-p", "--input-format=stream-json", "--output-format=stream-json", "--verbose"]
    made += ["--include-partial-messages", f"--model={launch.model}", f"--tools={launch.tools}"]
    made += ["--strict-mcp-config", f"--setting-sources={launch.setting_sources}"]
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
    if launch.asks:
        made += ["--permission-prompt-tool=stdio"]
    if launch.json_schema is not None:
        made += [f"--json-schema={launch.json_schema}"]
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
    """A process's variables: those of the daemon that find and authorise it, then those that keep it plain, then the
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


def secrets_of(launch: Launch, variables: Mapping[str, str]) -> tuple[str, ...]:
    """The texts that no message about a process may repeat, longest first: values of its variables, of its further
    arguments and of its MCP servers, apart from those that are known to be harmless."""
    values = [value for name, value in variables.items() if not _is_harmless(name)]
    for word in launch.extra_args:
        option, sign, value = word.partition("=")
        values += [value] if sign and option.startswith("-") else [] if word.startswith("-") else [word]
    if launch.mcp_config is not None:
        servers = msgspec.json.decode(launch.mcp_config)["mcpServers"]
        values += [text for server in servers.values() for text in _texts(server)]
    return worth_masking(piece for value in values for piece in pieces(value))


def _is_harmless(name: str) -> bool:
    return name in _HARMLESS or name in _ALWAYS or name.startswith("LC_")


def _texts(value: Any) -> Iterator[str]:
    """The texts within a server's configuration, its command and kind apart."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from (text for each in value for text in _texts(each))
    elif isinstance(value, dict):
        yield from (text for key, each in value.items() if key not in ("command", "type") for text in _texts(each))


def inert(prompt: str) -> str:
    """A prompt that is no slash command: a space before the slash makes it text."""
    return f" {prompt}" if prompt.startswith("/") else prompt


_SEEN = ("image", "document")
"""Blocks, besides text, that Claude Code accepts."""


def prompt_of(messages: Sequence[Message], *, commands: bool) -> str | list[Block]:
    """The prompt of a turn: the last message, with those before it quoted. Images and documents of all of them are
    blocks before the text, in their order. `commands`: a prompt that begins with a slash is a command."""
    *before, last = messages
    text = quoted([(m.role, text_of(_named(m.content))) for m in before], text_of(last.content))
    text = text if commands else inert(text)
    others = [b for m in messages for b in as_blocks(m.content) if b.get("type") in _SEEN]
    if not others:
        return text
    return [*others, {"type": "text", "text": text}] if text.strip() else others


def _named(content: Content) -> Content:
    """A content with a word in the place of each image or document, which precede the text."""
    if isinstance(content, str):
        return content
    return tuple({"type": "text", "text": f"[{b['type']}]\n"} if b.get("type") in _SEEN else b for b in content)


_CLOSING = re.compile(r"<(?=/?(?:message|conversation)\b)", re.IGNORECASE)


def quoted(history: Sequence[tuple[str, str]], prompt: str) -> str:
    """A first prompt that brings along a history from elsewhere, in pairs of role and text."""
    if not history:
        return prompt
    messages = "\n".join(f'<message role="{role}">\n{_CLOSING.sub("&lt;", text)}\n</message>' for role, text in history)
    return (
        "The conversation so far, which was held in another place, is quoted here. Go on from it.\n\n"
        f"<conversation>\n{messages}\n</conversation>\n\n{prompt}"
    )


def mcp_text(config: Any, home: Path) -> str | None:
    """An MCP configuration as JSON, made of an object (with or without `mcpServers` around it) or of a text. Any other
    text is returned as the path that it names; a relative one is below the home."""
    if config is None or config == {}:
        return None
    if isinstance(config, str):
        return config if config.lstrip().startswith("{") else str(home / Path(config).expanduser())
    servers = config if "mcpServers" in config else {"mcpServers": config}
    return msgspec.json.encode(servers, order="deterministic").decode()


def _written(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path
