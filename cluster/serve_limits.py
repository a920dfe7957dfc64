"""How much each key may ask, and how much may wait at all. Pure: time is handed in."""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_BUCKETS = 10_000


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


class RateLimiter:
    """Requests per key and minute.

    Guarantees:
    - a key gets at most `per_minute` requests at once, and `per_minute` in any later minute of refilling.
    """

    def __init__(self, per_minute: int | None) -> None:
        """None: no limit."""
        self._per_minute = per_minute
        self._buckets: dict[str, _Bucket] = {}

    def wait_s(self, key: str, now: float) -> int | None:
        """Count a request of the key; None lets it pass, else the whole seconds after which another one would."""
        if self._per_minute is None:
            return None
        bucket = self._buckets.get(key)
        if bucket is None:
            if len(self._buckets) >= MAX_BUCKETS:  # names come from a file of ours, but it may change for ever
                self._buckets.clear()
            bucket = self._buckets[key] = _Bucket(self._per_minute, now)
        refilled = bucket.tokens + (now - bucket.at) * self._per_minute / 60
        bucket.tokens, bucket.at = min(float(self._per_minute), refilled), now
        if bucket.tokens >= 1:
            bucket.tokens -= 1
            return None
        return max(1, math.ceil((1 - bucket.tokens) * 60 / self._per_minute))


def has_room(num_new: int, *, num_unfinished: int, num_seqs: int, max_waiting: int) -> bool:
    """Whether so many more samples may come, beside those that are unfinished, when engines run `num_seqs` at once."""
    return num_unfinished + num_new <= num_seqs + max_waiting
