"""Small records that daemons keep in their store, one for each provider, changed by compare and set (D1)."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ksi.clock import Moment


class KeptRecord(msgspec.Struct, frozen=True):
    """A record as it is kept."""

    version: int = 0
    """0 where there is none; grows with each change."""
    value: bytes = b""


class KeptRecords(msgspec.Struct, frozen=True):
    """All records."""

    at: int
    """The store's wall time, which all daemons share, in microseconds."""
    records: Mapping[str, KeptRecord] = {}


class PutRecord(msgspec.Struct, frozen=True):
    """What became of a change."""

    at: int
    """The store's wall time in microseconds."""
    written: bool
    kept: KeptRecord
    """The record as it is now: the new one, or another daemon's."""


class HeldRecords:
    """Keeps records as long as the process lives, for a daemon without a store that lasts."""

    def __init__(self) -> None:
        self._records: dict[str, KeptRecord] = {}

    async def provider_records(self, now: Moment) -> KeptRecords:
        """See `ksi.store.base.Store`."""
        return KeptRecords(now.wall, dict(self._records))

    def version(self, name: str) -> int:
        """Of the record that is kept now."""
        return self._records.get(name, KeptRecord()).version

    async def put_provider_record(self, name: str, version: int, value: bytes, now: Moment, *, tell: bool) -> PutRecord:
        """See `ksi.store.base.Store`."""
        kept = self._records.get(name, KeptRecord())
        written = kept.version == version
        if written:
            kept = self._records[name] = KeptRecord(version + 1, value)
        return PutRecord(now.wall, written, kept)
