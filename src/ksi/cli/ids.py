"""Shortened ids: from any unambiguous prefix to the whole id."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ksi.client import Client

Kind = Literal["request", "conversation"]

SHOWN = 10
"""Maximum number of candidates in a message."""

MADE = re.compile(r"[a-z]+_[0-9a-f]{26}")
"""An id made by KSI itself."""


async def send_named(
    client: Client, event: str, data: Mapping[str, Any], field: str, kind: Kind = "request", *, changes: bool = False
) -> dict[str, Any]:
    """Send an event with a name in `field`, which may be shortened. A whole id needs no look-up.

    Raises:
        AmbiguousId, NotFound: as `whole_id`.
        As `Client.send_event`.
    """
    from ksi.errors import RemoteError

    try:
        return await client.send_event(event, data)
    except RemoteError as error:
        if error.code != "not_found":
            raise
        whole = await whole_id(client, data[field], kind, changes=changes)
        if whole == data[field]:
            raise
    return await client.send_event(event, {**data, field: whole})


async def whole_id(client: Client, word: str, kind: Kind = "request", *, changes: bool = False) -> str:
    """The id with the prefix `word`; `word` itself if no id has this prefix.

    A delivery's id consists of its request's id and a number: `req_.../1`.

    `changes` says that the caller will change something. Then only ids made by KSI may be shortened: a chosen name must
    be whole, because `job-1` may be gone and `job-10` may be another piece of work.

    Raises:
        AmbiguousId: several ids have this prefix.
        NotFound: the only id with this prefix was chosen by a client, and must be whole. As `Client.send_event`.
    """
    from ksi.errors import RemoteError

    name, slash, number = word.partition("/")
    if not name or MADE.fullmatch(name):
        return word
    try:
        reply = await client.send_event("completion:find", {"beginning": name, "kind": kind, "limit": 100})
    except RemoteError as error:
        if error.code not in ("unknown_event", "not_available_in_v1"):
            raise
        return word  # a daemon that cannot look up names
    found = choose(name, reply.get("names", ()), more=bool(reply.get("more")), kind=kind, changes=changes)
    return f"{found}{slash}{number}"


def choose(word: str, names: Sequence[str], *, more: bool, kind: Kind, changes: bool) -> str:
    """The one of `names`, all of which begin with `word`, that is meant. Raises as `whole_id`."""
    from ksi.errors import AmbiguousId, NotFound

    if word in names or not names:
        return word
    # A request that carries a delivery is called `<the sending request>/<number>`: the shorter one is meant.
    names = [name for name in names if name.rpartition("/")[0] not in names]
    what = "requests" if kind == "request" else "conversations"
    if len(names) > 1 or more:
        others = f" and {'more' if more else len(names) - SHOWN}" if len(names) > SHOWN or more else ""
        raise AmbiguousId(
            f"{word!r} is the beginning of several {what}: {', '.join(sorted(names)[:SHOWN])}{others}; give more of it",
            candidates=sorted(names)[:SHOWN],
        )
    if changes and not MADE.fullmatch(names[0]):
        raise NotFound(
            f"no {kind} is named {word!r}; if you mean {names[0]!r}, give its whole name: a client chose it",
            candidates=list(names),
        )
    return names[0]
