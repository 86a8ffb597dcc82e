"""The environment's proxies and certificates: which endpoint they count for."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import pytest
import trustme
from yarl import URL

from ksi.errors import ConfigError
from ksi.providers.http.access import access, keepalive_socket

PROXY = "http://user:pw@proxy.corp:3128"
BOTH = {"HTTP_PROXY": PROXY, "HTTPS_PROXY": "http://secure.corp:3129"}


def proxy(url: str, environ: dict[str, str], own: str | None = None) -> str | None:
    found = access("team", URL(url), proxy=own, environ=environ).proxy
    return None if found is None else str(found)


@pytest.mark.promise("O6")
@pytest.mark.parametrize(
    ("url", "environ", "expected"),
    [
        ("http://model.corp/v1", BOTH, PROXY),
        ("https://model.corp/v1", BOTH, "http://secure.corp:3129"),
        ("http://model.corp/v1", {"http_proxy": PROXY}, PROXY),
        ("http://model.corp/v1", {"http_proxy": PROXY, "HTTP_PROXY": "http://other"}, PROXY),
        ("http://model.corp/v1", {"http_proxy": "", "HTTP_PROXY": PROXY}, None),
        ("http://model.corp/v1", {"HTTPS_PROXY": PROXY}, None),
        ("https://model.corp/v1", {"ALL_PROXY": PROXY}, PROXY),
        ("https://model.corp/v1", {"HTTPS_PROXY": "proxy.corp:3128"}, "http://proxy.corp:3128"),
        ("https://model.corp/v1", {}, None),
    ],
)
def test_the_environment_names_a_proxy(url: str, environ: dict[str, str], expected: str | None) -> None:
    found = proxy(url, environ)
    assert found == (None if expected is None else str(URL(expected)))


@pytest.mark.promise("O6")
@pytest.mark.parametrize("host", ["localhost", "api.localhost", "127.0.0.1", "127.8.8.8", "[::1]"])
def test_a_loopback_address_needs_no_proxy(host: str) -> None:
    assert proxy(f"http://{host}:8080/v1", {**BOTH, "NO_PROXY": ".other"}) is None


@pytest.mark.promise("O6")
@pytest.mark.parametrize(
    ("host", "no_proxy", "straight"),
    [
        ("model.corp", "model.corp", True),
        ("a.model.corp", "model.corp", True),
        ("a.model.corp", ".model.corp", True),
        ("a.model.corp", "*.model.corp", True),
        ("a.model.corp", "other, MODEL.corp", True),
        ("notmodel.corp", "model.corp", False),
        ("model.corp", "*", True),
        ("model.corp", "other,*", True),
        ("model.corp", "model.corp:80", True),
        ("model.corp", "model.corp:81", False),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("11.1.2.3", "10.0.0.0/8", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("[fd00::7]", "fd00::/8", True),
        ("model.corp", "", False),
        ("model.corp", " , ", False),
    ],
)
def test_no_proxy_excepts_hosts_suffixes_and_networks(host: str, no_proxy: str, straight: bool) -> None:
    assert (proxy(f"http://{host}/v1", {**BOTH, "no_proxy": no_proxy}) is None) is straight


@pytest.mark.promise("O6")
def test_a_provider_s_own_proxy_wins_and_an_empty_one_means_none() -> None:
    assert proxy("http://model.corp", BOTH, "http://own:1") == "http://own:1"
    assert proxy("http://127.0.0.1", {"NO_PROXY": "*"}, "http://own:1") == "http://own:1"
    assert proxy("http://model.corp", BOTH, "") is None


@pytest.mark.promise("O6")
def test_a_proxy_that_cannot_be_used_is_a_problem_of_the_endpoints_behind_it_only() -> None:
    environ = {"ALL_PROXY": "socks5://user:pw-secret@proxy.corp:1080"}
    told = access("team", URL("https://model.corp"), environ=environ).problem
    assert told is not None
    assert "ALL_PROXY" in told
    assert "pw-secret" not in told
    assert access("team", URL("http://127.0.0.1:1"), environ=environ).problem is None
    assert access("team", URL("https://model.corp"), proxy="", environ=environ).problem is None


@pytest.fixture
def ca_file(tmp_path: Path) -> Path:
    path = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(path))
    return path


@pytest.mark.promise("O6")
def test_certificates_come_from_the_provider_then_from_the_environment_then_from_the_system(ca_file: Path) -> None:
    url, environ = URL("https://model.corp"), {"SSL_CERT_FILE": str(ca_file)}
    assert access("team", url).tls is True
    assert access("team", URL("http://model.corp"), environ=environ).tls is True
    for found in (access("team", url, environ=environ), access("team", url, ca_file=ca_file)):
        assert isinstance(found.tls, ssl.SSLContext)
        assert len(found.tls.get_ca_certs()) == 1
        assert found.tls.verify_mode is ssl.CERT_REQUIRED
    folder = access("team", url, environ={"SSL_CERT_DIR": str(ca_file.parent)}).tls
    assert isinstance(folder, ssl.SSLContext)
    assert folder.get_ca_certs() == []


@pytest.mark.promise("O6")
def test_certificates_that_cannot_be_read_are_reported(tmp_path: Path) -> None:
    url, missing, empty = URL("https://model.corp"), tmp_path / "none.pem", tmp_path / "empty.pem"
    empty.write_text("no certificate")
    for path in (missing, empty):
        with pytest.raises(ConfigError) as caught:
            access("team", url, ca_file=path)
        assert caught.value.place == "providers.team.ca_file"
        told = access("team", url, environ={"SSL_CERT_FILE": str(path)}).problem
        assert told is not None
        assert "SSL_CERT_FILE" in told


def test_sockets_are_probed_while_they_are_silent() -> None:
    with keepalive_socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 1))) as made:
        assert made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        idle = getattr(socket, "TCP_KEEPIDLE", None) or getattr(socket, "TCP_KEEPALIVE")  # noqa: B009 - one of two names
        assert made.getsockopt(socket.IPPROTO_TCP, idle) == 60
