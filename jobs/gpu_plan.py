"""What a job would take on GPUs, live, assumed, or merely named in its spec: sizes of engines, speed, time and cost.

Pure. All speeds and times are estimates by `cluster.roofline`, from datasheets; nothing is measured here. What a run
would be refused for, or would leave unused, is said with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.fleet_plan import PlannedModel, candidate_of, planned_model
from cluster.gpus import CPU, GpuType, gpu_type
from cluster.hardware import Hardware, NodeKind
from cluster.pools import slot_shape
from cluster.roofline import (
    NETWORK_GB_PER_S,
    REAL_SHARE_HIGH,
    REAL_SHARE_LOW,
    Engine,
    RunEstimate,
    TokenTotal,
    Work,
    decode_step,
    estimate_run,
)
from cluster.settings import AUTO, FleetSettings, PoolSettings
from cluster.topology import Candidate
from pipeline.errors import SpecError
from pipeline.settings import ModelSettings

NODE_GPUS = 8
"""Of the node that a pool is planned on when no cluster was looked at."""
_SHARES = (REAL_SHARE_LOW, REAL_SHARE_HIGH)


@dataclass(frozen=True, slots=True)
class PoolEstimate:
    """One GPU type, planned."""

    gpu: str
    nodes: tuple[NodeKind, ...]
    num_replicas: int
    """That a run would have; 0 when nothing fits, or no pool asks for this type."""
    candidate: Candidate | None
    reason: str
    """Why this tensor-parallel size; or why none."""
    refused: tuple[str, ...] = ()
    """Why other sizes don't do."""
    ideal_tokens_per_s: float = 0.0
    """Output tokens of one replica, decoding with a full batch, at best."""
    run: RunEstimate | None = None
    """The whole job on this pool's replicas alone; None when it has none."""
    nodes_per_replica: int = 1

    @property
    def replicas_per_node(self) -> int:
        """Engines that fit on the largest node."""
        size = self.candidate.tensor_parallel if self.candidate else 0
        return max((kind.gpus_per_node // size for kind in self.nodes), default=0) if size else 0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        chosen = self.candidate
        ideal = self.ideal_tokens_per_s
        return {
            "gpu": self.gpu,
            "nodes": [{"gpus_per_node": kind.gpus_per_node, "nodes": kind.num_nodes} for kind in self.nodes],
            "replicas": self.num_replicas,
            "replicas_per_node": self.replicas_per_node,
            "nodes_per_replica": self.nodes_per_replica,
            "tensor_parallel": chosen.tensor_parallel if chosen else None,
            "weights_gib_per_gpu": round(chosen.weights_gib, 2) if chosen else None,
            "kv_tokens": chosen.kv_tokens if chosen else None,
            "max_num_seqs": chosen.max_num_seqs if chosen else None,
            "max_num_batched_tokens": chosen.max_num_batched_tokens if chosen else None,
            "ideal_tokens_per_s": round(ideal * self.num_replicas),
            "expected_tokens_per_s": [round(ideal * self.num_replicas * share) for share in _SHARES],
            "reason": self.reason,
            "refused": list(self.refused),
        }


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """All GPU types, and what the job takes on all replicas together."""

    pools: tuple[PoolEstimate, ...]
    notes: tuple[str, ...] = ()

    def total(self) -> dict[str, Any] | None:
        """GPU-hours, seconds and dollars, each low and high; None when nothing would run.

        Rows go to whoever has least to do, so all pools end together: rates add up.
        """
        runs = [pool.run for pool in self.pools if pool.run is not None]
        if not runs:
            return None
        low, high, ideal = (
            _together([getattr(run, name) for run in runs]) for name in ("wall_low_s", "wall_high_s", "ideal_s")
        )
        num_gpus = sum(run.num_gpus for run in runs)
        prices = [run.usd_per_gpu_hour for run in runs]
        usd_per_hour = sum(run.num_gpus * (run.usd_per_gpu_hour or 0.0) for run in runs)
        return {
            "gpus": num_gpus,
            "ideal_s": ideal,
            "wall_s": [low, high],
            "gpu_hours": [low * num_gpus / 3600, high * num_gpus / 3600],
            "usd": None if None in prices else [low * usd_per_hour / 3600, high * usd_per_hour / 3600],
        }


@dataclass(frozen=True, slots=True)
class Question:
    """A job, as far as planning goes."""

    fleet: FleetSettings
    model: ModelSettings
    model_path: str
    work: Work

    @property
    def context(self) -> float:
        """Mean tokens that a sequence is long while it is decoded."""
        count = max(1, self.work.num_sequences)
        return (self.work.input_tokens.total + self.work.output_tokens.total / 2) / count


def expected_output(limit: TokenTotal, *, is_exact: bool) -> TokenTotal:
    """Output tokens, from the limit of n x max_tokens: how soon answers end is a guess until `preview` measures it.

    Half of the limit, from a quarter to all of it; `is_exact` where every sample goes on to its limit.
    """
    return limit if is_exact else TokenTotal(limit.total // 2, limit.low // 4, limit.high)


def plan_gpus(question: Question, hardware: Hardware | None, *, assumed: bool) -> GpuPlan:
    """Plan every GPU type that the spec names or that is there.

    Args:
        question: what is to be run.
        hardware: which GPUs there are; None plans one node of eight GPUs for each pool.
        assumed: these GPUs are supposed for the sake of planning, so types that no pool names are planned as under
            `fleet: auto`, too. On a live cluster a run would not use them.
    """
    fleet = question.fleet
    any_type = next((pool for pool in fleet.pools if pool.gpu == AUTO), None)
    named = [pool for pool in fleet.pools if pool.gpu not in (CPU, AUTO)]
    if hardware is None:
        notes = ["fleet: auto takes what a cluster has, so there is nothing to plan yet"] if any_type else []
        kinds = tuple(NodeKind(pool.gpu, NODE_GPUS, _nodes_of_replica(pool)) for pool in named)
        if kinds:
            few = all(kind.num_nodes == 1 for kind in kinds)
            nodes = f"one node of {NODE_GPUS} GPUs" if few else f"as many nodes of {NODE_GPUS} GPUs as a replica takes"
            notes.append(f"planned on {nodes} for each pool")
        there = Hardware(kinds)
        found = tuple(_estimate(pool, question, there) for pool in named)
        return GpuPlan(found, (*notes, *_network_notes(found)))
    notes = [f"not used: {reason}" for reason in hardware.unknown]
    notes += [f"{pool.gpu}: fleet.pools asks for it, but there is none" for pool in named if not hardware.of(pool.gpu)]
    pools: list[PoolEstimate] = []
    for name in hardware.gpu_types:
        pool = next((pool for pool in named if pool.gpu == name), None)
        template = any_type or PoolSettings(replicas="max", tensor_parallel=AUTO)
        is_used = pool is not None or any_type is not None or assumed
        pools.append(_estimate(pool or template.model_copy(update={"gpu": name}), question, hardware, is_used=is_used))
        if pool is None and any_type is None:
            cure = "set `fleet: auto`, or add a pool" if assumed else "no pool names it"
            notes.append(f"{name}: a run of this spec would not use it; {cure}")
    return GpuPlan(tuple(pools), (*notes, *_network_notes(pools)))


def _nodes_of_replica(pool: PoolSettings) -> int:
    """On nodes of `NODE_GPUS` GPUs."""
    return 1 if pool.tensor_parallel == AUTO else Hardware(()).nodes_of_replica(pool.gpu, pool.num_workers)


def _network_notes(pools: Sequence[PoolEstimate]) -> Iterator[str]:
    """What a plan can't know of replicas that span nodes."""
    for pool in pools:
        if pool.candidate is not None and pool.nodes_per_replica > 1:
            yield (
                f"{pool.gpu}: a replica of {pool.candidate.tensor_parallel} GPUs spans {pool.nodes_per_replica} nodes, "
                f"and the network between them decides its speed: taken as {NETWORK_GB_PER_S:g} GB/s a GPU without "
                "delay, so measure it with `tramontane preview`"
            )


def _estimate(pool: PoolSettings, question: Question, hardware: Hardware, *, is_used: bool = True) -> PoolEstimate:
    gpu, nodes = gpu_type(pool.gpu, question.fleet.gpu_types), tuple(hardware.of(pool.gpu))
    engine_args = {**question.model.engine_args, **pool.engine_args}
    try:
        planned = planned_model(question.model, question.model_path, engine_args)
        chosen = candidate_of(pool, planned, gpu, hardware)
    except SpecError as error:
        return PoolEstimate(gpu.name, nodes, 0, None, error.message)
    if "max_num_seqs" in engine_args:
        chosen = replace(chosen, max_num_seqs=int(engine_args["max_num_seqs"]))
    reason, refused = _reasons(pool, chosen, planned, gpu, hardware)
    num_replicas = hardware.num_replicas(gpu.name, chosen.tensor_parallel)
    if pool.most is not None:
        num_replicas = min(num_replicas, pool.most)
    if not is_used:
        num_replicas = 0
    num_nodes = hardware.nodes_of_replica(gpu.name, chosen.tensor_parallel)
    engine = Engine(planned.size, gpu, chosen.tensor_parallel, planned.demand.precision, num_nodes)
    return PoolEstimate(
        gpu=gpu.name,
        nodes=nodes,
        num_replicas=num_replicas,
        candidate=chosen,
        reason=reason,
        refused=refused,
        ideal_tokens_per_s=decode_step(engine, batch=chosen.max_num_seqs, context=question.context).tokens_per_s,
        run=_run(engine, num_replicas, chosen, question.work, pool) if num_replicas else None,
        nodes_per_replica=num_nodes,
    )


def _run(engine: Engine, num_replicas: int, chosen: Candidate, work: Work, pool: PoolSettings) -> RunEstimate:
    return estimate_run(
        engine,
        num_replicas=num_replicas,
        max_num_seqs=chosen.max_num_seqs,
        work=work,
        usd_per_gpu_hour=pool.usd_per_gpu_hour,
    )


def _reasons(
    pool: PoolSettings, chosen: Candidate, planned: PlannedModel, gpu: GpuType, hardware: Hardware
) -> tuple[str, tuple[str, ...]]:
    """Why the size, and why no smaller or larger one where that has a reason."""
    choice = planned.choose(gpu, gpus_per_node=hardware.largest_node(gpu.name))
    others = tuple(each.problem for each in choice.candidates if each.problem and each != choice.chosen)
    if pool.tensor_parallel == AUTO:
        return choice.reason, others
    size = chosen.tensor_parallel
    own = f"tensor_parallel={size} is the spec's, {chosen.weights_gib:.1f} GiB of weights a GPU"
    fits = hardware.num_replicas(gpu.name, size)
    if fits < pool.least:
        takes = slot_shape(pool, [gpu], num_nodes=hardware.nodes_of_replica(gpu.name, size)).describe()
        return f"{own}, but {pool.least} x {takes} are needed, and {fits} fit", others
    if choice.chosen is None or choice.chosen.tensor_parallel == size:
        return own, others
    return f"{own}; `auto` would take {choice.chosen.tensor_parallel}", others


def _together(seconds: Sequence[float]) -> float:
    """How long pools take for what each alone would take so long for."""
    return 1 / sum(1 / alone for alone in seconds) if all(seconds) else 0.0
