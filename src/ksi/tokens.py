"""Estimates of tokens, for texts that no provider has counted."""

from __future__ import annotations

BYTES_PER_TOKEN = 3.5
"""Bytes of UTF-8 for each token. This overestimates plain English and is right for mixed text, so that a text cut to a
context or a rate limit fits."""
CHARACTERS_PER_TOKEN = 4
"""Characters for each token, by which a chain's budget is charged if a provider reports no usage: the common mean for
English."""


def estimate_tokens(text: str) -> int:
    """About how many tokens a text has, on the careful side."""
    size = len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
    return int(size / BYTES_PER_TOKEN) + 1
