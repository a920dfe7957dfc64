"""Runs one command and measures it from outside: wall, processor time, memory, and when its results could be read.

Processes are found by a mark in their environment, wherever they have moved in the tree; a process's processor time is
that of the last look at it, 0.25 s before its end at most. Results count from when their file was last written.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from tests.bench.contestants import Command, environment

INTERVAL_S = 0.25
ENGINE_TITLES = ("ray::Replica", "ray::MapWorker(MapBatches(vLLMEngineStage", "VLLM::")
"""How the titles of processes begin that hold an engine."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of one contestant."""

    wall_s: float
    rows: int
    tokens: int
    """Generated."""
    first_row_s: float
    """From the command to the first row that can be read."""
    most_rows_s: float
    """To nine rows in ten."""
    cpu_s: float
    """Of all processes."""
    engine_cpu_s: float
    """Of those that hold an engine; 0 where engine and driver are one process."""
    peak_mib: float
    """Most that all processes had together, memory shared between them left out."""


@dataclass
class _Watch:
    mark: str
    cpu: dict[int, tuple[bool, float]] = field(default_factory=dict)
    """Process id -> whether it has ever been an engine's, seconds."""
    peak: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    def look_until_done(self) -> None:
        while not self.done.wait(INTERVAL_S):
            self._look()

    def _look(self) -> None:
        total = 0
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                # vLLM's engine core writes its title over its environment, but its parent is known.
                if process.ppid() not in self.cpu and process.environ().get("TRAMONTANE_BENCH_RUN") != self.mark:
                    continue
                times, memory = process.cpu_times(), process.memory_info()
                title = " ".join(process.cmdline())
                was_engine = self.cpu.get(process.pid, (False, 0.0))[0]
                self.cpu[process.pid] = (was_engine or title.startswith(ENGINE_TITLES), times.user + times.system)
                total += memory.rss - memory.shared
        self.peak = max(self.peak, total)


def measure(command: Command, log: Path) -> Measured:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed; the message has the end of its output.
    """
    watch = _Watch(uuid.uuid4().hex)
    thread = threading.Thread(target=watch.look_until_done, daemon=True)
    thread.start()
    began_at, began = time.time(), time.perf_counter()
    try:
        with log.open("w") as output:
            ended = subprocess.run(
                command.words, check=False, env=environment(command, watch.mark), stdout=output, stderr=output
            )
        wall = time.perf_counter() - began
    finally:
        watch.done.set()
        thread.join()
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command.words)} ended with {ended.returncode}:\n{log.read_text()[-3000:]}")
    written = sorted(_results(command.results))
    rows = sum(count for _, count, _ in written)
    return Measured(
        wall_s=wall,
        rows=rows,
        tokens=sum(tokens for _, _, tokens in written),
        first_row_s=written[0][0] - began_at,
        most_rows_s=_when(written, 0.9 * rows) - began_at,
        cpu_s=sum(seconds for _, seconds in watch.cpu.values()),
        engine_cpu_s=sum(seconds for is_engine, seconds in watch.cpu.values() if is_engine),
        peak_mib=watch.peak / 2**20,
    )


def as_record(measured: Measured) -> dict[str, Any]:
    """For JSON, rounded to what was measured."""
    return {name: round(value, 3) for name, value in asdict(measured).items()}


def _results(folder: Path) -> list[tuple[float, int, int]]:
    """When each file was written, its rows and generated tokens."""
    found = []
    for file in folder.iterdir():
        if file.suffix == ".parquet":
            counts = pq.read_table(file, columns=["num_generated_tokens"])["num_generated_tokens"].to_pylist()
        elif file.suffix == ".jsonl":
            bodies = [json.loads(line)["response"]["body"] for line in file.read_text().splitlines()]
            counts = [body["usage"]["completion_tokens"] for body in bodies]
        else:
            continue
        found.append((file.stat().st_mtime, len(counts), sum(counts)))
    return found


def _when(written: list[tuple[float, int, int]], wanted: float) -> float:
    total = 0
    for at, rows, _ in written:
        total += rows
        if total >= wanted:
            return at
    raise AssertionError("asked for more rows than there are")
