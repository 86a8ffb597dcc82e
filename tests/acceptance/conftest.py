"""Folders whose paths a socket can have."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder with a short path."""
    with tempfile.TemporaryDirectory(prefix="ksi-", ignore_cleanup_errors=True) as folder:
        yield Path(folder).resolve()
