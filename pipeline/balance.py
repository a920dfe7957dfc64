"""Evening out the end of a run: which waiting rows to call back from a slow replica for one that has run dry. Pure.

A replica holds about twice what it can run at once, so that it never waits for us. When the input runs dry, that store
is the tail of the run: on a replica three times slower than its neighbour it lasts three times as long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MEMORY_S = 20.0
"""Time over which a replica's speed is averaged."""


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
