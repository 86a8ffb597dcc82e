"""A home under migration: its files, its daemon's lock, and the check that no daemon runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ksi.clock import Chance
from ksi.config.reader import load
from ksi.config.schema import CONFIG_FILE, Config
from ksi.daemon.parts import store_rules
from ksi.errors import MigrationError, StoreInUse
from ksi.host.pid_file import PidFile
from ksi.host.platforms import answers
from ksi.host.private_files import make_folder
from ksi.migration import control
from ksi.store.sqlite.store import SqliteStore

OLD_SERVICES = (
    "ksi_daemon/plugins/completion/completion_service.py",
    "ksi_daemon/completion/completion_service.py",
)
"""The places of the old project's completion service, early and late ones."""
DISABLED = ".disabled"
VARIABLE = "KSI_SERVICE__VERSION"

Say = Callable[[str], None]


class House:
    """The paths of all files."""

    def __init__(self, home: Path) -> None:
        """Read the home's configuration.

        Raises:
            ConfigError: it cannot be used.
            MigrationError: a variable sets the version.
        """
        self.home = home
        if VARIABLE in os.environ:
            raise MigrationError(f"the variable {VARIABLE} says which version runs; take it away first")
        self.config: Config = load(home)
        self.settings = home / CONFIG_FILE
        self.logs = self.config.log_dir / "responses"
        self.backups = home / "var" / "backups"
        self.old_service = _old_service(home)
        self.disabled = _disabled(self.old_service)
        self.control = home / control.NAME
        self.old_control = _disabled(self.control)
        """The old project's own control script, after ours has replaced it."""

    @property
    def old_project(self) -> bool:
        """True if this is a tree of the old project."""
        return self.old_service.is_file() or self.disabled.is_file()

    @property
    def database(self) -> Path | None:
        """The SQLite database of the configuration; None for another store."""
        kind, _, rest = self.config.store.url.partition("://")
        return self.config.path(rest[1:]) if kind == "sqlite" and rest.startswith("/") else None

    def store(self, path: Path) -> SqliteStore:
        """A store on a database, with the configuration's rules."""
        return SqliteStore(path, store_rules(self.config), Chance(), durability="full")

    def files(self) -> list[Path]:
        """V1's files, as they stand now."""
        logs = sorted(path for path in self.logs.rglob("*") if path.is_file()) if self.logs.is_dir() else []
        others = (self.settings, self.old_service, *((self.control,) if self.old_project else ()))
        return [path for path in others if path.is_file()] + logs

    def relative(self, path: Path) -> str:
        """A path for messages."""
        return str(path.relative_to(self.home)) if path.is_relative_to(self.home) else str(path)

    @contextmanager
    def alone(self, *, look_only: bool = False) -> Iterator[None]:
        """No daemon runs here, and none can start meanwhile. `look_only` leaves no folder behind.

        Raises:
            MigrationError: one runs.
        """
        if answers(self.config.socket_path):
            raise MigrationError(
                f"a daemon listens on {self.config.socket_path}; stop it first: ./daemon_control.sh stop"
            )
        folder = self.config.run_dir
        if look_only and not folder.is_dir():
            yield
            return
        make_folder(folder)
        pid_file = PidFile(self.config.pid_path)
        try:
            pid_file.take()
        except StoreInUse as error:
            raise MigrationError(f"{error.message}; stop it first: ./daemon_control.sh stop") from None
        try:
            yield
        finally:
            pid_file.release()


def _disabled(path: Path) -> Path:
    return path.with_name(path.name + DISABLED)


def _old_service(home: Path) -> Path:
    """The path of the old project's completion service, enabled or not; if there is none, the path it would have."""
    places = [home / place for place in OLD_SERVICES]
    return next((path for path in places if path.is_file() or _disabled(path).is_file()), places[0])
