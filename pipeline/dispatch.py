"""Which rows go to which replica next, and what happens to rows whose attempt failed. Pure: no Ray, no clock, no I/O.

Rows go in microbatches to the least loaded live replica, as long as its window has room; the window counts unfinished
rows, never shards, so a shard's slow last row costs nobody anything. The oldest row goes first, and after it those that
wait and begin as it does, to the same replica: see `fresh_rows`.

Finding a row that kills its engine. A replica that dies takes up to a window of rows along, any of which may be the
killer. All of them become suspects and run again in groups, one group at a time on a replica that runs nothing else.
With `a` attempts left, groups hold k^((a-1)/a) of k suspects, so the last attempt is a row all alone: 1,024 rows and
three attempts are at most 32 groups of 32 and then 32 single rows. A row that dies alone is the killer.

Guarantees:
- every row added comes out exactly once, finished or failed, however replicas come and go.
- no row is charged with more than `max_attempts` attempts. A death in company isn't charged to a row that has only
  one attempt left; that row runs alone next, so it is sent at most once more than it is charged.
- with 2 attempts or more, a row fails as `engine_crash` or `engine_hang` only when it was alone on its replica, or for
  the fourth time the only one of ours on a replica that others use too.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pipeline.fresh_rows import FreshRows

MICROBATCH = 32
SMALL_MICROBATCH = 8
MAX_SPARED = 3
"""Deaths in strangers' company after which a row counts as the killer all the same, or it might go on for ever."""
MAX_MOVED = 10
"""Losses of nodes that a row is moved away from before it counts as a suspect: one that takes its whole host down looks
like a lost node each time, and an autoscaler would start nodes for it for ever."""

RowKey = TypeVar("RowKey", bound=Hashable)


@dataclass(slots=True)
class PendingRow(Generic[RowKey]):
    """A row that is waiting or in flight."""

    key: RowKey
    prompt: bytes = b""
    """By which rows that begin alike are found; empty for one that goes in its turn."""
    attempts: int = 0
    """Attempts begun and ended badly."""
    avoid: str | None = None
    """Replica that failed it last; another is preferred."""
    spared: int = 0
    """Deaths of which it was the only suspect of ours, but not the only request there."""
    moved: int = 0
    """Losses for which no row was to blame, as it seemed."""


@dataclass(frozen=True, slots=True)
class Assignment(Generic[RowKey]):
    """Send these rows to this replica now."""

    replica: str
    keys: tuple[RowKey, ...]


@dataclass(frozen=True, slots=True)
class GaveUp(Generic[RowKey]):
    """This row has failed for good."""

    key: RowKey
    kind: str
    attempts: int


@dataclass(slots=True)
class _Replica(Generic[RowKey]):
    window: int
    leaving: bool = False
    """Finishes what it has and gets nothing more."""
    in_flight: dict[RowKey, PendingRow[RowKey]] = field(default_factory=dict)
    reserved: bool = False
    """Takes suspects only: it is being emptied for a group, or runs one."""
    running_group: bool = False
    last_prompt: bytes = b""
    """Of the row that was last sent here for the first time."""


class DispatchBoard(Generic[RowKey]):
    """All rows between arrival and outcome, and all live replicas."""

    def __init__(self, *, max_attempts: int) -> None:
        self._max_attempts = max_attempts
        self._fresh: FreshRows[PendingRow[RowKey]] = FreshRows()
        self._again: deque[PendingRow[RowKey]] = deque()
        self._suspects: deque[list[PendingRow[RowKey]]] = deque()
        self._replicas: dict[str, _Replica[RowKey]] = {}
        self.held = False
        """Set while it is in doubt whether suspects are to blame at all: nothing is sent."""

    @property
    def num_unfinished(self) -> int:
        """Rows added that have no outcome yet."""
        return self.num_waiting + sum(len(replica.in_flight) for replica in self._replicas.values())

    @property
    def num_waiting(self) -> int:
        """Rows that are with no replica."""
        return len(self._fresh) + len(self._again) + sum(map(len, self._suspects))

    @property
    def has_suspects(self) -> bool:
        """Whether rows wait that may have ended a replica."""
        return bool(self._suspects)

    def num_in_flight(self, replica: str) -> int:
        """Rows that are with this replica."""
        return len(self._replicas[replica].in_flight) if replica in self._replicas else 0

    def takes_work(self, replica: str) -> bool:
        """Whether this replica is there for any row: it isn't leaving, nor kept for suspects."""
        return not self.is_leaving(replica) and not self._replicas[replica].reserved

    def is_reserved(self, replica: str) -> bool:
        """Whether it is kept for suspects."""
        return replica in self._replicas and self._replicas[replica].reserved

    def is_blameless(self, replica: str, key: RowKey) -> bool:
        """Whether no attempt at this row, which is there, has ended badly, and no node was lost with it."""
        row = self._replicas[replica].in_flight[key]
        return row.attempts == 0 and row.moved == 0

    def is_leaving(self, replica: str) -> bool:
        """Whether nothing more may be sent to it."""
        state = self._replicas.get(replica)
        return state is None or state.leaving

    def live_replicas(self) -> tuple[str, ...]:
        """Replicas that can be given work."""
        return tuple(self._replicas)

    @property
    def wants_more(self) -> bool:
        """Whether rows that begin alike come so far apart that with more rows waiting more would meet."""
        return self._fresh.wants_more

    def go_in_order(self) -> None:
        """Have fresh rows go in the order they were added from now on."""
        self._fresh.go_in_order()

    def add_rows(self, keys: Sequence[RowKey], prompts: Sequence[bytes] | None = None) -> None:
        """Queue fresh rows, in order; with `prompts`, one for each, those that begin alike go together."""
        for key, prompt in zip(keys, prompts or [b""] * len(keys), strict=True):
            self._fresh.add(PendingRow(key, prompt), prompt)

    def discard(self, keys: Iterable[RowKey]) -> None:
        """Forget rows that wait; those in flight stay until their replica answers."""
        gone = set(keys)
        self._fresh.discard(lambda row: row.key in gone)
        self._again = deque(row for row in self._again if row.key not in gone)
        groups = ([row for row in group if row.key not in gone] for group in self._suspects)
        self._suspects = deque(group for group in groups if group)

    def replica_up(self, replica: str, *, window: int) -> None:
        """A replica can take up to `window` unfinished rows."""
        self._replicas[replica] = _Replica(window=max(1, window))

    def drain(self, replica: str) -> None:
        """Send this replica nothing more; what it has may still finish."""
        if replica in self._replicas:
            self._replicas[replica].leaving = True

    def returned(self, replica: str, key: RowKey) -> None:
        """A row came back untouched: it is the next to go, and nothing is charged."""
        state = self._replicas.get(replica)
        in_group = state is not None and state.running_group
        row = self._take(replica, key)
        if row is not None and in_group:
            self._suspects.append([row])
        elif row is not None:
            self._fresh.put_back(row, row.prompt)

    def finished(self, replica: str, key: RowKey) -> int | None:
        """A row came back good; returns which attempt it was, or None for a late answer about a row that moved on."""
        row = self._take(replica, key)
        return None if row is None else row.attempts + 1

    def request_failed(self, replica: str, key: RowKey, kind: str, *, final: bool = False) -> GaveUp[RowKey] | None:
        """One request failed in an engine that lives on: try the row elsewhere, or give up (at once if `final`)."""
        row = self._take(replica, key)
        if row is None:
            return None
        row.attempts += 1
        row.avoid = replica
        if row.attempts >= self._max_attempts or final:
            return GaveUp(key, kind, row.attempts)
        self._again.append(row)
        return None

    def replica_down(
        self, replica: str, kind: str, *, rows_to_blame: bool = True, in_company: bool = False
    ) -> list[GaveUp[RowKey]]:
        """A replica is gone with everything in flight on it; returns the rows that thereby failed for good.

        `rows_to_blame=False` says that the cause lay elsewhere (a lost node, a planned removal): no attempt is counted
        of a row that has not been there MAX_MOVED times.
        `in_company` says that the replica ran requests of others too, which may be to blame as well.
        """
        gone = self._replicas.pop(replica, None)
        if gone is None:
            return []
        rows = list(gone.in_flight.values())
        if not rows_to_blame:
            self._again.extend(row for row in rows if row.moved < MAX_MOVED)
            rows = [row for row in rows if row.moved >= MAX_MOVED]
            for row in gone.in_flight.values():
                row.moved += 1
        alone = gone.running_group and len(rows) == 1
        if alone and in_company and rows[0].spared < MAX_SPARED:
            rows[0].spared += 1
            alone = False
        return self._suspect(rows, kind, alone=alone)

    def next_assignment(self) -> Assignment[RowKey] | None:
        """Return what to send next, or None when nothing can be sent now. Call again until it returns None."""
        return None if self.held else self._next_group() or self._next_microbatch()

    def _take(self, replica: str, key: RowKey) -> PendingRow[RowKey] | None:
        state = self._replicas.get(replica)
        row = state.in_flight.pop(key, None) if state else None
        if state and not state.in_flight and state.running_group:
            state.reserved = state.running_group = False
        return row

    def _suspect(self, rows: list[PendingRow[RowKey]], kind: str, *, alone: bool) -> list[GaveUp[RowKey]]:
        given_up, groups = [], []
        for row in rows:
            # A row with one attempt left keeps it for a run alone, where a death is its own doing.
            if alone or self._max_attempts == 1 or row.attempts < self._max_attempts - 1:
                row.attempts += 1
            if row.attempts >= self._max_attempts:
                given_up.append(GaveUp(row.key, kind, row.attempts))
            else:
                groups.append(row)
        for attempts in sorted({row.attempts for row in groups}):
            same = [row for row in groups if row.attempts == attempts]
            size = suspect_group_size(len(same), attempts_left=self._max_attempts - attempts)
            self._suspects.extend(same[start : start + size] for start in range(0, len(same), size))
        return given_up

    def _next_group(self) -> Assignment[RowKey] | None:
        if not self._suspects:
            for state in self._replicas.values():
                if state.reserved and not state.running_group:
                    state.reserved = False
            return None
        self._reserve()
        for name, state in self._replicas.items():
            if state.reserved and not state.in_flight and not state.leaving:
                group = self._suspects.popleft()
                state.running_group = True
                return self._send(name, group)
        return None

    def _reserve(self) -> None:
        """Keep up to half of the replicas (at least one) for suspects, the emptiest first."""
        staying = [state for state in self._replicas.values() if not state.leaving]
        waiting = sum(state.reserved and not state.running_group for state in staying)
        reserved = sum(state.reserved for state in staying)
        allowed = max(1, len(staying) // 2)
        free = sorted((state for state in staying if not state.reserved), key=lambda s: len(s.in_flight))
        wanted = min(allowed - reserved, len(self._suspects) - waiting)
        for state in free[: max(0, wanted)]:
            state.reserved = True
        self._reserve_empty_ones_instead(free[max(0, wanted) :])

    def _reserve_empty_ones_instead(self, free: list[_Replica[RowKey]]) -> None:
        """Let go of replicas that are still being emptied for a group where an empty one has joined since.

        One that streams to somebody may take minutes to empty, while the suspects' attempts wait.
        """
        emptying = [state for state in self._replicas.values() if state.reserved and state.in_flight]
        busy = [state for state in emptying if not state.running_group]
        for held, empty in zip(busy, (state for state in free if not state.in_flight), strict=False):
            held.reserved, empty.reserved = False, True

    def _next_microbatch(self) -> Assignment[RowKey] | None:
        if not self._fresh and not self._again:
            return None
        candidates = sorted(
            (len(state.in_flight) / state.window, name)
            for name, state in self._replicas.items()
            if not state.reserved and not state.leaving
        )
        for _, name in candidates:
            state = self._replicas[name]
            room = state.window - len(state.in_flight)
            waiting = len(self._fresh) + len(self._again)
            # Topping up row by row would cost a call each; an engine with a full window loses nothing by waiting.
            if room >= min(SMALL_MICROBATCH, waiting, state.window):
                rows = self._choose(name, min(room, MICROBATCH))
                if rows:
                    return self._send(name, rows)
        return None

    def _choose(self, replica: str, count: int) -> list[PendingRow[RowKey]]:
        others = any(
            name != replica and not state.reserved and not state.leaving for name, state in self._replicas.items()
        )
        rows: list[PendingRow[RowKey]] = []
        for _ in range(len(self._again)):
            row = self._again.popleft()
            if len(rows) == count or (others and row.avoid == replica):
                self._again.append(row)
            else:
                rows.append(row)
        state = self._replicas[replica]
        while self._fresh and len(rows) < count:
            row, state.last_prompt = self._fresh.take(after=state.last_prompt)
            rows.append(row)
        return rows

    def _send(self, replica: str, rows: list[PendingRow[RowKey]]) -> Assignment[RowKey]:
        self._replicas[replica].in_flight.update((row.key, row) for row in rows)
        return Assignment(replica, tuple(row.key for row in rows))


def suspect_group_size(num_suspects: int, *, attempts_left: int) -> int:
    """Rows per group so that the last of `attempts_left` attempts is a row alone, after the fewest runs."""
    if attempts_left <= 1:
        return 1
    return max(1, math.ceil(math.pow(num_suspects, (attempts_left - 1) / attempts_left)))
