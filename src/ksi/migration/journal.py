"""What a migration has begun and done, on disk before it is done: a kill at any moment finds it there."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from ksi.errors import MigrationError
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
    """Whether there was a database before."""
    mark: int = 0
    """The last attempt that was brought in: what version 2 made itself is behind it."""
    kept: str | None = None
    """Version 2's files, as a rollback found them."""
    before: Journal | None = None
    """What stood here when it began, and stands here again when it is undone."""


class JournalFile:
    """Where it is kept: `var/backups/migration.json`."""

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
            raise MigrationError(f"{self.path} is damaged ({error}); the backups beside it are whole") from None

    def write(self, journal: Journal) -> None:
        """Remember, on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write(self.path, msgspec.json.format(msgspec.json.encode(journal), indent=2) + b"\n")

    def remove(self) -> None:
        """Forget: nothing of the migration is left."""
        self.path.unlink(missing_ok=True)
