"""`status` reads files and nothing else: before, during and after a run, from anywhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from jobs.progress import PROGRESS, Progress
from jobs.status import read_status, status_lines
from pipeline.errors import SpecError
from pipeline.lease import acquire_lease
from pipeline.ledger import Ledger
from pipeline.storage import Store
from tests.whole_runs import make_job, run_scripted, spec_text, write_prompts


def begun(folder: Path, *, age_s: float) -> str:
    """A run that has planned 100 rows, done 40, and posted its progress so long ago; its owner is this process."""
    job = make_job(write_prompts(folder / "in.parquet", 100), folder / "out")
    store = Store(str(folder / "out"))
    with acquire_lease(store, run_id="abc") as lease:
        Ledger(store, lease=lease).open_run(job.plan, job.fingerprint, resume="if_possible")
        progress = Progress("abc", "running", 100, 40, 1, 9, 1, 1, 10.0, 20.0, 2.0, 30.0, 20.0, time.time() - age_s)
        store.put(PROGRESS, json.dumps(asdict(progress)).encode())
    return str(folder / "out")


def test_a_run_under_way_shows_its_newest_line_and_who_runs_it(tmp_path: Path) -> None:
    lines = status_lines(read_status(begun(tmp_path, age_s=3)))
    assert lines[0].endswith("out: 0 of 100 rows committed, 0 of 2 shards")
    assert lines[1].startswith("running  40 of 100 rows (40%) | failed 1 |")
    assert lines[2].startswith("run abc on ")
    assert re.search(r"updated \d s ago$", lines[2])


def test_a_run_that_went_silent_is_said_to_be(tmp_path: Path) -> None:
    lines = status_lines(read_status(begun(tmp_path, age_s=600)))
    assert "has been silent for 10 min 0 s; if it is dead, rerun the same command" in lines[2]


def test_a_run_whose_process_died_is_known_to_be_gone_at_once(tmp_path: Path) -> None:
    output = begun(tmp_path, age_s=3)
    script = (
        "import os; from pipeline.lease import acquire_lease; from pipeline.storage import Store\n"
        f"acquire_lease(Store({output!r}), run_id='abc'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 9
    lines = status_lines(read_status(output))
    assert "ended without a word (killed?) 3 s ago; rerun the same command" in re.sub(r"\d s ago", "3 s ago", lines[2])


def test_looking_changes_nothing(tmp_path: Path) -> None:
    output = begun(tmp_path, age_s=3)
    before = {path: path.stat().st_mtime_ns for path in Path(output).rglob("*")}
    read_status(output)
    assert {path: path.stat().st_mtime_ns for path in Path(output).rglob("*")} == before


def test_a_copy_on_another_machine_says_the_same_without_ray(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 100, text=[None, *["hello"] * 99])
    run_scripted(make_job(rows, tmp_path / "out"))
    here = read_status(str(tmp_path / "out"))
    assert (here["committed_rows"], here["committed_shards"], here["summary"]["counts"]["failed"]) == (100, 2, 1)
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    shutil.rmtree(tmp_path / "out")
    rows.unlink()
    script = (
        "import json, sys; from jobs.status import read_status\n"
        f"report = read_status({str(tmp_path / 'copy')!r}); assert 'ray' not in sys.modules; print(json.dumps(report))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert {**json.loads(done.stdout), "output": here["output"]} == here


def test_a_spec_stands_for_its_output(tmp_path: Path) -> None:
    output = begun(tmp_path, age_s=3)
    (tmp_path / "job.yaml").write_text(spec_text(tmp_path / "in.parquet", output))
    assert read_status(str(tmp_path / "job.yaml"))["output"] == output


def test_where_no_run_began_there_is_no_status(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="holds no run; give an output directory or URL, or a spec that was run"):
        read_status(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
