"""Tokens for HTTP: the events of each scope, the ownership of requests, and the end of a revoked token."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ksi.events.specs import SCOPES
from ksi.events.tokens import Scope
from tests.claude import until
from tests.daemon_process import DaemonProcess, make_home
from tests.http_door import door
from tests.integration.redis_team import team
from tests.integration.serving import AT_ONCE
from tests.integration.wire import Wire
from tests.redis_server import RedisServer

PROVIDERS: dict[str, Any] = {
    "stub": {"kind": "stub", "max_concurrency": 64},
    "slow": {"kind": "stub", "delay": 600},
    "local": {"kind": "local", "enabled": False},
}


def code(reply: Any) -> tuple[int, str]:
    return reply.status, reply.json["error"]["code"]


@pytest.mark.promise("H1")
async def test_nothing_is_answered_without_a_token_that_is_known() -> None:
    async with door() as here:
        for headers in (
            {},
            {"Authorization": "Bearer "},
            {"Authorization": f"Basic {here.token}"},
            {"x-api-key": "ksi_no"},
        ):
            for method, path in (("POST", "/v1/events"), ("GET", "/v1/schema"), ("GET", "/nowhere"), ("GET", "/page")):
                async with here.session.request(method, here.url + path, headers=headers) as answer:
                    assert answer.status == 401
                    assert json.loads(await answer.read())["error"]["code"] == "unauthenticated"
        async with here.session.head(here.url + "/api/hello") as answer:
            assert (answer.status, await answer.read()) == (200, b"")
        async with here.session.get(here.url + "/v1/schema", headers={"x-api-key": here.token}) as answer:
            assert answer.status == 200


@pytest.mark.promise("H1")
async def test_the_owners_token_is_a_private_file_and_is_replaced_by_a_word(tmp_path: Path) -> None:
    async with door(home=tmp_path) as here:
        path = here.daemon.config.run_dir / "token"
        assert path.stat().st_mode & 0o777 == 0o600
        before = here.token
        async with here.stream("/v1/events") as held:
            reply = await here.told("token:renew")
            assert reply["path"] == str(path)
            with pytest.raises((aiohttp.ClientError, AssertionError)):
                await held.until("nothing")
        assert code(await here.event("system:ready", token=before)) == (401, "unauthenticated")
        here.token = path.read_text().strip()
        assert here.token != before
        assert path.stat().st_mode & 0o777 == 0o600
        await here.told("system:ready")
        path.chmod(0o644)
    async with door(home=tmp_path) as again:
        assert again.token == here.token
        assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.promise("H1")
async def test_a_scope_allows_the_events_of_the_table() -> None:
    async with door() as here:
        tokens = {scope: await here.new_token(scope.word, scope.word) for scope in Scope}
        for event, needed in SCOPES.items():
            if event == "system:shutdown":
                continue
            for scope, token in tokens.items():
                if event.startswith("token:") and scope is Scope.OPERATE:
                    continue  # it would take away the tokens that this test uses
                reply = await here.event(event, token=token)
                forbidden = reply.status == 403 and reply.json["error"]["code"] == "forbidden"
                assert forbidden is (scope < needed), (event, scope, reply.body)


@pytest.mark.promise("H1")
async def test_a_submit_token_looks_at_its_own_requests_and_at_no_others() -> None:
    async with door(providers=PROVIDERS, service=AT_ONCE) as here:
        ann, bob = await here.new_token("ann", priority="low"), await here.new_token("bob")
        mine = await here.told("completion:request", token=ann, prompt="x", request_id="a1", agent_id="helper")
        assert (mine["agent_id"], mine["priority"]) == ("ann/helper", "low")
        assert (await here.told("completion:request", token=ann, prompt="x", priority="high"))["agent_id"] == "ann"
        assert (await here.told("completion:get", token=ann, request_id="a1"))["result"] == "echo: x"
        await here.told("completion:async", token=ann, prompt="x", model="slow/x", request_id="a2")
        missing = await here.event("completion:get", token=bob, request_id="nix")
        for event in ("completion:get", "completion:wait", "completion:cancel"):
            other = await here.event(event, token=bob, request_id="a2")
            assert code(other) == (404, "not_found")
            # The reply does not reveal if there is such a request at all.
            assert other.json["error"]["message"] == missing.json["error"]["message"].replace("nix", "a2")
        async with here.stream("/v1/requests/a2/stream", token=bob) as pieces:
            assert pieces.status == 404
        async with here.stream("/v1/events?pattern=*", token=bob) as events:
            assert events.status == 403
        assert code(await here.event("completion:async", token=bob, prompt="x", request_id="a1")) == (
            422,
            "request_id_conflict",
        )
        assert code(await here.event("completion:cancel", token=ann, chain_id="a2")) == (403, "forbidden")
        assert (await here.told("completion:cancel", token=ann, request_id="a2"))["status"] == "cancelled"


@pytest.mark.promise("H1")
async def test_a_submit_token_speaks_in_no_conversation_of_others() -> None:
    async with door() as here:
        ann, bob = await here.new_token("ann"), await here.new_token("bob", "read")
        await here.told("completion:request", token=ann, prompt="secret", session_id="s", request_id="a1")
        await here.told("completion:request", token=ann, prompt="more", session_id="s")
        others: tuple[dict[str, Any], ...] = (
            {"session_id": "s"},
            {"conversation_id": "s", "fork": True},
            {"injection_config": {"target_sessions": ["s"]}},
        )
        for data in others:
            assert code(await here.event("completion:async", token=bob, prompt="x", **data)) == (403, "forbidden"), data
        chained: dict[str, Any] = {"circuit_breaker_config": {"parent_request_id": "a1"}}
        assert code(await here.event("completion:async", token=bob, prompt="x", **chained)) == (404, "not_found")
        reaching: dict[str, Any] = {
            "mcp_config": {"mcpServers": {"x": {"command": "sh"}}},
            "provider_options": {"a": 1},
        }
        for field, value in reaching.items():
            reply = await here.event("completion:async", token=bob, prompt="x", **{field: value})
            assert code(reply) == (403, "forbidden")
            assert field in reply.json["error"]["message"]
        asked = {"model": "stub/echo", "messages": [{"role": "user", "content": "x"}]}
        own = {"Authorization": f"Bearer {bob}", "x-ksi-session": "s"}
        chat = await here.post("/v1/chat/completions", asked, **own)
        assert chat.status == 403
        assert "ann" not in chat.body.decode()
        assert (await here.told("completion:get", token=bob, request_id="a1"))["result"] == "echo: secret"


@pytest.mark.promise("H1", "H3")
async def test_responses_and_conversations_of_others_are_not_there_for_a_submit_token() -> None:
    async with door() as here:
        ann, bob = await here.new_token("ann"), await here.new_token("bob")

        async def ask(token: str, **more: Any) -> Any:
            asked = {"model": "stub/echo", "input": "secret", **more}
            return await here.post("/v1/responses", asked, Authorization=f"Bearer {token}")

        first = (await ask(ann, conversation="c1")).json["id"]
        assert (await ask(ann, previous_response_id=first)).status == 200
        for more in ({"previous_response_id": first}, {"conversation": "c1"}):
            assert (await ask(bob, **more)).status in (403, 404), more
        for path in (f"/v1/responses/{first}", f"/v1/responses/{first}/input_items"):
            assert (await here.get(path, Authorization=f"Bearer {bob}")).status == 404
            assert (await here.get(path, Authorization=f"Bearer {ann}")).status == 200
        assert (await here.get("/v1/conversations/c1/items", Authorization=f"Bearer {bob}")).status == 403
        assert (await here.post(f"/v1/responses/{first}/cancel", {}, Authorization=f"Bearer {bob}")).status == 404
        assert (await here.delete(f"/v1/responses/{first}", Authorization=f"Bearer {bob}")).status == 404
        for token in (ann, bob):
            assert (await here.delete("/v1/conversations/c1", Authorization=f"Bearer {token}")).status == 403


@pytest.mark.promise("H1")
async def test_a_revoked_token_stops_at_once_with_all_that_is_held_under_it() -> None:
    async with door(providers=PROVIDERS, service=AT_ONCE) as here:
        ann = await here.new_token("ann", "read")
        await here.told("completion:async", token=ann, prompt="x", model="slow/x", request_id="a1")
        asked = {"model": "slow/x", "messages": [{"role": "user", "content": "x"}]}
        whole = asyncio.create_task(here.post("/v1/chat/completions", asked, Authorization=f"Bearer {ann}"))
        waits = asyncio.create_task(here.event("completion:wait", token=ann, request_id="a1"))
        async with (
            here.stream("/v1/events?pattern=*", token=ann) as events,
            here.stream("/v1/requests/a1/stream", token=ann) as pieces,
        ):
            await until(lambda: len(here.daemon.queue.runs) == 2 and here.daemon._announcer._waits.awaited("a1"))
            name = events.name
            await here.told("token:revoke", name="ann")
            for held in (events, pieces):
                with pytest.raises((aiohttp.ClientError, AssertionError)):
                    await held.until("nothing")
        assert code(await waits) == (401, "unauthenticated")
        refused = await whole
        assert (refused.status, refused.json["error"]["type"]) == (401, "authentication_error")
        assert code(await here.event("system:ready", token=ann)) == (401, "unauthenticated")
        # The next owner of the name has nothing of its streams.
        again = await here.new_token("ann", "read")
        assert code(await here.event("system:ready", token=again, via=name)) == (404, "not_found")


@pytest.mark.promise("H1")
async def test_a_tokens_secret_is_shown_once_and_stored_nowhere(tmp_path: Path) -> None:
    process = DaemonProcess(make_home(tmp_path))
    process.start()
    async with await Wire.open(process.socket_path) as wire:
        made = await wire.ask("token:create", name="ann", priority="background")
        secret = made["token"]
        taken = await wire.refused("token:create", name="ann")
        assert (taken.code, taken.details["path"]) == ("invalid_data", "name")
        for name in ("owner", "a/b", "", "a\n", "ä", "x" * 65):
            assert (await wire.refused("token:create", name=name)).details["path"] == "name"
        assert (await wire.refused("token:revoke", name="nobody")).code == "not_found"
        assert (await wire.refused("token:revoke", name="owner")).code == "invalid_data"
        listed = (await wire.ask("token:list"))["tokens"]
        assert [(one["name"], one["scope"], one["priority"]) for one in listed] == [("ann", "submit", "background")]
        assert "token" not in listed[0]
    process.end(signal.SIGKILL)
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert secret.encode() not in kept
    with process:
        assert await ready(tmp_path, secret) == 200
        async with await Wire.open(process.socket_path) as wire:
            assert (await wire.ask("token:revoke", name="ann"))["tokens"] == []
        assert await ready(tmp_path, secret) == 401


@pytest.mark.promise("H1", "D1")
async def test_tokens_hold_at_all_daemons_of_a_store(tmp_path: Path, redis_server: RedisServer) -> None:
    with team(tmp_path, f"{redis_server.url}?namespace=tokens", 2) as daemons:
        homes = [daemon.home for daemon in daemons.daemons]
        async with await Wire.open(daemons.path(0)) as wire:
            secret = (await wire.ask("token:create", name="ann"))["token"]
            await until_ready(homes[1], secret, 200)
            await wire.ask("token:revoke", name="ann")
            await until_ready(homes[1], secret, 401)


@pytest.mark.promise("H1")
async def test_a_record_that_was_read_before_a_revocation_does_not_undo_it() -> None:
    async with door() as here:
        token = await here.new_token("ann")
        before = await here.daemon.store.provider_records(here.daemon._clock.now())
        await here.told("token:revoke", name="ann")
        here.daemon._hear_records(before)
        assert code(await here.event("system:ready", token=token)) == (401, "unauthenticated")


async def ready(home: Path, token: str) -> int:
    """The status of a look with a token."""
    url = json.loads((home / "var/run/http.json").read_text())["url"]
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"{url}/v1/events", json={"event": "system:ready"}, headers={"Authorization": f"Bearer {token}"}
        ) as answer,
    ):
        return answer.status


async def until_ready(home: Path, token: str, status: int) -> None:
    async with asyncio.timeout(30):
        while await ready(home, token) != status:  # noqa: ASYNC110 - it has to be asked
            await asyncio.sleep(0.01)
