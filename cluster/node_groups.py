"""Pools of replicas to groups of nodes: how many nodes of each GPU type, and what can't work. Pure.

Guarantees:
- every pool has a group of its GPU type whose nodes hold its replicas, and enough nodes for the fewest of them.
- no group is without a pool: it would cost money and run nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.fleet_file import FleetFile, NodeGroupSettings
from cluster.gpus import CPU, gpu_type
from cluster.pools import GPU_TYPE_LABEL
from cluster.settings import AUTO, PoolSettings
from cluster.spread import nodes_of_replica
from pipeline.errors import SpecError

MARKET_LABEL = "ray.io/market-type"
_CPUS_PER_GPU = 4
_GIB_PER_GPU = 24
_CPUS_WITHOUT_GPU, _GIB_WITHOUT_GPU = 8, 32
_DRAIN_S = 90
# What is left of a spot node's notice when its pods hear of it: GKE's kubelet keeps 15 of 30 s for system pods, AKS
# gives 30 in all, AWS's termination handler passes on nearly all of its 120.
_SPOT_DRAIN_S = {"gke": 12, "aks": 20, "eks": 90, "other": 20}
_GPU_RESOURCES = {"nvidia": "nvidia.com/gpu", "amd": "amd.com/gpu"}


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Equal nodes, worked out."""

    name: str
    """Lower case, digits and dashes."""
    settings: NodeGroupSettings
    min_nodes: int
    max_nodes: int
    num_gpus: int
    """Of each node; 0 for CPU nodes."""
    cpus: int
    memory_gib: int
    image: str
    gpu_resource: str | None = None
    """What Kubernetes calls such GPUs; None without."""
    labels: dict[str, str] = field(default_factory=dict)
    """Ray node labels."""
    drain_s: int = 90
    """How long a node that is told to go has for its work."""
    nodes_of_replica: int = 1
    """Of the pools here, of the one whose replicas span most nodes."""

    @property
    def ray_cpus(self) -> int:
        """CPUs that Ray may give away: one for each replica there can be, so that row work stays on the head."""
        return self.num_gpus or self.cpus

    @property
    def is_scaled(self) -> bool:
        """Whether nodes come and go with the work."""
        return self.min_nodes < self.max_nodes


def node_groups(file: FleetFile) -> list[NodeGroup]:
    """One group per entry of `cluster.groups`, in its order.

    Raises:
        SpecError: a pool without a group, a group without a pool, a replica larger than all nodes, too few nodes.
    """
    if file.cluster.image is None:
        raise SpecError(
            "cluster.image is missing: a manifest needs a container image with this program; build "
            "cluster/image/Dockerfile.gpu, push it, and name it, e.g. registry.example.com/tramontane:0.1.0"
        )
    _refuse_mismatch(file)
    groups = [_group(entry, file) for entry in file.cluster.groups]
    refuse_what_does_not_fit(file.fleet.pools, groups, where="fleet.pools")
    return groups


def refuse_what_does_not_fit(pools: Sequence[PoolSettings], groups: Sequence[NodeGroup], *, where: str) -> None:
    """Check that pools, the fleet file's or a job's, can run on these groups, as far as they are decided.

    Raises:
        SpecError: naming the pool, what it needs and what there is.
    """
    by_gpu = {group.settings.gpu: group for group in groups}
    for index, pool in enumerate(pools):
        path = f"{where}[{index}]"
        if pool.gpu != AUTO and pool.gpu not in by_gpu:
            raise SpecError(
                f"{path} asks for gpu {pool.gpu}, but cluster.groups has {', '.join(by_gpu) or 'no groups'}; "
                f"add a group `- gpu: {pool.gpu}`, or change the pool"
            )
        if not pool.is_decided:
            continue
        group = by_gpu[pool.gpu]
        _refuse_larger_than(group, pool, path)
    decided = [pool for pool in pools if pool.is_decided]
    for group in groups:
        needed = _nodes_for(group.settings, decided, fewest=True) or 0
        if needed > group.max_nodes:
            raise SpecError(
                f"{where}: the fewest replicas on {group.settings.gpu} take {needed} nodes, but max_nodes is "
                f"{group.max_nodes}; raise cluster.groups[].max_nodes, or lower replicas"
            )


def _refuse_larger_than(group: NodeGroup, pool: PoolSettings, path: str) -> None:
    """Refuse a pool whose replica is larger than a node on CPU, or than all of the group's nodes."""
    size = _capacity(group.settings)
    if pool.gpu == CPU and pool.num_workers > size:
        raise SpecError(
            f"{path}: tensor_parallel={pool.tensor_parallel} is more than the {size} CPUs of a {pool.gpu} node, "
            "and a replica on CPU lives on one node; lower tensor_parallel, or raise the group's cpus"
        )
    num_nodes = _nodes_of_replica(pool, group.settings)
    if num_nodes <= group.max_nodes:
        return
    raise SpecError(
        f"{path}: tensor_parallel={pool.tensor_parallel} is more than the {size} GPUs of a {pool.gpu} node, and spread "
        f"evenly takes {num_nodes} nodes, but max_nodes is {group.max_nodes}; lower tensor_parallel, or raise the "
        "group's gpus_per_node or max_nodes"
    )


def _refuse_mismatch(file: FleetFile) -> None:
    for index, pool in enumerate(file.fleet.pools):
        if not pool.is_decided:
            raise SpecError(
                f"fleet.pools[{index}] leaves gpu or tensor_parallel to be decided on a cluster, but a manifest is "
                "what makes one; name both (`tramontane plan job.yaml --assume H100-80G:8x1` says what fits)"
            )
    seen: set[str] = set()
    for index, entry in enumerate(file.cluster.groups):
        where = f"cluster.groups[{index}]"
        if entry.gpu in seen:
            raise SpecError(f"{where} is a second group of {entry.gpu}; raise max_nodes of the first")
        seen.add(entry.gpu)
        if entry.gpu not in {pool.gpu for pool in file.fleet.pools}:
            raise SpecError(f"{where}: no pool uses {entry.gpu}, so its nodes would idle; leave the group out")
    for index, pool in enumerate(file.fleet.pools):
        if pool.gpu not in seen:
            raise SpecError(
                f"fleet.pools[{index}] asks for gpu {pool.gpu}, but cluster.groups has "
                f"{', '.join(sorted(seen)) or 'no groups'}; add a group `- gpu: {pool.gpu}`, or change the pool"
            )


def _group(entry: NodeGroupSettings, file: FleetFile) -> NodeGroup:
    kind = gpu_type(entry.gpu, file.fleet.gpu_types)
    num_gpus = 0 if entry.gpu == CPU else entry.gpus_per_node
    if kind.vendor == "amd" and entry.image is None:
        raise SpecError(
            f"cluster.groups: {entry.gpu} needs a ROCm build of vLLM, and cluster.image is for CUDA; "
            "name an image of your own as the group's `image`"
        )
    low, high = _bounds(entry, file.fleet.pools)
    labels = {} if entry.gpu == CPU else {GPU_TYPE_LABEL: entry.gpu}
    return NodeGroup(
        name=entry.gpu.lower().replace(".", "-").replace("_", "-") + ("-spot" if entry.spot else ""),
        settings=entry,
        min_nodes=low,
        max_nodes=high,
        num_gpus=num_gpus,
        cpus=entry.cpus or (_CPUS_PER_GPU * num_gpus or _CPUS_WITHOUT_GPU),
        memory_gib=entry.memory_gib or (_GIB_PER_GPU * num_gpus or _GIB_WITHOUT_GPU),
        image=entry.image or file.cluster.image or "",
        gpu_resource=_GPU_RESOURCES.get(kind.vendor),
        labels={**entry.labels, **labels, MARKET_LABEL: "spot" if entry.spot else "on-demand"},
        nodes_of_replica=max((_nodes_of_replica(p, entry) for p in file.fleet.pools if p.gpu == entry.gpu), default=1),
        drain_s=entry.drain_s or (_SPOT_DRAIN_S[file.cluster.kubernetes] if entry.spot else _DRAIN_S),
    )


def _bounds(entry: NodeGroupSettings, pools: Sequence[PoolSettings]) -> tuple[int, int]:
    """Fewest and most nodes, given or worked out."""
    fewest = _nodes_for(entry, pools, fewest=True)
    most = entry.max_nodes or len(entry.hosts) or _nodes_for(entry, pools, fewest=False)
    if most is None:
        raise SpecError(
            f"cluster.groups: {entry.gpu} has no max_nodes, and a pool with `replicas: max` takes all there are; "
            "give the group max_nodes"
        )
    low = entry.min_nodes if entry.min_nodes is not None else min(fewest or 0, most)
    if low > most:
        raise SpecError(
            f"cluster.groups: {entry.gpu} has min_nodes {low}, more than its {most} nodes at most; "
            "lower min_nodes, or raise max_nodes"
        )
    return low, max(most, 1)


def _nodes_for(entry: NodeGroupSettings, pools: Sequence[PoolSettings], *, fewest: bool) -> int | None:
    """Nodes that the pools' replicas take, each pool on nodes of its own; None for without limit."""
    total = 0
    for pool in pools:
        if pool.gpu != entry.gpu:
            continue
        wanted = pool.least if fewest else pool.most
        if wanted is None:
            return None
        num_nodes = _nodes_of_replica(pool, entry)
        per_node = max(1, _capacity(entry) // (pool.num_workers // num_nodes))
        total += max(-(-wanted * num_nodes // per_node), num_nodes if wanted else 0)
    return total


def _nodes_of_replica(pool: PoolSettings, entry: NodeGroupSettings) -> int:
    """As the planner will see it once there are nodes enough."""
    if pool.gpu == CPU:
        return 1
    return nodes_of_replica(pool.num_workers, [entry.gpus_per_node] * pool.num_workers)


def _capacity(entry: NodeGroupSettings) -> int:
    """GPUs of a node, or its CPUs where replicas run on those."""
    return (entry.cpus or _CPUS_WITHOUT_GPU) if entry.gpu == CPU else entry.gpus_per_node
