"""deploy/: what the container file copies is there and is enough, and what it and the unit start exists."""

from __future__ import annotations

import json
import plistlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ksi.cli import main

ROOT = Path(__file__).parents[2]
UNIT = (ROOT / "deploy" / "ksi.service").read_text()
PLIST = (ROOT / "deploy" / "ksi.plist").read_text()
AGENT = plistlib.loads(PLIST.replace("@KSI@", "/Users/me/ksi").encode())


def instructions() -> list[tuple[str, str]]:
    """The container file's instructions, each in one line."""
    text = (ROOT / "deploy" / "Containerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, " ".join(rest.split())) for word, _, rest in (line.partition(" ") for line in lines)]


def test_copied_files_exist_and_are_enough_to_install(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    for word, rest in instructions():
        if word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                at = work / target / source if target.endswith("/") else work / target
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, at, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, at)
    (installs,) = [rest for word, rest in instructions() if word == "RUN" and "pip" in rest]
    locked, own = installs.split(" && ")
    # As the launcher does it: the lock says all, and one package of it asks for more than is used.
    assert locked.endswith("--no-deps --require-hashes -r requirements/runtime.txt")
    assert (work / "requirements" / "runtime.txt").is_file()
    assert own.endswith("--no-deps --no-build-isolation .")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    built = subprocess.run(build, cwd=work, capture_output=True, text=True, timeout=100)
    assert built.returncode == 0, built.stderr
    assert list(tmp_path.glob("ksi-*.whl"))


def started() -> list[list[str]]:
    """Every command that the container and the unit run."""
    in_container = [rest for word, rest in instructions() if word in ("HEALTHCHECK", "ENTRYPOINT")]
    of_unit = [line.partition("=")[2].split() for line in UNIT.splitlines() if line.startswith("ExecStart=")]
    return [*(json.loads(rest[rest.index("[") :]) for rest in in_container), *of_unit, AGENT["ProgramArguments"]]


@pytest.mark.parametrize("command", started(), ids=" ".join)
def test_the_started_command_is_one_of_ours(command: list[str], tmp_path: Path) -> None:
    program, option, _, *rest = command
    assert (Path(program).name, option) == ("ksi", "--home")
    found = CliRunner().invoke(main, ["--home", str(tmp_path), *rest, "--help"])
    assert found.exit_code == 0, found.output


@pytest.mark.promise("U5")
def test_the_unit_makes_its_environment_as_root_before_it_is_confined() -> None:
    settings = dict(re.findall(r"^(\w+)=(.*)$", UNIT, re.MULTILINE))
    assert settings["ExecStartPre"] == "+/opt/ksi/ksi --version", "the checkout cannot be written by the service itself"
    assert settings["ExecStart"].startswith("/opt/ksi/ksi --home /var/lib/ksi ")
    assert (settings["User"], settings["StateDirectory"]) == ("ksi", "ksi")
    assert settings["Environment"] == f"PYTHONPYCACHEPREFIX=/var/cache/{settings['CacheDirectory']}"
    assert "time-sync.target" in settings["After"].split()
    assert "time-sync.target" in settings["Wants"].split()
    head = UNIT[: UNIT.index("[Unit]")]
    assert f"useradd --system --home-dir /var/lib/{settings['StateDirectory']}" in head
    assert head.rstrip().splitlines()[-1].startswith("# After an update")


@pytest.mark.promise("O12")
def test_the_agent_of_launchd_is_started_again_after_a_crash_alone_and_names_every_place() -> None:
    assert AGENT["KeepAlive"] == {"SuccessfulExit": False}
    assert AGENT["ExitTimeOut"] == 60
    assert AGENT["Label"] in PLIST.partition("-->")[0], "its comment says how to stop it"
    assert "~" not in json.dumps(AGENT), "launchd expands nothing"
    assert "$" not in json.dumps(AGENT)
