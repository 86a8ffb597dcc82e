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
    """The store's time, which all daemons share, in microseconds."""
    records: Mapping[str, KeptRecord] = {}


class PutRecord(msgspec.Struct, frozen=True):
    """What became of a change."""

    at: int
    """The store's time."""
    written: bool
    kept: KeptRecord
    """The record as it is now: the new one, or another daemon's."""


class RecordKeeper:
    """Keeps records for daemons of one process, as long as it lives."""

    def __init__(self) -> None:
        self._records: dict[str, KeptRecord] = {}

    def all(self, now: Moment) -> KeptRecords:
        """See `ksi.store.base.Store.provider_records`."""
        return KeptRecords(now.mono, dict(self._records))

    def version(self, name: str) -> int:
        """Of the record that is kept now."""
        return self._records.get(name, KeptRecord()).version

    def put(self, name: str, version: int, value: bytes, now: Moment) -> PutRecord:
        """See `ksi.store.base.Store.put_provider_record`."""
        kept = self._records.get(name, KeptRecord())
        written = kept.version == version
        if written:
            kept = self._records[name] = KeptRecord(version + 1, value)
        return PutRecord(now.mono, written, kept)
