"""Checks of the installed Claude Code: is it there, new enough and logged in? Each problem comes with its remedy."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from ksi.config.found_providers import find_program
from ksi.errors import FailureClass, ProviderError
from ksi.providers.claude_cli.faults import LOG_IN
from ksi.providers.process import ChildProcess, ProcessRegistry, ProcessStartError

OLDEST = (2, 1, 97)
"""The oldest version that was tried and works; 2.1.39 cannot resume at a message."""
_PATIENCE = 20.0


class _AuthStatus(msgspec.Struct, rename="camel"):
    logged_in: bool


class Installation:
    """The program that the configuration names, looked at once and again whenever the file changes."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Callable[[], Mapping[str, str]],
        registry: ProcessRegistry,
        folder: Path,
    ) -> None:
        """It is run in `folder`."""
        self._command = command
        self._environment = environment
        self._registry = registry
        self._folder = folder
        self._looking = asyncio.Lock()
        self._looked_at: tuple[str, int] | None = None
        self._options = ""
        self.version: str | None = None
        self.logged_in: bool | None = None
        """None while nothing is known."""

    def program(self) -> list[str] | None:
        """The command with the program's path; None if there is no such program."""
        name, *rest = self._command
        path = find_program(name, self._environment())
        return None if path is None else [path, *rest]

    def problem(self) -> str | None:
        """One sentence that gives the reason why it cannot work, and advice; None if there is none."""
        if self.program() is None:
            return (
                f"Claude Code is not installed: there is no program {self._command[0]!r}; install it with "
                "`npm install -g @anthropic-ai/claude-code`, or set `command` to its path"
            )
        if self.too_old:
            oldest = ".".join(map(str, OLDEST))
            return f"Claude Code {self.version} is too old: {oldest} or later is needed; run `claude update`"
        if self.logged_in is False:
            return f"Claude Code is not logged in: {LOG_IN}"
        return None

    @property
    def too_old(self) -> bool:
        """True if its version is known, and below `OLDEST`."""
        found = re.match(r"(\d+)\.(\d+)\.(\d+)", self.version or "")
        return found is not None and tuple(int(part) for part in found.groups()) < OLDEST

    async def ready(self) -> list[str]:
        """The command to run.

        Raises:
            ProviderError: it is not installed, or too old.
        """
        async with self._looking:
            program = self.program()
            file = _identity(program[0]) if program is not None else None
            if program is not None and file != self._looked_at:
                async with asyncio.TaskGroup() as asking:  # which, unlike gather, ends with nothing left running
                    version = asking.create_task(self._ask(program, "--version"))
                    options = asking.create_task(self._ask(program, "--help"))
                self.version = version.result().strip().partition(" ")[0] or None
                self._options = options.result()
                self._looked_at = file
        if program is None or self.too_old:
            raise ProviderError(FailureClass.PROVIDER_ERROR, self.problem() or "it cannot be run")
        return program

    def has_option(self, name: str) -> bool:
        """Return True if this version's help lists an option; known once it is `ready`."""
        return name in self._options

    async def look(self) -> None:
        """Find out all that `problem` tells. The calls will show the rest."""
        with suppress(ProviderError):
            await self.look_at_login()

    async def look_at_login(self) -> bool | None:
        """Return True if the program has a login by its own word; None if it does not say. It does not ask its API, so
        it takes a login that was revoked for a good one.

        Raises:
            ProviderError: as for `ready`.
        """
        program = await self.ready()
        try:
            said = msgspec.json.decode(await self._ask(program, "auth", "status"), type=_AuthStatus)
        except msgspec.DecodeError:
            return None
        self.logged_in = said.logged_in
        return said.logged_in

    async def _ask(self, program: Sequence[str], *arguments: str) -> str:
        """The output of a short command; empty if it does not end."""
        try:
            child = await ChildProcess.start(
                self._registry,
                [*program, *arguments],
                name=" ".join(arguments),
                environment=self._environment(),
                folder=self._folder,
            )
        except ProcessStartError:
            return ""
        printed = bytearray()
        try:
            async with asyncio.timeout(_PATIENCE):
                while data := await child.read():
                    printed += data
        except TimeoutError:
            printed.clear()
        finally:
            await child.kill()
        return printed.decode("utf-8", "replace")


def _identity(path: str) -> tuple[str, int] | None:
    """A file and its time of change; None if it is gone."""
    try:
        return path, Path(path).stat().st_mtime_ns
    except OSError:
        return None
