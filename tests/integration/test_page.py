"""The page in a real browser, before a real daemon: each view with real data, and what people do there."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from playwright.async_api import Browser, Page, expect

from ksi.http.page.door import HEADERS, PageDoor
from ksi.http.page.sessions import PageSessions
from ksi.testing import SimulatedClock
from tests.browser import go, opened, page_of
from tests.daemon_process import DaemonProcess, make_home
from tests.http_door import Door, door
from tests.integration.serving import AT_ONCE

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.promise("V1")]

PROVIDERS: dict[str, Any] = {
    "slow": {"kind": "stub", "delay": 600, "max_concurrency": 2},
    "drip": {"kind": "stub", "pieces": 2_000, "piece_delay": 0.05},
    "broken": {"kind": "stub", "fail": "network_error"},
    "away": {"kind": "stub", "fail": "invalid_request"},
}
EVIL = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>\u202e&lt;b&gt;\"'`{{7*7}}"


def serving(**more: Any) -> Any:
    """A daemon with slow, streaming and failing providers."""
    return door(providers=PROVIDERS, service=AT_ONCE, breaker={"open_for": 300.0, "failures": 2}, **more)


# -- the way in ----------------------------------------------------------------------------------------------------


async def test_a_browser_is_let_in_by_a_code_that_works_once_and_stays_in_no_address(browser: Browser) -> None:
    async with serving() as here:
        code = (await here.post("/page/codes", {})).json["code"]
        used = asyncio.create_task(here.post("/page/codes/wait", {"code": code}))
        async with page_of(browser, here.url) as first, page_of(browser, here.url) as second:
            await first.page.goto(f"{here.url}/#code={code}")
            await expect(first.page.get_by_role("heading", level=1)).to_have_text("Overview")
            assert code not in first.page.url
            assert (await used).json == {"used": True}
            await first.page.reload()
            await expect(first.page.get_by_role("heading", level=1)).to_have_text("Overview")
            second.expected = ["401", "ERR_INCOMPLETE"]  # the second: its stream ends with its token
            await second.page.goto(f"{here.url}/#code={code}")
            await expect(second.page.get_by_role("alert")).to_contain_text("was used before")
            await expect(second.page.locator("pre")).to_have_text("ksi open")
            await second.page.get_by_label("Or paste a token").fill("ksi_wrong")
            await second.page.keyboard.press("Enter")
            await expect(second.page.get_by_role("alert")).to_contain_text("not known")
            await second.page.get_by_label("Or paste a token").fill(await here.new_token("wall", "read"))
            await second.page.keyboard.press("Enter")
            await expect(second.page.get_by_role("heading", level=1)).to_have_text("Overview")
            # A token that may only look changes nothing, and says so.
            second.expected += ["403"]
            await go(second.page, "#/settings")
            await second.page.get_by_role("button", name="Pause everything").click()
            await second.page.get_by_role("button", name="Pause", exact=True).click()
            await expect(second.page.locator("#said")).to_contain_text("needs operate")
            await here.told("token:revoke", name="wall")
            await expect(second.page.get_by_role("alert")).to_contain_text("session has ended")
            assert await first.page.evaluate("Object.keys(localStorage).join()") == "ksi.session"


async def test_a_session_is_for_the_page_and_ends_with_its_time_its_token_and_the_owners() -> None:
    async with door() as here:
        code = (await here.post("/page/codes", {})).json["code"]
        made = await here.post("/page/sessions", {"code": code}, Authorization="")
        assert (made.status, made.headers["Cache-Control"]) == (200, "no-store")
        session = made.json["session"]
        assert (await here.event("completion:status", token=session)).status == 200
        for event, data in (
            ("completion:async", {"prompt": "x"}),
            ("completion:request", {"prompt": "x", "mcp_config": "/tmp/evil"}),
            ("token:create", {"name": "more"}),
            ("token:renew", {}),
            ("checkpoint:collect", {"path": "/tmp/x"}),
        ):
            refused = await here.event(event, token=session, **data)
            assert (refused.status, refused.json["error"]["code"]) == (403, "forbidden"), event
        for path in ("/v1/messages", "/page/codes", "/mcp"):
            assert (await here.post(path, {}, Authorization=f"Bearer {session}")).status == 403, path
        for wrong in (session[:-1] + ("A" if session[-1] != "A" else "B"), "ksip_", "ksip_zz.yy.xx", session + "é"):
            assert (await here.event("completion:status", token=wrong)).status == 401, wrong
        await here.told("token:renew")
        assert (await here.event("completion:status", token=session)).status == 401


async def test_a_code_and_a_session_end_by_the_clock() -> None:
    clock = SimulatedClock()
    async with door() as here:
        tokens = here.daemon._tokens.tokens
        owner = tokens.find(here.token)
        assert owner is not None
        sessions = PageSessions(tokens, clock)
        sessions.offer("late", owner)
        sessions.offer("used", owner)
        made = sessions.redeem("used")
        assert made is not None
        assert sessions.redeem("used") is None
        found = sessions.find(made[0])
        assert found is not None
        assert (found.name, found.page) == ("owner", True)
        await clock.advance(121)
        assert sessions.redeem("late") is None
        await clock.advance(7 * 86_400)
        assert sessions.find(made[0]) is None


async def test_the_files_are_the_same_for_everybody_and_their_policy_has_no_exception() -> None:
    async with door() as here:
        page = PageDoor(PageSessions(here.daemon._tokens.tokens, SimulatedClock()))
        names = sorted(page._files)
        assert len(names) > 10
        for name in ["", *(f"page/{name}" for name in names)]:
            async with here.session.get(f"{here.url}/{name}") as answer:
                assert answer.status == 200, name
                assert {key: answer.headers[key] for key in HEADERS} == HEADERS
                tag = answer.headers["ETag"]
            async with here.session.get(f"{here.url}/{name}", headers={"If-None-Match": tag}) as answer:
                assert (answer.status, await answer.read()) == (304, b"")
        assert "unsafe" not in HEADERS["Content-Security-Policy"]
        everything = {name: page._files[name].body.decode() for name in names}
        assert not re.search(r"<script(?! type=\"module\" src=)|<style|\sstyle=|\son\w+=", everything["index.html"])
        for name, text in everything.items():
            assert "innerHTML" not in text, name
            assert not re.search(r"https?://(?!www\.w3\.org/)", text), f"{name} names something outside"
        assert sum(map(len, everything.values())) < 200_000, "it stays small"
        for path in ("page/", "page/no.js", "page/../../door.py", "page/%2e%2e/door.py", "page/files/app.js"):
            async with here.session.get(f"{here.url}/{path}") as answer:
                assert answer.status in (401, 404), path


# -- what is seen --------------------------------------------------------------------------------------------------


async def test_an_incident_is_seen_on_the_overview_and_ended_there(browser: Browser) -> None:
    async with serving() as here:
        for number in range(3):
            await here.told("completion:async", prompt=f"p{number}", model="slow/x", agent_id="crawler")
        await here.told("queue:pause", agent_id="nightly", by="ann", why="the bill")
        once = {"max_attempts": 1}
        for _ in range(2):
            await here.told("completion:async", prompt="b", model="broken/x", retry=once)
        await here.told("provider:disable", provider="drip", by="ann", why="too dear")
        async with opened(browser, here) as (page, _):
            know = page.locator(".attention")
            await expect(know).to_contain_text("agent nightly is paused")
            await expect(know).to_contain_text("too dear")
            await expect(know).to_contain_text("broken")
            await expect(page.locator(".figure", has_text="Running")).to_contain_text("2")
            await expect(page.locator(".figure", has_text="Waiting")).to_contain_text("1")
            await page.get_by_role("button", name="Resume agent nightly").click()
            await expect(page.locator("#said")).to_have_text("Resumed: agent nightly.")
            await expect(know).not_to_contain_text("agent nightly")
            await page.get_by_role("button", name="Enable drip").click()
            await expect(know).not_to_contain_text("too dear")
            await page.get_by_role("button", name="Reset broken").click()
            await expect(page.get_by_role("button", name="Reset broken")).to_have_count(0)
            assert (await here.told("queue:pauses"))["paused"] == []


async def test_a_request_is_cancelled_by_keyboard_alone(browser: Browser) -> None:
    async with serving() as here:
        await here.told("completion:async", prompt="A long story", model="slow/x", request_id="story", agent_id="ann")
        async with opened(browser, here) as (page, _):
            await page.keyboard.press("?")
            await expect(page.get_by_role("dialog")).to_contain_text("requests")
            await page.keyboard.press("Escape")
            await page.keyboard.press("g")
            await page.keyboard.press("r")
            await expect(page.get_by_role("row", name="story")).to_be_visible()
            assert await page.evaluate("document.activeElement.textContent") == "Requests"
            await page.keyboard.press("/")
            await page.keyboard.type("stor")
            await page.keyboard.press("Enter")
            await page.get_by_role("link", name="story", exact=True).focus()
            await page.keyboard.press("Enter")
            await expect(page.get_by_role("heading", level=1)).to_have_text("Request story")
            await expect(page.locator(".turn.user")).to_contain_text("A long story")
            await page.get_by_role("button", name="Cancel story").focus()
            await page.keyboard.press("Enter")
            dialog = page.get_by_role("dialog")
            await expect(dialog).to_contain_text("may still bill")
            await page.keyboard.press("Escape")
            await expect(dialog).to_have_count(0)
            assert (await here.told("completion:get", request_id="story"))["status"] == "running"
            await page.get_by_role("button", name="Cancel story").focus()
            await page.keyboard.press("Enter")
            await page.keyboard.press("Enter")
            await expect(page.locator("#said")).to_have_text("story is cancelled.")
            await expect(page.locator(".lead .state")).to_have_text("cancelled")
            assert (await here.told("completion:get", request_id="story"))["status"] == "cancelled"
            await page.get_by_role("button", name="Requeue story").click()
            await page.get_by_role("button", name="Requeue", exact=True).last.click()
            await expect(page.locator("#said")).to_contain_text("Requeued as req_")


async def test_a_running_answer_is_read_as_it_is_made(browser: Browser) -> None:
    words = " ".join(f"word{number}" for number in range(2_000))
    async with serving() as here:
        await here.told(
            "completion:async",
            prompt="x",
            model="drip/x",
            request_id="tale",
            stream=True,
            provider_options={"text": words},
        )
        async with opened(browser, here) as (page, _):
            await expect(page.locator(".tail")).to_contain_text("word")
            await go(page, "#/request/tale")
            await expect(page.locator("#live")).to_contain_text("word0 ")
            before = len(await page.locator("#live").inner_text())
            await until(page, "#live", lambda text: len(text) > before)
            await here.told("completion:cancel", request_id="tale")
            await expect(page.locator(".lead .state")).to_have_text("cancelled")


async def until(page: Page, selector: str, true: Callable[[str], bool]) -> None:
    """Wait until what an element says is as it should be."""
    async with asyncio.timeout(30):
        while not true(await page.locator(selector).inner_text()):
            await page.evaluate("new Promise(requestAnimationFrame)")


async def test_a_chain_grows_while_it_is_watched_and_is_released(browser: Browser) -> None:
    limits = {"max_depth": 2, "token_budget": 100_000}
    async with serving() as here:

        async def born_of(parent: str, name: str) -> Any:
            chain = {**limits, "parent_request_id": parent}
            return await here.told(
                "completion:async", prompt="go on", request_id=name, agent_id="worker", circuit_breaker_config=chain
            )

        await here.told("completion:request", prompt="begin", request_id="root", circuit_breaker_config=limits)
        await born_of("root", "child")
        async with opened(browser, here, "#/chain/root") as (page, _):
            tree = page.locator(".tree").first
            await expect(tree.get_by_role("link", name="child", exact=True)).to_be_visible()
            await tree.get_by_role("link", name="child", exact=True).focus()
            await born_of("child", "grandchild")
            await born_of("child", "sibling")
            await expect(tree.get_by_role("link", name="sibling", exact=True)).to_be_visible()
            assert await page.evaluate("document.activeElement.textContent") == "child", "the focus stays"
            await born_of("grandchild", "too-deep")
            await expect(tree).to_contain_text("max depth")
            await go(page, "#/chains")
            await expect(page.get_by_role("row", name="root")).to_contain_text("5")
            await go(page, "#/request/too-deep")
            await expect(page.locator(".notice.bad")).to_contain_text("max_depth")
            await here.told(
                "completion:async", prompt="x", model="slow/x", request_id="busy", circuit_breaker_config={}
            )
            await go(page, "#/chain/busy")
            await page.get_by_role("button", name="Cancel chain").click()
            await page.get_by_role("dialog").get_by_role("button", name="Cancel chain").click()
            await expect(page.locator("#said")).to_contain_text("The chain is closed; cancelled requests: 1.")
            await page.get_by_role("button", name="Reset chain").click()
            await page.get_by_role("dialog").get_by_role("button", name="Reset chain").click()
            await expect(page.locator(".lead .state")).to_have_text("open")


async def test_a_conversation_shows_its_turns_its_lock_its_line_and_its_forks(browser: Browser) -> None:
    async with serving() as here:
        for number in range(25):
            await here.told("completion:request", prompt=f"question {number}", session_id="talk", agent_id="ann")
        fork = await here.told("completion:request", prompt="another way", session_id="talk", fork=True)
        await here.told("conversation:acquire_lock", request_id="script", conversation_id="talk")
        await here.told("completion:async", prompt="after the script", session_id="talk", request_id="behind")
        await here.told("conversation:acquire_lock", request_id="second", conversation_id="talk")
        async with opened(browser, here, "#/conversation/talk") as (page, _):
            await expect(page.locator(".turns > li")).to_have_count(20)
            await expect(page.locator(".turns > li").last).to_contain_text("echo: question 24")
            await page.get_by_role("button", name="Show earlier turns").click()
            await expect(page.locator(".turns > li")).to_have_count(25)
            await expect(page.locator(".turns > li").first).to_contain_text("question 0")
            await expect(page.locator(".line li")).to_have_count(2)
            await expect(page.get_by_role("link", name=fork["session_id"])).to_be_visible()
            await page.get_by_role("link", name="behind").click()
            await expect(page.locator(".notice.wait")).to_contain_text("the holder is script, which is external")
            await expect(page.get_by_role("button", name="Release the lock of script")).to_be_visible()
            await go(page, "#/conversation/talk")
            await page.get_by_role("button", name="Remove second from the queue").click()
            await page.get_by_role("button", name="Remove", exact=True).click()
            await expect(page.locator(".line li")).to_have_count(1)
            await page.get_by_role("button", name="Release the lock of script").click()
            await page.get_by_role("dialog").get_by_role("button", name="Release lock").click()
            await expect(page.locator("#said")).to_contain_text("behind is next")
            await expect(page.locator(".turns > li").last).to_contain_text("echo: after the script")


async def test_what_a_vendors_client_sent_is_read_with_its_tools_and_its_dialogue(browser: Browser) -> None:
    call = {"type": "tool_use", "id": "t1", "name": "read", "input": {"path": "notes"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "what the notes say"}
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"question {number}"} for number in range(14)]
    messages += [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    tools = [{"name": "read", "input_schema": {"type": "object"}}]
    async with serving() as here:
        sent = {"model": "stub/x", "max_tokens": 9, "system": "Be kind.", "tools": tools, "messages": messages}
        assert (await here.post("/v1/messages", sent, x_ksi_session="talk")).status == 200
        request = (await here.told("completion:queue_status", list="finished"))["items"][0]["request_id"]
        async with opened(browser, here, f"#/request/{request}") as (page, _):
            await expect(page.locator("main")).to_contain_text("what the notes say")
            await expect(page.locator("main")).to_contain_text('[calls read] {"path":"notes"}')
            await expect(page.get_by_text("question 3", exact=True)).to_be_hidden()
            await page.get_by_text("4 earlier messages").click()
            await expect(page.get_by_text("question 3", exact=True)).to_be_visible()
            await page.get_by_text("Instructions, 8 characters").click()
            await expect(page.get_by_text("Be kind.")).to_be_visible()
            await go(page, "#/conversation/talk")
            await expect(page.locator(".turns")).to_contain_text("15 earlier messages")


async def test_the_queue_over_time_is_shown_by_priority_and_by_route_and_as_a_table(browser: Browser) -> None:
    async with serving() as here:
        for number in range(4):
            await here.told("completion:async", prompt="x", model="slow/x", priority=("high", "low")[number % 2])
        await here.daemon._trend.sample()
        async with opened(browser, here) as (page, _):
            await expect(page.locator(".legend")).to_contain_text("high")
            await page.get_by_role("button", name="By route").click()
            await expect(page.locator(".legend")).to_contain_text("slow")
            await expect(page.locator(".legend")).not_to_contain_text("high")
            await page.get_by_text("Show as a table").click()
            await expect(page.get_by_role("table", name="Waiting requests")).to_contain_text("2")


async def test_a_person_decides_on_the_page(browser: Browser) -> None:
    asking = {"approve_at": {"depth": 1}}
    async with serving() as here:
        await here.told("completion:async", prompt="Delete the logs", request_id="kept-back", hold=True, agent_id="ann")
        await here.told("completion:request", prompt="plan", request_id="plan", circuit_breaker_config=asking)
        for name in ("step", "other"):
            born = {"parent_request_id": "plan"}
            await here.told("completion:async", prompt=f"the {name}", request_id=name, circuit_breaker_config=born)
        async with opened(browser, here) as (page, _):
            await expect(page.locator(".attention")).to_contain_text("kept-back waits for a decision")
            await page.get_by_role("link", name="Review").first.click()
            await expect(page.locator(".questions > li")).to_have_count(3)
            await page.get_by_role("button", name="Approve step").click()
            await page.get_by_label("Reason, for others").fill("it is small")
            await page.get_by_role("dialog").get_by_role("button", name="Approve").click()
            await expect(page.locator("#said")).to_contain_text("Approved step")
            await expect(page.locator(".questions > li")).to_have_count(2)
            await page.get_by_role("button", name="Reject other").click()
            await page.get_by_label("Reason, for others").fill("not today")
            await page.get_by_role("dialog").get_by_role("button", name="Reject").click()
            await expect(page.locator(".questions > li")).to_have_count(1)
            await go(page, "#/request/kept-back")
            await expect(page.locator(".lead .state")).to_have_text("held")
            await page.get_by_role("button", name="Release kept-back").click()
            await page.get_by_role("dialog").get_by_role("button", name="Release").click()
            await expect(page.locator(".turn.assistant")).to_contain_text("echo: Delete the logs")
        step = await here.told("completion:wait", request_id="step")
        assert (step["status"], step["question"]["why"]) == ("completed", "it is small")
        other = await here.told("completion:get", request_id="other")
        assert (other["status"], other["question"]["why"]) == ("cancelled", "not today")


async def test_a_budget_that_is_used_up_is_seen_and_raised_where_it_is_seen(browser: Browser) -> None:
    async with serving() as here:
        await here.told("budget:set", budget="nightly", scope="agent:*", requests=1, per="day")
        await here.told("completion:request", prompt="first", agent_id="crawler")
        await here.told("completion:async", prompt="second", agent_id="crawler", request_id="second")
        async with opened(browser, here) as (page, _):
            await expect(page.locator(".attention")).to_contain_text("Budget nightly is used up for agent:crawler")
            await go(page, "#/request/second")
            await expect(page.locator(".notice.wait")).to_contain_text("budget")
            await go(page, "#/budgets")
            await expect(page.get_by_role("table", name="nightly")).to_contain_text("1 of 1 request")
            await page.get_by_role("button", name="Raise the budget nightly for agent:crawler").click()
            await page.get_by_label("How much more").fill("5")
            await page.get_by_role("button", name="Raise budget").click()
            await expect(page.locator("#said")).to_have_text("The budget nightly is raised.")
            await expect(page.get_by_role("table", name="nightly")).to_contain_text("of 6 requests")
        assert (await here.told("completion:wait", request_id="second"))["status"] == "completed"


async def test_turns_are_found_by_their_words_and_a_conversation_is_renamed_and_deleted(browser: Browser) -> None:
    async with serving() as here:
        await here.told("completion:request", prompt="Where is the heron?", session_id="birds")
        async with opened(browser, here) as (page, watched):
            watched.expected = ["404"]  # a look at the conversation may be under way when it is deleted
            await page.get_by_role("searchbox").fill("heron")
            await page.keyboard.press("Enter")
            await expect(page.locator(".matches mark").first).to_have_text("heron")
            await page.locator(".matches").get_by_role("link", name="birds").first.click()
            await page.get_by_role("button", name="Rename birds").click()
            await page.get_by_label("New name").fill("waders")
            await page.get_by_role("dialog").get_by_role("button", name="Rename").click()
            await expect(page.get_by_role("heading", level=1)).to_have_text("Conversation waders")
            await page.get_by_role("button", name="Delete waders").click()
            await expect(page.get_by_role("dialog")).to_contain_text("cannot be restored")
            await page.get_by_role("button", name="Delete permanently").click()
            await expect(page.locator("#said")).to_contain_text("Deleted: 1 turns")
            await expect(page.get_by_role("heading", level=1)).to_have_text("Conversations")
        assert (await here.told("completion:session_status"))["sessions"] == []


async def test_many_problems_leave_room_for_the_rest_and_lead_to_their_requests(browser: Browser) -> None:
    async with door(loops={"repeats": 10}) as here:
        for agent in "abcde":
            for number in range(16):
                asked: dict[str, Any] = {"agent_id": agent, "request_id": f"{agent}-{number}"}
                await here.told("completion:request", prompt="Again.", model="stub/x", **asked)
        async with opened(browser, here) as (page, _):
            problems = page.locator(".attention li")
            await expect(problems).to_have_count(4)
            await expect(problems.last).to_contain_text("2 more problems.")
            await page.get_by_role("button", name="Show all problems").click()
            await expect(problems).to_have_count(5)
            await problems.first.get_by_role("link").click()
            await expect(page.get_by_role("heading", level=1)).to_contain_text("a-")


async def test_dead_letters_providers_spend_and_settings_are_seen_and_acted_on(browser: Browser) -> None:
    async with serving() as here:
        await here.told("completion:request", prompt="t", session_id="inbox", model="stub/x", agent_id="ann")
        await here.told(
            "completion:request",
            prompt="news",
            injection_config={"trigger_type": "general", "target_sessions": ["inbox"]},
            circuit_breaker_config={"max_depth": 0},
        )
        await here.new_token("nightly")
        async with opened(browser, here) as (page, _):
            await expect(page.locator(".attention")).to_contain_text("1 result did not reach")
            await page.get_by_role("link", name="Show the dead letters").click()
            await expect(page.get_by_role("table", name="Deliveries")).to_contain_text("max depth")
            await page.get_by_role("row", name="blocked").get_by_role("link").first.click()
            await expect(page.locator("pre.text")).to_contain_text("echo: news")
            await page.get_by_role("button", name="Retry the delivery").click()
            await page.get_by_role("button", name="Retry delivery").click()
            await expect(page.locator("#said")).to_contain_text("Retried as")
            await expect(page.locator(".lead .state")).to_have_text("retried")
            await go(page, "#/spend")
            await expect(page.get_by_role("table", name="By agent")).to_contain_text("ann")
            await go(page, "#/providers")
            await page.get_by_role("button", name="Disable drip").click()
            await page.get_by_label("Reason, for others").fill("too slow")
            await page.get_by_role("button", name="Disable provider").click()
            await expect(page.locator("main")).to_contain_text("too slow")
            report = (await here.told("completion:provider_status"))["providers"]["drip"]
            assert not report["enabled"]
            assert "too slow" in report["disabled"]
            await go(page, "#/settings")
            await page.get_by_role("button", name="Revoke the token nightly").click()
            await page.get_by_role("button", name="Revoke token").click()
            await expect(page.locator("#said")).to_have_text("The token nightly is revoked.")
            await page.get_by_text("breaker", exact=False).first.click()
            await expect(page.get_by_role("table", name="breaker")).to_contain_text("breaker.open_for")
            await page.get_by_role("button", name="Drain", exact=True).click()
            await page.get_by_role("dialog").get_by_role("button", name="Drain").click()
            await expect(page.get_by_role("button", name="End drain")).to_be_visible()
            await page.get_by_role("button", name="End drain").click()
            await expect(page.locator("#said")).to_have_text("The daemon accepts work again.")


# -- what must not happen ------------------------------------------------------------------------------------------


async def test_hostile_text_is_text_in_every_view(browser: Browser) -> None:
    async with serving() as here:
        names: dict[str, Any] = {"session_id": EVIL, "agent_id": EVIL, "metadata": {EVIL: EVIL}, "system": EVIL}
        chain = {"circuit_breaker_config": {"max_depth": 1}}
        await here.told("completion:request", prompt=EVIL, request_id=EVIL, **names, **chain)
        await here.told("completion:async", prompt=EVIL, request_id=f"run {EVIL}", model="slow/x", **names)
        await here.told("completion:async", prompt=EVIL, request_id=f"wait {EVIL}", **names)
        await here.told("queue:pause", agent_id=EVIL, by=EVIL, why=EVIL)
        await here.told("provider:disable", provider="drip", by=EVIL, why=EVIL)
        failing = {"fail": "invalid_request"}
        await here.told(
            "completion:async",
            prompt=EVIL,
            model="away/" + "x" * 10,
            provider_options=failing,
            request_id=f"bad {EVIL}",
        )
        await here.told("completion:failed", request_id=f"run {EVIL}", reason="provider_error", message=EVIL)
        quoted = await _quoted(EVIL)
        places = ["#/", "#/requests/waiting", "#/requests/failed", "#/requests/finished", "#/conversations", "#/chains"]
        places += ["#/spend", "#/providers", "#/settings", f"#/search?q={quoted}", "#/deliveries"]
        places += ["#/request/%E0%A4%A", "#/__proto__", "#/constructor/x"]
        places += [f"#/request/{quoted}", f"#/request/wait%20{quoted}", f"#/conversation/{quoted}", f"#/chain/{quoted}"]
        async with opened(browser, here) as (page, watched):
            watched.expected = ["404"]  # an id that is none
            for place in places:
                await go(page, place)
                if quoted in place or place in ("#/", "#/requests/waiting", "#/conversations", "#/settings"):
                    await expect(page.locator("main").get_by_text("<img src=x", exact=False).first).to_be_visible()
                assert await page.locator("main img, main script").count() == 0, place
            assert not (await page.title()).startswith("owned")


async def _quoted(text: str) -> str:
    from urllib.parse import quote

    return quote(text, safe="")


LOST_CONFIG = """
[service]
default_model = "stub/echo"
[http]
listen = "127.0.0.1:{port}"
[providers.stub]
kind = "stub"
[providers.slow]
kind = "stub"
delay = 600
"""


async def test_a_lost_daemon_is_reported_and_the_page_continues_when_it_is_back(
    browser: Browser, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = LOST_CONFIG.format(port=port)
    home, url = make_home(tmp_path / "home", config), f"http://127.0.0.1:{port}"
    daemon = DaemonProcess(home)
    with daemon:
        token = (home / "var/run/token").read_text().strip()
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session:

            async def told(event: str, **data: Any) -> Any:
                async with session.post(f"{url}/v1/events", json={"event": event, "data": data}) as answer:
                    return (await answer.json())["data"]

            async with session.post(f"{url}/page/codes") as answer:
                code = (await answer.json())["code"]
            await told("completion:async", prompt="x", model="slow/x", request_id="kept")
            async with page_of(browser, url) as watched:
                page = watched.page
                watched.expected = ["ERR_", "Failed to fetch"]
                await page.goto(f"{url}/#code={code}")
                await go(page, "#/request/kept")
                await expect(page.locator(".lead .state")).to_have_text("running")
                daemon.end(signal.SIGKILL)
                await expect(page.locator("#link")).to_contain_text("Disconnected since")
                await page.get_by_role("button", name="Cancel kept").click()
                await page.get_by_role("button", name="Cancel request").click()
                await expect(page.locator("#said")).to_contain_text("It is not known whether")
                daemon.start()
                await expect(page.locator("#link")).to_have_text("Live")
                await expect(page.locator(".trail")).to_contain_text("interrupted")
                await told("completion:cancel", request_id="kept")
                await expect(page.locator(".lead .state")).to_have_text("cancelled")


async def test_a_hidden_page_holds_no_stream_and_asks_nothing(browser: Browser) -> None:
    async with serving() as here, opened(browser, here) as (page, _):
        await digests(here, 1)
        asked: list[str] = []
        await page.evaluate(HIDE, True)
        await digests(here, 0)
        page.on("request", lambda sent: asked.append(sent.url))
        await here.told("completion:request", prompt="x", request_id="meanwhile")
        assert asked == []
        await page.evaluate(HIDE, False)
        await expect(page.locator(".figure", has_text="Failed")).to_contain_text("1 completed")


async def test_many_tabs_share_one_stream_and_another_takes_over_from_one_that_is_closed(browser: Browser) -> None:
    async with serving() as here, opened(browser, here) as (first, _):
        tabs = [await first.context.new_page() for _ in range(8)]
        for tab in tabs:
            await tab.goto(f"{here.url}/#/requests/finished")
            await expect(tab.locator("#link")).to_have_text("Live")
        await digests(here, 1)
        await first.close()
        await here.told("completion:request", prompt="x", request_id="news")
        for tab in tabs:
            await expect(tab.get_by_role("link", name="news", exact=True)).to_be_visible()
        await digests(here, 1)


async def digests(here: Door, count: int) -> None:
    """Wait until so many streams of changes are read."""
    assert here.daemon.http is not None
    async with asyncio.timeout(30):
        while len(here.daemon.http._streams._digests) != count:  # noqa: ASYNC110 - no browser tells that it closed one
            await asyncio.sleep(0.01)


async def test_two_daemons_are_looked_at_beside_each_other_with_one_browser(browser: Browser) -> None:
    async with serving() as here, door() as there, opened(browser, here) as (page, watched):
        watched.expected = ["it asked"]
        code = (await there.post("/page/codes", {})).json["code"]
        await page.goto(f"{there.url}/#code={code}")
        await expect(page.locator("#link")).to_have_text("Live")
        await page.goto(f"{here.url}/")
        await expect(page.locator(".providers")).to_contain_text("broken")


async def test_a_refresh_leaves_scrolling_selection_and_open_details_where_they_are(browser: Browser) -> None:
    async with serving() as here, opened(browser, here, "#/settings", height=500) as (page, _):
        await page.get_by_text("retention, ").click()
        key = page.get_by_text("retention.sessions")
        await key.scroll_into_view_if_needed()
        await key.dblclick()
        at, selected = await page.evaluate(WHERE)
        assert selected
        await here.told("queue:pause", by="ann", why="to see it refreshed")
        await expect(page.locator("main")).to_contain_text("to see it refreshed")
        await expect(key).to_be_visible()
        assert (await page.evaluate(WHERE))[1] == selected
        assert await page.evaluate("scrollY") > 0
        assert at > 0


WHERE = "() => [scrollY, getSelection().toString()]"


async def test_times_go_by_the_daemons_clock(browser: Browser) -> None:
    async with serving() as here:
        await here.told("completion:async", prompt="x", model="slow/x", request_id="job")
        code = (await here.post("/page/codes", {})).json["code"]
        async with page_of(browser, here.url) as watched:
            await watched.page.add_init_script("const real = Date.now; Date.now = () => real() - 7_200_000;")
            await watched.page.goto(f"{here.url}/#code={code}")
            await go(watched.page, "#/request/job")
            await expect(watched.page.locator(".lead time")).to_have_text(re.compile(r"^\d+ s$"))


async def test_a_long_prompt_and_a_large_chain_are_shown_without_freezing(browser: Browser) -> None:
    async with serving() as here:
        await here.told("completion:request", prompt="long " * 180_000, request_id="long", model="stub/x")
        await here.told("completion:request", prompt="x", request_id="root", circuit_breaker_config={"max_depth": 2})
        born = {"circuit_breaker_config": {"parent_request_id": "root", "max_depth": 2}}
        asking = [here.told("completion:async", prompt=f"{n} is a number", **born) for n in range(1_100)]
        await asyncio.gather(*asking)
        async with opened(browser, here, "#/request/long") as (page, _):
            await expect(page.locator(".turn.user pre")).to_contain_text("long long")
            await go(page, "#/chain/root")
            await expect(page.locator(".tree li")).to_have_count(1_101)
            await page.keyboard.press("g")
            await page.keyboard.press("o")
            await expect(page.get_by_role("heading", level=1)).to_have_text("Overview")


HIDE = """hidden => {
    Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
    document.dispatchEvent(new Event("visibilitychange"));
}"""


async def test_a_deep_queue_is_shown_by_pages_and_asks_no_more(browser: Browser) -> None:
    async with serving() as here:
        await here.told("queue:pause")
        asking = [
            here.told("completion:async", prompt="x", session_id=f"s{number}", model="slow/x")
            for number in range(1_200)
        ]
        await asyncio.gather(*asking)
        async with opened(browser, here, "#/requests/waiting") as (page, _):
            await expect(page.locator("tbody tr")).to_have_count(100)
            await expect(page.locator(".tabs")).to_contain_text("1,200")
            first = await page.locator("tbody tr").first.inner_text()
            await page.get_by_role("link", name="The next hundred").click()
            await expect(page.get_by_role("link", name="Back to the first")).to_be_visible()
            await expect(page.locator("tbody tr")).to_have_count(100)
            assert await page.locator("tbody tr").first.inner_text() != first


PLACES = ["#/", "#/requests", "#/requests/failed", "#/conversations", "#/chains", "#/deliveries", "#/providers"]
PLACES += [
    "#/approvals",
    "#/spend",
    "#/settings",
    "#/search?q=r",
    "#/request/r1",
    "#/conversation/talk",
    "#/chain/root",
]


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (768, "light"), (1280, "dark")])
async def test_every_view_fits_its_screen_and_is_named_for_a_screen_reader(
    browser: Browser, width: int, scheme: str
) -> None:
    async with serving() as here:
        long = "a-name-without-a-place-to-break-it-" * 4
        await here.told("completion:async", prompt="x" * 3_000, request_id="r1", model="slow/x", agent_id=long)
        await here.told("completion:request", prompt="hi", session_id="talk", request_id=long)
        await here.told("completion:async", prompt="b", model="away/x", session_id=long)
        await here.told("completion:request", prompt="b", request_id="root", circuit_breaker_config={"max_depth": 2})
        await here.told("completion:async", prompt="h", hold=True, agent_id=long, session_id=f"{long}2")
        async with opened(browser, here, width=width, scheme=scheme) as (page, _):
            for place in PLACES:
                await go(page, place)
                beyond = await page.evaluate("document.documentElement.scrollWidth - innerWidth")
                assert beyond <= 0, f"{place} is {beyond} pixels too wide"
                assert await page.get_by_role("main").get_by_role("heading", level=1).count() == 1, place
                assert await page.evaluate(UNNAMED) == [], place
                assert await page.evaluate(FAINT) == [], place


UNNAMED = """() => [...document.querySelectorAll("button, a, input, select, svg, table")]
    .filter((one) => one.checkVisibility() && !one.closest("[aria-hidden=true]"))
    .filter((one) => !(one.getAttribute("aria-label") || one.textContent.trim() || one.labels?.length))
    .map((one) => one.outerHTML.slice(0, 200))"""

FAINT = """() => {
    const channel = (value) => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const parse = (text) => {
        const canvas = new OffscreenCanvas(1, 1).getContext("2d");
        canvas.fillStyle = text;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const ground = (one) => {
        for (let at = one; at; at = at.parentElement) {
            const found = parse(getComputedStyle(at).backgroundColor);
            if (found[3] === 255) return found;
        }
        return [255, 255, 255, 255];
    };
    return [...document.querySelectorAll("body *")].filter((one) => one.checkVisibility({opacityProperty: true})
        && !one.disabled && [...one.childNodes].some((child) => child.nodeType === 3 && child.data.trim()))
        .flatMap((one) => {
        const [a, b] = [light(parse(getComputedStyle(one).color)), light(ground(one))];
        const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        return contrast < 4.5 ? [`${contrast.toFixed(2)}: ${one.outerHTML.slice(0, 120)}`] : [];
    });
}"""
