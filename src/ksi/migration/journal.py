"""The journal of a migration's steps, written before each step, so that it is complete after a kill at any moment."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from ksi.errors import MigrationError
from ksi.host.private_files import make_folder
from ksi.migration.backup import write

Stage = Literal["migrating", "migrated", "rolling_back", "rolled_back"]


class Journal(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One migration. Paths are from the home; times in Unix time."""

    stage: Stage
    began_at: float
    backup: str
    """V1's files."""
    steps: tuple[str, ...] = ()
    """Begun, in order."""
    had_store: bool = False
    """True if there was a database before."""
    mark: int = 0
    """The last imported attempt: later ones were made by version 2 itself."""
    kept: str | None = None
    """Version 2's files, as a rollback found them."""
    before: Journal | None = None
    """The original files here, which are restored when the migration is undone."""


class JournalFile:
    """Its path: `var/backups/migration.json`."""

    def __init__(self, home: Path) -> None:
        self.path = home / "var" / "backups" / "migration.json"

    def read(self) -> Journal | None:
        """The last migration of this home.

        Raises:
            MigrationError: the file is damaged.
        """
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=Journal)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as error:
            raise MigrationError(f"{self.path} is damaged ({error}); the backups next to it are complete") from None

    def write(self, journal: Journal) -> None:
        """Remember, on disk when this returns."""
        make_folder(self.path.parent)
        write(self.path, msgspec.json.format(msgspec.json.encode(journal), indent=2) + b"\n")

    def remove(self) -> None:
        """Forget: nothing of the migration is left."""
        self.path.unlink(missing_ok=True)
