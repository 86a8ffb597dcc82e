"""Linux and macOS differ in the calls that are gathered here: syncing, limits, sockets' paths and peers."""

from __future__ import annotations

import fcntl
import hashlib
import os
import resource
import socket
import stat
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

SOCKET_PATH_LIMIT = 103 if sys.platform == "darwin" else 107
"""Bytes that the kernel takes for a socket's path."""

_FILE_LIMITS = (1_048_576, 524_288, 65_536, 24_576, 10_240, 8_192, 4_096, 2_048, 1_024)
"""Limits to try when the highest allowed one is refused: macOS says "unlimited" and takes 10,240 or somewhat more."""

_XUCRED = struct.Struct("@IIh16I")
"""Version, user, number of groups, groups: macOS's description of a socket's peer."""


def sync(descriptor: int) -> None:
    """Return when a file's content is on the disk and not only in the disk's own cache.

    On macOS `fsync` promises less than that. A file system that knows no full sync there gets the plain one.

    Raises:
        OSError: the disk could not write it.
    """
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(descriptor, full)
        except OSError:
            pass  # the plain one reports a disk's fault as well
        else:
            return
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Return when the names of a folder's files are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def folds_case(folder: Path) -> bool:
    """True if names that differ by case alone mean one file in this folder, as on most disks of macOS."""
    try:
        return folder.with_name(folder.name.swapcase()).samefile(folder)
    except OSError:
        return False


def raise_file_limit(
    get: Callable[[int], tuple[int, int]] = resource.getrlimit,
    put: Callable[[int, tuple[int, int]], None] = resource.setrlimit,
) -> int:
    """Let this process open as many files as the system accepts; returns the limit that holds then."""
    soft, hard = get(resource.RLIMIT_NOFILE)
    for limit in (hard, *_FILE_LIMITS):
        if limit == soft or _higher(soft, limit):
            break
        if limit != hard and _higher(limit, hard):
            continue
        try:
            put(resource.RLIMIT_NOFILE, (limit, hard))
        except (ValueError, OSError):
            continue
        return limit
    return soft


def _higher(limit: int, other: int) -> bool:
    """True if a limit is higher than another; unlimited is the highest, whatever number stands for it."""
    if resource.RLIM_INFINITY in (limit, other):
        return limit == resource.RLIM_INFINITY != other
    return limit > other


def peer_uid(peer: socket.socket) -> int:
    """The user at the other end of a Unix socket.

    Raises:
        OSError: the system does not tell.
    """
    if hasattr(socket, "SO_PEERCRED"):
        _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        return int(uid)
    sol_local, local_peercred = 0, 1
    return uid_of_xucred(peer.getsockopt(sol_local, local_peercred, _XUCRED.size))


def peer_pid(peer: socket.socket) -> int:
    """The process that connected the other end of a Unix socket; 0 if it is none that this one can see.

    Raises:
        OSError: the system does not tell.
    """
    if hasattr(socket, "SO_PEERCRED"):
        pid, _, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        return int(pid)
    sol_local, local_peerpid = 0, 2
    return int.from_bytes(peer.getsockopt(sol_local, local_peerpid, struct.calcsize("i")), sys.byteorder)


def uid_of_xucred(told: bytes) -> int:
    """The user in macOS's description of a peer.

    Raises:
        OSError: it is of another layout.
    """
    if len(told) < 2 * struct.calcsize("I"):
        raise OSError(f"the system returned {len(told)} bytes about the peer")
    version, uid = struct.unpack_from("2I", told)
    if version != 0:
        raise OSError(f"the system described the peer in version {version}")
    return int(uid)


def socket_place(path: Path, folders: Callable[[], Iterator[Path]] | None = None) -> Path | None:
    """The place of a socket whose path may be too long for the kernel.

    It is the path itself if that fits, else a short name in a folder for the files of running programs; None if even
    that is too long.
    """
    if _fits(path):
        return path
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
    places = (folder / f"ksi-{os.geteuid()}" / name for folder in (folders or runtime_folders)())
    return next((place for place in places if _fits(place)), None)


def find_socket(path: Path) -> Path:
    """The place to connect to for a socket's path: a path that is too long is a link to it."""
    if _fits(path):
        return path
    try:
        return path.readlink()
    except OSError:
        return path


def answers(path: Path) -> bool:
    """True if a process listens on the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(find_socket(path)))
        except OSError:
            return False
    return True


def runtime_folders(environ: Mapping[str, str] = os.environ) -> Iterator[Path]:
    """Folders for the files of running programs that may be there, the best one first."""
    given = environ.get("XDG_RUNTIME_DIR")
    if given and os.access(given, os.W_OK):
        yield Path(given)
    yield Path(tempfile.gettempdir())
    yield Path("/tmp")


def private_folder(folder: Path) -> None:
    """Make a folder for this user alone, in one that others may write too.

    Raises:
        OSError: it cannot be made, or is another user's.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise PermissionError(1, "belongs to another user", str(folder))
    folder.chmod(0o700)


def _fits(path: Path) -> bool:
    return len(os.fsencode(path)) <= SOCKET_PATH_LIMIT
