"""Whether a cluster can hold a fleet, and how much of it: what is missing where, in words. Pure.

Guarantees:
- pools of equal slots are let through exactly when their fewest replicas fit on the nodes all at once. Pools that mix
  sizes on the same nodes are placed largest first, which in rare cases refuses what could just be packed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cluster.nodes import Node, fitting
from cluster.pools import GPU_TYPE_LABEL, UNBOUNDED, PoolPlan, SlotShape
from cluster.spread import num_spread
from pipeline.errors import SpecError


def check_capacity(pools: Sequence[PoolPlan], nodes: Sequence[Node]) -> None:
    """Raise when not even the idle cluster could hold the fewest replicas of all pools.

    Raises:
        SpecError: says for the first pool that doesn't fit what it needs, what is there, and what to change.
    """
    left = list(nodes)
    for pool in sorted(pools, key=_bulk, reverse=True):
        for placed in range(pool.num_replicas):
            placement = place(pool.shape, left)
            if placement is None:
                raise SpecError(_refusal(pool, placed, nodes))
            left = placement
    if all(pool.num_replicas == 0 for pool in pools) and not any(place(pool.shape, nodes) for pool in pools):
        raise SpecError(_refusal(pools[0], 0, nodes))


def beside_the_stages(nodes: Sequence[Node], *driver_node_ids: str) -> list[Node]:
    """What is left for replicas: one CPU of a driver's node is needed to read, template and write rows."""
    return [
        replace(node, total=_one_cpu_less(node.total), free=_one_cpu_less(node.free))
        if node.node_id in driver_node_ids
        else node
        for node in nodes
    ]


def _one_cpu_less(resources: Mapping[str, float]) -> dict[str, float]:
    return {**resources, "CPU": max(0.0, resources.get("CPU", 0) - 1)}


def full_nodes(nodes: Sequence[Node], held_cpus: Mapping[str, float], shape: SlotShape) -> list[str]:
    """Ids of the nodes on which one more bundle would be too much beside what is held on them (node id -> CPUs)."""
    return [
        node_id
        for node_id, held in held_cpus.items()
        if any(node.node_id == node_id and held + shape.num_cpus > node.total.get("CPU", 0) for node in nodes)
    ]


def place(shape: SlotShape, nodes: Sequence[Node]) -> list[Node] | None:
    """Take one slot out of the nodes' totals, a bundle from each of some nodes; None if it doesn't fit.

    One bundle goes to the tightest node that holds it. Several go to those with most room: taking the tightest would
    leave room on too few different nodes for the next slot.
    """
    able = [node for node in nodes if node.suits(shape) and fitting(node.total, shape)]
    if len(able) < shape.num_bundles:
        return None
    room = -1 if shape.num_bundles > 1 else 1
    able.sort(key=lambda node: (_wastes_gpus(node, shape), room * fitting(node.total, shape), sum(node.total.values())))
    taken = {node.node_id for node in able[: shape.num_bundles]}
    return [_without(node, shape) if node.node_id in taken else node for node in nodes]


def _wastes_gpus(node: Node, shape: SlotShape) -> bool:
    return node.total.get("GPU", 0) > 0 and not shape.num_gpus


def num_placeable(shape: SlotShape, nodes: Sequence[Node]) -> int:
    """Slots of this shape that fit into what is free now, on nodes that stay."""
    able = [node for node in nodes if node.leaves_at is None and node.suits(shape)]
    return num_spread([fitting(node.free, shape) for node in able], shape.num_bundles)


def most_replicas(pool: PoolPlan, nodes: Sequence[Node]) -> int:
    """Replicas to prepare for: the pool's own limit, or, where it has none, half as many again as the nodes hold."""
    if pool.most < UNBOUNDED:
        return pool.most
    idle = [replace(node, free=node.total, leaves_at=None) for node in nodes]
    return max(pool.num_replicas, math.ceil(1.5 * num_placeable(pool.shape, idle)))


def _bulk(pool: PoolPlan) -> tuple[float, float, float]:
    """What is hardest to place: the largest slot, then the largest bundle."""
    shape = pool.shape
    return shape.num_gpus * shape.num_bundles, shape.num_gpus, shape.num_cpus


def _without(node: Node, shape: SlotShape) -> Node:
    left = {name: amount - shape.bundle.get(name, 0) for name, amount in node.total.items()}
    return replace(node, total=left)


def _refusal(pool: PoolPlan, placed: int, nodes: Sequence[Node]) -> str:
    wanted = f"{pool.num_replicas} replicas with " if pool.num_replicas > 1 else ""
    fits = f"; {placed} of {pool.num_replicas} fit" if placed else ""
    return (
        f"fleet.pools: {pool.name} needs {wanted}{pool.shape.describe()}, which this cluster can never hold{fits}. "
        f"It has {describe_nodes(nodes)}. {_cure(pool, placed, nodes)}"
    )


def _cure(pool: PoolPlan, placed: int, nodes: Sequence[Node]) -> str:
    gpu = pool.shape.gpu_type
    if placed:
        return f"Lower replicas to {placed}, or add nodes"
    if gpu and not any(node.total.get("GPU", 0) for node in nodes):
        return "Set gpu: cpu or fleet: auto, or name a Ray cluster that has such GPUs with --ray"
    if gpu and not any(node.suits(pool.shape) for node in nodes):
        family = gpu.split("-")[0]
        if any(node.gpu_type == family for node in nodes):
            return (
                f"To Ray, every {family} is the same: start nodes that have {gpu} with --labels {GPU_TYPE_LABEL}={gpu}"
            )
        return f"Name a GPU type that is there, or add nodes labelled {GPU_TYPE_LABEL}={gpu}"
    if gpu and pool.shape.num_bundles > 1:
        each = f"{pool.shape.num_gpus:g} GPU{'s' * (pool.shape.num_gpus != 1)}"
        return (
            "A replica larger than a node takes equally many GPUs of each of several: lower tensor_parallel, or have "
            f"{pool.shape.num_bundles} nodes with {each} of {gpu}"
        )
    return "Lower tensor_parallel, or use larger nodes"


def describe_nodes(nodes: Sequence[Node]) -> str:
    """`2 nodes with 4 GPUs (H100-80G), 1 node with 8 CPUs and no GPU`."""
    kinds: dict[str, int] = {}
    for node in nodes:
        gpus = node.total.get("GPU", 0)
        kind = (
            f"{gpus:g} GPUs ({node.gpu_type or 'no GPU type label'})"
            if gpus
            else f"{node.total.get('CPU', 0):g} CPUs and no GPU"
        )
        kinds[kind] = kinds.get(kind, 0) + 1
    words = [f"{count} node{'s' * (count > 1)} with {kind}" for kind, count in sorted(kinds.items())]
    return ", ".join(words) or "nothing"
