"""How much the random and the repeated tests do, and the one seed that all their chance comes from.

`./ksi test` does as much as finds a fault that is often there. `./ksi test --long` does all of them at length, for a
nightly run or a change to the store.
"""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")

LONG = "KSI_TEST_LONG"
SEED = "KSI_TEST_SEED"


def effort(usual: int, long: int) -> int:
    """How often to do something: in each run of the tests, and in a long one."""
    return long if os.environ.get(LONG) else usual


def sample(cases: Iterable[T], usual: int) -> list[T]:
    """Some of the cases of a costly test, as the seed will have it, in their order; in a long run all of them."""
    every = list(cases)
    places = dice("sample").sample(range(len(every)), effort(usual, len(every)))
    return [every[place] for place in sorted(places)]


def seed() -> int:
    """The seed of this run, the same in every process of it."""
    return int(os.environ.setdefault(SEED, str(secrets.randbits(32))))


def dice(name: str) -> random.Random:
    """The chance of one test, by its name: it does not depend on the other tests of the run."""
    return random.Random(f"{seed()} {name}")
