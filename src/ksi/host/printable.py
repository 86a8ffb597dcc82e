"""The one rule for output to a terminal: no control characters except our own. Pure.

Names, texts and errors come from clients, models and endpoints. A terminal obeys control characters (also those of
C1, above 0x7f), and it moves and hides text at marks of direction and of no width.
"""

from __future__ import annotations


def visible(text: str, keep: str = "") -> str:
    """The text with each character that is not printable spelt out, apart from those in `keep`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


def escaped(text: str, *, ascii_only: bool = False) -> str:
    """JSON that means the same, without a character that is not printable; with `ascii_only`, in ASCII alone."""
    if text.isprintable() and not (ascii_only and not text.isascii()):
        return text
    return "".join(c if c.isprintable() and not (ascii_only and ord(c) > 126) else _json_escape(c) for c in text)


def _json_escape(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))
