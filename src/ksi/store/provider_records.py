"""Small records that daemons keep in their store, one for each provider, changed by compare and set."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ksi.clock import Moment


class KeptRecord(msgspec.Struct, frozen=True):
    """A record as it is kept."""

    version: int = 0
    """0 if there is none; grows with each change."""
    value: bytes = b""


class KeptRecords(msgspec.Struct, frozen=True):
    """All records."""

    at: int
    """The store's wall time, which all daemons share, in microseconds."""
    records: Mapping[str, KeptRecord] = {}


class PutRecord(msgspec.Struct, frozen=True):
    """The result of a change."""

    at: int
    """The store's wall time in microseconds."""
    written: bool
    kept: KeptRecord
    """The record as it is now: the new one, or another daemon's."""


class HeldRecords:
    """Records in memory."""

    def __init__(self, kept: Mapping[str, KeptRecord] | None = None) -> None:
        self._kept = dict(kept or {})

    @property
    def kept(self) -> Mapping[str, KeptRecord]:
        """All records by name."""
        return self._kept

    def version(self, name: str) -> int:
        """The version of the record that is kept now."""
        return self._kept.get(name, KeptRecord()).version

    def take(self, name: str, value: bytes) -> None:
        """Keep a value whatever there was."""
        self._kept[name] = KeptRecord(self.version(name) + 1, value)

    async def provider_records(self, now: Moment) -> KeptRecords:
        """See `ksi.store.base.Store`."""
        return KeptRecords(now.wall, dict(self._kept))

    async def put_provider_record(self, name: str, version: int, value: bytes, now: Moment, *, tell: bool) -> PutRecord:
        """See `ksi.store.base.Store`."""
        written = self.version(name) == version
        if written:
            self.take(name, value)
        return PutRecord(now.wall, written, self._kept.get(name, KeptRecord()))
