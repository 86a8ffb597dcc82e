"""The account that each provider uses: its login or key, and the key's origin. Keys are never shown."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ksi.config.found_providers import KEYS
from ksi.config.schema import ProviderConfig

Environ = Mapping[str, str]

_CLOUDS = {
    "CLAUDE_CODE_USE_BEDROCK": "Amazon Bedrock",
    "CLAUDE_CODE_USE_VERTEX": "Google Vertex AI",
    "CLAUDE_CODE_USE_FOUNDRY": "Microsoft Foundry",
}
"""Variables that make Claude Code ask a cloud with that cloud's login."""

_CREDENTIALS = ("ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN")
"""Variables that Claude Code prefers to its login, in its order."""


def account(name: str, entry: ProviderConfig, environ: Environ) -> str | None:
    """One provider's account in words; None for a kind that has none."""
    if entry.kind == "claude-cli":
        own = entry.options.get("env")
        return _claude(own if isinstance(own, dict) else {}, environ)
    if entry.kind in KEYS:
        return _by_key(name, entry, environ)
    return None


def _by_key(name: str, entry: ProviderConfig, environ: Environ) -> str:
    address = entry.options.get("base_url")
    where = "" if address is None else f" at {_shown(str(address))}"
    if "api_key" in entry.options:
        return f"the key that ksi.toml gives{where}"
    variable = entry.options.get("api_key_env")
    if variable is None and (entry.kind != "openai" or address is None):
        variable = KEYS[entry.kind]
    if variable is None:
        return f"no key{where}"
    present = "the key in" if environ.get(str(variable)) else "none: there is no"
    return f"{present} {variable}, from the daemon's environment{where}"


def _claude(own: Mapping[str, object], environ: Environ) -> str:
    def origin(variable: str) -> str | None:
        if variable in own:
            return f"{variable} of ksi.toml" if own[variable] else None
        return f"{variable} from the daemon's environment" if environ.get(variable) else None

    address = origin("ANTHROPIC_BASE_URL")
    url = own.get("ANTHROPIC_BASE_URL") or environ.get("ANTHROPIC_BASE_URL")
    where = "" if address is None else f", at {_shown(str(url))} ({address})"
    for variable, cloud in _CLOUDS.items():
        told = origin(variable)
        if told is not None:
            return f"{cloud}'s login ({told}){where}"
    for variable in _CREDENTIALS:
        told = origin(variable)
        if told is not None:
            return f"the account of {told}{where}"
    folder = own.get("CLAUDE_CONFIG_DIR") or environ.get("CLAUDE_CONFIG_DIR") or f"{environ.get('HOME', '~')}/.claude"
    return f"Claude Code's own login in {folder}{where}"


def _shown(url: str) -> str:
    """An address without a name and password in it."""
    return re.sub(r"(?<=://)[^/@]*@", "", url)
