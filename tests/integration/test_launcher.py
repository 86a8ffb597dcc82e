"""The launcher: the making of .venv, the programs it runs from it, and the promises of the lock files. Nothing is
installed."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "requirements/runtime.txt", "requirements/test.txt")


class Checkout:
    """A copy of the launcher's files, with a .venv whose commands only report how they were called."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        self.venv = self.root / ".venv"
        (self.root / "requirements").mkdir(parents=True)
        for name in (*SOURCES, "ksi", "requirements/make_venv.py"):
            shutil.copy(ROOT / name, self.root / name)

    def command(self, name: str, code: int = 0) -> None:
        """Put a command into .venv that prints its name, folder and arguments, and exits with `code`."""
        self.shell(name, f'printf "[%s]" {name} "$@"\necho\nexit {code}')

    def shell(self, name: str, script: str) -> None:
        """Put a command into .venv that is this shell script."""
        path = self.venv / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def stamp(self, level: str) -> None:
        """Say that .venv is whole."""
        sums = subprocess.run(["cksum", *SOURCES], cwd=self.root, check=True, capture_output=True).stdout
        (self.venv / f"{level}.stamp").write_bytes(os.fsencode(self.venv.resolve()) + b"\n" + sums)

    def whole(self, level: str = "runtime") -> None:
        for name in ("ksi", "python", "pytest", "ruff", "mypy", "lint-imports"):
            self.command(name)
        self.stamp(level)

    def run(self, *arguments: str, launcher: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [launcher or self.root / "ksi", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, **environ},
        )


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture
def recorded(checkout: Checkout) -> Checkout:
    """A checkout in which making .venv only prints a line."""
    (checkout.root / "requirements" / "make_venv.py").write_text("import sys; sys.exit('would make ' + sys.argv[1])\n")
    return checkout


def test_a_whole_venv_is_used_as_it_is(recorded: Checkout) -> None:
    recorded.whole()
    done = recorded.run("ask", "two words", "", "*")
    assert done.stdout == "[ksi][ask][two words][][*]\n"
    assert done.stderr == ""


def test_the_commands_exit_code_is_the_launchers(recorded: Checkout) -> None:
    recorded.whole()
    recorded.command("ksi", code=37)
    assert recorded.run().returncode == 37


def test_it_works_through_a_symbolic_link(recorded: Checkout, tmp_path: Path) -> None:
    recorded.whole()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "k").symlink_to("../a checkout/ksi")
    (tmp_path / "k2").symlink_to(tmp_path / "bin" / "k")
    assert recorded.run("status", launcher=tmp_path / "k2").stdout == "[ksi][status]\n"


@pytest.mark.parametrize("source", SOURCES)
def test_a_changed_lock_rebuilds_the_venv(recorded: Checkout, source: str) -> None:
    recorded.whole()
    with (recorded.root / source).open("a") as file:
        file.write("# changed\n")
    done = recorded.run("status")
    assert done.stdout == ""
    assert done.stderr == "would make runtime\n"
    assert done.returncode == 1


@pytest.mark.parametrize("missing", ["runtime.stamp", "bin/ksi", "bin/python"])
def test_a_half_made_venv_is_not_used(recorded: Checkout, missing: str) -> None:
    recorded.whole()
    (recorded.venv / missing).unlink()
    assert recorded.run("status").stderr == "would make runtime\n"


def test_a_moved_checkout_rebuilds_its_venv(recorded: Checkout, tmp_path: Path) -> None:
    recorded.whole()
    recorded.root.rename(tmp_path / "moved")
    assert recorded.run("status", launcher=tmp_path / "moved" / "ksi").stderr == "would make runtime\n"


def test_the_tests_need_a_venv_of_their_own_level(recorded: Checkout) -> None:
    recorded.whole("runtime")
    assert recorded.run("test").stderr == "would make test\n"


def test_with_arguments_only_pytest_runs(recorded: Checkout) -> None:
    recorded.whole("test")
    assert recorded.run("test", "-k", "a name").stdout == "[pytest][-k][a name]\n"


@pytest.mark.promise("V1")
@pytest.mark.parametrize(("user", "packages"), [(0, True), (0, False), (1000, True)])
def test_a_missing_browser_is_installed_where_that_can_be_done_and_told_where_it_cannot(
    recorded: Checkout, tmp_path: Path, user: int, packages: bool
) -> None:
    recorded.whole("test")
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in ("cksum", "cmp", "readlink", "sh"):
        (commands / name).symlink_to(str(shutil.which(name)))
    scripts = {"id": f"echo {user}", "apt-get": f'echo "$@" >>{tmp_path}/asked'}
    for name in ("id", "apt-get") if packages else ("id",):
        (commands / name).write_text(f"#!/bin/sh\n{scripts[name]}\n")
        (commands / name).chmod(0o755)
    done = recorded.run("test", "-k", "page", PATH=str(commands), KSI_TEST_CHROMIUM="")
    assert done.stdout == "[pytest][-k][page]\n", "the tests run, and those of the page fail where it is missing"
    if user == 0 and packages:
        assert "chromium" in (tmp_path / "asked").read_text().splitlines()[1].split()
        assert "installing chromium" in done.stderr
    else:
        assert not (tmp_path / "asked").exists()
        assert "the tests of the page will fail" in done.stderr
    assert recorded.run("test", "-k", "page", PATH=str(commands), KSI_TEST_CHROMIUM="/it").stderr == ""


def test_a_long_run_is_passed_to_the_tests_and_to_nothing_else(recorded: Checkout) -> None:
    recorded.whole("test")
    recorded.shell("pytest", 'echo "long: $KSI_TEST_LONG, arguments: $*"')
    assert recorded.run("test", "--long", "-k", "name").stdout == "long: 1, arguments: -k name\n"
    assert recorded.run("test", "-k", "name", KSI_TEST_LONG="").stdout == "long: , arguments: -k name\n"
    whole = recorded.run("test", "--long").stdout.splitlines()
    assert whole[0] == "long: 1, arguments: -n auto --dist worksteal"
    assert whole[2] == "[ruff][format][--check]"


def test_all_checks_run_even_if_one_fails(recorded: Checkout) -> None:
    recorded.whole("test")
    recorded.command("mypy", code=2)
    darwin = "mypy --platform darwin --exclude ^benchmarks/chains/ --exclude ^tests/integration/test_http_sdks"
    done = recorded.run("test")
    checks = [
        "pytest -n auto --dist worksteal",
        "ruff format --check",
        "ruff check",
        "mypy --platform linux",
        darwin,
        "lint-imports",
    ]
    shown = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert shown == ["".join(f"[{word}]" for word in check.split()) for check in checks]
    assert done.stderr.endswith(f"ksi: failed: mypy --platform linux, {darwin}\n")
    assert done.returncode == 1
    recorded.command("mypy")
    assert recorded.run("test").returncode == 0
    recorded.command("pytest", code=1)
    assert recorded.run("test").stderr.endswith("ksi: failed: pytest -n auto --dist worksteal\n")


def test_a_fresh_checkout_is_compiled_once_and_not_by_each_worker(recorded: Checkout) -> None:
    recorded.whole("test")
    recorded.shell("pytest", 'echo "$* ${PYTHONDONTWRITEBYTECODE-kept}" >>runs')
    (recorded.root / "tests" / "unit").mkdir(parents=True)
    recorded.run("test", PYTHONDONTWRITEBYTECODE="1")
    (recorded.root / "tests" / "unit" / "__pycache__").mkdir()
    recorded.run("test", PYTHONDONTWRITEBYTECODE="1")
    whole = "-n auto --dist worksteal kept"
    assert (recorded.root / "runs").read_text().splitlines() == ["--collect-only -q kept", whole, whole]


def test_a_python_that_is_too_old_is_said_plainly(recorded: Checkout, tmp_path: Path) -> None:
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in ("cksum", "cmp", "readlink"):
        (commands / name).symlink_to(str(shutil.which(name)))
    done = recorded.run(PATH=str(commands))
    assert done.returncode == 1
    assert "KSI needs Python 3.11 or newer." in done.stderr
    old = commands / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] || exit 1\necho Python 3.9.2\n')
    old.chmod(0o755)
    done = recorded.run(PATH=str(commands))
    assert done.returncode == 1
    assert f"(here: {old} is Python 3.9.2)" in done.stderr


def test_a_named_python_is_taken_before_others(recorded: Checkout, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text(f'#!/bin/sh\necho mine >&2\nexec "{sys.executable}" "$@"\n')
    mine.chmod(0o755)
    assert recorded.run(KSI_PYTHON=str(mine)).stderr == "mine\nwould make runtime\n"


def test_the_second_of_two_waits_and_makes_nothing(checkout: Checkout) -> None:
    checkout.whole()
    lock = os.open(checkout.root / "requirements", os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with subprocess.Popen(
            [sys.executable, "-I", checkout.root / "requirements" / "make_venv.py", "runtime"],
            stderr=subprocess.PIPE,
            text=True,
        ) as second:
            assert second.stderr is not None
            assert "waiting" in second.stderr.readline()
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert second.stderr.read() == ""
            assert second.wait(60) == 0
    finally:
        os.close(lock)


@pytest.mark.parametrize("name", ["runtime.txt", "test.txt"])
def test_a_lock_is_whole_and_names_no_registry(name: str) -> None:
    text = (ROOT / "requirements" / name).read_text()
    assert "://" not in text
    assert "index" not in text
    entries = re.findall(
        r"^([\w.-]+)==[^\s;]+[^\\\n]*\\\n((?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.MULTILINE
    )
    locked = {entry[0].replace("_", "-").lower() for entry in entries}
    assert len(locked) == len(re.findall(r"^[\w.-]+==", text, re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ("local", "test") if name == "test.txt" else ("local",)
    wanted = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    assert {re.match(r"[\w.-]+", line)[0] for line in wanted} <= locked  # type: ignore[index]


def test_the_model_comes_alone_and_as_it_was_tried() -> None:
    text = (ROOT / "requirements" / "runtime.txt").read_text()
    assert "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70" in text
    assert "llama-cpp-python" not in text
    assert not re.search(r"^llm==", text, re.MULTILINE)
