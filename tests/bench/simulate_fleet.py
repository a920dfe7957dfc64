"""Many replicas of different speed in virtual time, under the real dispatch board and the real recall decision.

    python -m tests.bench.simulate_fleet --replicas 200 --rows 1000000

Only engines and network are imagined: rows have log-normal lengths, a replica runs `--sequences` of them at once at its
speed, and tells of finished rows once per `POLL_S`, as `pipeline.flights` hears of them. What is measured is real:
seconds of this process per row spent in decisions. What follows from the simulation: the share of sequences that stood
idle while there was work for all, and how long the last tenth of the rows took, beside what it takes if each row's
length is known and the longest go first, to wherever they are done soonest, and what runs stays where it is (LPT).
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from pipeline.balance import Load, PaceMeter, Place, SpeedMeter, choose_backups, choose_recall, slow_places
from pipeline.dispatch import DispatchBoard
from pipeline.flights import BACKUP_INTERVAL_S, RECALL_INTERVAL_S, WINDOW_FACTOR
from pipeline.fresh_rows import prompt_bytes

POLL_S = 0.05
SHARD_ROWS = 256
TAIL_FROM = 90
"""Percent of the rows that are done when the tail begins."""
MEDIAN_S = 8.0
"""A row of median length on the slowest kind of replica."""


@dataclass(slots=True)
class Replica:
    speed: float
    waiting: deque[int] = field(default_factory=deque)
    running: dict[int, float] = field(default_factory=dict)
    """Row -> when it was begun."""
    finished: list[tuple[str, int]] = field(default_factory=list)
    """What is still to be told: a row, and the replica that the board has it at."""
    meter: SpeedMeter = field(default_factory=SpeedMeter)
    pace: PaceMeter = field(default_factory=PaceMeter)


class Simulation:
    """One run in virtual time."""

    def __init__(
        self, *, replicas: int, rows: int, sequences: int, num_speeds: int = 3, prompt_tokens: int = 0, seed: int = 1
    ) -> None:
        """Replicas are 1 to `num_speeds` times as fast as the slowest; prompts share a quarter with all others."""
        self._random = random.Random(seed)
        self._rows_left = rows
        self._num_rows = rows
        self._sequences = sequences
        self._board: DispatchBoard[int] = DispatchBoard(max_attempts=3)
        self._replicas = {f"r{i}": Replica(1.0 + i % num_speeds) for i in range(replicas)}
        self._seconds = [self._random.lognormvariate(0.0, 0.6) * MEDIAN_S for _ in range(rows)]
        """Of each row, at speed 1."""
        self._window = WINDOW_FACTOR * sequences
        self._events: list[tuple[float, int, str, int]] = []
        self._order = itertools.count()
        self._prompt = np.random.default_rng(seed).integers(32_000, size=prompt_tokens, dtype=np.int32)
        self._now = 0.0
        self._next_row = 0
        self._balanced_at = 0.0
        self._backed_up_at = 0.0
        self._num_running = 0
        self._busy_s = 0.0
        """Sequence-seconds until the input ran dry."""
        self._dry_at: float | None = None
        self._done: set[int] = set()
        self._backups: dict[int, tuple[str, str]] = {}
        """Row -> where it was begun first, and once more."""
        self.decision_s = 0.0
        self.num_done = 0
        self.done_at: list[float] = []
        self._shortest_tail_s = 0.0

    def run(self) -> dict[str, float]:
        """Play to the end; returns the figures."""
        for name in self._replicas:
            self._board.replica_up(name, window=self._window)
        self._supply()
        self._send()
        for name in self._replicas:
            self._at(POLL_S * self._random.random(), name, -1)
        while self.num_done < self._num_rows:
            then, _, name, row = heapq.heappop(self._events)
            if self._dry_at is None:
                self._busy_s += self._num_running * (then - self._now)
                if not self._rows_left and not self._board.num_waiting:
                    self._dry_at = then
            self._now = then
            if row < 0:
                self._poll(name)
            else:
                self._finish(name, row)
        return self._figures()

    def _at(self, delay: float, name: str, row: int) -> None:
        heapq.heappush(self._events, (self._now + delay, next(self._order), name, row))

    def _supply(self) -> None:
        """Ray Data's part: shards are opened while fewer rows are unfinished than 1.5 windows."""
        while self._rows_left and self._board.num_unfinished < 1.5 * self._window * len(self._replicas):
            count = min(SHARD_ROWS, self._rows_left)
            keys = range(self._next_row, self._next_row + count)
            self._board_rows(keys)
            self._next_row += count
            self._rows_left -= count

    def _board_rows(self, keys: range) -> None:
        began = time.perf_counter()
        self._board.add_rows(keys, [self._prompt_of(key) for key in keys] if len(self._prompt) else None)
        self.decision_s += time.perf_counter() - began

    def _prompt_of(self, key: int) -> bytes:
        own = self._prompt.copy()
        own[len(own) // 4] = key
        return prompt_bytes(own)

    def _send(self) -> None:
        began = time.perf_counter()
        sent = []
        while (assignment := self._board.next_assignment()) is not None:
            sent.append(assignment)
        self.decision_s += time.perf_counter() - began
        for assignment in sent:
            replica = self._replicas[assignment.replica]
            replica.waiting.extend(assignment.keys)
            self._fill(assignment.replica, replica)

    def _fill(self, name: str, replica: Replica) -> None:
        while replica.waiting and len(replica.running) < self._sequences:
            row = replica.waiting.popleft()
            self._begin(name, replica, row)

    def _begin(self, name: str, replica: Replica, row: int) -> None:
        replica.running[row] = self._now
        self._num_running += 1
        self._at(self._seconds[row] / replica.speed, name, row)

    def _finish(self, name: str, row: int) -> None:
        replica = self._replicas[name]
        if row in self._done:  # by its other replica
            return
        replica.pace.add(1 + round(1000 * self._seconds[row]), self._now - replica.running[row])
        first, second = self._backups.get(row, (name, name))
        for each in {first, second}:
            del self._replicas[each].running[row]
            self._num_running -= 1
        replica.finished.append((first, row))
        self._done.add(row)
        self.num_done += 1
        self.done_at.append(self._now)
        if self.num_done == TAIL_FROM * self._num_rows // 100:
            self._shortest_tail_s = self._by_lengths()
        for each in {first, second}:
            self._fill(each, self._replicas[each])

    def _by_lengths(self) -> float:
        """Seconds until all is done if what runs stays where it is, and the rest goes by LPT."""
        begun = {row for replica in self._replicas.values() for row in replica.running}
        gone = begun | self._done
        rest = sorted((each for row, each in enumerate(self._seconds) if row not in gone), reverse=True)
        free: dict[float, list[float]] = {}
        for replica in self._replicas.values():
            ends = [begun + self._seconds[row] / replica.speed for row, begun in replica.running.items()]
            places = [*ends, *[self._now] * (self._sequences - len(ends))]
            free.setdefault(replica.speed, []).extend(places)
        for places in free.values():
            heapq.heapify(places)
        for each in rest:
            speed = min(free, key=lambda speed: free[speed][0] + each / speed)
            heapq.heapreplace(free[speed], free[speed][0] + each / speed)
        return max(max(places) for places in free.values()) - self._now

    def _poll(self, name: str) -> None:
        replica = self._replicas[name]
        told, replica.finished = replica.finished, []
        began = time.perf_counter()
        for holder, row in told:
            self._board.finished(holder, row)
        if told or replica.running:
            replica.meter.add(len(told), POLL_S)
        self.decision_s += time.perf_counter() - began
        if told:
            self._supply()
            self._send()
            self._balance()
        self._at(POLL_S, name, -1)

    def _balance(self) -> None:
        if self._board.num_waiting or self._now - self._balanced_at < RECALL_INTERVAL_S:
            return
        self._balanced_at = self._now
        began = time.perf_counter()
        loads = {
            name: Load(len(r.running) + len(r.waiting), self._sequences, len(r.waiting), r.meter.rate)
            for name, r in self._replicas.items()
        }
        recall = choose_recall(loads)
        if recall is not None:
            for _ in range(recall.count):
                self._board.returned(recall.replica, self._replicas[recall.replica].waiting.pop())
        self.decision_s += time.perf_counter() - began
        if recall is None and self._now - self._backed_up_at >= BACKUP_INTERVAL_S:
            self._backed_up_at = self._now
            self._back_up()
        self._send()

    def _back_up(self) -> None:
        """As `pipeline.flights` does."""
        began = time.perf_counter()
        places = {
            name: Place(self._sequences - len(r.running) - len(r.waiting), r.pace.pace)
            for name, r in self._replicas.items()
        }
        begun = (
            (round(1000 * at), str(row), name)
            for name in slow_places(places)
            for row, at in self._replicas[name].running.items()
            if row not in self._backups
        )
        chosen = choose_backups(begun, places)
        self.decision_s += time.perf_counter() - began
        for row, giver, receiver in chosen:
            self._backups[int(row)] = (giver, receiver)
            self._begin(receiver, self._replicas[receiver], int(row))

    def _figures(self) -> dict[str, float]:
        wall, dry = self.done_at[-1], self._dry_at or self.done_at[-1]
        capacity = len(self._replicas) * self._sequences
        return {
            "replicas": len(self._replicas),
            "rows": self._num_rows,
            "virtual_s": round(wall, 1),
            "decision_us_per_row": round(1e6 * self.decision_s / self._num_rows, 1),
            "rows_per_s_at_which_one_core_is_full": round(self._num_rows / self.decision_s),
            "idle_share_until_the_input_is_dry": round(1 - self._busy_s / (dry * capacity), 4),
            "from_dry_to_done_s": round(wall - dry, 1),
            "last_tenth_s": round(wall - self.done_at[TAIL_FROM * self._num_rows // 100 - 1], 1),
            "last_tenth_by_lengths_s": round(self._shortest_tail_s, 1),
            "rows_begun_twice": len(self._backups),
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=200)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--speeds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    simulation = Simulation(
        replicas=chosen.replicas,
        rows=chosen.rows,
        sequences=chosen.sequences,
        num_speeds=chosen.speeds,
        prompt_tokens=chosen.prompt_tokens,
        seed=chosen.seed,
    )
    print(json.dumps(simulation.run()))
