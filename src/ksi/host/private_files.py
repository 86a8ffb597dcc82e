"""Files and folders for this user only, whatever the umask; checks that a path still leads to an open file; free
space."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def make_folder(folder: Path) -> None:
    """Make a folder and all that is missing above it, each for this user only.

    Raises:
        OSError: it cannot be made, or something else lies there.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if not folder.is_dir():
            raise


def close_to_others(folder: Path, home: Path) -> None:
    """Remove other users' rights on a folder and on those between it and the home, if they are ours."""
    for part in (folder, *folder.parents):
        if not part.is_relative_to(home) or part == home:
            return
        with suppress(FileNotFoundError):
            status = part.stat()
            if status.st_uid == os.geteuid() and status.st_mode & 0o077:
                part.chmod(status.st_mode & 0o700)


_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC


def open_to_append(path: Path | str) -> int:
    """Open a file at its end, made for this user only. One that others could read until now is closed to them.

    Raises:
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, _APPEND, 0o600)
    status = os.fstat(descriptor)
    if status.st_uid == os.geteuid() and status.st_mode & 0o077:
        os.fchmod(descriptor, 0o600)
    return descriptor


def write_whole(path: Path, data: bytes) -> None:
    """Write a file for this user only, so that it is there whole or as it was before.

    Raises:
        OSError: it cannot be written.
    """
    beside = path.with_name(path.name + ".new")
    beside.unlink(missing_ok=True)
    append(beside, data)
    beside.replace(path)


def append(path: Path | str, data: bytes, *, private: bool = False) -> None:
    """Add to a file's end; see `open_to_append`. With `private`, no others can read it if it is there already.

    Raises:
        OSError: it cannot be written, or not all of it.
    """
    descriptor = os.open(path, _APPEND, 0o600) if private else open_to_append(path)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
    finally:
        os.close(descriptor)


def is_still(path: Path, descriptor: int) -> bool:
    """True if a path leads to this open file. Its inode cannot be given to another file while it is open."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def free_bytes(folder: Path) -> int | None:
    """Bytes that a user may still write on a folder's disk; None if that is unknown."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize
