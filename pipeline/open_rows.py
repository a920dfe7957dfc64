"""How many rows are open at once: enough for the engines, and no more than a killed driver may lose. Pure.

A row is open from when its shard is begun until the shard is whole and committed. One long answer keeps its shard open
after the others are done, so what engines still have to do is limited, and separately all that is open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MAX_CALLS = 256
"""A plan has more shards only if this many hold more rows than all engines can use."""
OPEN_FACTOR = 4
"""Rows of begun shards, done ones included, for each that engines may hold or are to get next. With one answer in a
hundred 20 times as long as the others, shards of 256 rows and 512 sequences, a replica is busy to 23, 43, 65 and 82%
with 1 to 4 of them (simulated in tests/pipeline/test_open_rows.py)."""
MAX_LOOKAHEAD = 2048


@dataclass(frozen=True, slots=True)
class OpenRows:
    """Limits from which on no other shard is begun."""

    unfinished: int
    """Rows that engines have to do."""
    begun: int
    """Rows of all shards that aren't whole, done or not: all are lost when the driver is killed."""
    uncommitted: int
    """Rows of whole shards that wait for their commit: enough for a store that takes seconds."""
    lookahead: int
    """Rows beyond the first two where prompts begin alike but come far apart, so that more of them meet."""
    rows_per_shard: int

    @classmethod
    def of(cls, window: int, rows_per_shard: int) -> OpenRows:
        """Limits for replicas that together hold `window` unfinished rows: half as many wait, and another shard."""
        wanted = math.ceil(1.5 * window)
        return cls(
            unfinished=wanted + rows_per_shard,
            begun=OPEN_FACTOR * wanted + rows_per_shard,
            uncommitted=max(4 * rows_per_shard, wanted + rows_per_shard),
            lookahead=min(8 * window, MAX_LOOKAHEAD),
            rows_per_shard=rows_per_shard,
        )

    def allow(self, *, unfinished: int, begun: int, uncommitted: int, looks_ahead: bool) -> bool:
        """Whether another shard may be begun beside so many rows."""
        more = self.lookahead if looks_ahead else 0
        return unfinished < self.unfinished + more and begun < self.begun + more and uncommitted < self.uncommitted

    def at_risk(self, *, looks_ahead: bool = False) -> int:
        """The most rows that a killed driver's successor does again."""
        more = self.lookahead if looks_ahead else 0
        return self.begun + self.uncommitted + more + 2 * self.rows_per_shard  # looked at before a shard, not after

    def num_calls(self, shard_rows: Sequence[int], *, twin_factor: int) -> int:
        """Shards that the dispatch process is handed at once; see `num_calls`."""
        return num_calls(shard_rows, self.begun + self.lookahead, twin_factor=twin_factor)


def num_calls(shard_rows: Sequence[int], limit: int, *, twin_factor: int) -> int:
    """As many neighbours as have `limit` rows together.

    Each is a thread of the dispatch process, of which an engine with 512 sequences would otherwise start thousands for
    one-row shards.
    """
    most, first, rows = 1, 0, 0
    for last, size in enumerate(shard_rows):
        rows += size
        while rows > limit and first < last:
            rows -= shard_rows[first]
            first += 1
        most = max(most, last - first + 1)
    return min(len(shard_rows), MAX_CALLS, (most + 1) * twin_factor)
