"""The pictures in the documents are made of the page as it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, expect

from ksi.events.reports import TrendSample
from tests.browser import go, opened
from tests.http_door import Door, door
from tests.integration.serving import AT_ONCE

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.promise("V1")]

PICTURES = Path(__file__).parents[2] / "docs" / "images"
NAMES = ("page-overview.png", "page-chain.png", "page-phone.png")
WRITE = "KSI_TEST_PICTURES"

TEXT = "A conversation has at most one holder. Behind it stands one queue, ordered by rank and by arrival. "
CLAUDE: dict[str, Any] = {"kind": "stub", "pieces": 4_000, "piece_delay": 0.05, "max_concurrency": 4}
OPENAI: dict[str, Any] = {"kind": "stub", "fail": "network_error"}
OFF: dict[str, Any] = {"kind": "local", "enabled": False}


async def test_the_pictures_in_the_documents_are_made_of_the_page(browser: Browser, tmp_path: Path) -> None:
    """With KSI_TEST_PICTURES=1 they are written anew."""
    folder = PICTURES if os.environ.get(WRITE) else tmp_path
    providers = {"claude": CLAUDE, "local": OFF, "openai": OPENAI}
    async with door(providers=providers, service=AT_ONCE, breaker={"open_for": 300.0, "failures": 2}) as here:
        await a_day_of_work(here)
        async with opened(browser, here) as (page, _):
            await expect(page.locator(".tail")).to_have_count(3)
            await page.screenshot(path=folder / "page-overview.png")
            await go(page, "#/chain/release-plan")
            await expect(page.locator(".tree").first).to_contain_text("max depth")
            await page.screenshot(path=folder / "page-chain.png")
        async with opened(browser, here, width=400, scheme="dark") as (page, _):
            await expect(page.locator(".attention li")).to_have_count(4)
            await page.screenshot(path=folder / "page-phone.png")
    for name in NAMES:
        made, kept = (folder / name).read_bytes(), (PICTURES / name).read_bytes()
        assert made[16:24] == kept[16:24], "of the same width and height"


async def a_day_of_work(here: Door) -> None:
    """Make what the pictures show."""
    for name, agent in (("essay", "writer"), ("review", "reviewer"), ("outline", "planner")):
        shown: dict[str, Any] = {"model": "claude/opus", "stream": True, "provider_options": {"text": TEXT * 40}}
        await here.told("completion:async", prompt=name, session_id=name, agent_id=agent, request_id=name, **shown)
    for _ in range(2):
        await here.told("completion:async", prompt="x", model="openai/gpt", retry={"max_attempts": 1})
    for number in range(6):
        crawl: dict[str, Any] = {"model": "claude/haiku", "session_id": "essay", "agent_id": "crawler"}
        await here.told("completion:async", prompt="page", priority=("low", "background")[number % 2], **crawl)
    await a_chain(here)
    held: dict[str, Any] = {"hold": True, "agent_id": "cleaner", "request_id": "clean-up"}
    await here.told("completion:async", prompt="Delete last year's logs", **held)
    await here.told("queue:pause", agent_id="nightly", by="ann", why="the monthly budget")
    three_hours(here)


async def a_chain(here: Door) -> None:
    """A release that is planned, and a review that goes too deep."""
    limits: dict[str, Any] = {"max_depth": 3, "token_budget": 400}
    plan: dict[str, Any] = {"request_id": "release-plan", "agent_id": "planner", "session_id": "release"}
    await here.told("completion:request", prompt="Plan the release.", circuit_breaker_config=limits, **plan)
    for parent, name, agent, asked in (
        ("release-plan", "changelog", "writer", "Write down what users will notice, newest first."),
        ("release-plan", "audit", "reviewer", "Which parts have changed since the last audit?"),
        ("audit", "audit-store", "reviewer", "Does the upgrade of the database survive a crash in its middle?"),
        ("audit", "audit-http", "reviewer", "Who can reach the port, and with which token?"),
        ("audit-http", "audit-tokens", "reviewer", "Are revoked tokens refused on connections that are open?"),
        ("audit-tokens", "audit-again", "reviewer", "Repeat the check with a token of another agent."),
    ):
        born: dict[str, Any] = {"circuit_breaker_config": {**limits, "parent_request_id": parent}, "agent_id": agent}
        await here.told("completion:async", prompt=asked, request_id=name, session_id=f"release-{name}", **born)
        if name != "audit-again":
            await here.told("completion:wait", request_id=name)


def three_hours(here: Door) -> None:
    """A queue that grew, and was worked off."""
    now, waiting = here.daemon._clock.now().unix, 0
    none: dict[str, Any] = {"delayed": 0, "completed": 0, "failed": 0, "by_route": {}}
    for minute in range(180):
        step = 9 if 60 < minute < 100 else -8 if minute > 120 else 0
        waiting = max(0, waiting + step + minute * 7 % 5 - 2)
        parts = {"high": waiting // 5, "normal": waiting // 2, "background": waiting - waiting // 5 - waiting // 2}
        at = now - (180 - minute) * 60
        here.daemon._trend._samples.append(TrendSample(at=at, active=4, queued=waiting, by_priority=parts, **none))
