"""Evening out the end of a run: which rows a replica that has run dry takes over from a slow one. Pure.

A replica holds about twice what it can run at once, so that it never waits for us. When the input runs dry, that store
is the tail of the run: on a replica three times slower than its neighbour it lasts three times as long. What the slow
one hasn't begun is called back. What it has begun is begun once more at a fast one that has sequences free, and the
first answer counts: MapReduce's backup tasks (Dean and Ghemawat 2004, section 3.6).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

MEMORY_S = 20.0
"""Time over which a replica's speed is averaged."""
MEMORY_ROWS = 100
"""Rows over which its pace is."""
BACKUP_SPEEDUP = 1.5
"""How many times as fast a replica must be for a row to begin again there. Of 8,000 rows on four replicas of four
speeds (simulated, 12 seeds, `tests/bench/simulate_fleet.py`) the last tenth takes 23.2 s, with 2.0 25.4 s, with 1.0
23.8 s, and 39.8 s without; 96 rows are begun twice, by sequences that had nothing to do."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one replica has and how fast it is."""

    in_flight: int
    num_sequences: int
    """Rows that its engine runs at once."""
    num_recallable: int
    """Rows that its engine hasn't begun."""
    rate: float | None
    """Rows per second; None until it has finished some."""


@dataclass(frozen=True, slots=True)
class Recall:
    """Call back so many rows from this replica."""

    replica: str
    count: int


class SpeedMeter:
    """Rows per second of one replica while it has work, the last `MEMORY_S` seconds weighing most."""

    def __init__(self) -> None:
        self._rows = 0.0
        self._seconds = 0.0

    def add(self, rows: int, seconds: float) -> None:
        """Take in what finished during so many seconds of work."""
        keep = 0.5 ** (seconds / MEMORY_S)
        self._rows = self._rows * keep + rows
        self._seconds = self._seconds * keep + seconds

    @property
    def rate(self) -> float | None:
        """Rows per second; None before the first row."""
        return self._rows / self._seconds if self._rows and self._seconds else None


class PaceMeter:
    """Tokens per second of one row at one replica, the last `MEMORY_ROWS` rows weighing most."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Take in a row that the engine worked on for so long; what no time is known of (NaN) tells nothing."""
        if tokens > 0 and seconds > 0:
            keep = 0.5 ** (1 / MEMORY_ROWS)
            self._tokens = self._tokens * keep + tokens
            self._seconds = self._seconds * keep + seconds

    @property
    def pace(self) -> float | None:
        """None before the first row."""
        return self._tokens / self._seconds if self._seconds else None


@dataclass(frozen=True, slots=True)
class Place:
    """A replica as one that rows may begin at once more, or from which they may be taken over."""

    free: int
    """Sequences that have nothing to do."""
    pace: float | None


def slow_places(places: Mapping[str, Place]) -> list[str]:
    """Replicas whose begun rows had better begin once more elsewhere, where there is room now.

    One that has finished nothing has no pace, and is not relieved.
    """
    paces = {name: place.pace for name, place in places.items() if place.pace}
    free = [pace for name, pace in paces.items() if places[name].free > 0]
    return [name for name, pace in paces.items() if free and max(free) >= BACKUP_SPEEDUP * pace]


def choose_backups(begun: Iterable[tuple[int, str, str]], places: Mapping[str, Place]) -> list[tuple[str, str, str]]:
    """Return what to begin once more and where: request, its replica, and the fastest that has room, the oldest first.

    `begun` has each request's age (the n-th that was sent), id and replica, which is one of `slow_places`.
    """
    paces = {name: place.pace for name, place in places.items() if place.pace}
    room = [name for name in paces for _ in range(places[name].free)]
    room.sort(key=lambda name: -paces[name])
    chosen: list[tuple[str, str, str]] = []
    for _, request_id, giver in heapq.nsmallest(len(room), begun):
        receiver = room[len(chosen)]
        if paces[receiver] >= BACKUP_SPEEDUP * paces[giver]:
            chosen.append((request_id, giver, receiver))
    return chosen


def choose_recall(loads: Mapping[str, Load], *, at_once: bool = False) -> Recall | None:
    """Return what to call back, when nothing else waits for a replica; None when nobody would be done sooner.

    The replica that will be done last gives to the one that will be done first, so many that both are done together:
    with n rows at r rows a second each, x = (n1 r2 - n2 r1) / (r1 + r2), and never more than the receiver can run.
    With `at_once`, as many as the receiver can run, were it slow: somebody waits for the first word of each.
    """
    known = [load.rate for load in loads.values() if load.rate]
    usual = sum(known) / len(known) if known else 1.0
    rates = {name: load.rate or usual for name, load in loads.items()}
    idle = [name for name, load in loads.items() if load.in_flight < load.num_sequences]
    full = [name for name, load in loads.items() if load.num_recallable > 0]
    if not idle or not full:
        return None
    receiver = min(idle, key=lambda name: loads[name].in_flight / rates[name])
    giver = max(full, key=lambda name: loads[name].in_flight / rates[name])
    here, there = loads[giver], loads[receiver]
    even = (here.in_flight * rates[receiver] - there.in_flight * rates[giver]) / (rates[giver] + rates[receiver])
    count = min(here.num_recallable, there.num_sequences - there.in_flight)
    count = count if at_once else min(int(even), count)
    return Recall(giver, count) if giver != receiver and count > 0 else None
