"""What of a configuration is shown: what is known to be harmless, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ksi.config.reader import load
from ksi.config.view import HIDDEN, shown_values

SECRETS = """
[store]
url = "redis://user:SECRET-1@127.0.0.1:1/0?password=SECRET-2"
[providers.up]
kind = "openai"
base_url = "http://SECRET-3@127.0.0.1:1/v1?key=SECRET-4"
proxy = "http://u:SECRET-5@127.0.0.1:9"
api_key_env = "sk-SECRET-6"
headers = { Authorization = "Bearer SECRET-7", "X-Api-Key" = "SECRET-8", Cookie = "sess=SECRET-9" }
extra_body = { api_token = "SECRET-10", passphrase = "SECRET-11", pin = 4242424242 }
[providers.cc]
kind = "claude-cli"
command = ["claude", "--api-key", "SECRET-12"]
system_prompt = "The door's code is SECRET-13."
allowed_tools = ["Bash(curl -H SECRET-14)"]
env = { ANTHROPIC_API_KEY = "SECRET-15", GITHUB_PAT = "SECRET-16" }
mcp_config = { mcpServers = { x = { command = "y", env = { GH = "SECRET-17" } } } }
extra_args = ["--api-key=SECRET-18"]
[providers.later]
kind = "not-there-yet"
credential = "SECRET-19"
nested = { deep = { deeper = "SECRET-20" } }
listed = ["SECRET-21", { x = "SECRET-22" }]
"""


@pytest.mark.promise("U4", "S3")
def test_no_secret_is_shown_wherever_it_stands(tmp_path: Path) -> None:
    hooks = '[hooks]\non_end = "https://hooks.example/services/SECRET"\non_block = ["curl", "SECRET"]\n'
    (tmp_path / "ksi.toml").write_text(SECRETS + hooks)
    text = json.dumps(shown_values(load(tmp_path, {})))
    assert "SECRET" not in text
    assert "4242424242" not in text


@pytest.mark.promise("U4")
def test_harmless_values_are_shown(tmp_path: Path) -> None:
    (tmp_path / "ksi.toml").write_text(SECRETS + '[providers.key]\nkind = "openai"\napi_key_env = "TEAM_API_KEY"\n')
    shown = shown_values(load(tmp_path, {}))
    assert shown["store.url"] == "redis://***@127.0.0.1:1/0?password=***"
    assert shown["providers.up.base_url"] == "http://***@127.0.0.1:1/v1?key=***"
    assert shown["providers.up.headers.Cookie"] == HIDDEN
    assert shown["providers.cc.command"] == ["claude", HIDDEN]
    assert shown["providers.cc.env.GITHUB_PAT"] == HIDDEN
    assert shown["providers.key.api_key_env"] == "TEAM_API_KEY"
    assert shown["providers.up.api_key_env"] == HIDDEN
    assert shown["providers.up.max_concurrency"] == 4
    assert shown["queue.lease"] == 30.0
    assert shown["service.default_model"] == "local/smollm2"
