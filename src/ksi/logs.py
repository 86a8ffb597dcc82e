"""The daemon's log: one JSON line per event, in a file that `ksi logs` shows."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any, TextIO

import structlog

from ksi.errors import ConfigError


def open_log(path: Path, level: str) -> None:
    """Write the log of this process to a file, from this level on.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        file = path.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}; make it writable or choose another home", place=str(path)
        ) from None
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(sort_keys=False),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=_FileLoggers(file),
        cache_logger_on_first_use=True,
    )


class _FileLoggers:
    """Loggers on one file. A full disk must not stop the daemon: what cannot be written goes to stderr."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def __call__(self, *args: Any) -> _FileLogger:
        return _FileLogger(self._file, args[0] if args else "ksi")


class _FileLogger:
    def __init__(self, file: TextIO, name: str) -> None:
        self._file = file
        self._name = name

    def msg(self, message: str) -> None:
        try:
            self._file.write(message + "\n")
        except OSError as error:
            print(f"ksi: log not written ({error.strerror}): {message}", file=sys.stderr)

    debug = info = warning = error = critical = exception = msg
