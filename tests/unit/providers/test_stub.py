"""The scripted provider."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.config.reader import options_of
from ksi.config.schema import ProviderConfig
from ksi.content.blocks import Message
from ksi.errors import ConfigError, FailureClass, ProviderError
from ksi.providers.base import Call, Chunk, Completion, Setting
from ksi.providers.stub import Options, StubProvider, build
from ksi.request import Usage
from ksi.testing import SimulatedClock


def stub(home: Path = Path("/nowhere"), **options: Any) -> StubProvider:
    setting = Setting(name="stub", clock=SimulatedClock(), home=home, log_dir=home, environ={})
    return build(setting, msgspec.convert(options, Options))


def call(prompt: str = "one two", **fields: Any) -> Call:
    known: dict[str, Any] = {
        "request_id": "r",
        "attempt": 1,
        "conversation": "talk",
        "model": "echo",
        "messages": [Message("user", "before"), Message("assistant", "then"), Message("user", prompt)],
    }
    return Call(**(known | fields))


async def answer(provider: StubProvider, asked: Call) -> tuple[list[str], Completion]:
    """Pieces and the whole."""
    pieces, whole = [], None
    async with aclosing(provider.complete(asked)) as stream:
        async for item in stream:
            assert whole is None
            if isinstance(item, Chunk):
                pieces.append(item.text)
            else:
                whole = item
    assert whole is not None
    return pieces, whole


async def failure(provider: StubProvider, asked: Call) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await answer(provider, asked)
    return caught.value


# -- answers ----------------------------------------------------------------------------------------------------------


async def test_it_echoes_the_last_message_and_counts_words_as_tokens() -> None:
    pieces, whole = await answer(stub(), call())
    assert pieces == []
    assert (whole.text, whole.model, whole.stop_reason) == ("echo: one two", "echo", "end_turn")
    assert whole.usage == Usage(input_tokens=2, output_tokens=3)


@given(text=st.text(max_size=30), pieces=st.integers(1, 40))
async def test_a_streamed_answer_is_the_whole_one_in_no_more_pieces_than_set(text: str, pieces: int) -> None:
    chunks, whole = await answer(stub(text=text, pieces=pieces), call(stream=True))
    assert "".join(chunks) == whole.text == text
    assert 1 <= len(chunks) <= pieces


async def test_a_request_s_own_script_wins_over_the_configured_one() -> None:
    provider = stub(text="configured", usage=False)
    _, whole = await answer(provider, call(options={"text": "asked for", "usage": True}))
    assert whole.text == "asked for"
    assert whole.usage is not None
    _, whole = await answer(provider, call())
    assert (whole.text, whole.usage) == ("configured", None)


async def test_usage_can_be_set_as_it_is_reported() -> None:
    _, whole = await answer(stub(), call(options={"usage": {"input_tokens": 7, "cost_usd": 0.5}}))
    assert whole.usage == Usage(input_tokens=7, cost_usd=0.5)


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.promise("F1")
@pytest.mark.parametrize("failure_class", list(FailureClass))
async def test_it_fails_with_any_class_on_demand(failure_class: FailureClass) -> None:
    error = await failure(stub(), call(options={"fail": failure_class.value, "retry_after": 2.5}))
    assert (error.failure, error.retry_after) == (failure_class, 2.5)
    assert error.details["provider"] == "stub"


async def test_it_fails_only_in_the_first_so_many_attempts() -> None:
    provider = stub(fail="overloaded", fail_attempts=2)
    for number in (1, 2):
        assert (await failure(provider, call(attempt=number))).failure is FailureClass.OVERLOADED
    _, whole = await answer(provider, call(attempt=3))
    assert whole.text == "echo: one two"


@pytest.mark.promise("F1", "S1")
@pytest.mark.parametrize(
    "options",
    [
        {"text": 5},
        {"delay": -1},
        {"pieces": 0},
        {"fail": "no such class"},
        {"nothing": 1},
        {"record": "/etc/passwd"},
        {"context_tokens": 5},
    ],
)
async def test_a_script_that_makes_no_sense_is_the_request_s_own_fault(options: dict[str, Any]) -> None:
    error = await failure(stub(), call(options=options))
    assert error.failure is FailureClass.INVALID_REQUEST
    assert error.message.startswith("provider_options: ")


def test_a_misspelt_option_in_the_configuration_is_reported_with_the_nearest_one() -> None:
    config = ProviderConfig(kind="stub", models=("stub/*",), options={"dealy": 1.0})
    with pytest.raises(ConfigError, match=r"'providers\.stub\.delay'"):
        options_of(config, Options, "stub", {})


# -- stopping ---------------------------------------------------------------------------------------------------------


async def test_a_call_that_is_closed_early_ends_and_says_so(tmp_path: Path) -> None:
    provider = stub(tmp_path, record="calls", text="a b c", pieces=3)
    await provider.start()
    stream: AsyncGenerator[Chunk | Completion, None] = provider.complete(call(stream=True))
    assert isinstance(await anext(stream), Chunk)
    await stream.aclose()
    waits = asyncio.ensure_future(anext(provider.complete(call(options={"delay": 3_600.0}))))
    await asyncio.sleep(0)
    waits.cancel()
    await asyncio.wait([waits])
    await provider.stop()
    words = [line.split("\t")[0] for line in (tmp_path / "calls").read_text().splitlines()]
    assert words == ["begin", "end", "begin", "end"]


# -- the record -------------------------------------------------------------------------------------------------------


async def test_each_call_s_begin_and_end_are_recorded_for_those_who_look_from_outside(tmp_path: Path) -> None:
    provider = stub(tmp_path, record="var/calls", fail="timeout", fail_attempts=1)
    await provider.start()
    await failure(provider, call())
    await answer(provider, call(attempt=2))
    await provider.stop()
    await provider.stop()
    lines = (tmp_path / "var" / "calls").read_text().splitlines()
    assert [line.split("\t") for line in lines] == [
        [word, str(os.getpid()), "talk", "r", attempt] for attempt in "12" for word in ("begin", "end")
    ]
    await answer(provider, call(attempt=2))
    assert len((tmp_path / "var" / "calls").read_text().splitlines()) == 4


async def test_a_record_is_gone_on_with_by_the_next_daemon(tmp_path: Path) -> None:
    for _ in range(2):
        provider = stub(tmp_path, record="calls")
        await provider.start()
        await answer(provider, call())
        await provider.stop()
    assert len((tmp_path / "calls").read_text().splitlines()) == 4


def test_it_has_the_abilities_it_was_given() -> None:
    provider = stub(context_tokens=77, mcp=True)
    assert (provider.capabilities.context_tokens, provider.capabilities.mcp) == (77, True)
    assert not provider.capabilities.stateful
    assert provider.problem() is None
