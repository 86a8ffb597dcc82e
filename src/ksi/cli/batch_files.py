"""The files of a batch: prompts by line, answers, and failures; no file stays half-written."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import msgspec

from ksi.errors import InvalidData
from ksi.events.completions import CompletionData
from ksi.protocol import convert, unknown_fields
from ksi.request import BATCH

Json = dict[str, Any]

MISTAKES_SHOWN = 10


class Item(msgspec.Struct, frozen=True):
    """One line of the input. `name` follows from its content and from the number of earlier equal lines."""

    name: str
    line: int
    """The line's number, from 1."""
    offset: int
    length: int


def made_name(*parts: object) -> str:
    """A name made from its parts, as long as KSI's own ids."""
    return BATCH + hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:26]


class Input:
    """A file with a request on each line: an object with a completion's fields, or the prompt as a string."""

    def __init__(self, path: Path, run: str) -> None:
        """Read and check all lines before any is asked.

        Raises:
            click.UsageError: the file cannot be read, or a line is no request.
        """
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise click.UsageError(f"{path} cannot be read: {error.strerror}") from None
        self.items: list[Item] = []
        seen: Counter[bytes] = Counter()
        mistakes: list[str] = []
        offset = 0
        for number, raw in enumerate(self._file, 1):
            content = raw.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else raw.strip()
            if content:
                mistake = _mistake(content)
                if mistake is not None:
                    mistakes.append(f"line {number}: {mistake}")
                digest = hashlib.sha256(content).digest()
                seen[digest] += 1
                name = made_name(run, digest.hex(), seen[digest])
                self.items.append(Item(name, number, offset, len(raw)))
            offset += len(raw)
        if mistakes:
            self.close()
            more = len(mistakes) - MISTAKES_SHOWN
            shown = [*mistakes[:MISTAKES_SHOWN], *([f"and {more} more"] if more > 0 else [])]
            raise click.UsageError(f"{path}: no request was sent, because of\n  " + "\n  ".join(shown))

    def fields(self, item: Item) -> Json:
        """The item's fields, as its line has them."""
        self._file.seek(item.offset)
        return _decoded(self._file.read(item.length).removeprefix(b"\xef\xbb\xbf").strip())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _decoded(content: bytes) -> Json:
    value = msgspec.json.decode(content)
    if isinstance(value, str):
        return {"prompt": value}
    if not isinstance(value, dict):
        raise InvalidData("neither an object nor a string")
    return value


def _mistake(content: bytes) -> str | None:
    """The reason why a line is no request."""
    try:
        fields = _decoded(content)
        fields.pop("custom_id", None)
        for name in ("request_id", "stream"):
            if name in fields:
                return f"{name}: a batch sets it itself" + ("; use custom_id" if name == "request_id" else "")
        data = convert(fields, CompletionData)
    except InvalidData as error:
        return error.message
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return f"not JSON: {error}"
    unknown = unknown_fields(fields, CompletionData)
    if unknown:
        return unknown[0].replace(" was ignored", "")
    if (data.prompt is None) == (data.messages is None):
        return "give either prompt or messages"
    return "prompt: must not be empty" if data.prompt is not None and not data.prompt.strip() else None


class Results:
    """A file of results, one per line, each with its item's name; only one batch writes it at a time."""

    def __init__(self, path: Path) -> None:
        """Open it and read the results of an earlier run.

        Raises:
            click.UsageError: it cannot be written, another batch writes it, or it has other content.
        """
        self.path = path.resolve()
        if path.exists() and not path.is_file():
            raise click.UsageError(f"{path} is no file; a batch reads back what it wrote")
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise click.UsageError(f"{path} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise click.UsageError(f"another batch writes {path}; wait for it, or choose another name") from None
        self.known: dict[str, Json] = {}
        """The known results by item, without their texts."""
        self._end = 0
        for number, entry, end in self._entries():
            if entry is None:
                os.close(self._descriptor)
                raise click.UsageError(f"{path}, line {number}, is no result of a batch; choose another name")
            self._note(entry)
            self._end = end
        self._cut_off()

    def _entries(self) -> Iterator[tuple[int, Json | None, int]]:
        """Each line's number, result and end. A torn last line is skipped: its answer comes again."""
        end = 0
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            file.seek(0)
            for number, raw in enumerate(file, 1):
                entry = _result(raw)
                if entry is None and not raw.endswith(b"\n"):
                    return
                end += len(raw)
                yield number, entry, end

    def _cut_off(self) -> None:
        """Truncate the file after its last complete line, and make sure of a newline there."""
        os.ftruncate(self._descriptor, self._end)
        if self._end and os.pread(self._descriptor, 1, self._end - 1) != b"\n":
            self._end += os.pwrite(self._descriptor, b"\n", self._end)

    def _note(self, entry: Json) -> None:
        self.known[entry["item"]] = {name: value for name, value in entry.items() if name != "result"}

    def add(self, entry: Json) -> None:
        """Write one more result.

        Raises: OSError: there is no room for it; the file is unchanged.
        """
        line = msgspec.json.encode(entry) + b"\n"
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(self._descriptor, line[written:], self._end + written)
        except OSError:
            os.ftruncate(self._descriptor, self._end)
            raise
        self._end += len(line)
        self._note(entry)

    def rewrite(self, order: Mapping[str, int], *, without: Container[str] = ()) -> None:
        """Bring the file into the order of the lines, with only the latest result of each item; atomic.

        Results of items that are not in `order` come at the end; those in `without` are removed.

        Raises:
            OSError: it cannot be done; the file is unchanged.
        """
        places: dict[str, tuple[int, int]] = {}
        there: list[tuple[str, Any]] = []
        begin = 0
        for _, entry, end in self._entries():
            if entry is not None:
                there.append((entry["item"], entry.get("line")))
                places[entry["item"]] = (begin, end - begin)
            begin = end
        kept = [name for name in places if name not in without]
        names = sorted(kept, key=lambda name: (name not in order, order.get(name, 0)))
        if there == [(name, order.get(name, self.known[name].get("line"))) for name in names]:
            return
        made = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with made.open("wb") as file:
                os.fchmod(file.fileno(), os.fstat(self._descriptor).st_mode & 0o777)
                for name in names:
                    at, length = places[name]
                    entry = msgspec.json.decode(os.pread(self._descriptor, length, at))
                    file.write(msgspec.json.encode({**entry, "line": order.get(name, entry.get("line"))}) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            made.replace(self.path)
        except OSError:
            made.unlink(missing_ok=True)
            raise

    def close(self, *, keep_empty: bool) -> None:
        """Close the file; an empty one is removed unless it is to be kept."""
        if not keep_empty and self.path.stat().st_size == 0:
            self.path.unlink()
        os.close(self._descriptor)


def _result(raw: bytes) -> Json | None:
    try:
        entry = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("item"), str) else None
