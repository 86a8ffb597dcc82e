"""Taking a snapshot into an empty reference store."""

from __future__ import annotations

from collections.abc import Iterable

from ksi.clock import Moment
from ksi.errors import StoreNotEmpty
from ksi.store.image import load as image
from ksi.store.provider_records import HeldRecords
from ksi.store.snapshot.records import Loaded, Record
from ksi.store.values import StoreRules
from tests.reference_store.data import MemoryData


def load(data: MemoryData, rules: StoreRules, records: Iterable[Record], now: Moment) -> Loaded:
    """Load a snapshot into the empty store; if it cannot be loaded, nothing is changed.

    Raises:
        StoreNotEmpty: there is something.
        CheckpointInvalid: the records do not fit together.
    """
    if data.members or data.conversations:
        raise StoreNotEmpty(
            "a checkpoint is only loaded into an empty store: take a new home, or move this one's away first",
            requests=len(data.members),
            conversations=len(data.conversations),
        )
    fresh = MemoryData()
    fresh.heard.update(data.heard)
    fresh.records = HeldRecords(data.records.kept)
    fresh.count_on({"fence": data.last_number("fence")})
    loaded = image.load(fresh, rules, records, now)
    for conversation in fresh.conversations.values():
        fresh.reindex(conversation)
    data.become(fresh)
    return loaded
