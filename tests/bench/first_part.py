"""Where the seconds go between a command and its first committed part: the tiny model, 20 rows, fresh outputs.

    python -m tests.bench.first_part --repeats 5

Each phase ends when a process of the next one, or the part, is first seen, 10 times a second; medians over the runs.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

NUM_ROWS = 20
SEEN_EVERY_S = 0.1
PHASES = {
    "ray": "imports, spec, model and output read; nothing has started",
    "replica": "Ray started, the fleet on it, and the replica's process, which names itself once Ray is in it",
    "part": "vLLM's imports (most of it), the engine, the rows",
    "exit": "statistics and summary written, all processes ended",
}
"""Each phase by what ends it."""


def main() -> None:
    """Print when each phase had ended, in seconds after the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        runs = [one_run(Path(folder), number) for number in range(repeats)]
    before = 0.0
    for name, what in PHASES.items():
        ended = median(run[name] for run in runs)
        print(f"{name:8} {ended:5.1f} s  (+{ended - before:.1f})  {what}")
        before = ended
    print("first part of each run:", ", ".join(f"{run['part']:.1f}" for run in runs))


def one_run(folder: Path, number: int) -> dict[str, float]:
    """Seconds from the command to the end of each phase."""
    job, out = write_job(folder, number)
    found: dict[str, float] = {}
    began = time.monotonic()
    with subprocess.Popen(
        [str(Path(sys.executable).with_name("tramontane")), "run", str(job), "--quiet"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as command:
        while command.poll() is None:
            for name in seen(psutil.Process(command.pid), out):
                found.setdefault(name, time.monotonic() - began)
            time.sleep(SEEN_EVERY_S)
    if command.returncode != 0:
        raise RuntimeError(f"the run ended with {command.returncode}")
    return {**found, "exit": time.monotonic() - began}


def seen(command: psutil.Process, out: Path) -> list[str]:
    """The phases that have ended, by what there is now."""
    words = []
    with contextlib.suppress(psutil.NoSuchProcess):  # the command has just ended
        for child in command.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                words.append(" ".join(child.cmdline()))
    has = {
        "ray": any("gcs_server" in word for word in words),
        "replica": any("ray::Replica" in word for word in words),
        "part": any(out.glob("data/*.parquet")),
    }
    return [name for name, is_there in has.items() if is_there]


def write_job(folder: Path, number: int) -> tuple[Path, Path]:
    """A job's file and its output."""
    rows, job, out = folder / "rows.parquet", folder / f"{number}.yaml", folder / f"out-{number}"
    pq.write_table(pa.table({"text": [f"Say {row}." for row in range(NUM_ROWS)]}), rows)
    spec = {
        "name": "first-part",
        "model": {"source": "tiny"},
        "input": {"path": str(rows)},
        "prompt": {"template": "{{ text }}"},
        "sampling": {"temperature": 0, "max_tokens": 16},
        "output": {"path": str(out)},
    }
    job.write_text(yaml.safe_dump(spec, sort_keys=False))
    return job, out


if __name__ == "__main__":
    main()
