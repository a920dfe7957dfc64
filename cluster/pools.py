"""What each pool's replicas run and what each of them takes: the fleet's settings, worked out. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cluster.gpus import CPU, GpuType, gpu_type
from cluster.settings import FleetSettings, PoolSettings
from pipeline.cores import num_cores
from pipeline.engine import MoeShape
from pipeline.engine_thread import EngineConfig
from pipeline.settings import ModelSettings
from pipeline.vllm_engine import VllmEngineConfig

GPU_TYPE_LABEL = "ray.io/accelerator-type"
"""Node label that Ray sets where it knows the GPU, and operators where it doesn't (to Ray, every A100 is `A100`)."""
UNBOUNDED = 1_000_000


@dataclass(frozen=True, slots=True)
class SlotShape:
    """What one replica takes: `num_bundles` equal bundles, each on one node, each on a node of its own."""

    num_cpus: float = 1.0
    """Of each bundle."""
    num_gpus: float = 0.0
    """Of each bundle."""
    num_bundles: int = 1
    gpu_type: str | None = None
    """What the spec calls the GPUs; None for any, or none."""
    gpu_labels: tuple[str, ...] = ()
    """Values of the node label `GPU_TYPE_LABEL` that mean this type."""

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of one bundle, as Ray names them."""
        wanted = {"CPU": self.num_cpus, "GPU": self.num_gpus}
        return {name: amount for name, amount in wanted.items() if amount}

    def describe(self) -> str:
        """What has to be there, in words: `2 GPUs of H100-80G on one node`."""
        count, unit = (self.num_gpus, "GPU") if self.num_gpus else (self.num_cpus, "CPU")
        kind = f" of {self.gpu_type}" if self.gpu_type else ""
        where = "one node" if self.num_bundles == 1 else f"each of {self.num_bundles} nodes"
        return f"{count:g} {unit}{'s' * (count != 1)}{kind} on {where}"


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """Replicas of one kind: how many, what each runs, and what each takes."""

    name: str
    num_replicas: int
    """The fewest: a cluster that can't hold them is refused, and they are kept while there is no work."""
    engine: EngineConfig
    max_num_seqs: int = 64
    """Sequences that the engine runs at once, for sizing what is kept ready for it."""
    env: dict[str, str] = field(default_factory=dict)
    shape: SlotShape = SlotShape()
    max_replicas: int | None = None
    """The most, as work and cluster allow; None for no more than `num_replicas`."""

    @property
    def most(self) -> int:
        """Replicas that there may be at most."""
        return self.num_replicas if self.max_replicas is None else self.max_replicas


def pool_plans(
    fleet: FleetSettings,
    model: ModelSettings,
    *,
    model_path: str,
    moe: MoeShape | None,
    num_nodes: Sequence[int] | None = None,
) -> list[PoolPlan]:
    """One plan per pool, in the spec's order; all pools are decided, see `cluster.fleet_plan.decide_fleet`.

    `num_nodes` says for each pool over how many nodes its replicas go; None for one.
    """
    num_cpu_workers = sum(max(1, pool.least) * pool.num_workers for pool in fleet.pools if pool.gpu == CPU)
    num_threads = max(1, num_cores() // max(1, num_cpu_workers))
    plans = []
    for index, pool in enumerate(fleet.pools):
        shape = slot_shape(pool, fleet.gpu_types, num_nodes=num_nodes[index] if num_nodes else 1)
        engine = VllmEngineConfig(
            model_path=model_path,
            dtype=model.dtype,
            max_model_len=model.max_model_len,
            moe=moe,
            tensor_parallel=pool.num_workers,
            num_nodes=shape.num_bundles,
            on_cpu=pool.gpu == CPU,
            num_threads=(pool.cpu_threads or num_threads) if pool.gpu == CPU else 1,
            engine_args={**model.engine_args, **pool.engine_args},
            source=model,
        )
        plans.append(
            PoolPlan(
                name=f"{pool.gpu}-{index}",
                num_replicas=pool.least,
                max_replicas=UNBOUNDED if pool.most is None else pool.most,
                engine=engine,
                max_num_seqs=engine.max_num_seqs,
                env=engine.environment(),
                shape=shape,
            )
        )
    return plans


def slot_shape(pool: PoolSettings, custom: Iterable[GpuType] = (), *, num_nodes: int = 1) -> SlotShape:
    """The GPUs of a replica in one bundle per node, equally many in each; on CPU, a core per tensor-parallel worker."""
    if pool.gpu == CPU:
        return SlotShape(num_cpus=pool.num_workers)
    labels = gpu_type(pool.gpu, custom).labels
    share = pool.num_workers // num_nodes
    return SlotShape(num_gpus=share, num_bundles=num_nodes, gpu_type=pool.gpu, gpu_labels=labels)
