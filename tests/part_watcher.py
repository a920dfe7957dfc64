"""Somebody else who looks at `data/` all the while, with plain pyarrow: what is visible must be whole, and stay.

Knows the output's folder only, nothing of runs. Reads each version of a part once, as soon as it is seen.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Self

import pyarrow.parquet as pq


def part_names(output: Path) -> list[str]:
    """What a user's glob `data/*` finds."""
    try:
        return sorted(name for name in os.listdir(output / "data") if not name.startswith("."))
    except FileNotFoundError:
        return []


class PartWatcher:
    """Polls `data/` on a thread from start to end of the block."""

    def __init__(self, output: Path, *, full_part_rows: int, last_part_rows: int) -> None:
        self.num_reads = 0
        self.problems: list[str] = []
        self._output = output
        self._rows = (full_part_rows, last_part_rows)
        self._seen: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._stop.wait(0.02):
            try:
                self._look()
            except Exception as error:
                self.problems.append(repr(error))

    def _look(self) -> None:
        names = part_names(self._output)
        self.problems += [f"{name} has vanished" for name in self._seen.keys() - set(names)]
        for name in names:
            path = self._output / "data" / name
            version = path.stat().st_mtime_ns
            if self._seen.get(name) != version:
                num_rows = pq.read_table(path).num_rows
                self.num_reads += 1
                if num_rows not in self._rows:
                    self.problems.append(f"{name} has {num_rows} rows")
                self._seen[name] = version
