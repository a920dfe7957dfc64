"""Tensor parallelism through the whole path: two worker processes per replica give what one gives."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.run import RunOptions, run_job
from pipeline.model import ModelFiles
from tests.driver_processes import processes_below, wait_until
from tests.near_ties import check_only_ties_differ, differing_rows
from tests.whole_runs import check_whole, make_job, prompt_ids, read_output, spec_text, write_prompts


@contextlib.contextmanager
def watched_processes(title: str) -> Iterator[set[psutil.Process]]:
    """Collect the processes below this one whose command line contains the title, while the block runs."""
    found: set[psutil.Process] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            found.update(processes_below(os.getpid(), title))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif((psutil.cpu_count() or 1) < 2, reason="each of two workers is bound to a core of its own")
def test_two_way_tensor_parallel_runs_whole_and_leaves_no_process_behind(
    local_ray: None, vllm_fleet: Any, tiny_model: ModelFiles, tmp_path: Path
) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 64)
    sections = {"sampling": {"temperature": 0, "max_tokens": 8}, "routing": {"level": "tokens"}}
    pool = {"gpu": "cpu", "replicas": 1, "tensor_parallel": 2}
    job = make_job(rows, tmp_path / "two", fleet={"pools": [pool]}, **sections)
    with watched_processes("VLLM::Worker_TP") as workers:
        summary = run_job(job, RunOptions(quiet=True), say=lambda line: None)
    assert summary["exit_code"] == 0
    assert summary["this_execution"]["replica_losses"] == []
    check_whole(tmp_path / "two", 64)
    assert len(workers) == 2
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []

    one = make_job(rows, tmp_path / "one", **sections)
    run_job(one, RunOptions(quiet=True), say=lambda line: None, fleet=vllm_fleet)
    parted = check_only_ties_differ(tiny_model.path, prompt_ids(one, rows), tmp_path / "one", tmp_path / "two")
    assert parted <= 3


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif((psutil.cpu_count() or 1) < 2, reason="each of two workers is bound to a core of its own")
def test_a_killed_core_a_killed_worker_and_a_killed_replica_cost_no_row_and_leave_no_orphan(
    local_ray: None, vllm_fleet: Any, tiny_model: ModelFiles, tmp_path: Path
) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 768)
    sections = {"sampling": {"temperature": 0, "max_tokens": 24}, "routing": {"level": "tokens"}}
    pool = {"gpu": "cpu", "replicas": 1, "tensor_parallel": 2}
    job = make_job(rows, tmp_path / "killed", fleet={"pools": [pool]}, **sections)
    killed: list[str] = []

    def num_parts() -> int:
        return len(list((tmp_path / "killed" / "data").glob("*.parquet")))

    def its_replacement_works(all_of_it: list[psutil.Process]) -> None:
        """What was killed is gone, with all that belongs to it, and another engine's rows come."""
        _, alive = psutil.wait_procs(all_of_it, timeout=30)
        assert alive == []
        before = num_parts()
        wait_until(lambda: num_parts() > before, "its replacement works")

    def kill_all_three() -> None:
        wait_until(lambda: num_parts() >= 1, "work is under way")
        for title in ("VLLM::EngineCore", "VLLM::Worker_TP"):
            engine = processes_below(os.getpid(), "VLLM::")
            processes_below(os.getpid(), title)[0].kill()
            killed.append(title)
            its_replacement_works(engine)
        replica = processes_below(os.getpid(), "VLLM::EngineCore")[0].parent()
        assert replica is not None
        killed.append(replica.cmdline()[0].split(".")[0])
        replica.kill()

    killer = threading.Thread(target=kill_all_three)
    with watched_processes("VLLM::") as processes:
        killer.start()
        summary = run_job(job, RunOptions(quiet=True), say=lambda line: None)
        killer.join()
    assert summary["exit_code"] == 0
    assert killed == ["VLLM::EngineCore", "VLLM::Worker_TP", "ray::Replica"]
    losses = [loss["kind"] for loss in summary["this_execution"]["replica_losses"]]
    assert losses == ["engine_crash"] * 3
    check_whole(tmp_path / "killed", 768)
    assert set(read_output(tmp_path / "killed")["status"].to_pylist()) <= {"ok", "truncated"}
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []

    calm = make_job(rows, tmp_path / "calm", **sections)
    run_job(calm, RunOptions(quiet=True), say=lambda line: None, fleet=vllm_fleet)
    parted = check_only_ties_differ(tiny_model.path, prompt_ids(calm, rows), tmp_path / "calm", tmp_path / "killed")
    assert parted <= 38


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif((psutil.cpu_count() or 1) < 2, reason="each of two workers is bound to a core of its own")
def test_a_killed_driver_takes_its_workers_along_and_the_same_command_goes_on(tmp_path: Path) -> None:
    rows, mark = write_prompts(tmp_path / "in.parquet", 512), uuid.uuid4().hex
    pool = {"gpu": "cpu", "replicas": 1, "tensor_parallel": 2}
    sampling = {"temperature": 0, "max_tokens": 24}
    (tmp_path / "job.yaml").write_text(
        spec_text(rows, tmp_path / "out", fleet={"pools": [pool]}, sampling=sampling, limits={"hang_timeout_s": 60})
    )
    command = [str(Path(sys.executable).with_name("tramontane")), "run", str(tmp_path / "job.yaml"), "--quiet"]
    environment = {**os.environ, "TRAMONTANE_TEST_MARK": mark}
    driver = subprocess.Popen(command, env=environment, start_new_session=True)
    wait_until(lambda: len(list((tmp_path / "out").glob("data/*.parquet"))) >= 1, "work is under way")
    titles = {title for process in marked(mark) for title in process.cmdline()[:1]}
    assert sum(title.startswith("VLLM::Worker_TP") for title in titles) == 2
    driver.kill()
    driver.wait()
    wait_until(lambda: not marked(mark), "nothing of it is left", deadline_s=30)
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    check_whole(tmp_path / "out", 512)
    wait_until(lambda: not marked(mark), "nothing of it is left", deadline_s=30)


def marked(mark: str) -> list[psutil.Process]:
    """Live processes with it in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TRAMONTANE_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.long
@pytest.mark.timeout(600)
def test_two_real_replicas_give_what_one_gives(local_ray: None, vllm_fleet: Any, tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 300)
    sections = {"sampling": {"temperature": 0.8, "max_tokens": 8}, "routing": {"level": "tokens"}}
    pool = {"gpu": "cpu", "replicas": 2}
    job = make_job(rows, tmp_path / "two", fleet={"pools": [pool]}, **sections)
    assert run_job(job, RunOptions(quiet=True), say=lambda line: None)["exit_code"] == 0
    one = make_job(rows, tmp_path / "one", **sections)
    run_job(one, RunOptions(quiet=True), say=lambda line: None, fleet=vllm_fleet)
    assert differing_rows(tmp_path / "one", tmp_path / "two") == []  # CPU results don't depend on the batch
