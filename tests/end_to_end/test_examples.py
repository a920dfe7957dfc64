"""The examples do what their comments say, on real vLLM with the tiny Mixtral: as many right answers, valid records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow.parquet as pq
import pytest

from cluster.fleet import start_fleet, stop_fleet
from cluster.pools import PoolPlan
from jobs.calibrate import read_calibration
from jobs.init_files import example_files, write_files
from jobs.prepare import PreparedJob, prepare
from jobs.run import RunOptions, run_job
from jobs.spec import load_spec
from jobs.synthesis import run_synthesis
from pipeline.model import fetch_model
from pipeline.settings import ModelSettings
from pipeline.vllm_engine import VllmEngineConfig
from tests.example_data import ASKERS
from tests.whole_runs import check_whole, read_output

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def engine(_ray_session: None) -> Iterator[Any]:
    """One engine as all three examples have it."""
    tiny = fetch_model(ModelSettings(source="tiny"))
    config = VllmEngineConfig(
        model_path=tiny.path, dtype="float32", max_model_len=1024, moe=tiny.moe, on_cpu=True, num_threads=1
    )
    fleet = start_fleet([PoolPlan("tiny", 1, config, env=config.environment())], start_timeout_s=300)
    yield fleet
    stop_fleet(fleet)


def run_example(name: str, folder: Path, engine: Any) -> tuple[PreparedJob, dict[str, Any]]:
    """Copy an example as `tramontane init` does, and run it."""
    write_files(example_files(name, folder / f"{name}.yaml"), force=False)
    job = prepare(load_spec(folder / f"{name}.yaml", [f"output.path={folder / 'out'}"]))
    run = run_job if job.spec.synthesize is None else run_synthesis
    summary = run(job, RunOptions(quiet=True), say=lambda line: None, fleet=engine)
    assert (summary["exit_code"], summary["counts"]["failed"]) == (0, 0)
    check_whole(folder / "out", job.plan.num_rows)
    return job, summary


@pytest.mark.long
def test_tickets_get_their_true_topic_in_five_languages(tmp_path: Path, engine: Any) -> None:
    _, summary = run_example("tickets", tmp_path, engine)
    rows = read_output(tmp_path / "out").to_pylist()
    assert [row["label"] for row in rows] == [row["topic"] for row in rows]
    assert len(rows) == summary["labels"]["rows"] == 40
    assert summary["labels"]["abstained"] == 0
    assert read_calibration(str(tmp_path / "out"), "topic")["accuracy"] == 1


@pytest.mark.long
def test_numbers_are_translated_into_five_languages(tmp_path: Path, engine: Any) -> None:
    run_example("translation", tmp_path, engine)
    rows = read_output(tmp_path / "out").to_pylist()
    assert [row["generated_text"].strip() for row in rows] == [row["expected"] for row in rows]
    assert len({row["target"] for row in rows}) == 5


@pytest.mark.long
def test_pairs_follow_their_schema_and_none_is_lost(tmp_path: Path, engine: Any) -> None:
    job, summary = run_example("pairs", tmp_path, engine)
    files = {name: (tmp_path / "out" / name).glob("*.parquet") for name in ("records", "dropped")}
    records, dropped = ([row for file in files[name] for row in pq.read_table(file).to_pylist()] for name in files)
    report = summary["synthesis"]
    assert report["records"] == len(records) > 0
    assert sum(report["dropped"].values()) == len(dropped) == 2 * job.plan.num_rows - len(records)
    for record in records:
        jsonschema.validate(json.loads(record["record"]), job.spec.sampling.json_schema)
        assert record["asker"] in ASKERS
        assert record["document"].startswith("manual-")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_all_examples_run_by_command_in_a_fresh_clone(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = os.environ | {"PYTHONPATH": str(clone)}
    for name in ("tickets", "pairs", "translation"):
        command = [str(Path(sys.executable).with_name("tramontane")), "run", f"jobs/examples/{name}.yaml"]
        done = subprocess.run(command, check=False, cwd=clone, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        summary = json.loads((clone / "out" / name / "summary.json").read_text())
        assert summary["counts"]["committed_rows"] == summary["counts"]["input_rows"] == check_whole_rows(clone, name)


def check_whole_rows(clone: Path, name: str) -> int:
    """Rows of the example's output, each found whole."""
    rows = len({(row["input_file"], row["input_row"]) for row in read_output(clone / "out" / name).to_pylist()})
    check_whole(clone / "out" / name, rows)
    return rows
