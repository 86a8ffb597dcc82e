"""`ksi open`: how a browser gets to the daemon's page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemon_process import DaemonProcess, clean_environ, make_home


@pytest.mark.promise("V1")
def test_ksi_open_hands_a_browser_the_code_in_a_file_of_its_own_and_waits_for_it(tmp_path: Path) -> None:
    # A browser that follows the page's lead: it looks who can read it, and exchanges the code.
    helper = tmp_path / "browser.py"
    helper.write_text(
        "import json, os, re, sys, urllib.parse, urllib.request\n"
        "path = urllib.parse.urlsplit(sys.argv[1]).path\n"
        "assert os.stat(path).st_mode & 0o077 == 0\n"
        "url, code = re.search(r'url=(.*?)/#code=([\\w-]+)', open(path).read()).groups()\n"
        "sent = urllib.request.Request(url + '/page/sessions', json.dumps({'code': code}).encode())\n"
        f"open({str(tmp_path / 'session')!r}, 'wb').write(urllib.request.urlopen(sent).read())\n"
    )
    home = make_home(tmp_path / "home")
    environ = {**clean_environ(), "BROWSER": f"{sys.executable} {helper} %s"}
    command = [sys.executable, "-m", "ksi.cli", "--home", str(home), "open"]
    with DaemonProcess(home):
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert json.loads((tmp_path / "session").read_bytes())["session"].startswith("ksip_")
        assert not (home / "var/run/open.html").exists()
        printed = subprocess.run([*command, "--print"], env=environ, capture_output=True, text=True, timeout=60)
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/#code=[\w-]{32}\n", printed.stdout)
