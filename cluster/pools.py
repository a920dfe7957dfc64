"""Fleet settings -> what each pool's replicas run and take."""

from __future__ import annotations

import os

from cluster.fleet import PoolPlan
from pipeline.engine import MoeShape
from pipeline.settings import FleetSettings, ModelSettings
from pipeline.vllm_engine import VllmEngineConfig

CPU = "cpu"


def pool_plans(fleet: FleetSettings, model: ModelSettings, *, model_path: str, moe: MoeShape | None) -> list[PoolPlan]:
    """One plan per pool, in the spec's order.

    CPU replicas share this machine's cores; a GPU replica takes as many GPUs as its tensor-parallel size, all of one
    node, since a single actor holds them.
    """
    num_cpu_engines = sum(pool.replicas * pool.tensor_parallel for pool in fleet.pools if pool.gpu == CPU)
    plans = []
    for index, pool in enumerate(fleet.pools):
        on_cpu = pool.gpu == CPU
        engine = VllmEngineConfig(
            model_path=model_path,
            dtype=model.dtype,
            max_model_len=model.max_model_len,
            moe=moe,
            tensor_parallel=pool.tensor_parallel,
            on_cpu=on_cpu,
            num_threads=max(1, (os.cpu_count() or 1) // max(1, num_cpu_engines)) if on_cpu else 1,
            engine_args={**model.engine_args, **pool.engine_args},
        )
        plans.append(
            PoolPlan(
                name=f"{pool.gpu}-{index}",
                num_replicas=pool.replicas,
                engine=engine,
                max_num_seqs=engine.max_num_seqs,
                env=engine.environment(),
                num_gpus=0 if on_cpu else pool.tensor_parallel,
            )
        )
    return plans
