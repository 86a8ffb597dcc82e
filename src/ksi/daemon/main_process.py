"""The daemon as a process of its own: its log, its pid file, its signals and its exit code."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress

import structlog
import uvloop

from ksi.clock import Chance, Clock, SystemClock
from ksi.completion.upkeep.clock_keeper import start_clock
from ksi.config.schema import Config
from ksi.daemon.daemon import build_daemon
from ksi.errors import ConfigError, InternalError, KsiError, StoreInUse
from ksi.host.init_process import run_as_init
from ksi.host.logs import Log, open_log
from ksi.host.pid_file import PidFile, claim_run_dir
from ksi.host.platforms import raise_file_limit
from ksi.host.printable import visible
from ksi.host.private_files import close_to_others

SWITCH_INTERVAL = 0.0005
"""Seconds after which a thread gives way; the interpreter's own default is ten times that."""

EXIT_OK = 0
EXIT_FAULT = 1
EXIT_CONFIG = 2
EXIT_IN_USE = 3


def run(config: Config, *, say: Callable[[str], None] = print) -> int:
    """Serve until SIGTERM, SIGINT or `system:shutdown`; returns the exit code. Says one line when ready.

    SIGHUP ends nothing: the log is reopened. As PID 1 of a container the daemon is a child of this process.
    """
    return run_as_init(lambda: _run(config, say)) if os.getpid() == 1 else _run(config, say)


def _run(config: Config, say: Callable[[str], None]) -> int:
    # A handler, and not SIG_IGN, which the programs that are started later would inherit.
    signal.signal(signal.SIGHUP, lambda _number, _frame: None)
    try:
        claim_run_dir(config.run_dir, config.home)
        log_file = _open_log(config, SystemClock())
        pid_file = PidFile(config.pid_path)
        pid_file.take()
    except KsiError as error:
        return _not_started(error)
    raise_file_limit()
    try:
        return uvloop.run(_serve(config, start_clock(config.clock_path), pid_file, log_file, say))
    except KsiError as error:
        structlog.get_logger("ksi.daemon").error("not started", error=error.message, code=error.code)
        return _not_started(error)
    except OSError as error:
        structlog.get_logger("ksi.daemon").exception("ended by an error of the system")
        return _not_started(InternalError(f"the daemon of {config.home} ended: {error}"))
    finally:
        pid_file.release()
        log_file.close()


def _open_log(config: Config, clock: Clock) -> Log:
    path = config.log_dir / "daemon.log"
    log = open_log(path, config.log.level, clock, max_bytes=config.log.max_bytes, keep=config.log.keep)
    for folder in (config.log_dir, config.log_dir / "responses", config.path("var/db"), config.path("var/checkpoints")):
        close_to_others(folder, config.home)
    return log


def _not_started(error: KsiError) -> int:
    with suppress(OSError):  # it is not read, or the disk is full: the exit code says it too
        print(visible(f"ksi: {error.message}", keep="\n"), file=sys.stderr)
    if isinstance(error, ConfigError):
        return EXIT_CONFIG
    return EXIT_IN_USE if isinstance(error, StoreInUse) else EXIT_FAULT


async def _serve(
    config: Config, clock: SystemClock, pid_file: PidFile, log_file: Log, say: Callable[[str], None]
) -> int:
    daemon = build_daemon(config, clock, Chance(), dict(os.environ), pid_file=pid_file, log_file=log_file)
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, daemon.stopping.set)
    loop.add_signal_handler(signal.SIGHUP, log_file.reopen)
    await daemon.start()
    _spare_the_collector()
    # The threads behind the loop (response log, checkpoints, reports) must not keep it waiting for the interpreter.
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        say(f"ksi is ready on {config.socket_path} (pid {os.getpid()}, home {config.home})")
    except OSError as error:
        structlog.get_logger("ksi.daemon").warning("the ready line was not taken", error=str(error))
    tell_systemd("READY=1")
    for problem in (await daemon.health()).problems:
        structlog.get_logger("ksi.daemon").warning("problem at the start", problem=problem)
    await daemon.stopping.wait()
    tell_systemd("STOPPING=1")
    await daemon.stop()
    return EXIT_OK


def tell_systemd(state: str) -> None:
    """Notify the service manager, if it asked for that (sd_notify). One that does not listen stops nothing."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        try:
            notify.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
        except OSError as error:
            structlog.get_logger("ksi.daemon").warning("service manager not notified", state=state, error=str(error))


def _spare_the_collector() -> None:
    """Freeze the objects of the start out of the garbage collector, and collect the rest less often.

    A request leaves no cycles behind, so the collector finds next to nothing; by default it took a seventh of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)
    gc.enable()
