"""What a fleet's settings leave open, decided: GPU types, tensor-parallel sizes, engine arguments. Pure but for one
small file, the model's config.

Guarantees:
- a pool on GPUs that can't hold the model, or can't compute in its dtype, is refused before any weight is loaded.
- what the user set is never changed.
- pools on `cpu` are left as they are: the rules here are those of GPU memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.gpus import CPU, GpuType, gpu_type, precision_problem
from cluster.hardware import Hardware, seen_hardware
from cluster.model_size import ModelSize, model_size
from cluster.nodes import Node
from cluster.pools import PoolPlan, pool_plans
from cluster.precision import Precision, model_precision
from cluster.settings import AUTO, FleetSettings, PoolSettings
from cluster.topology import Candidate, Choice, Demand, assess, choose_tensor_parallel, require_fit
from pipeline.engine import MoeShape
from pipeline.errors import SpecError
from pipeline.model import read_config
from pipeline.settings import ModelSettings

_MEMORY_ELSEWHERE = ("cpu_offload_gb", "pipeline_parallel_size", "kv_cache_memory_bytes", "speculative_config")
"""Engine arguments under which memory isn't what the planner counts."""


@dataclass(frozen=True, slots=True)
class FleetDemand:
    """A fleet and what it is for."""

    fleet: FleetSettings
    model: ModelSettings
    model_path: str
    """Directory with the model's config."""
    moe: MoeShape | None

    @property
    def replica_cpus(self) -> int:
        """Logical CPUs that the fewest replicas take."""
        return sum(pool.least * (pool.num_workers if pool.gpu == CPU else 1) for pool in self.fleet.pools)

    def plans(self, nodes: Sequence[Node], *, grows: bool) -> tuple[list[PoolPlan], tuple[str, ...]]:
        """Every pool worked out for these nodes, and what is left unused, in words.

        Raises:
            SpecError: as `decide_fleet`.
        """
        hardware = seen_hardware(nodes, self.fleet.gpu_types)
        decided, notes = decide_fleet(self.fleet, self.model, self.model_path, hardware, grows=grows)
        num_nodes = [nodes_of_replica(pool, hardware) for pool in decided.pools]
        plans = pool_plans(decided, self.model, model_path=self.model_path, moe=self.moe, num_nodes=num_nodes)
        return plans, notes


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model whose memory can be counted, for engines with given arguments."""

    size: ModelSize
    demand: Demand

    def choose(self, gpu: GpuType, *, gpus_per_node: int) -> Choice:
        """The planner's tensor-parallel size, and why."""
        return choose_tensor_parallel(self.size, gpu=gpu, demand=self.demand, gpus_per_node=gpus_per_node)


def planned_model(model: ModelSettings, path: str, engine_args: Mapping[str, Any]) -> PlannedModel:
    """Count a model for engines with these arguments, the pool's laid over the model's.

    A sequence is taken to be half of `max_model_len` long on average: rows' own lengths aren't known yet when engines
    start, and a warm fleet has no rows.

    Raises:
        SpecError: its family or quantization isn't known, or an argument changes what memory holds.
    """
    elsewhere = next((name for name in _MEMORY_ELSEWHERE if engine_args.get(name) not in (None, 1)), None)
    if elsewhere:
        raise SpecError(f"engine_args.{elsewhere} changes what GPUs hold, which isn't planned; give tensor_parallel")
    config = read_config(Path(path) / "config.json")
    precision = model_precision(config, dtype=model.dtype, engine_args=engine_args)
    demand = Demand(model.max_model_len, max(1, model.max_model_len // 2), precision)
    given = {name: engine_args.get(name) for name in ("gpu_memory_utilization", "max_num_batched_tokens")}
    if given["gpu_memory_utilization"] is not None:
        demand = replace(demand, utilisation=float(given["gpu_memory_utilization"]))
    if given["max_num_batched_tokens"] is not None:
        demand = replace(demand, max_num_batched_tokens=int(given["max_num_batched_tokens"]))
    try:
        return PlannedModel(model_size(config), demand)
    except KeyError as error:
        raise SpecError(
            f"{path}/config.json has no {error}, so the model's size is unknown; give tensor_parallel"
        ) from None


def refuse_impossible(fleet: FleetSettings, model: ModelSettings, path: str) -> None:
    """Check pools whose GPU type is named, before nodes are known.

    Raises:
        SpecError: a GPU type that nobody described, a dtype it can't compute in, or a tensor-parallel size that can't
            hold the model, with the one that can.
    """
    for index, pool in enumerate(fleet.pools):
        if pool.gpu in (CPU, AUTO):
            continue
        gpu = gpu_type(pool.gpu, fleet.gpu_types)
        with _about(index, pool):
            _refuse_pool(pool, gpu, model, path)


def decide_fleet(
    fleet: FleetSettings, model: ModelSettings, path: str, hardware: Hardware, *, grows: bool
) -> tuple[FleetSettings, tuple[str, ...]]:
    """Decide what is `auto`, and give engines on GPUs the batch sizes that fit; say what is left unused.

    `grows`: an autoscaler may add nodes, so the absence of GPUs now means nothing.

    Raises:
        SpecError: as `refuse_impossible`; or no GPU that is there can hold the model.
    """
    refuse_impossible(fleet, model, path)
    pools: list[PoolSettings] = []
    notes: list[str] = []
    for index, pool in enumerate(fleet.pools):
        with _about(index, pool):
            if pool.gpu == AUTO:
                found, unused = _pools_for_all(pool, fleet, model, path, hardware, grows=grows)
                pools += found
                notes += unused
            else:
                pools.append(decide_pool(pool, fleet, model, path, hardware))
    return fleet.model_copy(update={"pools": pools}), tuple(notes)


def decide_pool(
    pool: PoolSettings, fleet: FleetSettings, model: ModelSettings, path: str, hardware: Hardware
) -> PoolSettings:
    """Decide tensor-parallel size and batch sizes of a pool of a named type.

    Raises:
        SpecError: nothing fits.
    """
    if pool.gpu == CPU:
        return pool.model_copy(update={"tensor_parallel": 1}) if pool.tensor_parallel == AUTO else pool
    gpu = gpu_type(pool.gpu, fleet.gpu_types)
    engine_args = {**model.engine_args, **pool.engine_args}
    try:
        planned = planned_model(model, path, engine_args)
    except SpecError:
        if pool.tensor_parallel == AUTO:
            raise
        return pool  # the user knows what the planner doesn't
    candidate = candidate_of(pool, planned, gpu, hardware)
    suggested = {
        "max_num_seqs": candidate.max_num_seqs,
        "max_num_batched_tokens": max(candidate.max_num_batched_tokens, int(engine_args.get("max_num_seqs") or 0)),
    }
    added = {name: value for name, value in suggested.items() if name not in engine_args}
    decided = {"tensor_parallel": candidate.tensor_parallel, "engine_args": {**added, **pool.engine_args}}
    return pool.model_copy(update=decided)


def candidate_of(pool: PoolSettings, planned: PlannedModel, gpu: GpuType, hardware: Hardware) -> Candidate:
    """The user's tensor-parallel size, or the planner's, with what fits then.

    Raises:
        SpecError: nothing fits.
    """
    if pool.tensor_parallel != AUTO:
        return assess(planned.size, gpu=gpu, demand=planned.demand, tensor_parallel=pool.num_workers)
    choice = planned.choose(gpu, gpus_per_node=hardware.largest_node(gpu.name))
    if choice.chosen is None:
        raise SpecError(choice.reason)
    return choice.chosen


def nodes_of_replica(pool: PoolSettings, hardware: Hardware) -> int:
    """Nodes that a replica of a decided pool takes; engines on CPU stay on one."""
    return 1 if pool.gpu == CPU else hardware.nodes_of_replica(pool.gpu, pool.num_workers)


def _refuse_pool(pool: PoolSettings, gpu: GpuType, model: ModelSettings, path: str) -> None:
    try:
        planned = planned_model(model, path, {**model.engine_args, **pool.engine_args})
    except SpecError:
        if pool.tensor_parallel == AUTO:
            raise
        problem = precision_problem(gpu, Precision(model.dtype)) if model.dtype != AUTO else None
        if problem:
            raise SpecError(problem) from None
        return
    if pool.tensor_parallel != AUTO:
        require_fit(planned.size, gpu=gpu, demand=planned.demand, tensor_parallel=pool.num_workers)
    elif problem := precision_problem(gpu, planned.demand.precision):
        raise SpecError(problem)


def _pools_for_all(
    pool: PoolSettings, fleet: FleetSettings, model: ModelSettings, path: str, hardware: Hardware, *, grows: bool
) -> tuple[list[PoolSettings], list[str]]:
    """One pool per GPU type that is there and can hold the model; and why others can't."""
    if not hardware.kinds and not hardware.unknown:
        if grows:
            raise SpecError(
                "auto takes the GPUs that the cluster has, and it has none until it grows; name the types it may add"
            )
        return [PoolSettings(engine_args=pool.engine_args)], []
    pools: list[PoolSettings] = []
    unused = [*hardware.unknown]
    for name in hardware.gpu_types:
        typed = pool.model_copy(update={"gpu": name})
        try:
            _refuse_pool(typed, gpu_type(name, fleet.gpu_types), model, path)
            decided = decide_pool(typed, fleet, model, path, hardware)
            if hardware.num_replicas(name, decided.num_workers) == 0:
                raise SpecError(
                    f"{name}: no node has {decided.num_workers} of them, as tensor_parallel asks for, and no nodes "
                    "have equal shares of that"
                )
            pools.append(decided)
        except SpecError as error:
            unused.append(error.message)
    if not pools:
        raise SpecError(f"no GPU of this cluster can be used: {'; '.join(unused)}")
    return pools, [f"not used: {reason}" for reason in unused]


@contextlib.contextmanager
def _about(index: int, pool: PoolSettings) -> Iterator[None]:
    """Within the block a SpecError is about this pool, and says so."""
    try:
        yield
    except SpecError as error:
        raise SpecError(f"fleet.pools[{index}] ({pool.gpu}): {error.message}") from error
