"""The daemon as a background process: starting it, finding it, stopping it."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ksi.cli.logs import LOG_FILE
from ksi.cli.settings import Exit
from ksi.config.schema import Config
from ksi.errors import ConfigError, ConnectionFailed, InternalError, WaitTimeout
from ksi.host.platforms import answers
from ksi.host.private_files import free_bytes, make_folder, open_to_append

LOOK_EVERY = 0.05
"""Seconds between two polls of a state without notifications."""
SETTLE = 60.0
"""Seconds that a daemon which another process started, or which is stopping, gets to answer or exit."""
FULL = 64 * 1024
"""Free bytes below which a disk counts as full."""


def start_daemon(config: Config) -> str:
    """Start the daemon in the background unless one serves already; returns its message when it is ready.

    Concurrent starts wait for the first one.

    Raises:
        ConfigError: the home cannot be written, or the configuration cannot be used.
        InternalError: it did not start; the message quotes its output.
    """
    with _starting(config):
        _let_settle(config)
        pid = running_pid(config)
        if pid is not None:
            return f"ksi runs already on {config.socket_path} (pid {pid}, home {config.home})"
        return _launch(config)


def stop_daemon(config: Config, timeout: float) -> int | None:
    """Stop the daemon in order and wait until it has exited; returns its pid, or None if none ran.

    Raises:
        WaitTimeout: it still runs after `timeout` seconds.
        ConnectionFailed: this user may not stop it.
    """
    pid = running_pid(config)
    if pid is None:
        return None
    try:
        _stop_process(config, pid, timeout)
    except PermissionError:
        raise ConnectionFailed(f"the daemon (pid {pid}) belongs to another user") from None
    return pid


def running_pid(config: Config) -> int | None:
    """The pid of the daemon that runs in this home: the holder of its pid file's lock."""
    try:
        descriptor = os.open(config.pid_path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        return int(text) if text.isdigit() else None
    else:
        return None  # the process that wrote it has exited
    finally:
        os.close(descriptor)


@contextmanager
def _starting(config: Config) -> Iterator[None]:
    """One start at a time."""
    path = config.run_dir / "start.lock"
    try:
        make_folder(config.run_dir)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"{error.filename} cannot be used: {error.strerror}; make it writable or choose another home",
            place=str(path),
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _let_settle(config: Config) -> None:
    """Wait while a daemon exists that does not answer: it is starting or stopping."""
    until = time.monotonic() + SETTLE
    while (pid := running_pid(config)) is not None and not answers(config.socket_path):
        if time.monotonic() > until:
            raise InternalError(f"the daemon (pid {pid}) runs and does not answer; see `ksi logs`, or end that process")
        time.sleep(LOOK_EVERY)


def _launch(config: Config) -> str:
    log_path = config.log_dir / LOG_FILE
    try:
        make_folder(log_path.parent)
        log = open_to_append(log_path)
    except OSError as error:
        raise ConfigError(
            f"{error.filename} cannot be written: {error.strerror}; make it writable or choose another home",
            place=str(log_path),
        ) from None
    command = [sys.executable, "-m", "ksi.cli", "--home", str(config.home), "start", "--foreground"]
    try:
        before = os.fstat(log).st_size
        # Its stdout has one line: that it is ready. All other output goes to the log.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=config.home,
            start_new_session=True,
        )
    finally:
        os.close(log)
    assert process.stdout is not None
    with process.stdout:
        word = process.stdout.readline().decode("utf-8", "replace").strip()
    if word:
        return word
    code = process.wait()
    reason = f"the daemon of {config.home} did not start (exit code {code}):\n{_added(log_path, before)}"
    raise ConfigError(reason, place=str(config.home)) if code == Exit.USAGE else InternalError(reason)


def _added(path: Path, before: int, lines: int = 20) -> str:
    """The last lines written to a file since it had `before` bytes."""
    with path.open("rb") as log:
        # The log was rotated, and this is a new one.
        log.seek(before if before <= log.seek(0, os.SEEK_END) else 0)
        text = log.read().decode("utf-8", "replace")
    if said := "\n".join(text.splitlines()[-lines:]):
        return said
    if (free := free_bytes(path.parent)) is not None and free < FULL:
        return f"the disk of {path.parent} is full; free some space and start it again"
    return f"it printed nothing; see {path}"


def _stop_process(config: Config, pid: int, timeout: float) -> None:
    if sys.platform == "linux":
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        except OSError:  # not permitted in this container
            _stop_by_number(config, pid, timeout)
            return
        try:
            # Check once more, now that the handle cannot come to mean another process.
            if running_pid(config) != pid:
                return
            signal.pidfd_send_signal(handle, signal.SIGTERM)
            ended, _, _ = select.select([handle], [], [], timeout)
        finally:
            os.close(handle)
        if not ended:
            raise _still_runs(pid, timeout)
    else:
        _stop_by_number(config, pid, timeout)


def _stop_by_number(config: Config, pid: int, timeout: float) -> None:
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    until = time.monotonic() + timeout
    while running_pid(config) == pid:
        if time.monotonic() > until:
            raise _still_runs(pid, timeout)
        time.sleep(LOOK_EVERY)


def _still_runs(pid: int, timeout: float) -> WaitTimeout:
    return WaitTimeout(
        f"the daemon (pid {pid}) still runs after {timeout:g} s; see `ksi logs`, wait, or end it by its pid"
    )
