"""The local provider with its real model: answers, faults, and that nothing of it is left running."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import psutil
import pytest
import pytest_asyncio

from ksi.clock import SystemClock
from ksi.content.blocks import Message
from ksi.errors import FailureClass, ProviderError
from ksi.providers.base import Call, Chunk, Completion, Frame, Piece, Setting
from ksi.providers.local import LocalProvider, Options
from ksi.providers.local.model_file import bundled_model
from ksi.providers.local.process import SCRIPT, ModelSettings
from tests.integration.wire import until

LONG = {"max_tokens": 3000, "options": {"ignore_eos": True}}
"""Half a minute of work, unless it is stopped."""


THREADS = 1
"""Several wait for each other in busy loops: on busy cores that costs twenty times as much."""


class Local:
    """A provider and its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "local.log"
        self.providers: list[LocalProvider] = []

    def make(self, idle_timeout: float = 120.0, **options: Any) -> LocalProvider:
        setting = Setting(
            name="local",
            clock=SystemClock(),
            home=self.folder,
            log_dir=self.folder,
            environ=os.environ,
            idle_timeout=idle_timeout,
        )
        provider = LocalProvider(setting, Options(**{"threads": THREADS, **options}))
        self.providers.append(provider)
        return provider


@pytest_asyncio.fixture
async def local(tmp_path: Path) -> AsyncIterator[Local]:
    made = Local(tmp_path)
    yield made
    for provider in made.providers:
        await provider.stop()


def call(prompt: str, **fields: Any) -> Call:
    return Call(
        request_id="r", attempt=1, conversation="c", model="smollm2", messages=[Message("user", prompt)], **fields
    )


async def answer(provider: LocalProvider, prompt: str, **fields: Any) -> Completion:
    """The completion, after its pieces were seen to make its text."""
    pieces: list[str] = []
    async for piece in provider.complete(call(prompt, **fields)):
        if isinstance(piece, Completion):
            assert "".join(pieces) == piece.text
            return piece
        assert isinstance(piece, Chunk)
        pieces.append(piece.text)
    pytest.fail("the answer had no end")


async def started(answers: AsyncIterator[Piece | Frame | Completion]) -> None:
    """Wait for the first piece."""
    async with asyncio.timeout(60):
        assert isinstance(await anext(answers), Chunk)


def wait_for_end(process: int, seconds: float) -> bool:
    """True if a process that is not our child ends in time."""
    try:
        psutil.Process(process).wait(seconds)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


@pytest.mark.promise("T1")
async def test_a_real_model_answers_in_pieces_and_reports_its_usage(local: Local, capfd: Any) -> None:
    completion = await answer(local.make(), "Name three colours.", stream=True)
    assert "red" in completion.text.lower()
    assert completion.model.startswith("SmolLM2-135M-Instruct")
    assert completion.stop_reason == "end_turn"
    assert completion.usage is not None
    assert completion.usage.input_tokens > 10
    assert 10 < completion.usage.output_tokens <= 256
    assert capfd.readouterr() == ("", "")


async def test_the_calls_limits_and_choices_reach_the_model(local: Local) -> None:
    provider = local.make()
    short = await answer(provider, "Tell me a story.", max_tokens=5)
    assert short.stop_reason == "max_tokens"
    assert short.usage is not None
    assert short.usage.output_tokens == 5
    whole = await answer(provider, "Tell me a story.", max_tokens=12, temperature=0)
    word = whole.text.split()[5]
    stopped = await answer(provider, "Tell me a story.", max_tokens=12, temperature=0, stop=[word])
    assert stopped.text == whole.text.partition(word)[0]
    assert stopped.stop_reason in ("end_turn", "stop_sequence")
    seeds = [
        await answer(provider, "Tell me a story.", max_tokens=12, temperature=1.5, options={"seed": seed})
        for seed in (1, 2)
    ]
    assert seeds[0].text != seeds[1].text


async def test_several_calls_at_once_are_all_answered(local: Local) -> None:
    provider = local.make(parallel=2)
    completions = await asyncio.gather(*(answer(provider, f"Say {n}.", max_tokens=4) for n in range(5)))
    assert all(completion.text for completion in completions)


@pytest.mark.promise("F1", "L9")
async def test_a_prompt_over_the_context_is_context_too_long(local: Local) -> None:
    provider = local.make(context_tokens=512)
    with pytest.raises(ProviderError) as caught:
        await answer(provider, "word " * 1000)
    assert caught.value.failure is FailureClass.CONTEXT_TOO_LONG
    assert (await answer(provider, "Hello", max_tokens=2)).text


@pytest.mark.promise("F1")
async def test_a_crash_in_mid_answer_is_a_provider_error_and_the_next_call_works(local: Local) -> None:
    provider = local.make()
    answers = provider.complete(call("Tell me a story.", **LONG))
    await started(answers)
    first = provider.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    with pytest.raises(ProviderError, match="SIGKILL") as caught:
        async for _ in answers:
            pass
    assert caught.value.failure is FailureClass.PROVIDER_ERROR
    assert (await answer(provider, "Hello", max_tokens=2)).text
    assert provider.pid != first


@pytest.mark.promise("F7")
async def test_a_hung_process_is_a_timeout_and_is_killed(local: Local) -> None:
    provider = local.make(idle_timeout=10)
    answers = provider.complete(call("Tell me a story.", **LONG))
    await started(answers)
    first = provider.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    with pytest.raises(ProviderError) as caught:
        async for _ in answers:
            pass
    assert caught.value.failure is FailureClass.TIMEOUT
    assert provider.pid is None


@pytest.mark.promise("F8")
async def test_closing_the_iterator_stops_the_models_work(local: Local) -> None:
    provider = local.make(parallel=1)
    async with aclosing(provider.complete(call("Tell me a story.", **LONG))) as answers:
        await started(answers)
    async with asyncio.timeout(15):
        assert (await answer(provider, "Hello", max_tokens=2)).text


async def test_a_call_cancelled_while_the_model_loads_leaves_the_load_to_the_next(local: Local) -> None:
    provider = local.make()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await answer(provider, "Hello")
    assert (await answer(provider, "Hello", max_tokens=2)).text


async def test_a_file_that_is_no_model_is_said_with_the_place_of_the_log(local: Local) -> None:
    (local.folder / "broken.gguf").write_bytes(b"not a model" * 100)
    provider = local.make(model_path="broken.gguf")
    with pytest.raises(ProviderError) as caught:
        await answer(provider, "Hello")
    assert caught.value.failure is FailureClass.PROVIDER_ERROR
    assert "broken.gguf" in caught.value.message
    assert str(local.log) in caught.value.message
    assert provider.problem() == caught.value.message

    async def written() -> bool:
        return "invalid magic" in local.log.read_text()

    await until(written)  # by its process, in its own time


async def test_a_load_over_its_time_is_given_up(local: Local) -> None:
    with pytest.raises(ProviderError, match="not loaded after"):
        await answer(local.make(start_timeout=0.001), "Hello")


async def test_preload_loads_at_the_start_and_stop_ends_it_at_any_moment(local: Local) -> None:
    provider = local.make(preload=True)
    await provider.start()
    await provider.stop()
    assert provider.pid is None
    with pytest.raises(ProviderError, match="stopped"):
        await answer(provider, "Hello")
    await provider.start()
    assert (await answer(provider, "Hello", max_tokens=2)).text
    child = provider.pid
    await provider.stop()
    assert child is not None
    assert provider.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.promise("S2")
async def test_the_port_answers_no_client_without_the_key(tmp_path: Path) -> None:
    process, address = serve(tmp_path)
    with process:
        body = {"model": "smollm2", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{address}/v1/chat/completions", json=body) as response:
                assert response.status == 401
            headers = {"Authorization": "Bearer right"}
            async with session.post(f"{address}/v1/chat/completions", json=body, headers=headers) as response:
                assert response.status == 200
        process.stdin.close()  # type: ignore[union-attr]
        assert process.wait(5) == 0


@pytest.mark.promise("F7")
def test_the_end_of_its_stdin_ends_the_process(tmp_path: Path) -> None:
    process, _ = serve(tmp_path)
    with process:
        process.stdin.close()  # type: ignore[union-attr]
        assert process.wait(5) == 0


def serve(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """The model's process without a provider around it."""
    settings = ModelSettings(
        model_path=str(bundled_model()),
        alias="m",
        context_tokens=256,
        parallel=1,
        threads=THREADS,
        fit=False,
        unload_after=-1,
        api_key="right",
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-I", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(msgspec.json.encode(settings) + b"\n")
    process.stdin.flush()
    address = msgspec.json.decode(process.stdout.readline())["address"]
    return process, address


PARENT = """
import asyncio, os, sys
from pathlib import Path
from ksi.clock import SystemClock
from ksi.content.blocks import Message
from ksi.providers.base import Call, Setting
from ksi.providers.local import LocalProvider, Options

async def main():
    folder = Path(sys.argv[1])
    setting = Setting(name="local", clock=SystemClock(), home=folder, log_dir=folder, environ=os.environ)
    provider = LocalProvider(setting, Options(threads=1))
    call = Call(
        request_id="r", attempt=1, conversation="c", model="m", messages=[Message("user", "Tell me a story.")],
        max_tokens=3000, options={"ignore_eos": True},
    )
    async for _ in provider.complete(call):
        print(provider.pid, flush=True)

asyncio.run(main())
"""


@pytest.mark.promise("F7")
def test_a_kill_of_the_daemon_ends_the_models_process(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
        assert wait_for_end(child, 5)
