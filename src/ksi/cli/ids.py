"""Ids that were shortened: from any unambiguous beginning to the whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ksi.client import Client

Kind = Literal["request", "conversation"]

SHOWN = 10
"""Candidates that are named."""

MADE = re.compile(r"[a-z]+_[0-9a-f]{26}")
"""An id that KSI made itself."""


async def whole_id(client: Client, word: str, kind: Kind = "request", *, changes: bool = False) -> str:
    """The id that `word` is, or is the beginning of; `word` itself if nothing begins so, for the daemon to refuse.

    `changes`: something will be changed by it. Then only ids that KSI made may be shortened: a name that somebody chose
    must be whole, because `job-1` may be gone and `job-10` be another piece of work.

    Raises:
        AmbiguousId: several begin so.
        NotFound: the only one that begins so was chosen by somebody, and must be whole.
        As `Client.send_event`.
    """
    if MADE.fullmatch(word) or not word:
        return word
    reply = await client.send_event("completion:find", {"beginning": word, "kind": kind, "limit": 100})
    return choose(word, reply.get("names", ()), more=bool(reply.get("more")), kind=kind, changes=changes)


def choose(word: str, names: Sequence[str], *, more: bool, kind: Kind, changes: bool) -> str:
    """Which of `names`, all of which begin with `word`, is meant. Raises as `whole_id`."""
    from ksi.errors import AmbiguousId, NotFound

    if word in names or not names:
        return word
    what = "requests" if kind == "request" else "conversations"
    if len(names) > 1 or more:
        others = f" and {'more' if more else len(names) - SHOWN}" if len(names) > SHOWN or more else ""
        raise AmbiguousId(
            f"{word!r} is the beginning of several {what}: {', '.join(sorted(names)[:SHOWN])}{others}; give more of it",
            candidates=sorted(names)[:SHOWN],
        )
    if changes and not MADE.fullmatch(names[0]):
        raise NotFound(
            f"no {kind} is named {word!r}; if you mean {names[0]!r}, give its whole name: it was chosen by somebody",
            candidates=list(names),
        )
    return names[0]
