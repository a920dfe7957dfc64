"""One real vLLM engine over two Ray nodes: what one process gives, and gone as a whole when a part of it is.

The nodes are real raylets on one machine, so what crosses between them here is gloo over the loopback; no GPU, no NCCL.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util import placement_group_table

from cluster.pools import PoolPlan, SlotShape
from jobs.run import RunOptions, run_job
from pipeline.model import ModelFiles
from pipeline.vllm_engine import VllmEngineConfig
from tests.driver_processes import processes_below, wait_until
from tests.end_to_end.test_tensor_parallel import watched_processes
from tests.extra_nodes import extra_nodes
from tests.near_ties import check_only_ties_differ
from tests.whole_runs import check_whole, make_job, prompt_ids, read_output, write_prompts

TYPE = "H100-80G"


def pool_over_two_nodes(model: ModelFiles) -> PoolPlan:
    engine = VllmEngineConfig(
        model_path=model.path,
        dtype="float32",
        max_model_len=512,
        moe=model.moe,
        tensor_parallel=2,
        num_nodes=2,
        on_cpu=True,
    )
    shape = SlotShape(num_gpus=1, num_bundles=2, gpu_type=TYPE, gpu_labels=(TYPE,))
    return PoolPlan(TYPE, 1, engine, max_num_seqs=64, env=engine.environment(), shape=shape)


def gone(process: psutil.Process) -> bool:
    """Ended; where nobody collects orphans they stay as zombies, which hold nothing."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_an_engine_over_two_nodes_loses_a_worker_and_a_node_and_no_row(
    local_ray: None, vllm_fleet: Any, tiny_model: ModelFiles, tmp_path: Path
) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 1024)
    sections = {"sampling": {"temperature": 0, "max_tokens": 24}, "routing": {"level": "tokens"}}
    job = make_job(rows, tmp_path / "two", **sections)
    pool = pool_over_two_nodes(tiny_model)

    def num_parts() -> int:
        return len(list((tmp_path / "two" / "data").glob("*.parquet")))

    def more_parts(what: str) -> None:
        before = num_parts()
        wait_until(lambda: num_parts() > before, what, deadline_s=400)

    def slot_nodes() -> list[str]:
        groups = [g for g in placement_group_table().values() if g["state"] == "CREATED" and TYPE in g["name"]]
        assert len(groups) == 1
        return [groups[0]["bundles_to_node_id"][index] for index in (0, 1)]

    with extra_nodes() as nodes, watched_processes("VLLM::") as processes:
        for _ in range(3):
            nodes.add(TYPE, 1)
        done: list[str] = []

        def disturb() -> None:
            more_parts("work is under way")
            assert len(set(slot_nodes())) == 2
            processes_below(os.getpid(), "VLLM::Worker_TP1")[0].kill()
            done.append("worker")
            more_parts("its replacement works")
            nodes.lose(slot_nodes()[1])
            done.append("node")

        disturber = threading.Thread(target=disturb)
        disturber.start()
        summary = run_job(job, RunOptions(quiet=True), say=lambda line: None, pools=[pool])
        disturber.join()
        assert done == ["worker", "node"]
        assert summary["exit_code"] == 0
        kinds = [loss["kind"] for loss in summary["this_execution"]["replica_losses"]]
        assert kinds == ["engine_crash", "node_lost"]
        check_whole(tmp_path / "two", 1024)
        assert set(read_output(tmp_path / "two")["status"].to_pylist()) <= {"ok", "truncated"}
        assert summary["routing"]["invalid_samples"] == 0
        wait_until(lambda: all(map(gone, processes)), "no process is left, not even of the lost node", deadline_s=30)
        wait_until(lambda: ray.available_resources().get("GPU", 0) == 2, "GPUs free", deadline_s=30)

    one = make_job(rows, tmp_path / "one", **sections)
    run_job(one, RunOptions(quiet=True), say=lambda line: None, fleet=vllm_fleet)
    parted = check_only_ties_differ(tiny_model.path, prompt_ids(one, rows), tmp_path / "one", tmp_path / "two")
    assert parted <= 50
