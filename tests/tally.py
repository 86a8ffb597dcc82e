"""What tests that kill daemons count, and the line that sums it up at the end of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

PROPERTY = "tally"
"""The name under which a test's report carries its counts, so that they come back from parallel workers."""

Count = tuple[str, int]


@dataclass
class Tally:
    """How often daemons were harmed, and what came of the requests. The lists name each offender."""

    kills: int = 0
    harms: Counter[str] = field(default_factory=Counter)
    """What befell daemons besides."""
    acknowledged: int = 0
    lost: list[str] = field(default_factory=list)
    """Acknowledged, and unknown or without an end or a line in the response log."""
    doubled: list[str] = field(default_factory=list)
    """Begun, ended, told, logged or delivered more than once."""
    overlapping: list[str] = field(default_factory=list)
    """Runs that began while another of the same conversation ran."""
    orphans: list[str] = field(default_factory=list)
    """Places, locks, deliveries and processes that belong to nobody."""

    @property
    def counts(self) -> list[Count]:
        """Each word and its number."""
        return [
            ("kills", self.kills),
            *sorted(self.harms.items()),
            ("acknowledged", self.acknowledged),
            ("lost", len(self.lost)),
            ("doubled", len(self.doubled)),
            ("overlapping", len(self.overlapping)),
            ("orphans", len(self.orphans)),
        ]

    def check(self) -> None:
        """Nothing was lost, doubled, overlapping or orphaned."""
        assert self.acknowledged > 0
        for offenders in (self.lost, self.doubled, self.overlapping, self.orphans):
            assert offenders == []


def summed(counts: Iterable[Iterable[Count]]) -> str:
    """The counts of several tests as one line."""
    total = Counter[str]()
    for one in counts:
        for word, number in one:
            total[word] += number
    return ", ".join(f"{number:,} {word}" for word, number in total.items())
