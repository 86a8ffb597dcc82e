"""Knows the second try of a call whose client gives no id: by who sent it, and by its body."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import msgspec

from ksi.clock import Clock, microseconds
from ksi.completion.completion_service import CompletionService
from ksi.completion.replies import is_final
from ksi.errors import NotFound
from ksi.events.completions import GetData
from ksi.http.errors import Refusal
from ksi.http.fleets import Sender
from ksi.request import State

REMEMBER = 60.0
"""Seconds for which the unstreamed try of a refused stream gets the refusal's status."""

STILL_NEW = 900.0
"""Seconds for which an answer that was not fetched is kept for its client's retry."""

MOST_REMEMBERED = 10_000

_PREFIX = "cc_"


def key_of(sender: Sender, body: Mapping[str, Any]) -> str:
    """The common key of two tries of the same call."""
    said = msgspec.json.encode([sender.session, sender.agent, body])
    return hashlib.blake2b(said, digest_size=16).hexdigest()


class Retries:
    """Gives a call the id of an earlier one that it repeats, as long as the answer to that was not fetched.

    So a client that lost its connection, or the daemon under it, gets the answer that was made and paid for.
    """

    def __init__(self, completions: CompletionService, clock: Clock) -> None:
        self._completions = completions
        self._clock = clock
        self._number: OrderedDict[str, int] = OrderedDict()
        """The number of ended calls with a key, if there were any."""
        self._refused: OrderedDict[str, tuple[int, Refusal]] = OrderedDict()

    async def request_id(self, key: str) -> str:
        """The id for a call."""
        while True:
            number = self._number.get(key, 0)
            request_id = f"{_PREFIX}{key}" if number == 0 else f"{_PREFIX}{key}_{number}"
            if await self._is_open(request_id):
                return request_id
            self.over(key)

    def over(self, key: str) -> None:
        """A call's answer has reached its client, or its id means something else: the same call is a new one."""
        self._number[key] = self._number.get(key, 0) + 1
        self._number.move_to_end(key)
        if len(self._number) > MOST_REMEMBERED:
            self._number.popitem(last=False)

    async def _is_open(self, request_id: str) -> bool:
        try:
            view = await self._completions.get(GetData(request_id=request_id))
        except NotFound:
            return True
        if view.status != State.COMPLETED.value:
            return not is_final(view.status)
        return view.finished_at is not None and self._clock.unix() - view.finished_at < STILL_NEW

    # -- refused streams ----------------------------------------------------------------------------------------------

    def refused(self, sender: Sender, body: Mapping[str, Any], refusal: Refusal) -> None:
        """A held stream was refused: its client asks once more without a stream, to see the status."""
        until = self._clock.now().mono + microseconds(REMEMBER)
        self._refused[key_of(sender, _unstreamed(body))] = (until, refusal)
        if len(self._refused) > MOST_REMEMBERED:
            self._refused.popitem(last=False)

    def refusal(self, sender: Sender, body: Mapping[str, Any]) -> Refusal | None:
        """The refusal of the stream that this call asks for once more."""
        if not self._refused:
            return None
        until, refusal = self._refused.pop(key_of(sender, _unstreamed(body)), (0, None))
        return refusal if until > self._clock.now().mono else None


def _unstreamed(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in ("stream", "max_tokens")}
