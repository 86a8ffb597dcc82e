"""Prices: the configuration's word, nothing at home, the public lists; unknown is unknown."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime

import genai_prices
import msgspec
import pytest
from genai_prices.data_snapshot import get_snapshot
from genai_prices.types import StartDateConstraint

from ksi.clock import microseconds
from ksi.completion.replies import Teller
from ksi.completion.usage import public_prices
from ksi.completion.usage.prices import FREE, UNKNOWN, Prices
from ksi.completion.usage.public_prices import PriceLibrary
from ksi.config.schema import PriceConfig
from ksi.providers.base import Capabilities
from ksi.request import UNPRICED, Attempt, Outcome, Priority, State, Usage
from ksi.store.usage import rates_for
from ksi.store.values import RequestView

NOW = microseconds(1_795_000_000)
PROVIDERS = {
    "anthropic": Capabilities(price_list="https://api.anthropic.com"),
    "cli": Capabilities(price_list="anthropic"),
    "team": Capabilities(price_list="http://127.0.0.1:9000/v1"),
    "home": Capabilities(free=True),
    "mystery": Capabilities(),
}


def attempt(provider: str, model: str | None = None, asked: str | None = None, **usage: float | None) -> Attempt:
    tokens = {"input_tokens": 1_000_000, "output_tokens": 0, **usage}
    return Attempt(
        number=1,
        provider=provider,
        outcome=Outcome.COMPLETED,
        started_at=NOW,
        finished_at=NOW,
        model=model,
        asked=asked,
        usage=Usage(**tokens),  # type: ignore[arg-type]
    )


def prices(**configured: PriceConfig) -> Prices:
    return Prices({name.replace("__", "/"): price for name, price in configured.items()}, PROVIDERS)


def test_a_local_model_costs_nothing() -> None:
    assert prices().tariff("home", "m", "home/m", NOW) is FREE
    assert prices().cost(attempt("home", "m")) == 0.0


def test_a_configured_price_wins_over_everything_but_the_provider_s_own_word() -> None:
    known = prices(home__m=PriceConfig(input=2.0, output=4.0))
    assert known.cost(attempt("home", "m", output_tokens=500_000)) == pytest.approx(4.0)
    assert known.cost(attempt("home", "m", cost_usd=0.25)) == 0.25
    assert known.cost(attempt("home", "other")) == 0.0


def test_without_a_price_of_their_own_cached_tokens_cost_the_same_as_input() -> None:
    plain = prices(home__m=PriceConfig(input=2.0, output=4.0))
    assert plain.cost(attempt("home", "m", cache_read_tokens=1_000_000, cache_write_tokens=500_000)) == pytest.approx(5)
    own = prices(home__m=PriceConfig(input=2.0, output=4.0, cache_read=0.2, cache_write=0.0))
    assert own.cost(attempt("home", "m", cache_read_tokens=1_000_000, cache_write_tokens=500_000)) == pytest.approx(2.2)


def test_a_price_goes_by_the_model_that_answered_and_by_the_one_asked_for_exact_names_first() -> None:
    configured = {
        "cli/*": PriceConfig(input=1.0, output=0.0),
        "cli/haiku": PriceConfig(input=2.0, output=0.0),
        "cli/claude-haiku-9": PriceConfig(input=3.0, output=0.0),
    }
    known = Prices(configured, PROVIDERS)
    assert known.cost(attempt("cli", "claude-haiku-9", "cli/haiku")) == pytest.approx(3.0)
    assert known.cost(attempt("cli", "claude-haiku-8", "cli/haiku")) == pytest.approx(2.0)
    assert known.cost(attempt("cli", "x", "cli/x")) == pytest.approx(1.0)
    assert known.cost(attempt("cli", None, "cli/x")) == pytest.approx(1.0)
    assert known.cost(attempt("team", "x", "team/x")) is None


@pytest.mark.promise("T2")
async def test_an_unknown_price_is_none_and_not_zero() -> None:
    known = prices()
    await known.ready(["anthropic", "team"])
    assert known.tariff("mystery", "m", "mystery/m", NOW) is UNKNOWN
    # A model of a known name at an address that is nobody's.
    assert known.cost(attempt("team", "gpt-5", "team/gpt-5")) is None
    assert known.cost(attempt("anthropic", "no-such-model")) is None
    assert known.cost(attempt("gone", "claude-haiku-4-5")) is None
    assert known.cost(attempt("anthropic", None, None)) is None


@pytest.mark.promise("T2")
async def test_public_prices_are_found_by_address_and_by_name() -> None:
    known = prices()
    assert known.cost(attempt("anthropic", "claude-haiku-4-5")) is None
    await known.ready(["home", "cli"])
    by_address = known.cost(attempt("anthropic", "claude-haiku-4-5-20251001"))
    assert by_address == known.cost(attempt("cli", "claude-haiku-4-5-20251001", "cli/haiku"))
    assert by_address == known.cost(attempt("cli", None, "cli/claude-haiku-4-5-20251001"))
    assert by_address is not None
    assert by_address > 0


@pytest.mark.promise("T1")
async def test_the_first_reply_waits_for_the_lists_and_has_its_cost() -> None:
    view = RequestView(
        request_id="r",
        conversation="c",
        state=State.COMPLETED,
        priority=Priority.NORMAL,
        model="cli/haiku",
        route="cli",
        body=b"{}",
        attempts=(attempt("cli", "claude-haiku-4-5"), attempt("home", "m")),
    )
    known = prices()
    reply = await Teller(known).tell(view)
    assert reply.cost_usd == known.cost(view.attempts[0])
    assert reply.cost_usd is not None
    unknown = msgspec.structs.replace(view, attempts=(*view.attempts, attempt("mystery", "m")))
    assert (await Teller(known).tell(unknown)).cost_usd is None


async def test_the_lists_are_read_only_if_a_price_is_looked_up_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    class Counted:
        def __init__(self) -> None:
            read.append("read")

    monkeypatch.setattr(public_prices, "PriceLibrary", Counted)
    known = prices()
    await known.ready(["home", "mystery", "unknown"])
    assert read == []
    known.warm("cli")
    await known.ready(["cli"])
    await known.ready(["anthropic"])
    assert read == ["read"]


async def test_lists_that_cannot_be_read_leave_prices_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ValueError("no table")

    monkeypatch.setattr(public_prices, "PriceLibrary", broken)
    known = prices()
    await known.ready(["cli"])
    await known.ready(["cli"])
    assert known.cost(attempt("cli", "claude-haiku-4-5")) is None
    assert known.cost(attempt("home", "m")) == 0.0


def test_the_daemon_starts_without_the_table() -> None:
    script = "import sys, ksi.daemon; sys.exit('genai_prices' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# The library.


@pytest.fixture(scope="module")
def library() -> PriceLibrary:
    return PriceLibrary()


@pytest.mark.parametrize(
    ("price_list", "model"),
    [
        ("anthropic", "claude-haiku-4-5"),
        ("anthropic", "claude-sonnet-4-5"),
        ("openai", "gpt-5"),
        ("google", "gemini-2.5-pro"),
        ("perplexity", "sonar-pro"),
        ("perplexity", "sonar-deep-research"),
        ("deepseek", "deepseek-chat"),
    ],
)
@pytest.mark.parametrize("size", [0, 1_000, 200_000, 200_001, 900_000])
def test_a_tariff_has_the_package_s_price(library: PriceLibrary, price_list: str, model: str, size: int) -> None:
    usage = Usage(
        input_tokens=size // 2,
        output_tokens=700,
        cache_read_tokens=size // 4,
        cache_write_tokens=size - size // 2 - size // 4,
        reasoning_tokens=300,
    )
    theirs = genai_prices.calc_price(
        genai_prices.Usage(
            input_tokens=usage.input_size,
            cache_read_tokens=usage.cache_read_tokens,
            cache_write_tokens=usage.cache_write_tokens,
            output_tokens=usage.output_tokens,
            output_reasoning_tokens=usage.reasoning_tokens,
        ),
        model,
        provider_id=price_list,
        genai_request_timestamp=datetime.fromtimestamp(NOW / 1e6, UTC),
    )
    rates = rates_for(library.tariff(price_list, model, NOW), usage)
    assert rates is not None
    assert rates.cost(usage) == pytest.approx(float(theirs.total_price))


def test_a_price_is_that_of_its_time(library: PriceLibrary) -> None:
    changed = [
        (provider.id, model.id, price.constraint.start_date)
        for provider in get_snapshot().providers
        for model in provider.models
        if isinstance(model.prices, list)
        for price in model.prices
        if isinstance(price.constraint, StartDateConstraint) and price.prices != model.prices[0].prices
    ]
    differing = 0
    for provider, model, start in changed:
        midnight = microseconds(datetime(start.year, start.month, start.day, tzinfo=UTC).timestamp())
        differing += library.tariff(provider, model, midnight - 1) != library.tariff(provider, model, midnight)
    assert differing > 5


def test_a_model_without_both_prices_has_no_tariff(library: PriceLibrary) -> None:
    assert library.tariff("openai", "no-such-model", NOW) == ()
    assert library.tariff("nobody", "gpt-5", NOW) == ()
    assert library.tariff("openai", "text-embedding-3-small", NOW) == ()


HOUR = Usage(input_tokens=0, output_tokens=0, cache_write_tokens=100_000, cost_usd=UNPRICED)


@pytest.mark.promise("A7", "T2")
@pytest.mark.parametrize(
    ("price", "hour_tokens", "cost"),
    [
        (PriceConfig(input=3.0, output=15.0, cache_write=3.75), 100_000, 0.6),
        (PriceConfig(input=3.0, output=15.0, cache_write=3.75), 50_000, 0.4875),
        (PriceConfig(input=3.0, output=15.0, cache_write=3.75, cache_write_hour=5.0), 100_000, 0.5),
        (PriceConfig(input=0.0, output=0.0), 100_000, 0.0),
    ],
)
def test_an_hour_s_cache_is_priced_when_the_call_ends(price: PriceConfig, hour_tokens: int, cost: float) -> None:
    usage = prices(home__m=price).with_hour_cache("home", "m", "home/m", HOUR, hour_tokens, NOW)
    assert usage == msgspec.structs.replace(HOUR, cost_usd=pytest.approx(cost))


@pytest.mark.promise("A7", "T2")
def test_an_hour_s_cache_at_a_public_price_costs_twice_the_input() -> None:
    known = prices()
    known._load()
    usage = known.with_hour_cache("anthropic", "claude-haiku-4-5", None, HOUR, 100_000, NOW)
    (rates, *_) = known.tariff("anthropic", "claude-haiku-4-5", None, NOW)
    assert usage.cost_usd == pytest.approx(0.1 * 2 * rates.input)


@pytest.mark.promise("A7", "T2")
def test_an_hour_s_cache_without_a_known_price_stays_without_a_cost() -> None:
    assert prices().with_hour_cache("mystery", "m", None, HOUR, 100_000, NOW) == HOUR
    plain = Usage(input_tokens=1)
    assert prices(home__m=PriceConfig(input=3.0, output=1.0)).with_hour_cache("home", "m", None, plain, 0, NOW) == plain


@pytest.mark.promise("A7", "T2")
def test_a_call_that_no_price_fits_has_no_cost_whatever_is_configured() -> None:
    assert prices(home__m=PriceConfig(input=3.0, output=1.0)).cost(attempt("home", "m", cost_usd=UNPRICED)) is None
