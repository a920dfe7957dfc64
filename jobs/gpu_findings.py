"""What GPUs a cluster has, whether their types can be told, and which of them hold the job's model. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from cluster.fleet_plan import PlannedModel
from cluster.gpus import GpuType, gpu_type
from cluster.hardware import seen_hardware
from cluster.nodes import Node
from cluster.topology import Fit
from jobs.findings import Finding, fine


def gpu_findings(nodes: Sequence[Node], custom: Sequence[GpuType] = ()) -> list[Finding]:
    """GPUs by type, free and in all; those that no pool can ask for; and nodes that are leaving.

    `custom` are the types that the spec describes itself.
    """
    total: Counter[str] = Counter()
    free: Counter[str] = Counter()
    for node in nodes:
        for kind in seen_hardware([node], custom).kinds:
            total[kind.gpu] += kind.gpus_per_node
            free[kind.gpu] += int(node.free.get("GPU", 0))
    found = [
        fine("gpus", f"{name}: {count} GPU{'s' * (count != 1)}, {free[name]} free") for name, count in total.items()
    ]
    for unusable in seen_hardware(nodes, custom).unknown:
        what, _, cure = unusable.partition(": ")
        found.append(Finding("warning", "gpus", f"no pool finds {what}", cure))
    leaving = [node.address for node in nodes if node.leaves_at is not None]
    if leaving:
        said = f"about to be removed: {', '.join(leaving)}"
        found.append(Finding("warning", "gpus", said, "wait for the nodes that replace them, or count on fewer"))
    return found or [fine("gpus", "no GPU on any node: only pools of gpu `cpu` can run")]


def fit_findings(model: PlannedModel, nodes: Sequence[Node], custom: Sequence[GpuType] = ()) -> list[Finding]:
    """For each type of GPU that there is, the planner's choice for this model."""
    hardware = seen_hardware(nodes, custom)
    found = []
    for name in hardware.gpu_types:
        count = hardware.largest_node(name)
        choice = model.choose(gpu_type(name, custom), gpus_per_node=count)
        what = f"{name}, {count} a node: {choice.reason}"
        if choice.chosen is not None and choice.chosen.fit is Fit.ROOMY:
            found.append(fine("fit", what))
        else:
            cure = f"use nodes with more {name}, an FP8, AWQ or GPTQ model, or a smaller max_model_len"
            found.append(Finding("warning", "fit", what, cure))
    return found
