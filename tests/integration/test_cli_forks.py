"""The tree of forks in the output of `ksi`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.daemon_process import DaemonProcess, make_home
from tests.integration.test_cli import ksi, rows


@pytest.mark.promise("L6", "L7")
def test_sessions_show_and_locks_have_the_tree_of_forks(tmp_path: Path) -> None:
    with DaemonProcess(make_home(tmp_path)) as daemon:
        rows(ksi(daemon.home, "ask", "--json", "--session", "trip", "one"))
        alone = ksi(daemon.home, "sessions", "trip").stdout
        data = '{"prompt": "two", "session_id": "trip", "fork": true, "request_id": "branch"}'
        (forked,) = rows(ksi(daemon.home, "send", "completion:request", data))
        child = forked["session_id"]
        drawn = f"trip\n└─ {child}  asked for by branch, "
        for command in (("sessions", "trip"), ("sessions", child), ("show", "branch"), ("locks", "trip")):
            assert drawn in ksi(daemon.home, *command).stdout, command
        assert "forks\n" not in alone
