"""Addresses as they may be shown."""

from __future__ import annotations

HARMLESS_PARAMETERS = frozenset(
    {"namespace", "db", "protocol", "sentinel_tls", "ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile"}
)
"""Parameters of an address that hold no secret."""


def shown_url(url: str) -> str:
    """An address that is safe to print: without user and password, and without parameter values that may be secret. A
    text that is no address is hidden, unless it is a plain word or path."""
    if "://" not in url:
        return "***" if set(url) & set("@:?=#") else url
    head, mark, parameters = url.partition("?")
    scheme, slashes, rest = head.partition("://")
    # A password may itself contain slashes and @ signs: remove everything up to the last @.
    user, at, place = rest.rpartition("@")
    if not at and "@" in parameters:
        return f"{scheme}{slashes}***"  # a question mark in a password
    shown = f"{scheme}{slashes}{'***@' if at and user else ''}{place.partition('#')[0]}"
    if not mark:
        return shown
    return f"{shown}?{'&'.join(map(_shown_parameter, parameters.partition('#')[0].split('&')))}"


def _shown_parameter(parameter: str) -> str:
    name, sign, _ = parameter.partition("=")
    if not sign:
        return "***"
    return parameter if name in HARMLESS_PARAMETERS else f"{name}=***"
