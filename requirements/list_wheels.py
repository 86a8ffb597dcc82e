"""Lists for which systems the locked packages have wheels: `list_wheels.py PYLOCK LOCK...` on stdout. Run by lock.sh.

Only wheels whose hashes stand in the lock files count. A line is `name==version` and the systems for which there is a
wheel for every Python from OLDEST to NEWEST; `any` is a wheel of pure Python.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

OLDEST, NEWEST = 11, 14
SYSTEMS = {
    "linux-x86_64": r"manylinux\w*_x86_64",
    "linux-arm64": r"manylinux\w*_aarch64",
    "macos-arm64": r"macosx_\w+_(arm64|universal2)",
    "macos-x86_64": r"macosx_\w+_(x86_64|universal2)",
}


def serves(python: str, abi: str, minor: int) -> bool:
    """True if a wheel with these tags runs on Python 3.`minor`."""
    for tag in python.split("."):
        if tag == "py3" or (tag == f"cp3{minor}" and abi in (tag, "none", "abi3")):
            return True
        if "abi3" in abi and re.fullmatch(r"cp3\d+", tag) and int(tag[3:]) <= minor:
            return True
    return False


def systems_of(wheels: list[dict[str, Any]], hashes: set[str]) -> list[str]:
    """The systems that the locked wheels of a package serve, or `any`."""
    locked = [wheel for wheel in wheels if wheel["hashes"]["sha256"] in hashes]
    tags = [wheel["url"].rpartition("/")[2].removesuffix(".whl").split("-")[-3:] for wheel in locked]
    if any(platform == "any" for _, _, platform in tags):
        return ["any"]

    def served(pattern: str) -> bool:
        here = [(python, abi) for python, abi, platform in tags if re.search(pattern, platform)]
        return all(any(serves(*tag, minor) for tag in here) for minor in range(OLDEST, NEWEST + 1))

    return [name for name, pattern in SYSTEMS.items() if served(pattern)]


def main() -> None:
    """Write the list."""
    pylock, *locks = sys.argv[1:]
    hashes = {found for path in locks for found in re.findall(r"sha256:([0-9a-f]{64})", Path(path).read_text())}
    print("# Made by requirements/lock.sh: the systems for which each locked package has wheels.")
    for package in tomllib.loads(Path(pylock).read_text())["packages"]:
        systems = systems_of(package.get("wheels", []), hashes)
        print(f"{package['name']}=={package['version']}", *systems)


if __name__ == "__main__":
    main()
