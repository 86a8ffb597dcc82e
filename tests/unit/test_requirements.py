"""The lock files: everything in them installs on each system that KSI runs on, without a compiler."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = ROOT / "requirements"
SYSTEMS = {"linux-x86_64", "linux-arm64", "macos-arm64", "macos-x86_64"}
MARKED = {"onnxruntime": {"macos-x86_64"}}
"""Packages of an extra that are not asked for on a system, by their markers: KSI goes on without them."""
ELSEWHERE = {**MARKED, "cryptography": {"macos-x86_64"}, "pywin32": SYSTEMS}
"""Packages of the tests alone that have no wheel for a system: CI does not run there, or they are for Windows."""


def pins(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9.-]+)==([^ ;]+)", (LOCKS / lock).read_text(), re.MULTILINE))


def wheels() -> dict[tuple[str, str], set[str]]:
    lines = [line.split() for line in (LOCKS / "wheels.txt").read_text().splitlines() if not line.startswith("#")]
    return {
        (name.partition("==")[0], name.partition("==")[2]): SYSTEMS if systems == ["any"] else set(systems)
        for name, *systems in lines
    }


@pytest.mark.promise("O12")
@pytest.mark.parametrize(("lock", "missing"), [("runtime.txt", MARKED), ("test.txt", ELSEWHERE)])
def test_every_locked_package_has_wheels_for_linux_and_macos(lock: str, missing: dict[str, set[str]]) -> None:
    listed = wheels()
    assert len(pins(lock)) > 20
    lacking = {name: SYSTEMS - listed[name, version] for name, version in pins(lock).items()}
    assert {name: systems for name, systems in lacking.items() if systems} == missing


def test_the_tests_lock_has_all_of_the_runtimes_lock() -> None:
    assert pins("runtime.txt").items() <= pins("test.txt").items()
