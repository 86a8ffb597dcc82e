"""Which clients are netcats whose input is no terminal."""

from __future__ import annotations

import os
import pty
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ksi.transports.netcat import is_piped_netcat

CLIENT = """
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
connection.recv(1)
"""


def seen(tmp_path: Path, name: str, stdin: int) -> bool:
    """What is said of a program of this name that connects."""
    program = tmp_path / name
    program.symlink_to(sys.executable)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        listener.settimeout(60)
        with subprocess.Popen([program, "-c", CLIENT, tmp_path / "s"], stdin=stdin) as process:
            peer, _ = listener.accept()
            with peer:
                found = is_piped_netcat(peer)
            process.wait(60)
    return found


@pytest.mark.promise("S1")
@pytest.mark.parametrize(("name", "is_one"), [("nc", True), ("netcat", True), ("nc.openbsd", True), ("ncdu", False)])
def test_a_netcat_is_known_by_its_name(tmp_path: Path, name: str, is_one: bool) -> None:
    assert seen(tmp_path, name, subprocess.PIPE) is is_one


def test_a_netcat_at_a_terminal_may_say_more(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    try:
        assert seen(tmp_path, "nc", theirs) is False
    finally:
        os.close(ours)
        os.close(theirs)
