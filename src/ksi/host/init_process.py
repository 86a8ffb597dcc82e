"""As PID 1 of a container: run the daemon in a child, forward signals to it, and reap every process that ends.

Processes whose parent died become children of PID 1. The daemon cannot reap them itself: it would take exit codes away
from its own event loop, which waits for the processes that it started.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress

_FORWARDED = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2})


def run_as_init(serve: Callable[[], int]) -> int:
    """Run `serve` in a child process until it ends; returns its exit code, or 128 and its signal's number.

    In the child this returns the result of `serve`.
    """
    # Blocked signals wait until they are asked for: PID 1 would ignore them, and none may get lost around the fork.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED | {signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return serve()
    while True:
        for pid, status in _reap():
            if pid == child:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
        number = signal.sigwait(_FORWARDED | {signal.SIGCHLD})
        if number != signal.SIGCHLD:
            with suppress(ProcessLookupError):
                os.kill(child, number)


def _reap() -> Iterator[tuple[int, int]]:
    """Each child that has ended, with its status."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            yield ended
