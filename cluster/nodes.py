"""What the cluster has: its live nodes with their labels, resources and notices of removal, as plain data."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from cluster.pools import GPU_TYPE_LABEL, SlotShape


@dataclass(frozen=True, slots=True)
class Node:
    """One live node."""

    node_id: str
    address: str
    port: int = 0
    """Of the node's raylet."""
    labels: Mapping[str, str] = field(default_factory=dict)
    total: Mapping[str, float] = field(default_factory=dict)
    free: Mapping[str, float] = field(default_factory=dict)
    """Resources that nothing holds, placement groups included; a second old at most."""
    leaves_at: float | None = None
    """When it will be gone (seconds since the epoch): its preemption was announced, or it is being drained."""

    @property
    def gpu_type(self) -> str | None:
        """Value of the node's GPU type label."""
        return self.labels.get(GPU_TYPE_LABEL)

    def suits(self, shape: SlotShape) -> bool:
        """Whether the node has the right type of GPU, however many."""
        return not shape.gpu_labels or self.gpu_type in shape.gpu_labels


def fitting(resources: Mapping[str, float], shape: SlotShape) -> int:
    """Bundles of this shape that fit into these resources side by side."""
    return min((int(resources.get(name, 0) // amount) for name, amount in shape.bundle.items()), default=0)


def read_nodes() -> list[Node]:
    """All live nodes of the cluster that this process is connected to."""
    import ray
    from ray._private.state import available_resources_per_node, state

    free = available_resources_per_node()
    leaving = state.get_draining_nodes()  # what Ray Serve watches too; node id -> deadline in ms, 0 for none
    return [
        Node(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            port=node["NodeManagerPort"],
            labels=node.get("Labels", {}),
            total=node["Resources"],
            free=free.get(node["NodeID"], {}),
            leaves_at=_deadline(leaving.get(node["NodeID"])),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def own_node_id() -> str:
    """Id of the node that this process is on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def leaving_at(nodes: Iterable[Node], node_ids: Collection[str]) -> float | None:
    """When the first of these nodes will be gone, as far as that is announced; seconds since the epoch."""
    return min((n.leaves_at for n in nodes if n.node_id in node_ids and n.leaves_at is not None), default=None)


def can_grow() -> bool:
    """Whether an autoscaler looks after the cluster, so that what doesn't fit today may fit in a few minutes.

    Autoscaler v2 (KubeRay, `ray up`) publishes what it may add. Every head, scaled or not, has `__autoscaling_status`.
    """
    from ray._private.state import state

    return state.get_cluster_config() is not None


def _deadline(milliseconds: int | None) -> float | None:
    if milliseconds is None:
        return None
    return milliseconds / 1000 if milliseconds else time.time() + 30.0
