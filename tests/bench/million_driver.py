"""A whole run through the scripted engine in a process of its own, which watches its memory and its dispatcher's.

    python tests/bench/million_driver.py ROWS FOLDER [REPLICAS]

Writes FOLDER/in.parquet and FOLDER/out, and prints one JSON object: rates, processor time per row, and samples of rows
done, rows in flight, the resident memory of driver and dispatcher in MiB and their processor time in seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.flights import WINDOW_FACTOR
from tests.driver_processes import process_below
from tests.own_ray import own_ray
from tests.scripted_engine import ScriptedConfig
from tests.whole_runs import TINY_MOE, make_job, run_scripted

INTERVAL_S = 0.5
MAX_NUM_SEQS = 512
"""As an engine on a GPU has."""
MIB = 1 << 20


def write_rows(path: Path, rows: int, *, row_group: int = 50_000) -> Path:
    """Short prompts in several row groups, written group by group."""
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, row_group):
            ids = range(start, min(rows, start + row_group))
            table = {"id": list(ids), "text": [f"question number {n}" for n in ids]}
            writer.write_table(pa.table(table, schema=schema), row_group_size=row_group)
    return path


@dataclass
class MemoryWatch:
    """Samples resident memory of this process and of the dispatcher's, until told to stop."""

    progress_file: Path
    samples: list[dict[str, float]] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    _dispatcher: psutil.Process | None = None

    def watch(self) -> None:
        me = psutil.Process()
        while not self.stop.wait(INTERVAL_S):
            with contextlib.suppress(OSError, ValueError, psutil.Error):
                progress = json.loads(self.progress_file.read_text())
                self._dispatcher = dispatcher = self._dispatcher or process_below(me.pid, "GenerateStage")
                if dispatcher is not None:
                    sample = {name: progress[name] for name in ("rows_done", "rows_in_flight")}
                    sample |= {"driver_mib": rss(me), "dispatcher_mib": rss(dispatcher)}
                    self.samples.append(sample | {"driver_s": cpu_s(me), "dispatcher_s": cpu_s(dispatcher)})

    def cpu_us_per_row(self) -> dict[str, float]:
        """Processor time of both between the first tenth and the last sample; start-up is not in it."""
        last = self.samples[-1]
        first = next(sample for sample in self.samples if sample["rows_done"] >= last["rows_done"] / 10)
        rows = last["rows_done"] - first["rows_done"]
        if not rows:
            return {}
        return {name: 1e6 * (last[f"{name}_s"] - first[f"{name}_s"]) / rows for name in ("driver", "dispatcher")}


def rss(process: psutil.Process) -> float:
    """MiB that are the process's own: the object store's shared pages belong to nobody."""
    memory = process.memory_info()
    return (memory.rss - memory.shared) / MIB


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main(rows: int, folder: Path, replicas: int) -> None:
    # Drawn, not greedy: outcomes of greedy rows are kept for equal ones, up to `twins.MAX_KEPT_BYTES`.
    job = make_job(write_rows(folder / "in.parquet", rows), folder / "out", sampling={"temperature": 1.0})
    watch = MemoryWatch(folder / "out" / "_run" / "progress.json")
    thread = threading.Thread(target=watch.watch, daemon=True)
    with own_ray():
        thread.start()
        began = time.monotonic()
        summary = run_scripted(job, ScriptedConfig(moe=TINY_MOE, max_num_seqs=MAX_NUM_SEQS), replicas=replicas)
        wall = time.monotonic() - began
        watch.stop.set()
        thread.join()
    report = {
        "rows": rows,
        "wall_s": wall,
        "execution": summary["this_execution"],
        "exit_code": summary["exit_code"],
        "counts": summary["counts"],
        "load": os.getloadavg()[0],
        "window": WINDOW_FACTOR * MAX_NUM_SEQS * replicas,
        "cpu_us_per_row": watch.cpu_us_per_row(),
        "samples": watch.samples,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1)
