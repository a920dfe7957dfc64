"""What manifests say of themselves: what they cost, and why some fields are as they are. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.fleet_file import FleetFile
from cluster.node_groups import NodeGroup
from cluster.yaml_text import Path


def cost_lines(file: FleetFile, groups: Sequence[NodeGroup], *, while_: str = "it exists") -> list[str]:
    """Nodes, GPUs, and money where the fleet file knows prices."""
    head = file.cluster.head
    lines = [f"Costs while {while_}:"]
    lines.append(f"  head: 1 node, {head.cpus} CPUs, {head.memory_gib} GiB, no GPU{_price(head.usd_per_node_hour)}")
    low = high = head.usd_per_node_hour or 0.0
    is_known = head.usd_per_node_hour is not None
    for group in groups:
        price = group.settings.usd_per_node_hour
        lines.append(f"  {group.name}: {_span(group)}{_price(price)}")
        is_known = is_known and price is not None
        low += group.min_nodes * (price or 0.0)
        high += group.max_nodes * (price or 0.0)
    if is_known:
        lines.append(f"  in all ${low:,.2f} to ${high:,.2f} an hour, at the fleet file's prices")
    else:
        lines.append("  no sum: not every usd_per_node_hour is in the fleet file")
    return lines


def drain_note(group: NodeGroup) -> str:
    """What becomes of rows when one of these nodes is taken away."""
    kind = (
        "Spot nodes: the cloud may take them back at any time." if group.settings.spot else "A node that is told to go:"
    )
    return (
        f"{kind} On SIGTERM, `ray start --block` has its node drained for up to {group.drain_s} s: the fleet gives its "
        "replicas no new rows, and starts others if there is room. Rows that are done by then are kept; the others run "
        "again elsewhere, and that attempt is not held against them. No row is lost. There is no preStop "
        "hook: it would only delay the SIGTERM that starts this."
    )


def cluster_notes(spec: Path, groups: Sequence[NodeGroup]) -> dict[Path, str]:
    """Comments inside a RayCluster's spec."""
    notes = {
        (*spec, "rayVersion"): "Must be that of the image: see cluster/image/requirements-gpu.txt.",
        (*spec, "authOptions"): (
            "Every connection needs the token; the operator hands it to each Ray container as RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN, from the secret."
        ),
        (*spec, "autoscalerOptions"): "Version 2, because only that one understands node labels.",
        (*spec, "headGroupSpec", "serviceType"): "Inside the Kubernetes cluster only, dashboard included.",
        (*spec, "headGroupSpec", "rayStartParams"): (
            "Reads, templates and writes on its CPUs, and holds the driver. No GPU, so no replica; no spot node."
        ),
    }
    for group in groups:
        base = (*spec, "workerGroupSpecs", group.name)
        notes[(*base, "groupName")] = f"One pod per node: {_span(group)}.{_network(group)}"
        notes[(*base, "labels")] = "What a pool's replicas ask for: the GPU type as the fleet file calls it."
        notes[(*base, "rayStartParams")] = (
            "One CPU per GPU: what replicas take. So reading and writing stay on the head."
            if group.num_gpus
            else "Replicas run on CPUs here."
        )
        pod = (*base, "template", "spec")
        notes[(*pod, "terminationGracePeriodSeconds")] = drain_note(group)
        notes[(*pod, "volumes", "dshm", "name")] = "Shared memory, for Ray's objects and for engines of several GPUs."
        notes[(*pod, "volumes", "models", "name")] = "Downloaded models."
    return notes


def _network(group: NodeGroup) -> str:
    if group.nodes_of_replica == 1:
        return ""
    return (
        f" A replica spans {group.nodes_of_replica} of them, and its speed is that of their network: RDMA needs a "
        "device plugin and resources that this manifest doesn't ask for; without them NCCL uses TCP."
    )


def _span(group: NodeGroup) -> str:
    span = f"{group.min_nodes} to {group.max_nodes}" if group.is_scaled else f"{group.max_nodes}"
    nodes = f"{span} node{'s' * (group.max_nodes != 1)}"
    if not group.num_gpus:
        return f"{nodes} of {group.cpus} CPUs"
    most = group.max_nodes * group.num_gpus
    return f"{nodes} of {group.num_gpus} x {group.settings.gpu}, so at most {most} GPUs"


def _price(usd: float | None) -> str:
    return "" if usd is None else f", ${usd:,.2f} per node and hour"
