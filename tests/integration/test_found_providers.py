"""A fresh home serves installed programs and vendors with a key, reports them, and keeps conversations with their kind
of model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.daemon_process import DaemonProcess, make_home
from tests.integration.wire import Wire


@pytest.mark.promise("O8")
async def test_a_fresh_home_shows_its_models_with_their_origin_and_account(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    claude = tmp_path / "bin" / "claude"
    claude.write_text('#!/bin/sh\necho "2.1.200 (Claude Code)"\n')
    claude.chmod(0o755)
    environ = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "HOME": str(tmp_path), "OPENAI_API_KEY": "sk-secret-1"}
    environ |= {"ANTHROPIC_API_KEY": ""}
    with DaemonProcess(make_home(tmp_path / "home", ""), environ) as process:
        async with await Wire.open(process.socket_path) as wire:
            facts = (await wire.ask("system:health"))["providers"]
            reports = (await wire.ask("completion:provider_status"))["providers"]
            assert list(reports) == ["local", "claude-cli", "openai"]
            for name, told in facts.items():
                assert {key: reports[name][key] for key in told} == told
            assert facts["claude-cli"]["source"] == f"found at {claude}"
            assert facts["claude-cli"]["account"].startswith("Claude Code's own login in ")
            assert facts["openai"]["account"] == "the key in OPENAI_API_KEY, from the daemon's environment"
            refused = await wire.refused("completion:async", prompt="x", model="anthropic/claude")
            assert refused.code == "unknown_model"
            assert "there is no ANTHROPIC_API_KEY in the daemon's environment" in refused.message
            refused = await wire.refused("completion:async", prompt="x", model="anthropc/claude")
            assert "did you mean" not in refused.message
        log = (tmp_path / "home" / "var" / "logs" / "daemon.log").read_text()
    assert "the key in OPENAI_API_KEY" in log
    assert "sk-secret-1" not in log


@pytest.mark.promise("O8")
async def test_an_unknown_model_of_a_kind_that_is_not_installed_names_the_missing_program(tmp_path: Path) -> None:
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    with DaemonProcess(make_home(tmp_path / "home", ""), environ) as process:
        async with await Wire.open(process.socket_path) as wire:
            refused = await wire.refused("completion:request", prompt="Hello", model="claude-cli/haiku")
            assert "Claude Code is not installed: install it with `npm install" in refused.message


CONFIG = """\
[service]
default_model = "stub/echo"

[providers.stub]
kind = "stub"
"""


async def provider_of(wire: Wire, **data: Any) -> str:
    return str((await wire.ask("completion:request", prompt="x", session_id="c", **data))["provider"])


@pytest.mark.promise("O8", "L9")
async def test_a_conversation_stays_with_its_kind_of_model_or_says_why_not(tmp_path: Path) -> None:
    local = '[providers.small]\nkind = "local"\nmodels = ["small/*"]\n'
    home = make_home(tmp_path / "home", CONFIG + local)
    with DaemonProcess(home) as process:
        async with await Wire.open(process.socket_path) as wire:
            assert await provider_of(wire, model="small/smollm2", max_tokens=2) == "small"
            assert await provider_of(wire, max_tokens=2) == "small"
            assert (await wire.ask("completion:request", prompt="x", session_id="new"))["provider"] == "stub"
    make_home(home, CONFIG)
    with DaemonProcess(home) as process:
        async with await Wire.open(process.socket_path) as wire:
            refused = await wire.refused("completion:request", prompt="x", session_id="c")
            assert refused.code == "unknown_model"
            assert (
                "conversation 'c' was made at small and stays there: no provider serves 'small/smollm2'"
                in refused.message
            )
            assert await provider_of(wire, model="stub/echo") == "stub"
            assert await provider_of(wire) == "stub"
