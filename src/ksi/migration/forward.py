"""From version 1 to version 2, in steps that are undone when a later one fails, and that a kill leaves repeatable."""

from __future__ import annotations

import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ksi.clock import Clock
from ksi.errors import KsiError, MigrationError
from ksi.host.platforms import sync_folder
from ksi.migration import backup, control, database
from ksi.migration.checks import check_parts, self_test
from ksi.migration.house import House, Say
from ksi.migration.journal import Journal, JournalFile
from ksi.migration.records import Counts
from ksi.migration.settings_file import Key, settings_in, with_settings
from ksi.migration.v1_data import V1Data, look

DAMAGED = "damaged.jsonl"
"""The damaged lines of the logs, in the backup."""
NAMED = 20
"""Damaged lines that are named one by one."""

OLD_DEFAULT = "claude-cli/sonnet"
"""The old project's model for requests that named none."""

Agree = Callable[[], bool]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The steps to be done."""

    settings: Mapping[Key, str | int]
    """Keys of ksi.toml that are to be set."""
    disable: bool
    control: bool
    """True if our control script is to replace the old project's."""
    counts: Counts
    data: V1Data

    @property
    def bring(self) -> bool:
        """True if V1's logs have something new."""
        return self.counts.turns + self.counts.failed > 0

    @property
    def empty(self) -> bool:
        """True if there is nothing to do."""
        return not (self.settings or self.disable or self.control or self.bring)


class Forward:
    """One migration of a home. `say` hears of each step when it is done."""

    def __init__(self, home: Path, clock: Clock, ksi: str, say: Say) -> None:
        """`ksi` is this version of KSI.

        Raises:
            ConfigError, MigrationError: the home cannot be used.
        """
        self._house = House(home)
        self._clock = clock
        self._ksi = ksi
        self._say = say
        self._file = JournalFile(home)

    def run(self, *, dry_run: bool, agree: Agree) -> bool:
        """Migrate; returns False if the user did not agree.

        Raises:
            MigrationError: it cannot be made. The completed steps are undone.
        """
        with self._house.alone(look_only=dry_run):
            with _told("nothing was changed"):
                plan = self._looked(dry_run=dry_run)
            if plan is None:
                return True
            if dry_run or not agree():
                self._say("nothing was changed")
                return dry_run
            self._migrate(plan)
        return True

    def _looked(self, *, dry_run: bool) -> Plan | None:
        """The printed plan; None if there is nothing to do. A migration that was cut off is undone first."""
        journal = self._file.read()
        stage = journal.stage if journal is not None else None
        if stage == "rolling_back":
            raise MigrationError("a rollback was cut off; finish it first: ksi migrate --rollback")
        if journal is not None and stage == "migrating":
            if dry_run:
                raise MigrationError("a migration was cut off; run it again, or undo it: ksi migrate --rollback")
            self._say("a migration was interrupted: its steps are undone first")
            self.undo(journal)
            self._house = House(self._house.home)
        if stage == "migrated" and self._house.database is not None and not dry_run:
            database.remove(_before(self._house.database))
        if stage == "migrated" and self._house.config.service.version == 2 and not self._house.old_service.exists():
            self._say("nothing to do: this home is migrated, and its version is 2")
            return None
        check_parts()
        self_test()
        self._say("checked: all parts of version 2 are there, and a test daemon works")
        plan = self._plan()
        if plan.empty:
            self._say("nothing to do: the version is 2, and the logs have nothing that the database has not")
            return None
        self._announce(plan)
        return plan

    # -- look -----------------------------------------------------------------------------------------------------

    def _plan(self) -> Plan:
        """The plan, made from a copy of the database: looking changes nothing."""
        house = self._house
        data = self._data()
        with tempfile.TemporaryDirectory(prefix="ksi-migrate-") as folder:
            checkpoint = None
            if house.database is not None and house.database.is_file():
                copy = Path(folder, "ksi.db")
                for end in ("", "-wal"):
                    source = house.database.with_name(house.database.name + end)
                    if source.is_file():
                        shutil.copyfile(source, copy.with_name(copy.name + end))
                checkpoint = Path(folder, database.CHECKPOINT)
                database.save(house, copy, checkpoint, self._clock, self._ksi)
            counts = database.merge(house, data, checkpoint, self._clock.now()).counts
        if counts.turns + counts.failed and house.database is None:
            raise MigrationError(
                f"V1's data is brought into an SQLite database, and store.url is {house.config.store.url}; migrate "
                "with SQLite first, then take `ksi checkpoint save` and `restore` to the other store"
            )
        if house.old_service.is_file() and house.disabled.exists():
            raise MigrationError(f"{house.disabled} is in the way; move it away first")
        return Plan(
            settings=self._settings(),
            disable=house.old_service.is_file(),
            control=house.old_project and not control.is_ours(house.control),
            counts=counts,
            data=data,
        )

    def _settings(self) -> dict[Key, str | int]:
        """The settings that ksi.toml needs to serve version 1's models to its clients."""
        house = self._house
        first = house.config.service.version == 1
        if not first and not house.old_service.is_file():
            return {}
        has = settings_in(house.settings.read_text("utf-8") if house.settings.exists() else "")
        wanted: dict[Key, str | int] = {("service", "version"): 2} if first or "service" not in has else {}
        if "replies" not in has.get("socket", {}):
            wanted["socket", "replies"] = "v1"
        if house.old_project and "providers" not in has and "default_model" not in has.get("service", {}):
            wanted["service", "default_model"] = OLD_DEFAULT
        return wanted

    def _data(self) -> V1Data:
        house = self._house
        # Turns of version 2 itself that it has forgotten since are not restored.
        return look(house.home, house.logs, also_from_v2=house.config.service.version == 1)

    def _announce(self, plan: Plan) -> None:
        counts, data = plan.counts, plan.data
        if plan.bring or data.damaged:
            logs = self._house.relative(self._house.logs)
            self._say(
                f"found: {counts.turns} turns of {counts.conversations} conversations in {logs}"
                + (f", {counts.failed} answers that are errors" if counts.failed else "")
                + (f", {counts.known} that are known already" if counts.known else "")
            )
        if data.damaged:
            self._say(f"damaged: {len(data.damaged)} lines, which are kept aside")
            for line in data.damaged[:NAMED]:
                self._say(f"  {line.file} line {line.line}: {line.reason}")
            if len(data.damaged) > NAMED:
                self._say(f"  and {len(data.damaged) - NAMED} more, all in the backup's {DAMAGED}")
        if plan.disable:
            self._say(f"the old service file {self._house.relative(self._house.old_service)} is to be disabled")
        if plan.control:
            self._say(f"{control.NAME} is to start KSI; the old one is kept as {self._house.old_control.name}")
        for (section, key), value in plan.settings.items():
            self._say(f"{section}.{key} is to be set to {value}")

    # -- do -------------------------------------------------------------------------------------------------------

    def _migrate(self, plan: Plan) -> None:
        house, now = self._house, self._clock.now()
        base = house.database
        if plan.bring and base is not None and base.is_file():
            database.settle_log(house, base, self._clock)
            plan = msgspec.structs.replace(plan, data=self._data())
        folder = free_name(house.backups, "v1", now.unix)
        self._journal = Journal(
            stage="migrating",
            began_at=now.unix,
            backup=str(folder.relative_to(house.home)),
            had_store=base is not None and base.is_file(),
            before=_without_past(self._file.read()),
        )
        with _told("everything is as it was"):
            try:
                self._steps(plan, folder)
                self._file.write(msgspec.structs.replace(self._journal, stage="migrated"))
            except BaseException:
                self.undo(self._journal)
                raise
        if base is not None:
            database.remove(_before(base))
        again = f"ksi --home {shlex.quote(str(house.home))} migrate --rollback"
        self._say(f"done: start the daemon with {control.start_command(house.home)}; back again: {again}")

    def _steps(self, plan: Plan, folder: Path) -> None:
        house, now = self._house, self._clock.now()
        self._begin("backup")
        manifest = backup.make(house.home, house.files(), folder, now.unix, self._ksi)
        if plan.data.damaged:
            lines = b"".join(msgspec.json.encode(line) + b"\n" for line in plan.data.damaged)
            backup.write(folder / DAMAGED, lines)
        self._say(f"backed up: {len(manifest.items)} files, {manifest.bytes:,} bytes, in {house.relative(folder)}")
        if plan.bring:
            self._begin("data")
            self._bring(plan, folder)
        if plan.disable:
            self._begin("service")
            house.old_service.rename(house.disabled)
            sync_folder(house.disabled.parent)
            self._say(f"disabled: {house.relative(house.old_service)}, now {house.disabled.name}")
        if plan.control:
            self._begin("control")
            if house.control.exists():
                house.control.rename(house.old_control)
            backup.write(house.control, control.script().encode(), mode=0o755)
            self._say(f"put: {control.NAME}, which starts KSI in this home")
        if plan.settings:
            self._begin("version")
            text = house.settings.read_text("utf-8") if house.settings.exists() else ""
            changed = with_settings(text, plan.settings)
            backup.write(house.settings, changed.encode(), mode=settings_mode(house.settings))
            for (section, key), value in plan.settings.items():
                self._say(f"set: {section}.{key} = {value} in {house.relative(house.settings)}")
        self._begin("verify")
        self._verify(manifest, plan)
        self._say("verified: the database opens, the backup is whole, and V1's logs are untouched")

    def _begin(self, step: str) -> None:
        """On disk before anything of it is done."""
        self._journal = msgspec.structs.replace(self._journal, steps=(*self._journal.steps, step))
        self._file.write(self._journal)

    def _bring(self, plan: Plan, folder: Path) -> None:
        house, base = self._house, self._house.database
        assert base is not None
        checkpoint, accounted = None, 0
        if self._journal.had_store:
            checkpoint = folder / database.CHECKPOINT
            accounted = database.save(house, base, checkpoint, self._clock, self._ksi)
        merged = database.merge(house, plan.data, checkpoint, self._clock.now())
        new = database.beside(base)
        database.make(house, merged, new, self._clock, accounted)
        self._journal = msgspec.structs.replace(self._journal, mark=merged.mark)
        self._file.write(self._journal)
        if base.exists():
            database.remove_side_files(base)
            database.put(base, _before(base))
        database.put(new, base)
        counts = merged.counts
        self._say(
            f"imported: {counts.turns} turns of {counts.conversations} conversations, with their usage"
            + (f"; {counts.failed} answers that are errors, as usage" if counts.failed else "")
            + (f"; {counts.without_prompt} have no prompt, because V1 stored none" if counts.without_prompt else "")
        )

    def _verify(self, manifest: backup.Manifest, plan: Plan) -> None:
        house = self._house
        version = House(house.home).config.service.version
        if version != 2:
            raise MigrationError(f"service.version is still {version}")
        if house.database is not None and house.database.exists():
            database.look_into(house, house.database, self._clock)
        touched = {house.relative(house.settings)} if plan.settings else set()
        touched |= {house.relative(house.control)} if plan.control else set()
        touched |= {house.relative(house.old_service)} if plan.disable else set()
        for item in manifest.items:
            path = house.home / item.path
            if item.path not in touched and (not path.is_file() or backup.digest(path) != item.sha256):
                raise MigrationError(f"{item.path} was changed by another program meanwhile")
        backup.read(house.home / self._journal.backup)

    # -- undo -----------------------------------------------------------------------------------------------------

    def undo(self, journal: Journal) -> None:
        """Undo the steps of a migration; repeating this is harmless.

        Raises:
            MigrationError: something of it cannot be; the backup is left, and undoing can be tried again.
        """
        house, folder = self._house, self._house.home / journal.backup
        undo: dict[str, Callable[[], None]] = {
            "version": lambda: self._restore_settings(folder),
            "service": self._restore_service,
            "control": self.restore_control,
            "data": lambda: _restore_database(house.database, had_store=journal.had_store),
        }
        try:
            for step in reversed(journal.steps):
                if step in undo:
                    undo[step]()
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(folder.with_name(f".{folder.name}.part"), ignore_errors=True)
            if journal.before is not None:
                self._file.write(journal.before)
            else:
                self._file.remove()
        except OSError as error:
            raise MigrationError(
                f"the steps cannot be undone ({error}); the backup is {folder}; remove the cause, then: "
                "ksi migrate --rollback"
            ) from None

    def _restore_settings(self, folder: Path) -> None:
        house = self._house
        manifest = backup.read(folder)
        item = next((item for item in manifest.items if item.path == house.relative(house.settings)), None)
        if item is not None:
            backup.restore(folder, item, house.home)
        else:
            house.settings.unlink(missing_ok=True)

    def restore_control(self) -> None:
        """Put the old project's control script back to its place."""
        house = self._house
        if house.old_control.exists():
            house.old_control.replace(house.control)
        elif control.is_ours(house.control):
            house.control.unlink()

    def _restore_service(self) -> None:
        house = self._house
        if house.disabled.exists() and not house.old_service.exists():
            house.disabled.rename(house.old_service)


def free_name(parent: Path, kind: str, at: float) -> Path:
    """A folder's name that tells the moment, in UTC, and is not taken."""
    name = time.strftime(f"{kind}-%Y%m%dT%H%M%SZ", time.gmtime(at))
    number = 1
    while (parent / name).exists():
        number += 1
        name = f"{name.partition('Z')[0]}Z-{number}"
    return parent / name


def _without_past(journal: Journal | None) -> Journal | None:
    """A journal that does not hold all that were before it."""
    return None if journal is None else msgspec.structs.replace(journal, before=None)


def _before(base: Path) -> Path:
    return base.with_name(base.name + ".before")


def _restore_database(base: Path | None, *, had_store: bool) -> None:
    if base is None:
        return
    database.remove(database.beside(base))
    if _before(base).exists():
        database.remove(base)
        database.put(_before(base), base)
    elif not had_store:
        database.remove(base)


def settings_mode(path: Path) -> int:
    """The permissions of a configuration, also for a new one."""
    return path.stat().st_mode & 0o777 if path.exists() else 0o644


@contextmanager
def _told(state: str) -> Iterator[None]:
    """Whatever goes wrong becomes one sentence that says how things stand."""
    try:
        yield
    except MigrationError as error:
        raise MigrationError(f"{error.message}; {state}") from None
    except (KsiError, OSError, ValueError) as error:
        raise MigrationError(f"{getattr(error, 'message', error)}; {state}") from error
