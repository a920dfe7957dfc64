"""What stops an execution before it can do harm: a lost output, and GPUs that aren't there."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cluster.fleet import start_fleet
from cluster.pools import PoolPlan, SlotShape
from jobs.run import RunOptions, run_job
from pipeline.datasink import PartSink
from pipeline.errors import InfrastructureError, RunError, SpecError
from pipeline.lease import acquire_lease
from pipeline.storage import Store
from tests.scripted_engine import ScriptedConfig
from tests.whole_runs import TINY_MOE, make_job, run_scripted, snapshot, token_of, write_prompts


def test_a_driver_that_was_replaced_commits_nothing_more(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    first = acquire_lease(store, run_id="first")
    sink = PartSink(store, None, None, fingerprint="f", epoch=first.epoch, retried_statuses=None)
    sink._check_ownership()
    first.release()
    with acquire_lease(store, run_id="second"), pytest.raises(InfrastructureError, match=r"taken over by run second"):
        sink._check_ownership()


def run_on_gpus(rows: Path, output: Path, options: RunOptions, said: list[str]) -> int:
    """Run the spec's own pools, which want four GPUs."""
    fleet = {"pools": [{"gpu": "H100-80G", "replicas": 2, "tensor_parallel": 2}]}
    job = make_job(rows, output, fleet=fleet)
    return int(run_job(job, options, say=said.append)["exit_code"])


def test_gpus_that_are_not_there_are_refused_before_anything_changes_and_only_if_there_is_work(
    local_ray: None, tmp_path: Path
) -> None:
    text = ["please explode" if n == 3 else f"question number {n}" for n in range(100)]
    rows, output = write_prompts(tmp_path / "in.parquet", 100, text=text), tmp_path / "out"
    run_scripted(make_job(rows, output), ScriptedConfig(moe=TINY_MOE, faults={token_of("explode"): "error"}))
    said: list[str] = []

    def check_refused(output: Path, options: RunOptions) -> None:
        before = snapshot(tmp_path)
        with pytest.raises(SpecError, match=r"H100-80G-0.*GPU") as refusal:
            run_on_gpus(rows, output, options, said)
        assert refusal.value.exit_code == 2
        assert snapshot(tmp_path) == before

    check_refused(tmp_path / "new", RunOptions())
    check_refused(output, RunOptions())  # a row to do again; its summary is there
    check_refused(output, RunOptions(only_failed=True))
    assert said == []
    assert run_on_gpus(rows, output, RunOptions(retry_failed=False), said) == 0
    assert run_on_gpus(rows, output, RunOptions(only_failed=True, kinds=("engine_crash",)), said) == 0
    assert all(line.startswith("nothing to do: all 100 of 100 rows") for line in said)
    assert len(said) == 2
    (output / "summary.json").unlink()  # as after an execution that died: now footers alone say that there is work
    check_refused(output, RunOptions())
    min((output / "data").iterdir()).unlink()  # now rows are missing
    check_refused(output, RunOptions(retry_failed=False))


def test_a_run_without_a_place_for_its_engines_says_what_it_waits_for_and_gives_up_at_the_deadline(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.supervise.WAIT_SAID_AFTER_S", 0.5)
    monkeypatch.setattr("jobs.supervise.DEMAND_INTERVAL_S", 0.5)
    shape = SlotShape(num_gpus=2, gpu_type="H100-80G", gpu_labels=("H100-80G",))
    fleet = start_fleet([PoolPlan("H100-80G", 1, ScriptedConfig(moe=TINY_MOE), shape=shape)], start_timeout_s=6.0)
    said: list[tuple[float, str]] = []
    monkeypatch.setattr("jobs.progress.ProgressDisplay.say", lambda _, line: said.append((time.monotonic(), line)))
    job = make_job(write_prompts(tmp_path / "in.parquet", 4), tmp_path / "out")
    with pytest.raises(RunError, match="no replica for 6 s") as gave_up:
        run_job(job, RunOptions(quiet=True), say=lambda _: None, fleet=fleet)
    gave_up_at = time.monotonic()
    assert gave_up.value.exit_code == 3
    [at] = [at for at, line in said if line == "no replica yet: H100-80G waits for 2 GPUs of H100-80G on one node"]
    assert gave_up_at - at > 2.0
