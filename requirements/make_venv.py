"""Makes the checkout's .venv from the lock files: `python3 make_venv.py runtime|test`. Run by the launcher.

A stamp is written last and taken away first, so that a .venv that was interrupted half-made is never used, but made
anew. Two at once: the second waits and finds the work done. It needs only the standard library.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
COMMAND = VENV / "bin" / "ksi"
SOURCES = ("pyproject.toml", "requirements/runtime.txt", "requirements/test.txt")
"""What the stamp tells of, in the launcher's order."""
PIP = ("--disable-pip-version-check", "--no-input")


def say(message: str) -> None:
    """Progress, where it is in nobody's way."""
    print(f"ksi: {message}", file=sys.stderr, flush=True)


def stamp(level: str) -> Path:
    """The file that says that .venv has all of `level`."""
    return VENV / f"{level}.stamp"


def contents() -> bytes:
    """What a stamp says and the launcher compares: where .venv is, for it cannot be moved, and the files' checksums."""
    sums = subprocess.run(["cksum", *SOURCES], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    return os.fsencode(VENV) + b"\n" + sums


def is_whole(level: str, wanted: bytes) -> bool:
    """Whether .venv has what the lock files say."""
    usable = os.access(PYTHON, os.X_OK) and os.access(COMMAND, os.X_OK)
    return usable and stamp(level).is_file() and stamp(level).read_bytes() == wanted


def run(*command: str | Path, lock: int, progress: Callable[[str], None] = lambda line: None) -> None:
    """Run a step; the end of its output is shown when it fails. It holds the lock too, should we be killed before it.

    Raises:
        SystemExit: the step failed.
    """
    words = [str(part) for part in command]
    lines: list[str] = []
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", pass_fds=[lock]
    ) as step:
        assert step.stdout is not None
        for line in step.stdout:
            lines.append(line)
            progress(line)
    if step.returncode:
        sys.stderr.writelines(lines[-30:])
        say(f"this step failed, see above; nothing half-made will be used: {' '.join(words)}")
        raise SystemExit(1)


FETCHED = re.compile(r"\s*(?:Collecting|Processing|Downloading) (?:\S*/)?([\w.]+?(?:-[a-z]\w*)*)(?:==|-)(\d[^-\s]*)")
LARGE = re.compile(r"\([\d.]+ [MG]B\)")


def show_package(line: str) -> None:
    """Of pip's words only what it fetches, and how much where that takes time; on a terminal in one line."""
    fetched, large = FETCHED.match(line), LARGE.search(line)
    if fetched and (large or "Downloading" not in line):
        text = " ".join(["  fetching", *fetched.groups(), *([large[0]] if large else [])])
    elif line.startswith("Installing"):
        text = "  unpacking"
    else:
        return
    before, after = ("\r\033[K", "") if sys.stderr.isatty() else ("", "\n")
    print(f"{before}{text}", end=after, file=sys.stderr, flush=True)


def install(requirements: str, lock: int) -> None:
    """Install a whole lock file, checked against its hashes: nothing that is not in it, nothing built from source."""
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--progress-bar=off"]
    path = ROOT / "requirements" / requirements
    run(PYTHON, "-m", "pip", "install", *PIP, *options, "-r", path, lock=lock, progress=show_package)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def make(level: str, wanted: bytes, lock: int) -> None:
    """Bring .venv to `level`: the tests' tools on top of a whole one, else all of it from nothing."""
    on_top = level == "test" and is_whole("runtime", wanted)
    for name in ("runtime", "test"):
        stamp(name).unlink(missing_ok=True)
    if on_top:
        say("adding what the tests need to .venv")
    else:
        say(f"making {VENV} with the locked dependencies; this happens once and takes about half a minute")
        if VENV.is_symlink() or VENV.is_file():
            VENV.unlink()
        elif VENV.exists():
            shutil.rmtree(VENV)
        # By its real path: a .venv of an interpreter that was replaced is then seen to be broken.
        run(os.path.realpath(sys.executable), "-m", "venv", VENV, lock=lock)
    install(f"{level}.txt", lock)
    if not on_top:
        options = ["--no-deps", "--no-build-isolation", "--no-index"]
        run(PYTHON, "-m", "pip", "install", *PIP, *options, "--editable", ROOT, lock=lock)
    for name in ("runtime", level):
        fresh = stamp(name).with_suffix(".new")
        fresh.write_bytes(wanted)
        fresh.replace(stamp(name))
    say(".venv is ready")


def main() -> int:
    """Make .venv, or wait for another who does."""
    level = sys.argv[1]
    # Whoever could write here could run code as who starts the daemon. Others may read: a service's user runs it.
    os.umask(os.umask(0o077) | 0o022)
    try:
        import ensurepip  # noqa: F401 - some systems split it off
        import venv  # noqa: F401
    except ImportError:
        say(f"{sys.executable} has no venv module; on Debian and Ubuntu: apt install python3-venv")
        return 1
    lock = os.open(ROOT / "requirements", os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("another ksi is making .venv; waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)
    wanted = contents()
    if not is_whole(level, wanted):
        make(level, wanted, lock)
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        say("interrupted; the next start begins again")
        raise SystemExit(130) from None
