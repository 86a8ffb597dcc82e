"""The store's Lua on the server: one function library, made of the files in the package's `lua/` folder."""

from __future__ import annotations

import hashlib
from importlib import resources

from ksi.request import FINAL_STATES, TRANSITIONS
from ksi.tokens import BYTES_PER_TOKEN

LAYOUT = 2
"""The version of the records that the functions write; see `lua/00_records.lua`."""


class Library:
    """The text that the server loads, and the names by which its functions are called.

    The name has the text's hash in it: daemons of different versions that share a layout use their own functions.
    """

    def __init__(self) -> None:
        folder = resources.files("ksi.store.redis") / "lua"
        files = sorted((file for file in folder.iterdir() if file.name.endswith(".lua")), key=lambda file: file.name)
        text = _tables() + "".join(_part(file.name, file.read_text("utf-8")) for file in files)
        self.name = f"ksi_{hashlib.sha256(text.encode()).hexdigest()[:10]}"
        self.text = f"#!lua name={self.name}\nlocal LIBRARY = '{self.name}'\n{text}"

    def function(self, verb: str) -> str:
        """The server's name of a verb."""
        return f"{self.name}_{verb}"


def _part(name: str, text: str) -> str:
    """A file of the library. What those without a number define is theirs alone: Lua takes 200 locals in one block."""
    return text if name[0].isdigit() else f"do\n{text}end\n"


def _tables() -> str:
    """The state table and the other values that Lua shares with Python."""
    steps = ", ".join(
        f"{state.value} = ' {' '.join(sorted(after.value for after in follow))} '"
        for state, follow in TRANSITIONS.items()
    )
    final = ", ".join(f"{state.value} = true" for state in sorted(FINAL_STATES))
    return f"local TRANSITIONS = {{{steps}}}\nlocal FINAL = {{{final}}}\nlocal BYTES_PER_TOKEN = {BYTES_PER_TOKEN}\n"
