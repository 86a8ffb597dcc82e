"""The daemon's log: one JSON line per event, in a file that `ksi logs` shows. It is bounded, and it never raises."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import structlog

from ksi.clock import MICROSECONDS, Clock
from ksi.errors import ConfigError
from ksi.host.private_files import is_still, make_folder, open_to_append

Entry = MutableMapping[str, Any]

FOLD_WINDOW = 60.0
"""Seconds in which equal warnings and errors are counted together."""

WRITTEN_IN_FULL = 5
"""Lines of equal warnings and errors that a window shows before it only counts."""

_MAX_KINDS = 1_000
"""Different lines that are counted at a time."""

_FOLDED = ("warning", "error", "critical")


class LogCondition(msgspec.Struct, frozen=True):
    """How the log is, for an operator."""

    size: int
    """Bytes of all its files."""
    dropped: int
    """Lines that could not be written since the start."""
    problem: str | None
    """Why nothing can be written now."""


class LogFile:
    """One file and its predecessors, `daemon.log.1` being the youngest. Any thread may write."""

    def __init__(self, path: Path, max_bytes: int, keep: int) -> None:
        """A file that would become longer than `max_bytes` is set aside; `keep` of those stay.

        Raises:
            OSError: it cannot be opened.
        """
        self._path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._lock = threading.RLock()
        self._dropped = 0
        self._untold = 0
        self._problem: str | None = None
        self._torn = False
        self._file = self._open()
        # `ksi start` gives the daemon its log as stderr: that must follow to each new file.
        self._is_stderr = is_still(path, 2)
        self._closed = False

    def write(self, line: str) -> None:
        """Write a line. One that cannot be written is dropped and counted."""
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        with self._lock:
            if self._closed:
                return
            try:
                if not is_still(self._path, self._file):
                    self._replace()
                self._make_room(len(data))
                self._tell_of_dropped()
                self._put(data)
                self._problem = None
            except OSError as error:
                self._dropped += 1
                self._untold += 1
                self._problem = f"{self._path} cannot be written: {error.strerror}"

    def reopen(self) -> None:
        """Continue in the file at the path, made new if there is none."""
        with self._lock, suppress(OSError):
            if not self._closed:
                self._replace()

    def close(self) -> None:
        """Write no more."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._file)

    def condition(self) -> LogCondition:
        """Its size and its error."""
        sizes = 0
        for path in (self._path, *(self._aside(number) for number in range(1, self._keep + 1))):
            with suppress(OSError):
                sizes += path.stat().st_size
        return LogCondition(size=sizes, dropped=self._dropped, problem=self._problem)

    def _open(self) -> int:
        make_folder(self._path.parent)
        return open_to_append(self._path)

    def _replace(self) -> None:
        file = self._open()
        os.close(self._file)
        self._file = file
        if self._is_stderr:
            os.dup2(file, 2)

    def _aside(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")

    def _make_room(self, coming: int) -> None:
        size = os.fstat(self._file).st_size
        if not size or size + coming <= self._max_bytes:
            return
        try:
            for number in range(self._keep, 0, -1):
                with suppress(FileNotFoundError):
                    (self._aside(number - 1) if number > 1 else self._path).replace(self._aside(number))
            if not self._keep:
                self._path.unlink(missing_ok=True)
            self._replace()
        except OSError:
            # It cannot be rotated or reopened. The bound counts more than the old lines.
            os.ftruncate(self._file, 0)

    def _tell_of_dropped(self) -> None:
        if self._untold:
            self._put(b'{"level": "warning", "event": "log lines were dropped", "lines": %d}\n' % self._untold)
            self._untold = 0

    def _put(self, data: bytes) -> None:
        if self._torn:
            data = b"\n" + data
        written = 0
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
            self._torn = False
        except OSError:
            self._torn = self._torn or written > 0
            raise


class _Repeats(NamedTuple):
    began: int
    times: int
    last: Entry


class _Folding:
    """Lets the first few of equal warnings and errors pass, and counts the others of a minute in one line."""

    def __init__(self, clock: Clock, write: Callable[[str], None]) -> None:
        self._clock = clock
        self._write = write
        self._seen: dict[tuple[str, ...], _Repeats] = {}
        self._lock = threading.Lock()

    def __call__(self, _logger: Any, _method: str, entry: Entry) -> Entry:
        """Raises DropEvent for a line that is only counted."""
        with self._lock:
            now = self._clock.now().mono
            self._tell(before=now - int(FOLD_WINDOW * MICROSECONDS))
            if entry.get("level") not in _FOLDED:
                return entry
            kind = _kind(entry)
            seen = self._seen.get(kind)
            if seen is None:
                if len(self._seen) < _MAX_KINDS:
                    self._seen[kind] = _Repeats(now, 1, entry)
                return entry
            self._seen[kind] = seen._replace(times=seen.times + 1, last=entry)
            if seen.times < WRITTEN_IN_FULL:
                return entry
        raise structlog.DropEvent

    def flush(self) -> None:
        """Write the counts of lines that were only counted so far."""
        with self._lock:
            self._tell(before=self._clock.now().mono)

    def _tell(self, before: int) -> None:
        for kind, seen in list(self._seen.items()):
            if seen.began <= before:
                del self._seen[kind]
                if seen.times > WRITTEN_IN_FULL:
                    self._write(_render({**seen.last, "repeated": seen.times - WRITTEN_IN_FULL}))


class Log:
    """The logging of this process, set up by `open_log`."""

    def __init__(self, file: LogFile, folding: _Folding, forward: logging.Handler) -> None:
        self._file = file
        self._folding = folding
        self._forward = forward

    def reopen(self) -> None:
        """Write the counts of folded lines, and continue in the file at the path."""
        self._folding.flush()
        self._file.reopen()

    def condition(self) -> LogCondition:
        """Its size and its error."""
        return self._file.condition()

    def close(self) -> None:
        """Write the counts of folded lines, and then stop."""
        self._folding.flush()
        logging.getLogger().removeHandler(self._forward)
        self._file.close()


def open_log(path: Path, level: str, clock: Clock, *, max_bytes: int, keep: int) -> Log:
    """Write the log of this process to a file, from this level on. The log lines of libraries go there too.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        file = LogFile(path, max_bytes, keep)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}; make it writable or choose another home", place=str(path)
        ) from None
    folding = _Folding(clock, file.write)
    structlog.configure(
        processors=[
            _Unfailing(
                structlog.contextvars.merge_contextvars,
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.format_exc_info,
                folding,
                lambda _logger, _method, entry: _render(entry),
            )
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=lambda *_: _Logger(file),
        cache_logger_on_first_use=True,
    )
    forward = _Forward(logging.WARNING)
    logging.getLogger().addHandler(forward)
    return Log(file, folding, forward)


class _Unfailing:
    """Makes a line by these steps. If one fails on a value, the line reports that instead.

    A logged error was caught by an `except`, and an exception there would end a task.
    """

    def __init__(self, *steps: Callable[[Any, str, Any], Any]) -> None:
        self._steps = steps

    def __call__(self, logger: Any, method: str, entry: Entry) -> Any:
        """Raises DropEvent for a line that is only counted."""
        event = str(entry.get("event"))
        try:
            made: Any = entry
            for step in self._steps:
                made = step(logger, method, made)
        except structlog.DropEvent:
            raise
        except Exception as error:  # noqa: BLE001 - whatever was to be logged, and however it fails to be
            return _render({"event": event, "level": method, "unsaid": f"this line broke: {type(error).__name__}"})
        return made


class _Logger:
    def __init__(self, file: LogFile) -> None:
        self.msg = file.write
        self.debug = self.info = self.warning = self.error = self.critical = self.exception = self.msg


class _Forward(logging.Handler):
    """Lines that libraries log with the standard library go to the log, and never to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        log = structlog.get_logger(record.name)
        log.log(record.levelno, _message(record), logger=record.name, exc_info=record.exc_info)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError):  # its arguments do not fit its text
        return f"{record.msg} {record.args}"


_json = structlog.processors.JSONRenderer(sort_keys=False)


def _render(entry: Entry) -> str:
    try:
        return str(_json(None, "", entry))
    except (TypeError, ValueError, RecursionError):
        return str(_json(None, "", {str(name): repr(value) for name, value in entry.items()}))


def _kind(entry: Entry) -> tuple[str, ...]:
    """The key of equal lines: all fields except for the time and the request."""
    trace = str(entry.get("exception", "")).rstrip()
    return (
        str(entry.get("level")),
        str(entry.get("event")),
        str(entry.get("error", "")),
        str(entry.get("provider", "")),
        str(entry.get("task", "")),
        trace.rpartition("\n")[2],
    )
