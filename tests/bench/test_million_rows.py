"""Scale: whatever the number of rows, memory of driver and dispatcher stays where it was after the first tenth.

Throughput is printed, and bounded loosely. A million rows through one replica on two shared cores: 4,514 rows/s, driver
5.4 MiB and dispatcher 2.8 MiB above where they were after the first tenth (`pytest -s -m long tests/bench`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.whole_runs import check_whole

DRIVER = Path(__file__).with_name("million_driver.py")
ROOT = Path(__file__).parents[2]


def run_rows(rows: int, folder: Path, *, timeout_s: float) -> dict[str, Any]:
    """The driver's report; its output stays in the folder."""
    command = [sys.executable, str(DRIVER), str(rows), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.check_output(command, env=environment, cwd=ROOT, timeout=timeout_s, text=True)
    report: dict[str, Any] = json.loads(done.splitlines()[-1])
    print({name: value for name, value in report.items() if name != "samples"})
    return report


def growth(samples: list[dict[str, float]], name: str, rows: int) -> float:
    """MiB between the first tenth of the rows and the highest point after it."""
    after = [sample[name] for sample in samples if sample["rows_done"] >= rows // 10]
    assert len(after) >= 3, "too few samples to speak of growth"
    return max(after) - after[0]


def check_scale(
    report: dict[str, Any], rows: int, *, driver_mib: float, dispatcher_mib: float, rows_per_s: float
) -> None:
    assert report["exit_code"] == 0
    assert report["counts"]["committed_rows"] == rows
    assert report["counts"]["failed"] == 0
    samples = report["samples"]
    grown = {name: growth(samples, name, rows) for name in ("driver_mib", "dispatcher_mib")}
    print("growth after the first tenth:", grown)
    assert grown["driver_mib"] < driver_mib
    assert grown["dispatcher_mib"] < dispatcher_mib
    assert 0 < max(sample["rows_in_flight"] for sample in samples) <= report["window"]
    assert report["execution"]["rates"]["rows_per_s"] > rows_per_s


@pytest.mark.long
@pytest.mark.timeout(320)
def test_20_000_rows_leave_memory_flat(tmp_path: Path) -> None:
    report = run_rows(20_000, tmp_path, timeout_s=300)
    check_scale(report, 20_000, driver_mib=30, dispatcher_mib=60, rows_per_s=100)  # beside other tests: 280
    check_whole(tmp_path / "out", 20_000)


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_a_million_rows_leave_memory_flat(tmp_path: Path) -> None:
    report = run_rows(1_000_000, tmp_path, timeout_s=2300)
    check_scale(report, 1_000_000, driver_mib=300, dispatcher_mib=50, rows_per_s=500)
