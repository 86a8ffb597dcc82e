"""The first program of a provider's process: it ties the process to the daemon, registers it, and becomes the program.

`ksi.providers.process` runs this file as a script; the daemon never imports it. It needs nothing of KSI and little of
Python, so that it costs a few milliseconds. Arguments: the daemon's pid, the file to register in, the process's name,
and then the program with its arguments.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time

PR_SET_PDEATHSIG = 1
ORPHANED = 125
"""The exit code if the daemon was gone before the process was tied to it."""
NOT_STARTED = 126
"""The exit code if the program cannot be run."""


def tie_to(parent: int) -> None:
    """Have Linux kill this process when the one that started it dies. Elsewhere the end of stdin must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(ORPHANED)


def started() -> float:
    """The start of this process: with the pid, a name that is never used twice.

    On Linux it is in clock ticks since the machine's boot, elsewhere in Unix time.
    """
    if sys.platform == "linux":
        handle = os.open("/proc/self/stat", os.O_RDONLY | os.O_CLOEXEC)
        line = os.read(handle, 4096)
        os.close(handle)
        return int(line.rpartition(b")")[2].split()[19])
    else:
        return time.time()


def register(path: str, name: str) -> None:
    """Write down who this is, so that a later daemon finds it if this one is killed."""
    entry = {"pid": os.getpid(), "started": started(), "name": name}
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    os.write(handle, json.dumps(entry).encode())
    os.close(handle)


def main() -> None:
    """Tie, register, become."""
    parent, path, name, *program = sys.argv[1:]
    tie_to(int(parent))
    register(path, name)
    try:
        os.execvp(program[0], program)
    except OSError as error:
        os.write(2, f"{program[0]} cannot be run: {error.strerror}\n".encode())
        os._exit(NOT_STARTED)


if __name__ == "__main__":
    main()
