"""The records of providers that daemons share, on Redis; `ksi.store.base.Store` documents each verb."""

from __future__ import annotations

from ksi.clock import Moment
from ksi.store.provider_records import KeptRecord, KeptRecords, PutRecord
from ksi.store.redis.calls import Calls
from ksi.store.redis.values import Answer


class _Records(Answer, frozen=True, kw_only=True):
    at: int
    names: tuple[str, ...] = ()
    versions: tuple[int, ...] = ()


class _Put(Answer, frozen=True, kw_only=True):
    at: int = 0
    written: bool = False
    version: int = 0


class RedisProviders:
    """Records by compare and set; other daemons hear of a change by push."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def provider_records(self, now: Moment) -> KeptRecords:
        """See the protocol."""
        found, values = await self._calls.read("provider_records", _Records, mono=now.mono)
        kept = (KeptRecord(version, value) for version, value in zip(found.versions, values, strict=True))
        return KeptRecords(found.at, dict(zip(found.names, kept, strict=True)))

    async def put_provider_record(self, name: str, version: int, value: bytes, now: Moment, *, tell: bool) -> PutRecord:
        """See the protocol."""
        answer, values = await self._calls.change(
            "put_provider_record", now, _Put, (value,), name=name, version=version, tell=tell
        )
        if answer.written:
            return PutRecord(answer.at, True, KeptRecord(answer.version, value))
        if not values:
            # The call was sent again, and answered as the first time; bytes are not kept with answers.
            found = await self.provider_records(now)
            return PutRecord(found.at, False, found.records.get(name, KeptRecord()))
        return PutRecord(answer.at, False, KeptRecord(answer.version, values[0]))
