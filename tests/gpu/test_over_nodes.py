"""A replica over two nodes with real GPUs between which NCCL crosses a real network. Has not been run yet.

    TRAMONTANE_GPU_CLUSTER=HEAD:6379 TRAMONTANE_GPU_TYPE=H100-80G pytest -m gpu tests/gpu/test_over_nodes.py

The cluster needs two nodes of that type with a free GPU each, this program and its image's libraries on both, and the
head on this machine or reachable from it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.gpus import gpu_type
from cluster.pools import PoolPlan, SlotShape
from jobs.run import RunOptions, run_job
from pipeline.vllm_engine import VllmEngineConfig
from tests.near_ties import agreement
from tests.whole_runs import check_whole, make_job, write_prompts

ADDRESS, TYPE = os.environ.get("TRAMONTANE_GPU_CLUSTER"), os.environ.get("TRAMONTANE_GPU_TYPE", "H100-80G")
ROWS = 512

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        ADDRESS is None and os.environ.get("REQUIRE_GPU") != "1", reason="TRAMONTANE_GPU_CLUSTER names no Ray cluster"
    ),
]


def test_two_gpus_on_two_nodes_give_what_two_on_one_node_give(tmp_path: Path) -> None:
    assert ADDRESS, "REQUIRE_GPU=1, but TRAMONTANE_GPU_CLUSTER names no Ray cluster"
    rows = write_prompts(tmp_path / "in.parquet", ROWS)
    sections = {"sampling": {"temperature": 0, "max_tokens": 32}, "routing": {"level": "tokens"}}
    for name, nodes in (("spread", 2), ("packed", 1)):
        job = make_job(rows, tmp_path / name, **sections)
        engine = VllmEngineConfig(
            model_path=job.model.path,
            dtype="float32",
            max_model_len=512,
            moe=job.moe,
            tensor_parallel=2,
            num_nodes=nodes,
            source=job.spec.model,
        )
        shape = SlotShape(num_gpus=2 / nodes, num_bundles=nodes, gpu_type=TYPE, gpu_labels=gpu_type(TYPE).labels)
        pool = PoolPlan(TYPE, 1, engine, max_num_seqs=64, env=engine.environment(), shape=shape)
        summary = run_job(job, RunOptions(quiet=True, ray=ADDRESS), say=print, pools=[pool])
        assert summary["exit_code"] == 0
        assert summary["routing"]["invalid_samples"] == 0
        check_whole(tmp_path / name, ROWS)
    assert agreement(tmp_path / "spread", tmp_path / "packed") >= 0.9  # GPU kernels round differently in other batches
