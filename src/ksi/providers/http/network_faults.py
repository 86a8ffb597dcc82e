"""Faults of the network, of TLS, of proxies and of an answer's framing, as failure classes. Pure."""

from __future__ import annotations

import re

import aiohttp
from yarl import URL

from ksi.errors import FailureClass, ProviderError
from ksi.providers.http.access import Timeouts
from ksi.providers.http.sse import SseTooLong

_PERMANENT = re.compile(
    r"can't be present with|can not decode content-encoding|got more than|too many headers|duplicate content-length",
    re.IGNORECASE,
)
"""Forms of an answer that cannot be read and that its endpoint will always use."""


def broken_way(fault: Exception, url: URL, limits: Timeouts) -> ProviderError:
    """A fault of the network, of TLS, of a proxy or of the framing of an answer."""
    place = f"{url.scheme}://{url.host}:{url.port}"
    match fault:
        case aiohttp.ConnectionTimeoutError():
            return ProviderError(
                FailureClass.TIMEOUT, f"no connection to {place} within {limits.connect:g} s", unserved=True
            )
        case aiohttp.SocketTimeoutError():
            return idle(limits)
        case TimeoutError():
            return ProviderError(FailureClass.TIMEOUT, f"the answer was not whole after {limits.total:g} s")
        case aiohttp.ClientHttpProxyError():
            return _proxy_refused(fault)
        case aiohttp.ClientResponseError() | SseTooLong():
            return _unreadable(fault.message if isinstance(fault, aiohttp.ClientResponseError) else str(fault), place)
        case aiohttp.ClientPayloadError():
            return _network("the connection broke in the middle of the answer")
        case aiohttp.ClientConnectorCertificateError():
            return ProviderError(
                FailureClass.INVALID_REQUEST,
                f"the certificate of {place} is not trusted: {fault.certificate_error}; set ca_file for this provider "
                "to the certificate of its authority, or SSL_CERT_FILE for all",
            )
        case aiohttp.ClientConnectorSSLError():
            return _network(f"no TLS connection to {place}: {fault.os_error.strerror or fault.os_error}")
        case aiohttp.ClientConnectorError():
            said = fault.os_error.strerror or fault.os_error
            return ProviderError(FailureClass.NETWORK_ERROR, f"no connection to {place}: {said}", unserved=True)
        case aiohttp.ServerDisconnectedError():
            return _network(f"{place} closed the connection before it answered")
        case _:
            return _network(f"the connection to {place} broke: {fault}")


def idle(limits: Timeouts) -> ProviderError:
    """A stream in which nothing of the answer came for too long."""
    return ProviderError(
        FailureClass.TIMEOUT, f"nothing of the answer came for {limits.idle:g} s; the endpoint or the way to it hangs"
    )


def _proxy_refused(fault: aiohttp.ClientHttpProxyError) -> ProviderError:
    if fault.status == 407:
        return ProviderError(
            FailureClass.INVALID_REQUEST,
            "the proxy wants a user and a password (HTTP 407): give them in its URL, http://user:password@host:port",
        )
    return _network(f"the proxy refused: {fault.status} {fault.message}")


def _unreadable(said: str, place: str) -> ProviderError:
    said = " ".join(said.split())
    if _PERMANENT.search(said) is None:
        return ProviderError(FailureClass.PROVIDER_ERROR, f"the answer of {place} cannot be read: {said}")
    advice = "make it, or the proxy before it, answer in another form"
    if "content-encoding" in said.lower():
        advice = "switch off compression there, or install the package"
    return ProviderError(FailureClass.INVALID_REQUEST, f"answers of {place} can never be read: {said}; {advice}")


def _network(message: str) -> ProviderError:
    return ProviderError(FailureClass.NETWORK_ERROR, message)
