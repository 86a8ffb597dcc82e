"""The access to an endpoint by configuration and environment: URL, key, headers, time limits, proxy, certificates."""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from yarl import URL

from ksi.errors import ConfigError
from ksi.providers.masking import worth_masking

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """Time limits of a call, in seconds.

    `connect` until the connection stands, `idle` between two pieces of a streamed answer and before its first, `total`
    for the whole call. An answer in one piece is silent until it is whole, so only `connect` and `total` bind it. `end`
    is for a stream after the end of its answer: for the counts and its own end.
    """

    total: float = 600.0
    idle: float = 120.0
    connect: float = 10.0
    end: float = 3.0


class Credential(msgspec.Struct, frozen=True, kw_only=True):
    """The proof of who calls: an API key, and the headers that every call carries."""

    key: str | None = None
    problem: str | None = None
    """Why the key cannot be used; None if it can, or if none is needed."""
    own_headers: Mapping[str, str] = {}
    """The API's own headers, with the key in one of them."""
    headers: Mapping[str, str] = {}
    """The user's headers. They win over the API's own, and are secrets as the key is."""

    @classmethod
    def read(cls, variable: str | None, environ: Mapping[str, str]) -> Credential:
        """The key that a variable of the environment holds; without a variable the endpoint needs none."""
        if variable is None:
            return cls()
        key = environ.get(variable, "").strip()
        if not key:
            return cls(problem=f"no API key: set the environment variable {variable}")
        if not (key.isascii() and key.isprintable()):
            return cls(
                problem=f"the API key in the environment variable {variable} has characters that no HTTP header can "
                "carry"
            )
        return cls(key=key)


def base_url(provider: str, text: str, own_path: str = "") -> URL:
    """A provider's base URL. Blanks around it and the API's `own_path` at its end are taken off: people copy both.

    Raises:
        ConfigError: it is no http or https URL, or holds a password, which would show wherever the URL does.
    """
    url = http_url(text)
    place = f"providers.{provider}.base_url"
    if url is None:
        raise ConfigError(f"base_url of provider {provider} is no http or https URL", place=place)
    if url.user is not None or url.password is not None:
        raise ConfigError(
            f"base_url of provider {provider} holds a user or password: send an Authorization header instead",
            place=place,
        )
    path = url.path.rstrip("/")
    if own_path and path.endswith(f"/{own_path}"):
        url = url.with_path(path.removesuffix(f"/{own_path}"), keep_query=True)
    return url.with_fragment(None)


def proxy_url(provider: str, text: str | None) -> URL | None:
    """A proxy's URL, with user and password if it wants them.

    Raises:
        ConfigError: it is no http or https URL.
    """
    if text is None:
        return None
    url = http_url(text)
    if url is None:
        raise ConfigError(f"proxy of provider {provider} is no http or https URL", place=f"providers.{provider}.proxy")
    return url


def http_url(text: str) -> URL | None:
    """An http or https URL with a host; None for anything else."""
    try:
        url = URL(text.strip())
        return url if url.scheme in ("http", "https") and url.host and url.port is not None else None
    except ValueError:
        return None


def check_headers(provider: str, headers: Mapping[str, str]) -> None:
    """Refuse headers that no request can carry, without repeating their values.

    Raises:
        ConfigError: a name or value has characters that HTTP does not know.
    """
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or not (value.isascii() and (value.isprintable() or not value)):
            raise ConfigError(
                f"header {name!r} of provider {provider} cannot be sent: its name or value has characters that HTTP "
                "does not carry",
                place=f"providers.{provider}.headers",
            )


def secrets(credential: Credential, base: URL, proxy: URL | None) -> tuple[str, ...]:
    """The texts that no message may repeat, longest first: the key, and long values of headers and of the URL's
    query."""
    values = {*base.query.values(), (proxy.password or "") if proxy is not None else ""}
    for value in credential.headers.values():
        values |= {value, value.partition(" ")[2]}
    found = worth_masking(values)
    # A key is a secret however short it is.
    return found if credential.key is None else tuple(sorted({*found, credential.key}, key=len, reverse=True))


# -- the way there: proxies, certificates and sockets -----------------------------------------------------------------

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
    """One sentence that names an unusable setting of the environment, with advice."""


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
    """The context for a TLS connection, and the reason if the environment's certificates cannot be used."""
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
    """The variable that names a proxy for `url`, and the proxy; empty if there is none."""
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
    """Return True if NO_PROXY names the host: by itself, by a suffix, by `*`, with a port, or by a network such as
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
