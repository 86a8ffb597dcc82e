"""The weights of the package are those that the chains in the repository teach."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.corpus import CORPUS
from tests.effort import effort


def check(*options: str) -> None:
    done = subprocess.run(
        [sys.executable, str(CORPUS / "learn.py"), "--check", *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.promise("C7")
def test_learning_again_gives_the_same_weights_and_all_were_learned_from_these_chains() -> None:
    check("--words")
    if effort(0, 1):
        check()  # with sentence vectors, some minutes: `./ksi test --long`
