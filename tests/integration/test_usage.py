"""The account of usage over the wire: it equals the providers' reports, to the last token."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.daemon_process import DaemonProcess, clean_environ, make_home
from tests.integration.serving import daemon_and_wire
from tests.integration.wire import Json, Wire

TOKENS = ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens", "reasoning_tokens")
STUB = {"kind": "stub", "max_concurrency": 64}
PRICES = {"stub/*": {"input": 3.0, "output": 15.0, "cache_read": 0.3, "cache_write": 3.75}}
NESTED = "[" * 120 + "]" * 120


async def used(wire: Wire, **data: Any) -> Json:
    return await wire.ask("completion:token_usage", **data)


async def ask(wire: Wire, usage: Any = True, **data: Any) -> Json:
    options = {"usage": usage, **data.pop("provider_options", {})}
    return await wire.ask("completion:request", prompt="Hi", provider_options=options, **data)


def tokens(figures: Json) -> dict[str, int]:
    return {name: figures[name] for name in TOKENS}


@pytest.mark.promise("T1", "T2")
async def test_the_sums_are_those_the_provider_reported_and_outlive_a_restart(tmp_path: Path) -> None:
    chance = random.Random(7)
    reported: Counter[str] = Counter()
    by_agent: dict[str, Counter[str]] = {"planner": Counter(), "coder": Counter()}
    unknown = 0
    async with daemon_and_wire(tmp_path, prices=PRICES) as (_, wire):
        asked = []
        for number in range(120):
            agent = chance.choice(["planner", "coder"])
            usage: Any = {name: chance.randrange(1, 5_000) for name in TOKENS[:4]}
            usage["reasoning_tokens"] = chance.randrange(usage["output_tokens"])
            if number % 10 == 0:
                usage, unknown = False, unknown + 1
            else:
                reported.update(usage)
                by_agent[agent].update(usage)
            asked.append(ask(wire, usage, agent_id=agent, session_id=f"talk {number % 7}", model="stub/echo"))
        await asyncio.gather(*asked)
        before = await used(wire)
    assert tokens(before["totals"]) == reported
    assert (before["totals"]["requests"], before["totals"]["attempts"]) == (120, 120)
    assert before["totals"]["unknown_attempts"] == unknown == 12
    assert {row["agent_id"]: tokens(row) for row in before["by_agent"]} == by_agent
    assert sum(row["requests"] for row in before["by_session"]) == 120
    assert sum(bucket["total_tokens"] for bucket in before["trend"]) == before["totals"]["total_tokens"]
    price = PRICES["stub/*"]
    names = ("input", "output", "cache_read", "cache_write")
    cost = sum(reported[f"{name}_tokens"] * price[name] for name in names) / 1e6
    assert before["totals"]["cost_usd"] == pytest.approx(cost, abs=1e-6)

    async with daemon_and_wire(tmp_path, prices=PRICES) as (_, wire):
        after = await used(wire)
    for part in ("totals", "by_agent", "by_model", "by_provider", "by_session"):
        assert after[part] == before[part]


@pytest.mark.promise("T1")
async def test_every_failed_attempt_is_one_that_is_unknown(tmp_path: Path) -> None:
    retry = {"initial_delay": 0.01, "max_delay": 0.02}
    async with daemon_and_wire(tmp_path, retry=retry) as (_, wire):
        fails = {"fail": "overloaded", "fail_attempts": 2}
        reply = await ask(wire, {"input_tokens": 5, "output_tokens": 2}, provider_options=fails)
        assert [attempt["usage"] == "unknown" for attempt in reply["attempts"]] == [True, True, False]
        totals = (await used(wire))["totals"]
    assert (totals["requests"], totals["attempts"], totals["unknown_attempts"]) == (1, 3, 2)
    assert (totals["input_tokens"], totals["output_tokens"], totals["total_tokens"]) == (5, 2, 7)


@pytest.mark.promise("T2")
async def test_usage_is_filtered_and_grouped(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path) as (_, wire):
        await ask(wire, {"input_tokens": 1}, agent_id="planner", session_id="one", model="stub/small")
        await ask(wire, {"input_tokens": 2}, agent_id="coder", session_id="two", model="stub/large")
        await ask(wire, {"input_tokens": 4}, session_id="two", model="stub/large")
        found = await used(wire)
        assert [(row["model"], row["input_tokens"]) for row in found["by_model"]] == [
            ("stub/large", 6),
            ("stub/small", 1),
        ]
        assert [(row["agent_id"], row["input_tokens"]) for row in found["by_agent"]] == [
            (None, 4),
            ("coder", 2),
            ("planner", 1),
        ]
        for wish, expected in (
            ({"agent_id": "planner"}, 1),
            ({"model": "stub/large"}, 6),
            ({"model": "large"}, 6),
            ({"provider": "stub"}, 7),
            ({"provider": "other"}, 0),
            ({"session_id": "two"}, 6),
            ({"conversation_id": "two", "agent_id": "coder"}, 2),
        ):
            assert (await used(wire, **wish))["totals"]["input_tokens"] == expected, wish
        only = await used(wire, group_by="agent")
        assert [name for name in only if name.startswith("by_")] == ["by_agent"]


@pytest.mark.promise("T2")
async def test_a_chain_s_usage_is_that_of_its_root_and_all_that_it_led_to(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path, providers={"stub": STUB}) as (_, wire):
        await ask(wire, {"input_tokens": 10, "output_tokens": 1}, request_id="root", circuit_breaker_config={})
        for number, parent in enumerate(("root", "root", "hop 0")):
            link = {"parent_request_id": parent}
            await ask(wire, {"input_tokens": 100}, request_id=f"hop {number}", circuit_breaker_config=link)
        await ask(wire, {"input_tokens": 5_000}, request_id="alone")
        assert (await used(wire))["totals"]["input_tokens"] == 5_310
        found = await used(wire, chain_id="root")
        assert (found["totals"]["requests"], found["totals"]["input_tokens"]) == (4, 310)
        assert found["totals"]["output_tokens"] == 1
        assert sum(bucket["input_tokens"] for bucket in found["trend"]) == 310
        for other in ("hop 0", "alone", "nobody"):
            assert (await used(wire, chain_id=other))["totals"]["attempts"] == 0


@pytest.mark.promise("T2")
async def test_groups_are_paged_in_one_window_whatever_comes_meanwhile(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path) as (_, wire):
        for number in range(5):
            await ask(wire, {"input_tokens": number}, session_id=f"talk {number}")
        pages: list[list[str]] = []
        cursor: Json = {}
        while True:
            page = await used(wire, group_by="session", limit=2, **cursor)
            pages.append([row["session_id"] for row in page["by_session"]])
            await ask(wire, {"input_tokens": 100}, session_id="talk 0")
            if "session" not in page["more"]:
                break
            cursor = {"cursor": page["more"]["session"]}
        assert pages == [["talk 4", "talk 3"], ["talk 2", "talk 1"], ["talk 0"]]

        whole = await used(wire, limit=2)
        assert set(whole["more"]) == {"session"}
        refused = await wire.refused("completion:token_usage", group_by="agent", cursor=whole["more"]["session"])
        assert (refused.code, refused.details["path"]) == ("invalid_data", "cursor")
        refused = await wire.refused("completion:token_usage", group_by="agent", cursor="no cursor")
        assert refused.code == "invalid_data"


@pytest.mark.promise("T2")
async def test_the_trend_has_every_bucket_of_the_window(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path) as (_, wire):
        await ask(wire, {"input_tokens": 3})
        found = await used(wire, hours=2, bucket_minutes=30)
        starts = [bucket["start"] for bucket in found["trend"]]
        assert starts == [starts[0] + 1_800 * number for number in range(5)]
        assert starts[0] <= found["since"] < starts[1]
        assert sum(bucket["input_tokens"] for bucket in found["trend"]) == 3
        assert (await used(wire))["bucket_minutes"] == 60
        refused = await wire.refused("completion:token_usage", hours=100_000, bucket_minutes=1)
        assert refused.details["path"] == "bucket_minutes"
        for wrong in ({"hours": 0}, {"hours": -1}, {"bucket_minutes": 0}, {"group_by": "chain"}, {"limit": 0}):
            assert (await wire.refused("completion:token_usage", **wrong)).code == "invalid_data"


# Costs.


@pytest.mark.promise("T2")
async def test_a_reply_has_its_cost(tmp_path: Path) -> None:
    prices = {"stub/dear": {"input": 10.0, "output": 20.0}}
    usage = {"input_tokens": 1_000, "output_tokens": 500}
    async with daemon_and_wire(tmp_path, prices=prices) as (_, wire):
        reply = await ask(wire, usage, model="stub/dear")
        assert reply["cost_usd"] == pytest.approx(0.02)
        assert (await wire.ask("completion:get", request_id=reply["request_id"]))["cost_usd"] == reply["cost_usd"]
        assert (await ask(wire, {**usage, "cost_usd": 0.5}, model="stub/dear"))["cost_usd"] == 0.5
        assert (await ask(wire, usage, model="stub/echo"))["cost_usd"] == 0.0
        assert "cost_usd" not in await ask(wire, False, model="stub/dear")
        totals = (await used(wire, model="stub/dear"))["totals"]
    assert (totals["cost_usd"], totals["unpriced_attempts"], totals["unknown_attempts"]) == (0.52, 0, 1)
    async with daemon_and_wire(tmp_path) as (_, wire):
        # Tokens are priced in a report: without the price, the provider's own cost is left.
        assert (await used(wire, model="stub/dear"))["totals"]["cost_usd"] == 0.5


# MCP.


def with_tools(**more: Any) -> Json:
    return {"stub": {**STUB, "models": ["stub/*"]}, "tools": {**STUB, "mcp": True, "models": ["stub/*", "t/*"]}, **more}


@pytest.mark.promise("T2", "F4")
async def test_a_request_with_mcp_servers_goes_to_a_provider_that_takes_them(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path, providers=with_tools()) as (_, wire):
        for config in ({"files": {"command": "serve"}}, "tools.json"):
            assert (await ask(wire, mcp_config=config))["provider"] == "tools"
        assert (await ask(wire, mcp_config={}))["provider"] == "stub"
        assert (await ask(wire, mcp_config=None))["provider"] == "stub"
        found = (await used(wire))["mcp"]
        assert (found["totals"]["requests"], found["totals"]["attempts"]) == (2, 2)


async def test_mcp_servers_that_no_provider_supports_are_refused(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path) as (_, wire):
        for event in ("completion:request", "completion:async"):
            refused = await wire.refused(event, prompt="Hi", mcp_config={"files": {}})
            assert (refused.code, refused.details["path"]) == ("invalid_data", "mcp_config")
        for wrong in ("", 3, ["a"]):
            assert (await wire.refused("completion:async", prompt="Hi", mcp_config=wrong)).code == "invalid_data"
    async with daemon_and_wire(tmp_path, providers=with_tools()) as (_, wire):
        refused = await wire.refused("completion:async", prompt="Hi", mcp_config={"a": json.loads(NESTED)})
        assert refused.message.startswith("mcp_config: nested")


@pytest.mark.promise("Q4")
async def test_another_mcp_configuration_is_another_request(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path, providers=with_tools()) as (_, wire):
        await ask(wire, request_id="r1", mcp_config={"a": {"command": "x"}})
        await ask(wire, request_id="r1", mcp_config={"a": {"command": "x"}})
        refused = await wire.refused(
            "completion:request",
            prompt="Hi",
            request_id="r1",
            provider_options={"usage": True},
            mcp_config={"a": {"command": "y"}},
        )
        assert refused.code == "request_id_conflict"


@pytest.mark.promise("T2")
async def test_the_cost_of_mcp_is_the_difference_between_first_turns(tmp_path: Path) -> None:
    tools = {"mcp_config": {"files": {"command": "serve"}}, "model": "t/m"}
    async with daemon_and_wire(
        tmp_path, providers=with_tools(), prices={"t/*": {"input": 1.0, "output": 1.0, "cache_read": 0.1}}
    ) as (_, wire):
        for sent in (2_010, 2_030):
            await ask(wire, {"input_tokens": sent, "cache_read_tokens": 1_000}, **tools)
        (told,) = (await used(wire))["mcp"]["definitions"]
        assert (told["tokens_per_request"], told["tokens"]) == ("unknown", "unknown")
        for sent in (10, 20, 90):
            await ask(wire, {"input_tokens": sent}, model="t/m")
        mcp = (await used(wire))["mcp"]
    (told,) = mcp["definitions"]
    assert (told["provider"], told["model"], told["tokens_per_request"], told["tokens"]) == (
        "tools",
        "t/m",
        3_000,
        6_000,
    )
    assert told["with_mcp"] == {"turns": 2, "input_tokens": 3_020}
    assert told["without_mcp"] == {"turns": 3, "input_tokens": 20}
    assert mcp["totals"]["cache_read_tokens"] == 2_000
    assert mcp["totals"]["cache_saved_usd"] == pytest.approx(2_000 * 0.9 / 1e6)


# The command.


def ksi(home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ksi.cli", "--home", str(home), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean_environ(), check=False)


@pytest.mark.promise("T2")
def test_the_command_shows_tables_bars_and_json(tmp_path: Path) -> None:
    with DaemonProcess(make_home(tmp_path)) as daemon:
        asked = ksi(daemon.home, "ask", "--model", "stub/echo", "one two three")
        assert asked.returncode == 0, asked.stderr
        shown = ksi(daemon.home, "usage")
        assert shown.returncode == 0, shown.stderr
        lines = shown.stdout.splitlines()
        assert "requests       1" in lines
        for title in ("by agent", "by model", "by provider", "by session", "tokens every hour"):
            assert title in lines
        assert lines[-1].endswith("#" * 40)
        alone = ksi(daemon.home, "usage", "--by", "model", "--bucket", "5", "--hours", "1")
        assert "by agent" not in alone.stdout
        assert "tokens every 5 minutes" in alone.stdout
        told = json.loads(ksi(daemon.home, "usage", "--json", "--model", "echo").stdout)
        assert told["totals"]["input_tokens"] == 3
        assert "requests       0" in ksi(daemon.home, "usage", "--chain", "nobody").stdout
        unclear = ksi(daemon.home, "usage", "--hours", "nan")
        assert (unclear.returncode, "nan is no number" in unclear.stderr) == (2, True)
        nothing = ksi(daemon.home, "usage", "--agent", "nobody")
        assert "tokens every" not in nothing.stdout
        wrong = ksi(daemon.home, "usage", "--hours", "100000", "--bucket", "1")
        assert (wrong.returncode, "take 6000 or more" in wrong.stderr) == (2, True)
