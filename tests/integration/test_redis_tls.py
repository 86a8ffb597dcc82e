"""The connection to the server by TLS: trust, the message without trust, and a cut."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from ksi.errors import ConfigError, StoreUnavailable
from ksi.store.redis import address as redis_address
from ksi.store.redis import link as redis_link
from ksi.store.redis import store as redis_store
from ksi.store.redis.address import Address
from ksi.testing import running_daemon
from tests.daemon_process import make_home, start_in_vain
from tests.integration.cable import Cable, cable
from tests.integration.wire import Json, Wire, until
from tests.redis_server import RedisServer, watched

HOST = "127.0.0.1"


class Office:
    """An authority, and the files of its certificates."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._authority = trustme.CA()
        self.file = folder / "authority.pem"
        self._authority.cert_pem.write_to_path(self.file)

    def server(self, name: str = HOST, *, asks: bool = False) -> ssl.SSLContext:
        """The certificate of a server of this name; with `asks`, its clients must have a certificate of this authority
        too."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._authority.issue_cert(name).configure_cert(context)
        if asks:
            context.verify_mode = ssl.CERT_REQUIRED
            self._authority.configure_trust(context)
        return context

    def client(self) -> str:
        """A client's certificate, as options of an address."""
        issued = self._authority.issue_cert("client")
        certificate, key = self._folder / "client.pem", self._folder / "client.key"
        issued.cert_chain_pems[0].write_to_path(certificate)
        issued.private_key_pem.write_to_path(key)
        return f"&ssl_certfile={certificate}&ssl_keyfile={key}"


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path)


@pytest.fixture
def line(redis_server: RedisServer, office: Office) -> Iterator[Cable]:
    """A proxy that ends TLS in front of the server."""
    with cable(redis_server, office.server()) as made:
        yield made


def way(line: Cable, trusted: Path, namespace: str) -> str:
    """A server's address by TLS."""
    return f"rediss://{HOST}:{line.port}?namespace={namespace}&ssl_ca_certs={trusted}"


async def refusal(wire: Wire) -> Json | None:
    """The reply to clients, once the cut was noticed: calls sent into it wait for their answers."""
    asked = wire.post("completion:get", {"request_id": "one"})
    done, _ = await asyncio.wait({asked}, timeout=0.1)
    return asked.result()["error"] if done else None


async def completed(wire: Wire) -> Json | None:
    """A request's reply, once the store can be reached."""
    reply = await wire.post("completion:request", {"prompt": "hello"})
    return None if "error" in reply else reply["data"]


@pytest.mark.promise("D1", "D3")
async def test_a_daemon_serves_by_tls_again_when_a_cut_is_mended(line: Cable, office: Office) -> None:
    settings: Json = {"store": {"url": way(line, office.file, "tls")}}
    async with running_daemon(settings=settings) as daemon, await Wire.open(daemon.config.socket_path) as wire:
        assert (await wire.ask("completion:request", prompt="hello"))["result"] == "echo: hello"
        line.cut()
        line.mend()
        assert await until(lambda: completed(wire))


@pytest.mark.promise("D1")
async def test_a_server_that_asks_for_a_certificate_is_shown_the_daemon_s(
    redis_server: RedisServer, office: Office
) -> None:
    with cable(redis_server, office.server(asks=True)) as line:
        url = way(line, office.file, "asks")
        settings: Json = {"store": {"url": url + office.client()}}
        async with running_daemon(settings=settings) as daemon, await Wire.open(daemon.config.socket_path) as wire:
            assert await completed(wire)


@pytest.mark.promise("D1", "F6")
def test_a_server_of_an_authority_that_is_not_trusted_stops_the_start_at_once_with_advice(
    line: Cable, tmp_path: Path
) -> None:
    home = make_home(tmp_path / "home", f'[store]\nurl = "rediss://:secret@{HOST}:{line.port}"\n')
    done = start_in_vain(home)
    assert done.returncode != 0
    assert "its certificate is not trusted (unable to get local issuer certificate)" in done.stderr
    assert "ssl_ca_certs" in done.stderr
    assert "secret" not in done.stderr + done.stdout


@pytest.mark.promise("D1")
async def test_a_certificate_of_another_name_is_not_trusted(redis_server: RedisServer, office: Office) -> None:
    with cable(redis_server, office.server("valkey.example")) as line:
        with pytest.raises(StoreUnavailable, match=r"not trusted.*a name that the certificate has"):
            await start(way(line, office.file, "name"))
        await start(way(line, office.file, "name") + "&ssl_check_hostname=false")


@pytest.mark.promise("D1")
@pytest.mark.parametrize(
    ("scheme", "server", "said"),
    [("rediss", "plain", "it has TLS"), ("redis", "tls", "it has TLS"), ("rediss", "asks", "does not answer")],
)
async def test_a_server_that_cannot_be_spoken_to_like_this_is_named_with_advice(
    redis_server: RedisServer, office: Office, monkeypatch: pytest.MonkeyPatch, scheme: str, server: str, said: str
) -> None:
    monkeypatch.setattr(redis_link, "PATIENCE", 0.5)
    monkeypatch.setattr(redis_address, "CONNECT_TIME", 0.5)
    monkeypatch.setattr(redis_store, "START_TIME", 2.0)
    with cable(redis_server, None if server == "plain" else office.server(asks=server == "asks")) as line:
        options = f"?ssl_ca_certs={office.file}" if scheme == "rediss" else ""
        with pytest.raises(StoreUnavailable, match=said):
            await start(f"{scheme}://{HOST}:{line.port}{options}")


@pytest.mark.promise("D3")
async def test_a_certificate_that_is_exchanged_for_a_wrong_one_is_reported_to_clients_until_it_is_right_again(
    line: Cable, office: Office, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    right, wrong = line.tls, Office(tmp_path / "other").server()
    settings: Json = {"store": {"url": way(line, office.file, "exchanged")}}
    async with running_daemon(settings=settings) as daemon, await Wire.open(daemon.config.socket_path) as wire:
        await wire.ask("completion:request", prompt="hello", request_id="one")
        line.cut()
        line.tls = wrong
        line.mend()
        refused = await until(lambda: refusal(wire))
        assert refused is not None
        assert refused["code"] == "store_unavailable"
        assert "its certificate is not trusted" in refused["message"]
        line.cut()
        line.tls = right
        line.mend()
        assert await until(lambda: completed(wire))


@pytest.mark.promise("D1")
async def test_sentinels_are_asked_by_tls_if_the_server_is(office: Office) -> None:
    with watched() as (url, master):
        sentinel = int(url.partition("/team")[0].rpartition(":")[2])
        with cable(sentinel, office.server()) as line:
            address = Address(f"rediss+sentinel://{HOST}:{line.port}/team?ssl_ca_certs={office.file}")
            assert await address._host() == (HOST, master.port)
        plain = Address(f"rediss+sentinel://{HOST}:{sentinel}/team?ssl_ca_certs={office.file}&sentinel_tls=no")
        assert await plain._host() == (HOST, master.port)


@pytest.mark.promise("D1")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("ssl_ca_certs=/nowhere.pem", "/nowhere.pem"),
        ("ssl_cert_reqs=perhaps", "perhaps"),
        ("ssl_certs=/some.pem", "there is no option 'ssl_certs'"),
    ],
)
def test_a_wrong_option_is_named_before_anybody_is_asked(options: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Address(f"rediss://{HOST}?{options}")


async def start(url: str) -> None:
    """Begin with this address, and end."""
    async with running_daemon(settings={"store": {"url": url}}):
        pass
