"""Back to version 1: its original files, byte for byte, with the later turns of version 2 appended."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ksi.clock import Clock
from ksi.completion.upkeep.response_log import log_name
from ksi.direct.session_log import DamagedLine, read_line, write_line
from ksi.errors import KsiError, MigrationError
from ksi.host.private_files import make_folder
from ksi.migration import backup, control, database
from ksi.migration.forward import Forward, free_name, settings_mode
from ksi.migration.house import House, Say
from ksi.migration.journal import Journal, JournalFile
from ksi.migration.settings_file import with_settings
from ksi.request import RequestBody, decode_body
from ksi.store.base import Store

_PAGE = 1_000


class _Meanwhile(msgspec.Struct):
    """Turns that version 2 made."""

    lines: dict[str, list[tuple[float, bytes]]]
    """By the log file's name: end and line."""
    request_ids: set[str]
    turns: int
    waiting: int
    """Requests that have not ended."""


class Backward:
    """One rollback of a home. `say` hears of each step when it is done."""

    def __init__(self, home: Path, clock: Clock, ksi: str, say: Say) -> None:
        """`ksi` is this version of KSI.

        Raises:
            ConfigError: the home cannot be used.
        """
        self._house = House(home)
        self._clock = clock
        self._ksi = ksi
        self._say = say
        self._file = JournalFile(home)

    def run(self, *, dry_run: bool) -> None:
        """Roll the last migration back. One that was cut off is undone, a rollback that was cut off is finished.

        Raises:
            MigrationError: there is none, or the backup is not whole. Nothing was changed.
        """
        with self._house.alone(look_only=dry_run):
            journal = self._file.read()
            if journal is None or journal.stage == "rolled_back":
                raise MigrationError("nothing to roll back: no migration of this home is known")
            if journal.stage == "migrating":
                self._say("the migration was interrupted: its steps are undone")
                if not dry_run:
                    Forward(self._house.home, self._clock, self._ksi, self._say).undo(journal)
                    self._say("done: everything is as it was before the migration")
                return
            folder = self._house.home / journal.backup
            manifest = backup.read(folder)
            self._say(f"checked: the backup {self._house.relative(folder)} is whole, {len(manifest.items)} files")
            if dry_run:
                self._say("V1's files are to be restored, the turns made since appended, service.version set to 1")
                self._say("nothing was changed")
                return
            self._roll_back(journal, folder, manifest)

    def _roll_back(self, journal: Journal, folder: Path, manifest: backup.Manifest) -> None:
        """Each step can be repeated: its inputs are in the two backups and the database, which it does not change."""
        house, now = self._house, self._clock.now()
        if house.database is not None and house.database.is_file():
            database.settle_log(house, house.database, self._clock)
        if journal.kept is None or not (house.home / journal.kept / backup.MANIFEST).exists():
            kept = free_name(house.backups, "v2", now.unix)
            journal = msgspec.structs.replace(journal, stage="rolling_back", kept=str(kept.relative_to(house.home)))
            self._file.write(journal)
            found = backup.make(house.home, house.files(), kept, now.unix, self._ksi)
            self._say(f"backed up: {len(found.items)} files of version 2, in {house.relative(kept)}")
        assert journal.kept is not None
        kept = house.home / journal.kept
        try:
            self._restore(journal, folder, manifest, kept)
        except BaseException as error:
            self._undo(kept)
            self._file.write(msgspec.structs.replace(journal, stage="migrated", kept=None))
            if isinstance(error, KsiError | OSError | ValueError):
                what = getattr(error, "message", error)
                raise MigrationError(f"{what}; version 2's files are unchanged") from error
            raise
        self._file.write(msgspec.structs.replace(journal, stage="rolled_back"))
        home = house.home
        start = f"{home}/{control.NAME} start" if house.old_project else control.start_command(home)
        self._say(f"done: start the daemon with {start}; forward again: ksi --home {home} migrate")

    def _restore(self, journal: Journal, folder: Path, manifest: backup.Manifest, kept: Path) -> None:
        house = self._house
        meanwhile = self._meanwhile(journal)
        self._restore_logs(folder, manifest, kept, meanwhile)
        for item in manifest.items:
            if item.path == house.relative(house.old_service):
                backup.restore(folder, item, house.home)
                house.disabled.unlink(missing_ok=True)
                self._say(f"restored: {item.path}")
        if house.old_project:
            Forward(house.home, self._clock, self._ksi, self._say).restore_control()
        settings = next((item for item in manifest.items if item.path == house.relative(house.settings)), None)
        text = (folder / settings.path).read_text("utf-8") if settings is not None else ""
        if settings is not None:
            backup.restore(folder, settings, house.home)
        if House(house.home).config.service.version != 1:
            changed = with_settings(text, {("service", "version"): 1})
            backup.write(house.settings, changed.encode(), mode=settings_mode(house.settings))
        self._say(f"set: service.version = 1 in {house.relative(house.settings)}")
        if meanwhile.waiting:
            self._say(
                f"note: {meanwhile.waiting} requests of version 2 have not ended; they stay in its database and go on "
                "there after the next `ksi migrate`"
            )

    # -- the logs -------------------------------------------------------------------------------------------------

    def _restore_logs(self, folder: Path, manifest: backup.Manifest, kept: Path, meanwhile: _Meanwhile) -> None:
        """V1's original logs; each is followed by the turns that version 2 added. Files that V1 did not have get that
        alone."""
        house = self._house
        prefix = house.relative(house.logs) + "/"
        old = {item.path: item for item in manifest.items if item.path.startswith(prefix)}
        added = {prefix + name: list(lines) for name, lines in meanwhile.lines.items()}
        for path, lines in self._others(folder, set(old), kept, prefix, meanwhile.request_ids):
            added.setdefault(path, []).extend(lines)
        for path, item in old.items():
            data = (folder / item.path).read_bytes()
            if path not in added:
                backup.restore(folder, item, house.home)
            else:
                self._write_log(path, data, added[path])
        for path in added.keys() - old.keys():
            self._write_log(path, b"", added[path])
        self._say(
            f"restored: {len(old)} log files, byte for byte; appended: {meanwhile.turns} turns made under version 2"
        )

    def _write_log(self, path: str, before: bytes, lines: list[tuple[float, bytes]]) -> None:
        gap = b"\n" if before and not before.endswith(b"\n") else b""
        place = self._house.home / path
        make_folder(place.parent)
        backup.write(place, before + gap + b"".join(line for _, line in sorted(lines, key=lambda one: one[0])))

    def _others(
        self, folder: Path, old: set[str], kept: Path, prefix: str, known: set[str]
    ) -> Iterator[tuple[str, list[tuple[float, bytes]]]]:
        """Lines that version 2 wrote and its database has forgotten since."""
        for item in backup.read(kept).items:
            if not item.path.startswith(prefix) or not item.path.endswith(".jsonl"):
                continue
            before = set((folder / item.path).read_bytes().split(b"\n")) if item.path in old else set()
            lines = []
            for line in (kept / item.path).read_bytes().split(b"\n"):
                if not line.strip() or line in before:
                    continue
                try:
                    turn = read_line(line)
                except DamagedLine:
                    lines.append((0.0, line + b"\n"))
                    continue
                if turn.request_id not in known:
                    lines.append((turn.finished_at / 1e6, line + b"\n"))
            if lines:
                yield item.path, lines

    def _meanwhile(self, journal: Journal) -> _Meanwhile:
        """The database's turns after the migration's mark."""
        base = self._house.database
        found = _Meanwhile(defaultdict(list), set(), 0, 0)
        if base is not None and base.is_file():
            asyncio.run(self._read(base, journal.mark, found))
        return found

    async def _read(self, base: Path, mark: int, found: _Meanwhile) -> None:
        store = self._house.store(base)
        await store.open(self._clock.now(), lambda: None)
        try:
            totals = await store.totals()
            found.waiting = totals.queued + totals.scheduled + totals.retrying + totals.parked
            while turns := await store.log_after(mark, _PAGE, 1 << 26):
                for turn in turns:
                    line = write_line(turn, await _body(store, turn.id))
                    at = turn.attempt.finished_at / 1e6
                    found.lines[log_name(turn.conversation)].append((at, line))
                    found.request_ids.add(turn.request_id)
                    found.turns += 1
                mark = turns[-1].id
        finally:
            await store.close()

    # -- undo -----------------------------------------------------------------------------------------------------

    def _undo(self, kept: Path) -> None:
        """Version 2's files as they were."""
        house = self._house
        items = {item.path: item for item in backup.read(kept).items}
        for path in house.files():
            if house.relative(path) not in items:
                path.unlink()
        for item in items.values():
            backup.restore(kept, item, house.home)
        if house.relative(house.old_service) not in items:
            self._disable_again(kept)

    def _disable_again(self, kept: Path) -> None:
        """The old service file was disabled, and our control script replaced the old one: the originals are next to
        them."""
        house = self._house
        journal = self._file.read()
        if journal is None:
            return
        for place, disabled in ((house.old_service, house.disabled), (house.control, house.old_control)):
            source = house.home / journal.backup / house.relative(place)
            if source.is_file() and not disabled.exists():
                backup.write(disabled, source.read_bytes(), mode=source.stat().st_mode & 0o777)


async def _body(store: Store, turn: int) -> RequestBody:
    """The prompt of a turn."""
    (found, *_) = await store.history(turn, 0)
    return decode_body(found.body)
