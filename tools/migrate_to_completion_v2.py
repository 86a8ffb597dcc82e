#!/usr/bin/env python3
"""`ksi migrate` under its old name: from service version 1 to version 2, and back with --rollback.

Any Python can start it. The checkout's launcher makes .venv where it is not there yet, and runs the command in it. The
home is --root, else KSI_HOME, else this checkout.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Become the command."""
    launcher = str(CHECKOUT / "ksi")
    home = os.environ.get("KSI_HOME") or str(CHECKOUT)
    os.execv(launcher, [launcher, "--home", home, "migrate", *sys.argv[1:]])


if __name__ == "__main__":
    main()
