"""Watches for a login to come back: looks again and again, ever less often, without a call that costs anything."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import structlog

from ksi.clock import Clock
from ksi.completion.pool.limits import guess
from ksi.config.schema import BreakerConfig
from ksi.errors import KsiError
from ksi.providers.base import LoginProvider, Provider


class LoginWatch:
    """One task for each provider whose login lapsed. `on_login` is called when it can be asked again."""

    def __init__(
        self,
        providers: Mapping[str, Provider],
        config: BreakerConfig,
        clock: Clock,
        on_login: Callable[[str], Awaitable[None]],
    ) -> None:
        self._providers = providers
        self._config = config
        self._clock = clock
        self._on_login = on_login
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._log = structlog.get_logger("ksi.providers")

    def watch(self, name: str, lapses: int) -> None:
        """A provider's login failed so many times in a row; with 0 it works, as far as is known."""
        if lapses and name not in self._tasks:
            self._tasks[name] = asyncio.create_task(self._until_login(name, lapses - 1), name=f"ksi-login {name}")
        elif not lapses and name in self._tasks:
            self._tasks.pop(name).cancel()

    async def stop(self) -> None:
        """Watch no more."""
        tasks, self._tasks = list(self._tasks.values()), {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_login(self, name: str, looks: int) -> None:
        while True:
            await self._clock.sleep(guess(looks, self._config))
            looks += 1
            if await self._works(name):
                try:
                    await self._on_login(name)
                except KsiError as error:
                    self._log.error("a login came back, but cannot be noted yet", provider=name, error=error.message)

    async def _works(self, name: str) -> bool:
        """Return whether a call may go out. If only a call can tell, it goes out and uses up no attempt."""
        provider = self._providers[name]
        try:
            works = await provider.login_works() if isinstance(provider, LoginProvider) else None
        except Exception:  # noqa: BLE001 - a provider's defect must not end the watch
            self._log.exception("a login cannot be looked at", provider=name)
            works = None
        return works is not False
