"""A real Chromium, driven by Playwright: one process for all tests of a session, a fresh profile for each test."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, ConsoleMessage, Page, Request, async_playwright, expect

from tests.http_door import Door

NAMED = "KSI_TEST_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
FLAGS = (
    "--no-sandbox",  # CI is root, which Chromium does not sandbox
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
PATIENCE = 60_000.0
"""Milliseconds that anything on a page gets before the test gives up on it."""


def chromium() -> str:
    """The browser's path."""
    found = os.environ.get(NAMED) or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and MAC.exists():
        found = str(MAC)
    assert found is not None, f"these tests need Chromium: install it, or name it by {NAMED}; `./ksi test` tries to"
    return found


@asynccontextmanager
async def running_browser() -> AsyncIterator[Browser]:
    """The browser, until the end."""
    expect.set_options(timeout=PATIENCE)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS), timeout=60_000)
        try:
            yield browser
        finally:
            await browser.close()


class Watched:
    """A page whose faults and outside requests are noted: a test fails for each."""

    def __init__(self, page: Page, origin: str) -> None:
        self.page = page
        self._origin = origin
        self.faults: list[str] = []
        self.expected: list[str] = []
        """Parts of faults that the test brings about."""
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("console", self._said)
        page.on("request", self._asked)

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(message.text)

    def _asked(self, request: Request) -> None:
        if not request.url.startswith(self._origin):
            self.faults.append(f"it asked {request.url}")

    def check(self) -> None:
        """Nothing went wrong that the test did not bring about."""
        unexpected = [fault for fault in self.faults if not any(part in fault for part in self.expected)]
        assert not unexpected, unexpected


@asynccontextmanager
async def page_of(
    browser: Browser, origin: str, *, width: int = 1280, height: int = 900, scheme: str = "light"
) -> AsyncIterator[Watched]:
    """A page with a profile of its own."""
    context = await browser.new_context(viewport={"width": width, "height": height}, locale="en-GB")
    try:
        page = await context.new_page()
        await page.emulate_media(color_scheme="dark" if scheme == "dark" else "light", reduced_motion="reduce")
        watched = Watched(page, origin)
        yield watched
        watched.check()
    finally:
        await context.close()


@asynccontextmanager
async def opened(browser: Browser, here: Door, place: str = "#/", **look: Any) -> AsyncIterator[tuple[Page, Watched]]:
    """The page, let in, at a place."""
    code = (await here.post("/page/codes", {})).json["code"]
    async with page_of(browser, here.url, **look) as watched:
        await watched.page.goto(f"{here.url}/#code={code}")
        await expect(watched.page.locator("#link")).to_have_text("Live")
        await go(watched.page, place)
        yield watched.page, watched


async def go(page: Page, place: str) -> None:
    """Go to a view and wait until it is there."""
    await page.evaluate("place => { location.hash = place }", place)
    await expect(page.locator("main .loading")).to_have_count(0)
