"""Every event of the two documents with the documents' own payloads, and the answers that must come.

By hand, against the daemon that runs: `python3 tests/test_completion_service_v2.py`. Within pytest, against one of its
own that scripts its answers.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.acceptance.documents import CHECKS
from tests.acceptance.talk import Refused, Talk, find_socket


def by_hand() -> int:
    """Run all checks against the running daemon; 0 where all hold."""
    path = find_socket(Path(__file__).resolve().parents[1])
    try:
        with Talk(path) as talk:
            version = talk.ask("system:startup")["service_version"]
    except OSError as error:
        print(f"no daemon on {path} ({error.strerror}); start it with ./daemon_control.sh start")
        return 3
    if version == 1:
        print(
            f"the daemon on {path} runs service version 1, which has none of this; stop it, run `ksi migrate`, and "
            "start it again"
        )
        return 3
    failed = []
    for name, check in CHECKS.items():
        try:
            with Talk(path) as talk:
                check(talk)
        except (AssertionError, Refused, OSError, KeyError, ValueError) as error:
            failed.append(name)
            place = traceback.extract_tb(error.__traceback__)[-1]
            print(f"FAILED  {name}: {str(error) or place.line} ({Path(place.filename).name}:{place.lineno})")
        else:
            print(f"ok      {name}")
    print(f"{len(CHECKS) - len(failed)} of {len(CHECKS)} hold" + (f"; not: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(by_hand())

# Not at the top: by hand it is run by any Python, which need not have pytest.
import pytest  # noqa: E402

from tests.daemon_process import DaemonProcess, make_home  # noqa: E402

CONFIG = """\
[service]
default_model = "stub/echo"
shutdown_grace = 0.2

[providers.stub]
kind = "stub"
max_concurrency = 8

[providers.claude-cli]
kind = "stub"
text = "Hello from Claude."
"""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A daemon's socket."""
    home = make_home(tmp_path_factory.mktemp("v2"), CONFIG)
    with DaemonProcess(home) as process:
        yield process.socket_path


@pytest.mark.promise("Q1", "L2", "L5", "L6", "L7", "R1", "R4", "S1", "T2", "F6", "F8", "L10", "C1", "C4", "C5", "C8")
@pytest.mark.parametrize("name", CHECKS)
def test_the_documents_payloads_have_the_documents_answers(daemon: Path, name: str) -> None:
    with Talk(daemon) as talk:
        CHECKS[name](talk)


def test_by_hand_it_reports_that_no_daemon_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSI_HOME", str(tmp_path))
    assert by_hand() == 3


def test_by_hand_it_says_that_a_daemon_runs_version_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = make_home(tmp_path, CONFIG.replace("[service]\n", "[service]\nversion = 1\n"))
    monkeypatch.setenv("KSI_HOME", str(home))
    with DaemonProcess(home):
        assert by_hand() == 3
    assert "runs service version 1" in capsys.readouterr().out
