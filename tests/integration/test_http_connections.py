"""The way to an endpoint: kept connections, certificates, proxies, base URLs, and whether a login works."""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from ksi.clock import Moment, SystemClock
from ksi.errors import FailureClass
from ksi.providers.http.access import Timeouts
from tests.endpoint import Answer, ScriptedEndpoint, Seen
from tests.integration.http_calls import KEY, a_call, both_apis, both_ways, failure, make, pair, running, whole

PASSWORD = "proxy-pw-4711"


class HangsUp:
    """A script that answers the first request on a kept connection and hangs up on the second; a connection that is
    made for the next one is not kept."""

    def __init__(self, raw: bytes | None = None) -> None:
        self._raw = raw
        self._count = 0

    def __call__(self, seen: Seen) -> Answer:
        self._count += 1
        if self._count % 3 != 2:
            return Answer()
        return Answer(hang_up=True) if self._raw is None else Answer(raw=self._raw)


class LeapingClock(SystemClock):
    """A clock on which ten seconds pass between any two looks."""

    def __init__(self) -> None:
        self._looks = 0
        super().__init__()

    def now(self) -> Moment:
        self._looks += 1
        return super().now().after(10.0 * self._looks)


class TestKeptConnections:
    """A connection that was closed while idle costs nothing."""

    @both_apis
    @both_ways
    @pytest.mark.promise("O7")
    @pytest.mark.parametrize("size", [10, 1_000_000])
    async def test_a_reused_connection_that_was_closed_costs_no_attempt(
        self, api: str, stream: bool, size: int
    ) -> None:
        async with ScriptedEndpoint(script=HangsUp()) as endpoint, running(make(api, endpoint.url)) as provider:
            for number in range(4):
                prompt = "x" * size + str(number)
                assert (await whole(provider, a_call(prompt, stream=stream)))[1].text == "Hello there."
                assert endpoint.requests[-1].json["messages"][0]["content"] == prompt
            assert [seen.json["messages"][0]["content"][-1] for seen in endpoint.requests] == list("011233")

    @both_apis
    @pytest.mark.promise("O7")
    async def test_a_fresh_connection_that_is_closed_is_not_tried_twice(self, api: str) -> None:
        async with pair(api, Answer(hang_up=True)) as (endpoint, provider):
            assert (await failure(provider, a_call())).failure is FailureClass.NETWORK_ERROR
            assert len(endpoint.requests) == 1

    @both_apis
    @pytest.mark.promise("O7")
    async def test_a_second_connection_that_is_closed_too_ends_the_attempt(self, api: str) -> None:
        async with pair(api, Answer(), Answer(hang_up=True)) as (endpoint, provider):
            await whole(provider, a_call())
            assert (await failure(provider, a_call())).failure is FailureClass.NETWORK_ERROR
            assert len(endpoint.requests) == 3

    @both_apis
    @pytest.mark.promise("O7")
    async def test_a_connection_that_breaks_inside_the_head_is_not_tried_twice(self, api: str) -> None:
        torn = HangsUp(b"HTTP/1.1 200 OK\r\nContent-Type: appl")
        async with ScriptedEndpoint(script=torn) as endpoint, running(make(api, endpoint.url)) as provider:
            await whole(provider, a_call())
            await failure(provider, a_call())
            assert len(endpoint.requests) == 2

    @both_apis
    @pytest.mark.promise("O7")
    async def test_an_endpoint_that_breaks_off_late_is_not_asked_twice(self, api: str) -> None:
        async with (
            ScriptedEndpoint(script=HangsUp()) as endpoint,
            running(make(api, endpoint.url, clock=LeapingClock())) as provider,
        ):
            await whole(provider, a_call())
            assert (await failure(provider, a_call())).failure is FailureClass.NETWORK_ERROR
            assert len(endpoint.requests) == 2


@pytest.fixture
def authority(tmp_path: Path) -> tuple[Path, ssl.SSLContext]:
    """A private authority's certificate, and a server's context."""
    ca = trustme.CA()
    path = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(str(path))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1", "model.invalid").configure_cert(context)
    return path, context


class TestCertificates:
    """A private authority is trusted if configured, and nowhere else."""

    @both_apis
    @pytest.mark.promise("F1", "O6")
    async def test_a_certificate_that_is_not_trusted_is_no_passing_fault(
        self, api: str, authority: tuple[Path, ssl.SSLContext]
    ) -> None:
        async with ScriptedEndpoint(tls=authority[1]) as endpoint, running(make(api, endpoint.url)) as provider:
            error = await failure(provider, a_call())
        assert (error.failure, error.retryable) == (FailureClass.INVALID_REQUEST, False)
        assert "ca_file" in error.message
        assert not error.unserved

    @both_apis
    @pytest.mark.promise("O6")
    @pytest.mark.parametrize("variable", [False, True])
    async def test_a_private_authority_can_be_named(
        self, api: str, variable: bool, authority: tuple[Path, ssl.SSLContext]
    ) -> None:
        path, context = authority
        named: dict[str, Any] = {"environ": {"SSL_CERT_FILE": str(path)}} if variable else {"ca_file": str(path)}
        async with ScriptedEndpoint(tls=context) as endpoint, running(make(api, endpoint.url, **named)) as provider:
            assert (await whole(provider, a_call()))[1].text == "Hello there."

    @both_apis
    @pytest.mark.promise("O6")
    async def test_certificates_that_cannot_be_read_are_a_problem_before_any_call(
        self, api: str, tmp_path: Path
    ) -> None:
        environ = {"SSL_CERT_FILE": str(tmp_path / "none.pem")}
        async with running(make(api, "https://model.invalid", environ=environ)) as provider:
            assert "SSL_CERT_FILE" in (provider.problem() or "")
            error = await failure(provider, a_call())
        assert error.failure is FailureClass.INVALID_REQUEST
        assert "SSL_CERT_FILE" in error.message


@asynccontextmanager
async def connecting_proxy(answer: bytes, target: ScriptedEndpoint | None = None) -> Any:
    """A proxy that answers CONNECT, and tunnels to `target`. Gives its port and the heads that came."""
    heads: list[str] = []
    tasks: set[asyncio.Task[None]] = set()

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(answer)
        if target is None:
            writer.close()
            return
        up, down = await asyncio.open_connection("127.0.0.1", int(target.url.rpartition(":")[2]))
        await asyncio.gather(pipe(reader, down), pipe(up, writer), return_exceptions=True)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], heads
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class TestProxies:
    """The environment's proxy is used as the provider's own is."""

    @both_apis
    @pytest.mark.promise("O6")
    async def test_a_plain_call_goes_through_the_environment_s_proxy(self, api: str) -> None:
        async with ScriptedEndpoint() as proxy:
            environ = {"HTTP_PROXY": proxy.url.replace("//", f"//user:{PASSWORD}@")}
            async with running(make(api, "http://model.invalid", environ=environ)) as provider:
                await whole(provider, a_call())
            assert proxy.requests[0].target.startswith("http://model.invalid/v1/")
            assert proxy.requests[0].headers["proxy-authorization"].startswith("Basic ")

    @both_apis
    @pytest.mark.promise("O6")
    async def test_an_encrypted_call_goes_through_a_tunnel(
        self, api: str, authority: tuple[Path, ssl.SSLContext]
    ) -> None:
        path, context = authority
        async with (
            ScriptedEndpoint(tls=context) as endpoint,
            connecting_proxy(b"HTTP/1.1 200 Connection established\r\n\r\n", endpoint) as (port, heads),
        ):
            environ = {"https_proxy": f"http://127.0.0.1:{port}", "SSL_CERT_FILE": str(path)}
            async with running(make(api, "https://model.invalid", environ=environ)) as provider:
                assert (await whole(provider, a_call()))[1].text == "Hello there."
        assert heads[0].startswith("CONNECT model.invalid:443")

    @both_apis
    @pytest.mark.promise("O6")
    async def test_a_loopback_endpoint_is_called_straight(self, api: str) -> None:
        environ = {"HTTP_PROXY": "http://127.0.0.1:1", "ALL_PROXY": "socks5://127.0.0.1:1"}
        async with pair(api, Answer(), environ=environ) as (_, provider):
            assert provider.problem() is None
            assert (await whole(provider, a_call()))[1].text == "Hello there."

    @both_apis
    @pytest.mark.promise("O6", "S3")
    async def test_a_proxy_that_wants_a_password_is_no_passing_fault_and_the_wrong_one_is_not_shown(
        self, api: str
    ) -> None:
        refusal = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
        async with connecting_proxy(refusal) as (port, _):
            environ = {"HTTPS_PROXY": f"http://user:{PASSWORD}@127.0.0.1:{port}"}
            async with running(make(api, "https://model.invalid", environ=environ)) as provider:
                error = await failure(provider, a_call())
        assert (error.failure, error.retryable) == (FailureClass.INVALID_REQUEST, False)
        assert "407" in error.message
        assert PASSWORD not in error.message

    @both_apis
    @pytest.mark.promise("O6")
    async def test_a_proxy_of_another_kind_is_a_problem_before_any_call(self, api: str) -> None:
        environ = {"ALL_PROXY": f"socks5://user:{PASSWORD}@127.0.0.1:1"}
        async with running(make(api, "http://model.invalid", environ=environ)) as provider:
            assert "ALL_PROXY" in (provider.problem() or "")
            error = await failure(provider, a_call())
        assert (error.failure, PASSWORD in error.message) == (FailureClass.INVALID_REQUEST, False)


class TestUnserved:
    """A request that was never accepted is marked so."""

    @both_apis
    @pytest.mark.promise("F1")
    async def test_a_connection_that_does_not_come_about_has_served_nothing(self, api: str) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{unused.getsockname()[1]}"
            async with running(make(api, url)) as provider:
                assert (await failure(provider, a_call())).unserved
        async with running(make(api, "http://model.invalid", timeouts=Timeouts(connect=5.0))) as provider:
            assert (await failure(provider, a_call())).unserved

    @both_apis
    @pytest.mark.promise("F1")
    async def test_a_model_that_is_loading_has_served_nothing(self, api: str) -> None:
        answers = (Answer(status=503, error_message="Loading model"), Answer(status=503), Answer(hang_up=True))
        async with pair(api, *answers) as (_, provider):
            assert [(await failure(provider, a_call())).unserved for _ in answers] == [True, False, False]

    @both_apis
    @pytest.mark.promise("F5", "F12")
    async def test_a_limit_and_a_missing_model_are_reported_with_the_requested_model(self, api: str) -> None:
        limit = Answer(status=429, error_message="You have exhausted your capacity on this model.")
        gone = Answer(status=404, error_code="model_not_found", error_message="It is not there.")
        async with pair(api, limit, gone) as (_, provider):
            limited, missing = await failure(provider, a_call()), await failure(provider, a_call())
        assert limited.limited_models == "small"
        assert missing.failure is FailureClass.MODEL_NOT_FOUND
        assert "'small'" in missing.message


class TestBaseUrls:
    """People copy an endpoint's whole address, with blanks around it."""

    @pytest.mark.parametrize("ending", ["", "/", " ", "\n", "/chat/completions", "/chat/completions/ "])
    async def test_openai_s_own_path_may_stand_at_the_end(self, ending: str) -> None:
        async with ScriptedEndpoint() as endpoint:
            provider = make("openai", "", base_url=f" {endpoint.openai_url}{ending}")
            async with running(provider):
                await whole(provider, a_call())
            assert endpoint.requests[0].path == "/v1/chat/completions"

    @pytest.mark.parametrize("ending", ["", "/", " ", "/v1", "/v1/ ", "/v1/messages", "/v1/messages/ "])
    async def test_anthropic_s_own_path_may_stand_at_the_end(self, ending: str) -> None:
        async with ScriptedEndpoint() as endpoint:
            provider = make("anthropic", "", base_url=f" {endpoint.url}{ending}")
            async with running(provider):
                await whole(provider, a_call())
            assert endpoint.requests[0].path == "/v1/messages"

    async def test_a_query_stays_when_the_path_is_taken_off(self) -> None:
        async with ScriptedEndpoint() as endpoint:
            url = f"{endpoint.url}/deployments/a/chat/completions?api-version=1"
            provider = make("openai", "", base_url=url)
            async with running(provider):
                await whole(provider, a_call())
            seen = endpoint.requests[0]
            assert (seen.path, seen.query) == ("/deployments/a/chat/completions", "api-version=1")


class TestLogins:
    """A key is found to be valid again without a paid call."""

    @both_apis
    @pytest.mark.promise("F11")
    @pytest.mark.parametrize(
        ("status", "works"), [(200, True), (401, False), (403, False), (404, None), (429, None), (500, None)]
    )
    async def test_a_look_at_the_models_tells_whether_the_key_is_good(
        self, api: str, status: int, works: bool | None
    ) -> None:
        async with pair(api, Answer(status=401)) as (endpoint, provider):
            await failure(provider, a_call())
            endpoint.models_status = status
            assert await provider.login_works() is works
            assert (provider.problem() is None) is (works is True)
            (look,) = endpoint.looks
            assert look.path == "/v1/models"
            assert KEY in look.headers["authorization" if api == "openai" else "x-api-key"]
            assert len(endpoint.requests) == 1

    @both_apis
    @pytest.mark.promise("F11")
    async def test_an_unanswered_question_stays_unknown(self, api: str) -> None:
        provider = make(api, "http://127.0.0.1:1")
        assert await provider.login_works() is None
        async with running(provider):
            assert await provider.login_works() is None
        async with running(make(api, "http://127.0.0.1:1", api_key=None, api_key_env="TEAM_KEY")) as keyless:
            assert await keyless.login_works() is False
