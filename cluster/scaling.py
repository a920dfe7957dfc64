"""How many replicas a fleet should have, and when a pool is beyond hope. Pure: no Ray, the clock is an argument."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from cluster.pools import PoolPlan

ROWS_PER_SEQUENCE = 2
"""Rows left per sequence that a replica runs at once, below which another replica would have nothing to do."""
SURPLUS_S = 10.0
"""How long a replica must have been one too many before it goes: work comes in bursts, a start takes minutes."""
MAX_FAILED_STARTS = 5
"""In a row: a model that couldn't be loaded five times won't load the sixth time either."""
SHORT_LIFE_S = 10.0
"""A replica that dies so soon after its start is waited for like one that did not start."""
MAX_BACKOFF_S = 60.0
DEMAND_MEMORY_S = 15.0
"""A run tells every second or two what it has left; one that hasn't for so long is over."""

State = Literal["waiting", "starting", "up", "draining"]
"""Of a replica: waiting for its slot, loading the model, taking work, finishing what it has."""
KEPT_FIRST: tuple[State, ...] = ("up", "starting", "waiting")
"""Of replicas that are too many, who stays."""


def wanted_replicas(
    pools: Sequence[PoolPlan], rows_left: int | None, *, attainable: Sequence[int] | None = None
) -> list[int]:
    """Replicas that each pool should have for so many unfinished rows; None: nobody said, so as many as may be.

    Pools are filled in the spec's order, which is the author's order of preference. `attainable` says how many each
    could have now: rows for which a pool has no room go to the next one.
    """
    limits = [pool.most for pool in pools]
    if attainable is not None:
        limits = [max(p.num_replicas, min(p.most, n)) for p, n in zip(pools, attainable, strict=True)]
    if rows_left is None:
        return limits
    wanted = [pool.num_replicas for pool in pools]
    windows = [ROWS_PER_SEQUENCE * pool.max_num_seqs for pool in pools]
    live = wanted if attainable is None else [min(w, n) for w, n in zip(wanted, attainable, strict=True)]
    uncovered = rows_left - sum(n * each for n, each in zip(live, windows, strict=True))
    for index, each in enumerate(windows):
        if uncovered <= 0:
            break
        more = min(limits[index] - wanted[index], math.ceil(uncovered / each))
        wanted[index] += more
        uncovered -= more * each
    return wanted


@dataclass(slots=True)
class Demands:
    """What the runs on a fleet have left to do, as they last said."""

    _told: dict[str, tuple[int, float]] = field(default_factory=dict)

    def tell(self, consumer: str, rows_left: int, now: float) -> None:
        """A run says what it has left, 0 for goodbye."""
        self._told[consumer] = (rows_left, now)

    def by_consumer(self, now: float) -> dict[str, int]:
        """Rows left of each run that is still there."""
        self._told = {name: (rows, at) for name, (rows, at) in self._told.items() if now - at < DEMAND_MEMORY_S}
        return {name: rows for name, (rows, _) in self._told.items()}


@dataclass(slots=True)
class StartRecord:
    """What became of a pool's latest starts."""

    backoff_s: float
    """Wait after the first failure; doubles with each further one."""
    failures: int = 0
    """In a row."""
    not_before: float = 0.0
    """Monotonic clock: no start before."""
    diagnosis: str | None = None
    """Why there will be no further start; None while there is hope."""
    exit_code: int = 3
    last_failed_at: float = -math.inf

    def succeeded(self) -> None:
        """A replica came up: whatever kept others from it has passed."""
        self.failures, self.not_before, self.diagnosis = 0, 0.0, None

    def failed(self, now: float, message: str, *, began: float, final_exit_code: int | None = None) -> None:
        """A start that began then failed; with a final exit code, for a reason that no further start could change.

        Starts that ran side by side fail side by side: those that began before the last failure count with it.
        """
        if final_exit_code is None and began <= self.last_failed_at:
            return
        self.last_failed_at = now
        self.failures += 1
        self.not_before = now + min(MAX_BACKOFF_S, self.backoff_s * 2 ** (self.failures - 1))
        if final_exit_code is not None or self.failures >= MAX_FAILED_STARTS:
            times = "" if final_exit_code is not None else f" ({self.failures} starts failed in a row)"
            self.diagnosis = f"{message}{times}"
            self.exit_code = 3 if final_exit_code is None else final_exit_code

    def died_young(self, now: float) -> None:
        """A replica died right after its start: perhaps of a row, so no verdict, but no hurry either."""
        self.not_before = max(self.not_before, now + self.backoff_s)


def num_attainable(record: StartRecord, states: Sequence[State], *, room: int, can_grow: bool) -> int:
    """Replicas that a pool has or could have now; one more where an autoscaler may make room."""
    placed = states.count("starting") + states.count("up")
    if record.diagnosis is not None:
        return placed
    return placed + max(room, 1 if can_grow else 0)


def num_launches(
    pool: PoolPlan,
    record: StartRecord,
    states: Sequence[State],
    wanted: int,
    *,
    room: int,
    can_grow: bool,
    now: float,
) -> int:
    """Replicas to start now, of a pool that has replicas in these states and should have `wanted`.

    The fewest whether or not there is room, more only as fits into `room`, or might be added by an autoscaler.
    """
    if record.diagnosis is not None or now < record.not_before:
        return 0
    waiting = states.count("waiting")
    if record.failures:  # one at a time, until one comes up
        if waiting or "starting" in states:
            return 0
        wanted = len(states) + 1
    room -= waiting
    if can_grow:
        room = max(room, 1 - waiting)  # a waiting slot is what tells the autoscaler
    required = max(0, pool.num_replicas - len(states))
    return min(wanted - len(states), max(required, room))


def obstacle(pool: PoolPlan, record: StartRecord, states: Sequence[State]) -> str:
    """What a pool without a replica that is up waits for, in words."""
    if record.diagnosis:
        return record.diagnosis
    if "starting" in states:
        return f"{pool.name} is loading its model"
    return f"{pool.name} waits for {pool.shape.describe()}"
