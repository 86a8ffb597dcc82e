"""The way to an endpoint: proxy, certificates and sockets, as the configuration and the daemon's environment say."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from yarl import URL

from ksi.errors import ConfigError
from ksi.providers.http_checks import http_url, proxy_url

_KEEPALIVE_IDLE = 60
"""Seconds without traffic after which a connection is probed, so that no NAT forgets one that waits for an answer."""
_KEEPALIVE_INTERVAL = 15
"""Seconds between two probes."""
_KEEPALIVE_PROBES = 4
"""Probes without an answer after which a connection is dead."""

AddressInfo = tuple[int, int, int, str, Any]


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """How an endpoint is reached."""

    proxy: URL | None = None
    tls: ssl.SSLContext | bool = True
    """True: with the certificates that the system trusts."""
    problem: str | None = None
    """What in the environment cannot be used, and what to do about it."""


def access(
    provider: str,
    url: URL,
    *,
    proxy: str | None = None,
    ca_file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Access:
    """How to reach `url`.

    `proxy` is the provider's own and wins; an empty one means none. `ca_file` holds the certificates that are trusted
    for this endpoint in place of the system's. `environ` is the daemon's: HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY,
    SSL_CERT_FILE and SSL_CERT_DIR count, the first four in lower case too.

    Raises:
        ConfigError: `proxy` is no URL, or `ca_file` holds no certificates.
    """
    environ = environ or {}
    tls, tls_problem = _tls(provider, url, ca_file, environ)
    if proxy is not None:
        return Access(proxy=proxy_url(provider, proxy) if proxy.strip() else None, tls=tls, problem=tls_problem)
    variable, found = _proxy_for(url, environ)
    if not found:
        return Access(tls=tls, problem=tls_problem)
    through = http_url(found if "://" in found else f"http://{found}")
    if through is None:
        problem = (
            f"the proxy in {variable} is no http or https URL, and no other kind can be used: set proxy for this "
            'provider ("" for none), or name the endpoint in NO_PROXY'
        )
        return Access(tls=tls, problem=tls_problem or problem)
    return Access(proxy=through, tls=tls, problem=tls_problem)


def keepalive_socket(info: AddressInfo) -> socket.socket:
    """A socket whose connection is probed while it is silent."""
    made = socket.socket(info[0], info[1], info[2])
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Linux and macOS have different names for the time until the first probe.
    idle = getattr(socket, "TCP_KEEPIDLE", None) or getattr(socket, "TCP_KEEPALIVE", None)
    for option, value in (
        (idle, _KEEPALIVE_IDLE),
        (getattr(socket, "TCP_KEEPINTVL", None), _KEEPALIVE_INTERVAL),
        (getattr(socket, "TCP_KEEPCNT", None), _KEEPALIVE_PROBES),
    ):
        if option is not None:
            made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made


# -- certificates -----------------------------------------------------------------------------------------------------


def _tls(
    provider: str, url: URL, ca_file: Path | None, environ: Mapping[str, str]
) -> tuple[ssl.SSLContext | bool, str | None]:
    """The context for a TLS connection, and what keeps the environment's certificates from being used."""
    if ca_file is not None:
        try:
            return ssl.create_default_context(cafile=str(ca_file)), None
        except OSError as fault:
            raise ConfigError(
                f"ca_file of provider {provider} cannot be used: {ca_file}: {fault.strerror or fault}; it must be a "
                "file of certificates in PEM form",
                place=f"providers.{provider}.ca_file",
            ) from None
    file, folder = environ.get("SSL_CERT_FILE"), environ.get("SSL_CERT_DIR")
    if url.scheme != "https" or not (file or folder):
        return True, None
    try:
        return ssl.create_default_context(cafile=file or None, capath=folder or None), None
    except OSError as fault:
        name = "SSL_CERT_FILE" if file else "SSL_CERT_DIR"
        return (
            True,
            f"the certificates that {name} names cannot be read: {fault.strerror or fault}; correct or unset it",
        )


# -- proxies ----------------------------------------------------------------------------------------------------------


def _proxy_for(url: URL, environ: Mapping[str, str]) -> tuple[str, str]:
    """The variable that names a proxy for `url`, and the proxy; empty where there is none."""
    host = url.host or ""
    if _is_loopback(host) or _is_excepted(host, url.port, _variable(environ, "no_proxy")[1]):
        return "", ""
    name, found = _variable(environ, f"{url.scheme}_proxy")
    return (name, found) if found else _variable(environ, "all_proxy")


def _variable(environ: Mapping[str, str], name: str) -> tuple[str, str]:
    """A variable in lower or else in upper case. An empty one in lower case hides the other, as everywhere."""
    for spelling in (name, name.upper()):
        if spelling in environ:
            return spelling, environ[spelling].strip()
    return name, ""


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    address = _address(host)
    return address is not None and address.is_loopback


def _is_excepted(host: str, port: int | None, no_proxy: str) -> bool:
    """Whether NO_PROXY names the host: by itself, by a suffix, by `*`, with a port, or by a network such as
    10.0.0.0/8."""
    entries = [entry.strip() for entry in no_proxy.split(",") if entry.strip()]
    if "*" in entries:
        return True
    names = {"no": ",".join(entry.removeprefix("*") for entry in entries)}
    if urllib.request.proxy_bypass_environment(host, names):  # type: ignore[attr-defined]  # not in the stubs
        return True
    if urllib.request.proxy_bypass_environment(f"{host}:{port}", names):  # type: ignore[attr-defined]
        return True
    address = _address(host)
    return address is not None and any(
        address in network for entry in entries if (network := _network(entry)) is not None
    )


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def _network(entry: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return None
