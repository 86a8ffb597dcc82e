"""The file format of a checkpoint: a header line that describes the contents, then a store's records, zipped.

    {"format":"ksi-checkpoint","version":2,...,"sha256":"..."}   padded with spaces to HEADER_SIZE bytes
    gzip of JSON lines, one record each; see `ksi.store.snapshot.records`

The header's SHA-256 is of all that follows it. Everything here blocks: call it in a thread.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import re
import secrets
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ksi.errors import LONGEST_QUOTE, CheckpointInvalid, InvalidData, NotFound, StoreError, StoreFull, StoreUnavailable
from ksi.host.platforms import sync, sync_folder
from ksi.store.snapshot.records import Record, SavedRequest

FORMAT = "ksi-checkpoint"
VERSION = 5
"""1 had no chains, 2 did not say on which machine a provider session lives, 3 had nothing of providers and
pauses, no passages, and answers of text alone, 4 had no questions. All are read as well."""
HEADER_SIZE = 1024
LONGEST_RECORD = 1 << 30
"""Bytes of one record: a request with all that its attempts brought."""

_LEVEL = 1
"""The compression level: higher ones cost twice the time for a tenth of the size."""
_PIECE = 1 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}")
"""The name of a checkpoint that is being written."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The description of a checkpoint."""

    format: str
    version: int
    created_at: float
    """Unix time of the moment that was saved."""
    ksi: str
    """The version of KSI that wrote it."""
    records: dict[str, int]
    """How many there are of each kind."""
    interrupted: int
    """Requests that ran at that moment."""
    bytes: int
    """That follow the header."""
    sha256: str


class CheckpointWriter:
    """Writes a checkpoint under a temporary name; `finish` puts it in its place, `discard` leaves nothing."""

    def __init__(self, path: Path) -> None:
        """Begin.

        Raises:
            InvalidData: `path` is taken, or no file can be made there.
            StoreFull: no room.
        """
        self._path = path
        self._beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        self._counts: Counter[str] = Counter()
        self._interrupted = 0
        self._hash = hashlib.sha256()
        self._size = 0
        self._zip = zlib.compressobj(_LEVEL, wbits=31)
        try:
            if path.exists():
                raise _taken(path)
            self._file = os.open(self._beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._write(b" " * HEADER_SIZE)
        except OSError as error:
            raise _unwritable(path, error) from None

    def add(self, records: Sequence[Record]) -> None:
        """Write records.

        Raises:
            StoreFull: no room.
            StoreUnavailable: it cannot be written.
        """
        for record in records:
            self._counts[str(type(record).__struct_config__.tag)] += 1
            self._interrupted += isinstance(record, SavedRequest) and record.interrupted
        lines = b"".join(msgspec.json.encode(record) + b"\n" for record in records)
        self._follow(self._zip.compress(lines))

    def finish(self, created_at: float, ksi: str) -> Header:
        """The header, once the file is in its place and on disk. Raises as `add`, and InvalidData as the beginning."""
        self._follow(self._zip.flush())
        header = Header(
            format=FORMAT,
            version=VERSION,
            created_at=created_at,
            ksi=ksi,
            records=dict(self._counts),
            interrupted=self._interrupted,
            bytes=self._size,
            sha256=self._hash.hexdigest(),
        )
        try:
            os.pwrite(self._file, msgspec.json.encode(header).ljust(HEADER_SIZE - 1) + b"\n", 0)
            sync(self._file)
            _publish(self._beside, self._path)
        except FileExistsError:
            raise _taken(self._path) from None
        except OSError as error:
            raise _unwritable(self._path, error) from None
        finally:
            self.discard()
        return header

    def discard(self) -> None:
        """Close the file, and remove it if it was not put in its place."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._beside.unlink(missing_ok=True)

    def _follow(self, data: bytes) -> None:
        self._hash.update(data)
        self._size += len(data)
        try:
            self._write(data)
        except OSError as error:
            raise _unwritable(self._path, error) from None

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]


def sweep_unfinished(folder: Path) -> list[Path]:
    """Remove unfinished checkpoints of killed daemons from a folder, and return their paths.

    Raises:
        OSError: it cannot be taken away.
    """
    left = [path for path in folder.glob(".*") if _UNFINISHED.fullmatch(path.name) and path.is_file()]
    for path in left:
        path.unlink(missing_ok=True)
    return left


class CheckpointReader:
    """Reads a checkpoint. Nothing of it is believed before `check`."""

    def __init__(self, path: Path) -> None:
        """Open it and read its header.

        Raises:
            NotFound: no such file.
            CheckpointInvalid: it cannot be read, is no checkpoint, or of a newer version.
        """
        self._path = path
        try:
            self._file = path.open("rb")
        except FileNotFoundError:
            raise NotFound(f"no file {_named(path)}", path=str(path)) from None
        except OSError as error:
            raise self._invalid("unreadable", f"cannot be read: {error.strerror}") from None
        try:
            self.header = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Let it go."""
        self._file.close()

    def _read_header(self) -> Header:
        line = self._read(HEADER_SIZE)
        try:
            known = msgspec.json.decode(line, type=_Known)
        except (msgspec.DecodeError, UnicodeDecodeError):
            what = "was not finished" if line.strip() == b"" and line else "is no checkpoint of KSI"
            raise self._invalid("foreign", what) from None
        if known.format != FORMAT:
            raise self._invalid("foreign", "is no checkpoint of KSI")
        if known.version > VERSION:
            raise self._invalid(
                "newer", f"was written by a newer KSI (format {known.version}, known {VERSION}); upgrade KSI"
            )
        try:
            return msgspec.json.decode(line, type=Header)
        except msgspec.DecodeError as error:
            raise self._damaged(f"its header: {error}") from None

    def check(self) -> None:
        """Compare the data after the header with the header.

        Raises:
            CheckpointInvalid: it is damaged.
        """
        digest, size = hashlib.sha256(), 0
        self._file.seek(HEADER_SIZE)
        while piece := self._read(_PIECE):
            digest.update(piece)
            size += len(piece)
        if size != self.header.bytes:
            raise self._damaged(f"{size} bytes follow its header, {self.header.bytes} were written")
        if digest.hexdigest() != self.header.sha256:
            raise self._damaged("its checksum is wrong")

    def records(self) -> Iterator[Record]:
        """The records in order.

        Raises:
            CheckpointInvalid: they cannot be read, or are not as many as the header says.
        """
        counts: Counter[str] = Counter()
        self._file.seek(HEADER_SIZE)
        decoder = msgspec.json.Decoder(Record)
        with gzip.GzipFile(fileobj=self._file, mode="rb") as lines:
            while line := self._line(lines):
                try:
                    record = decoder.decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    raise self._damaged(f"record {counts.total() + 1}: {error}") from None
                counts[str(type(record).__struct_config__.tag)] += 1
                yield record
        if dict(counts) != self.header.records:
            raise self._damaged(f"it holds {dict(counts)}, its header says {self.header.records}")

    def _line(self, lines: gzip.GzipFile) -> bytes:
        try:
            line = lines.readline(LONGEST_RECORD)
        except (OSError, EOFError, zlib.error) as error:
            raise self._damaged(str(error)) from None
        if line and not line.endswith(b"\n"):
            raise self._damaged("a record breaks off")
        return line

    def _read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            raise self._invalid("unreadable", f"cannot be read: {error.strerror}") from None

    def _damaged(self, what: str) -> CheckpointInvalid:
        return self._invalid("damaged", f"is damaged: {what}")

    def _invalid(self, reason: str, what: str) -> CheckpointInvalid:
        return CheckpointInvalid(
            f"{_named(self._path)} {what}; nothing was changed", reason=reason, path=str(self._path)
        )


class _Known(msgspec.Struct):
    """The fields of every version's header."""

    format: str
    version: int


def _publish(beside: Path, path: Path) -> None:
    """Give a file its name, unless another has it; on disk when it returns."""
    try:
        os.link(beside, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        beside.rename(path)
    sync_folder(path.parent)


def _taken(path: Path) -> InvalidData:
    return InvalidData(f"path: {_named(path)} is there already; choose another name", path="path")


def _unwritable(path: Path, error: OSError) -> StoreError | InvalidData:
    facts: dict[str, Any] = {"path": str(path)}
    if error.errno in _NO_ROOM:
        return StoreFull(f"no room for {_named(path)}; free some space and try again", **facts)
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG):
        return InvalidData(f"path: {_named(path)} cannot be written: {error.strerror}", path="path")
    return StoreUnavailable(f"{_named(path)} cannot be written: {error.strerror}", **facts)


def _named(path: Path) -> str:
    """A path as a message repeats it: a client may have sent it."""
    name = str(path)
    return name if len(name) <= LONGEST_QUOTE else name[:LONGEST_QUOTE] + "…"
