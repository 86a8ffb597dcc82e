"""A backup: files copied next to a manifest with their sizes and SHA-256, either complete or absent."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import msgspec

from ksi.errors import MigrationError
from ksi.host.platforms import sync, sync_folder
from ksi.host.private_files import make_folder

MANIFEST = "manifest.json"
FORMAT = "ksi-backup"
_PIECE = 1 << 20


class Item(msgspec.Struct, frozen=True):
    """One file; `path` from the home."""

    path: str
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of a backup."""

    format: str
    created_at: float
    """Unix time."""
    ksi: str
    items: tuple[Item, ...]

    @property
    def bytes(self) -> int:
        """The total size of the files."""
        return sum(item.bytes for item in self.items)


def make(home: Path, files: Iterable[Path], folder: Path, created_at: float, ksi: str) -> Manifest:
    """Copy files of a home into a new folder; it has its name when all is on disk.

    Raises:
        OSError: a file cannot be read, or the folder not be written. Nothing is left of it.
    """
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    make_folder(beside.parent)
    beside.mkdir(mode=0o700)
    try:
        items = tuple(_copy(home, path, beside) for path in files)
        manifest = Manifest(format=FORMAT, created_at=created_at, ksi=ksi, items=items)
        write(beside / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
        beside.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return manifest


def read(folder: Path) -> Manifest:
    """A backup's manifest, once every file is as it says.

    Raises:
        MigrationError: the backup is not there, or damaged; the message names the file.
    """
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError) as error:
        raise MigrationError(f"the backup {folder} cannot be used: {error}") from None
    for item in manifest.items:
        path = folder / item.path
        try:
            found = (path.stat().st_size, digest(path))
        except OSError as error:
            raise MigrationError(f"the backup {folder} lacks {item.path}: {error.strerror}") from None
        if found != (item.bytes, item.sha256):
            raise MigrationError(f"the backup {folder} is damaged: {item.path} is not as its manifest says")
    return manifest


def restore(folder: Path, item: Item, home: Path) -> None:
    """Put one file back, byte for byte."""
    place = home / item.path
    make_folder(place.parent)
    source = folder / item.path
    write(place, source.read_bytes(), mode=source.stat().st_mode & 0o777)


def write(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write a file so that it is there whole or as it was, and on disk when this returns."""
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            sync(descriptor)
        finally:
            os.close(descriptor)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def digest(path: Path) -> str:
    """A file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy(home: Path, path: Path, folder: Path) -> Item:
    relative = path.relative_to(home)
    copy = folder / relative
    make_folder(copy.parent)
    hasher, size = hashlib.sha256(), 0
    with path.open("rb") as source, copy.open("xb") as target:
        while piece := source.read(_PIECE):
            hasher.update(piece)
            size += len(piece)
            target.write(piece)
        target.flush()
        sync(target.fileno())
    shutil.copystat(path, copy)
    return Item(str(relative), size, hasher.hexdigest())
