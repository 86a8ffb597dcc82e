"""What the configuration of an HTTP provider may say, judged before any call is made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import msgspec
from yarl import URL

from ksi.errors import ConfigError

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_SHORTEST_SECRET = 8


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """Time limits of a call, in seconds.

    `connect` until the connection stands, `idle` between two pieces of a streamed answer and before its first, `total`
    for the whole call. An answer in one piece is silent until it is whole, so only `connect` and `total` bind it. `end`
    is what a stream gets behind the end of its answer, for the counts and its own end.
    """

    total: float = 600.0
    idle: float = 120.0
    connect: float = 10.0
    end: float = 3.0


class Credential(msgspec.Struct, frozen=True):
    """An API key, and in `problem` why it cannot be used: None where it can, or where none is needed."""

    key: str | None = None
    problem: str | None = None

    @classmethod
    def read(cls, api_key: str | None, api_key_env: str | None) -> Credential:
        """Judge a key. With neither a key nor the name of a variable the endpoint needs none."""
        key = api_key.strip() if api_key is not None else ""
        source = f"the environment variable {api_key_env}" if api_key_env is not None else "api_key"
        if not key:
            return cls(problem=f"no API key: set {source}") if api_key_env is not None else cls()
        if not (key.isascii() and key.isprintable()):
            return cls(problem=f"the API key in {source} has characters that no HTTP header can carry")
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
    """A proxy's URL, with user and password where it wants them.

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


def secrets(credential: Credential, headers: Iterable[str], base: URL, proxy: URL | None) -> tuple[str, ...]:
    """What no message may repeat (S3), longest first: the key, long values of headers, and of the URL's query.

    Short values are ordinary words, and would blot out what is said.
    """
    values = {*base.query.values(), (proxy.password or "") if proxy is not None else ""}
    for value in headers:
        values |= {value, value.partition(" ")[2]}
    found = {value for value in values if len(value) >= _SHORTEST_SECRET}
    if credential.key is not None:
        found.add(credential.key)
    return tuple(sorted(found, key=len, reverse=True))
