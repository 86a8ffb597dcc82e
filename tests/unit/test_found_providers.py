"""Which providers are there without configuration, and whose account each uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from ksi.config.found_providers import find_program, found, missing
from ksi.config.reader import load
from ksi.config.schema import ProviderConfig
from ksi.providers.accounts import account


def program(path: Path) -> Path:
    """An executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.mark.promise("O8")
def test_without_anything_there_is_the_local_model_alone(tmp_path: Path) -> None:
    config = load(tmp_path, {"PATH": str(tmp_path), "HOME": str(tmp_path)})
    assert list(config.providers) == ["local"]
    assert config.sources == {"local": "built in"}


@pytest.mark.promise("O8")
@pytest.mark.parametrize("place", ["bin/claude", ".local/bin/claude", ".claude/local/claude"])
def test_claude_is_found_on_the_path_and_at_its_installers_places(tmp_path: Path, place: str) -> None:
    claude = program(tmp_path / place)
    environ = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path)}
    assert find_program("claude", environ) == str(claude)
    config = load(tmp_path, environ)
    assert config.providers["claude-cli"].models == ("claude-cli/*",)
    assert config.sources["claude-cli"] == f"found at {claude}"


@pytest.mark.promise("O8")
def test_a_key_in_the_environment_makes_its_provider(tmp_path: Path) -> None:
    environ = {"OPENAI_API_KEY": "sk-1", "ANTHROPIC_API_KEY": "sk-2", "PATH": ""}
    config = load(tmp_path, environ)
    assert list(config.providers) == ["local", "openai", "anthropic"]
    assert config.providers["openai"].models == ("openai/*",)
    assert config.sources["anthropic"] == "ANTHROPIC_API_KEY is in the environment"
    assert list(load(tmp_path, {"OPENAI_API_KEY": "", "PATH": ""}).providers) == ["local"]


@pytest.mark.promise("O8")
def test_configured_providers_replace_all_found_ones(tmp_path: Path) -> None:
    (tmp_path / "ksi.toml").write_text('[providers.stub]\nkind = "stub"\n')
    config = load(tmp_path, {"OPENAI_API_KEY": "sk-1", "PATH": ""})
    assert (list(config.providers), config.sources) == (["stub"], {})


def test_no_path_is_no_path_of_ours() -> None:
    assert find_program("sh", {}) is None
    assert list(found({})) == ["local"]


@pytest.mark.promise("O8")
@pytest.mark.parametrize(
    ("kind", "environ", "words"),
    [
        ("claude-cli", {}, "npm install -g @anthropic-ai/claude-code"),
        ("openai", {}, "no OPENAI_API_KEY in the daemon's environment"),
        ("anthropic", {"ANTHROPIC_API_KEY": "x"}, "add [providers.anthropic]"),
    ],
)
def test_a_missing_program_is_reported_with_advice(kind: str, environ: dict[str, str], words: str) -> None:
    assert words in (missing(kind, environ) or "")


def test_a_kind_that_is_never_found_by_itself_is_not_missing(tmp_path: Path) -> None:
    assert missing("team", {}) is None
    program(tmp_path / "claude")
    assert "add [providers.claude-cli]" in (missing("claude-cli", {"PATH": str(tmp_path)}) or "")


ACCOUNTS = [
    ("claude-cli", {}, {"HOME": "/h"}, "Claude Code's own login in /h/.claude"),
    ("claude-cli", {}, {"CLAUDE_CONFIG_DIR": "/c"}, "Claude Code's own login in /c"),
    (
        "claude-cli",
        {},
        {"ANTHROPIC_API_KEY": "sk", "ANTHROPIC_BASE_URL": "http://me:pw@127.0.0.1:9"},
        "the account of ANTHROPIC_API_KEY from the daemon's environment, at http://127.0.0.1:9 (ANTHROPIC_BASE_URL "
        "from the daemon's environment)",
    ),
    (
        "claude-cli",
        {"env": {"ANTHROPIC_API_KEY": "sk"}},
        {"CLAUDE_CODE_OAUTH_TOKEN": "t"},
        "the account of ANTHROPIC_API_KEY of ksi.toml",
    ),
    (
        "claude-cli",
        {"env": {"ANTHROPIC_API_KEY": ""}},
        {"ANTHROPIC_API_KEY": "sk", "HOME": "/h"},
        "Claude Code's own login in /h/.claude",
    ),
    (
        "claude-cli",
        {},
        {"CLAUDE_CODE_USE_BEDROCK": "1", "ANTHROPIC_API_KEY": "sk"},
        "Amazon Bedrock's login (CLAUDE_CODE_USE_BEDROCK from the daemon's environment)",
    ),
    ("openai", {}, {"OPENAI_API_KEY": "sk"}, "the key in OPENAI_API_KEY, from the daemon's environment"),
    ("openai", {}, {}, "none: there is no OPENAI_API_KEY, from the daemon's environment"),
    ("openai", {"base_url": "http://team/v1"}, {"OPENAI_API_KEY": "sk"}, "no key at http://team/v1"),
    (
        "openai",
        {"base_url": "http://team/v1", "api_key_env": "TEAM"},
        {"TEAM": "sk"},
        "the key in TEAM, from the daemon's environment at http://team/v1",
    ),
    ("anthropic", {}, {"ANTHROPIC_API_KEY": "sk"}, "the key in ANTHROPIC_API_KEY, from the daemon's environment"),
    ("stub", {}, {"OPENAI_API_KEY": "sk"}, None),
]


@pytest.mark.promise("O8", "S3")
@pytest.mark.parametrize(("kind", "options", "environ", "words"), ACCOUNTS)
def test_an_account_is_described_by_the_login_or_the_key_that_is_used(
    kind: str, options: dict[str, object], environ: dict[str, str], words: str | None
) -> None:
    entry = ProviderConfig(kind=kind, models=("x/*",), options=options)
    assert account("x", entry, environ) == words
