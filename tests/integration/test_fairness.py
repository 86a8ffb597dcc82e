"""No client takes all the places of a real daemon."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.daemon_process import DaemonProcess, make_home
from tests.integration.wire import Wire, in_state

ONE = """
[providers.one]
kind = "stub"
max_concurrency = 1
"""


@pytest.mark.promise("B4")
async def test_neither_a_flood_of_an_agent_nor_of_critical_keeps_others_out(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    (home / "ksi.toml").write_text((home / "ksi.toml").read_text() + ONE)
    with DaemonProcess(home) as process:
        async with await Wire.open(process.socket_path) as wire, await Wire.open(process.socket_path) as other:
            await wire.ask("queue:pause")
            for number in range(100):
                priority = "critical" if number % 2 else "normal"
                data = {"prompt": "x", "request_id": f"greedy{number}", "model": "one/x", "priority": priority}
                await wire.ask("completion:async", **data)
            await other.ask("completion:async", prompt="x", request_id="modest", model="one/x")
            await other.ask("completion:async", prompt="x", request_id="named", model="one/x", agent_id="ann")
            turns = (await wire.ask("completion:queue_status"))["turns"]
            normal = [one["flow"] for one in turns if one["priority"] == "normal"]
            assert len(normal) == 3 and "agent:ann" in normal
            await wire.ask("queue:resume")
            last = await in_state(wire, "greedy98", "completed")
            modest = await in_state(wire, "modest", "completed")
            critical = await in_state(wire, "greedy99", "completed")
            assert modest["finished_at"] < last["finished_at"]
            assert modest["finished_at"] < critical["finished_at"]
