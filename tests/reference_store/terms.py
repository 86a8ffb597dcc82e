"""The terms of offers in memory: the common rate of all users of the same slots (D1, F3, F5)."""

from __future__ import annotations

from ksi.clock import MICROSECONDS, Moment
from ksi.request import Attempt
from ksi.store.chains import charge
from ksi.store.image.data import Request
from ksi.store.values import Terms
from ksi.tokens import BYTES_PER_TOKEN
from tests.reference_store.data import MemoryData

_MINUTE = 60 * MICROSECONDS


class TermsKeeper:
    """Buckets that hold a minute's worth and fill evenly, for each slot; probes are counted from the requests."""

    def __init__(self, data: MemoryData) -> None:
        self._data = data
        self._left: dict[tuple[str, str], tuple[int, int]] = {}
        """Calls and tokens: the rest, in units of 1/60,000,000, and its time."""
        self._guesses: dict[int, tuple[int, int]] = {}
        """By fence: tokens that were guessed, of how many per minute."""

    def allow(self, terms: Terms | None, slot: str, now: Moment) -> bool:
        """True if one more call may begin."""
        if terms is None:
            return True
        probing = sum(self._data.request(key).probe for key in self._data.running.walk((slot,)))
        return (terms.probes is None or probing < terms.probes) and self.wait(terms, slot, now) == 0

    def wait(self, terms: Terms | None, slot: str, now: Moment) -> int:
        """In how many microseconds a minute's limit lets one begin."""
        limits = () if terms is None else (("calls", terms.requests), ("tokens", terms.tokens))
        missing = ((_MINUTE - self._level(slot, what, limit, now), limit) for what, limit in limits if limit)
        return max((-(-units // limit) for units, limit in missing if units > 0), default=0)

    def take(self, request: Request, terms: Terms | None, now: Moment) -> None:
        """A call begins; it has its slot and its fence."""
        request.probe = terms is not None and terms.probes is not None
        slot = request.slot or ""
        if terms is None:
            return
        if terms.requests:
            self._draw(slot, "calls", terms.requests, 1, now)
        if terms.tokens:
            guess = int(len(request.body) / BYTES_PER_TOKEN)
            self._draw(slot, "tokens", terms.tokens, guess, now)
            self._guesses[request.fence] = guess, terms.tokens

    def settle(self, request: Request, attempt: Attempt, now: Moment) -> None:
        """It ended; its usage is corrected, if it is known."""
        guessed = self._guesses.pop(request.fence, None)
        used, estimated = charge(attempt, 0)
        if guessed is not None and not estimated:
            guess, limit = guessed
            self._draw(request.slot or "", "tokens", limit, used - guess, now)

    def _level(self, slot: str, what: str, limit: int, now: Moment) -> int:
        most = limit * _MINUTE
        left, at = self._left.get((slot, what), (most, now.mono))
        return min(most, left + max(0, now.mono - at) * limit)

    def _draw(self, slot: str, what: str, limit: int, amount: int, now: Moment) -> None:
        self._left[slot, what] = self._level(slot, what, limit, now) - amount * _MINUTE, now.mono
