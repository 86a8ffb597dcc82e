"""The common part of providers over HTTP: their options, their endpoint's life, and the state of the login."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ksi.providers.base import Call, Capabilities, Setting
from ksi.providers.http.access import Credential, Timeouts, access, base_url
from ksi.providers.http.endpoint import Endpoint, Streaming


class HttpOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The configuration keys of every kind over HTTP, in addition to the common ones."""

    base_url: str
    """The endpoint's address."""
    api_key_env: str | None = None
    """The variable that holds the key; without one, calls carry no key."""
    headers: Mapping[str, str] = msgspec.field(default_factory=dict)
    """For every call; they win over those made here, and are kept out of all messages as keys are."""
    connect_timeout: float = 10.0
    """Until the connection stands."""
    context_tokens: int
    """The model's context; history is cut to it."""
    proxy: str | None = None
    """A proxy's URL; without it the one that the [environment](#proxies-and-certificates) names. Empty: none."""
    ca_file: str | None = None
    """A file of certificates (PEM) that are trusted for this endpoint in place of the system's; absolute or below the
    home."""
    streaming: Streaming = Streaming.ASKED
    """When to fetch the answer in pieces: `asked` (if a client reads them), `always` or `never`."""
    extra_body: Mapping[str, Any] = msgspec.field(default_factory=dict)
    """Fields for every call's body."""


class HttpProvider(ABC):
    """A provider with one endpoint; each dialect adds `complete`, and says how its API is spoken to."""

    own_path: str
    """The API's path, which may also stand at the end of a base URL."""

    def __init__(self, setting: Setting, options: HttpOptions, timeouts: Timeouts | None = None) -> None:
        """`timeouts` are the time limits of its calls; None takes those of `setting` and `options`.

        Raises:
            ConfigError: `base_url`, `proxy`, `ca_file` or a header cannot be used.
        """
        self.name = setting.name
        base = base_url(setting.name, options.base_url, self.own_path)
        credential = Credential.read(options.api_key_env, setting.environ)
        self._endpoint = Endpoint(
            setting.name,
            base,
            clock=setting.clock,
            credential=msgspec.structs.replace(
                credential, own_headers=self.own_headers(credential.key), headers=options.headers
            ),
            timeouts=timeouts
            or Timeouts(total=setting.timeout, idle=setting.idle_timeout, connect=options.connect_timeout),
            access=access(
                setting.name,
                base,
                proxy=options.proxy,
                ca_file=None if options.ca_file is None else setting.home / Path(options.ca_file).expanduser(),
                environ=setting.environ,
            ),
        )
        self.capabilities = Capabilities(
            stream=options.streaming is not Streaming.NEVER,
            context_tokens=options.context_tokens,
            price_list=str(base),
        )

    @abstractmethod
    def own_headers(self, key: str | None) -> dict[str, str]:
        """The headers by which the API knows its caller."""

    @property
    @abstractmethod
    def login_path(self) -> str:
        """A path that only a good key can GET, and that costs nothing."""

    async def start(self) -> None:
        """Make the session; nothing is sent."""
        await self._endpoint.start()

    async def stop(self) -> None:
        """Close the session and the calls that run on it."""
        await self._endpoint.stop()

    def problem(self) -> str | None:
        """A missing key, an environment that cannot be used, or the endpoint's last complaint about the account."""
        return self._endpoint.problem()

    async def login_works(self) -> bool | None:
        """Return True if the endpoint takes the key now; see `LoginProvider`."""
        return await self._endpoint.login_works(self.login_path)


def headers_of(call: Call) -> Mapping[str, str] | None:
    """A call's own headers: those that came with a native request, and its span."""
    own = {} if call.native is None else dict(call.native.headers)
    if call.traceparent is not None:
        own["traceparent"] = call.traceparent
    return own or None
