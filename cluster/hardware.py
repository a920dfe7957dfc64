"""Which GPUs there are: nodes, live or assumed, counted by GPU type. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.gpus import CPU, GPU_TYPES, GpuType, gpu_type
from cluster.nodes import Node
from cluster.pools import GPU_TYPE_LABEL
from cluster.spread import nodes_of_replica, num_spread
from pipeline.errors import SpecError

_ASSUMPTION = re.compile(r"(?P<gpu>[^:\s]+):(?P<gpus>[1-9]\d{0,2})[xX](?P<nodes>[1-9]\d{0,4})")


@dataclass(frozen=True, slots=True)
class NodeKind:
    """Equal nodes."""

    gpu: str
    """Name of the GPU type."""
    gpus_per_node: int
    num_nodes: int


@dataclass(frozen=True, slots=True)
class Hardware:
    """The nodes of a cluster, as far as replicas on GPUs are concerned."""

    kinds: tuple[NodeKind, ...]
    unknown: tuple[str, ...] = ()
    """GPUs that no pool can use: how many, why, and the cure."""

    def of(self, gpu: str) -> list[NodeKind]:
        """Nodes that have GPUs of this type."""
        return [kind for kind in self.kinds if kind.gpu == gpu]

    @property
    def gpu_types(self) -> list[str]:
        """Names of the types that are there, in their nodes' order."""
        return list(dict.fromkeys(kind.gpu for kind in self.kinds))

    def largest_node(self, gpu: str, *, otherwise: int = 8) -> int:
        """GPUs of the node that has most of this type; `otherwise` where there is none."""
        return max((kind.gpus_per_node for kind in self.of(gpu)), default=otherwise)

    def num_replicas(self, gpu: str, tensor_parallel: int) -> int:
        """Engines of that many GPUs of this type that fit on all nodes, were they idle; large ones spread evenly."""
        num_nodes = self.nodes_of_replica(gpu, tensor_parallel)
        room = [node_gpus // (tensor_parallel // num_nodes) for node_gpus in self._nodes(gpu)]
        return num_spread(room, num_nodes)

    def nodes_of_replica(self, gpu: str, tensor_parallel: int, *, otherwise: int = 8) -> int:
        """Nodes that an engine of that many GPUs takes; on nodes of `otherwise` GPUs where there is none of the type.

        See `cluster.spread.nodes_of_replica`.
        """
        return nodes_of_replica(tensor_parallel, self._nodes(gpu) or [otherwise])

    def _nodes(self, gpu: str) -> list[int]:
        """GPUs of each node that has this type."""
        return [kind.gpus_per_node for kind in self.of(gpu) for _ in range(kind.num_nodes)]


def parse_assumption(text: str, custom: Sequence[GpuType] = ()) -> NodeKind:
    """Read `H100-80G:8x4`: four nodes of eight GPUs each.

    Raises:
        SpecError: it doesn't look like that, or names no GPU type.
    """
    found = _ASSUMPTION.fullmatch(text.strip())
    if found is None:
        raise SpecError(
            f"--assume {text!r} is not TYPE:GPUSxNODES; write e.g. --assume H100-80G:8x4 for four nodes of eight GPUs"
        )
    if found["gpu"] == CPU:
        raise SpecError(
            f"--assume {text!r}: CPU engines can't be estimated from a datasheet; measure one with "
            "`tramontane preview SPEC -n 20`"
        )
    gpu = gpu_type(found["gpu"], custom)
    return NodeKind(gpu.name, int(found["gpus"]), int(found["nodes"]))


def assumed_hardware(texts: Iterable[str], custom: Sequence[GpuType] = ()) -> Hardware:
    """What `--assume`, given once or more, says.

    Raises:
        SpecError: one of them is malformed.
    """
    return _counted((parse_assumption(text, custom) for text in texts), ())


def seen_hardware(nodes: Sequence[Node], custom: Sequence[GpuType] = ()) -> Hardware:
    """The GPUs of live nodes that stay, by the types that their labels mean; the user's own types come first."""
    types = [*custom, *(gpu for gpu in GPU_TYPES.values() if gpu.name not in {own.name for own in custom})]
    meaning: dict[str, str] = {}
    for gpu in types:
        for label in gpu.labels:
            meaning.setdefault(label, gpu.name)
    kinds: list[NodeKind] = []
    unknown: Counter[str | None] = Counter()
    for node in nodes:
        num_gpus = int(node.total.get("GPU", 0))
        if num_gpus < 1 or node.leaves_at is not None:
            continue
        if node.gpu_type in meaning:
            kinds.append(NodeKind(meaning[str(node.gpu_type)], num_gpus, 1))
        else:
            unknown[node.gpu_type] += num_gpus
    return _counted(kinds, tuple(_unusable(label, count) for label, count in unknown.items()))


def _counted(kinds: Iterable[NodeKind], unknown: tuple[str, ...]) -> Hardware:
    """Equal kinds added up."""
    nodes: Counter[tuple[str, int]] = Counter()
    for kind in kinds:
        nodes[kind.gpu, kind.gpus_per_node] += kind.num_nodes
    return Hardware(tuple(NodeKind(gpu, gpus, count) for (gpu, gpus), count in nodes.items()), unknown)


def _unusable(label: str | None, count: int) -> str:
    what = f"{count} GPU{'s' * (count != 1)}"
    if label is None:
        return f"{what} without the node label {GPU_TYPE_LABEL}: start their nodes with --labels {GPU_TYPE_LABEL}=TYPE"
    family = sorted(name for name in GPU_TYPES if name.startswith(f"{label}-"))
    cure = (
        f"to Ray every {label} is the same; start their nodes with --labels {GPU_TYPE_LABEL}={' or '.join(family)}"
        if family
        else f"describe the type in fleet.gpu_types, with ray_labels: [{label}]"
    )
    return f"{what} labelled {label}: {cure}"
