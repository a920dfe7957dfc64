"""Whether a job's fleet finds room on the cluster, and which warm fleets hold its GPUs. Needs a connection to Ray."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.capacity import check_capacity, num_placeable
from cluster.fleet_plan import FleetDemand
from cluster.nodes import Node
from cluster.pools import PoolPlan
from cluster.warm import Attachment, find_fleet, warm_fleets
from jobs.findings import Finding, fine, refusal
from jobs.spec_findings import KnownJob
from pipeline.errors import RunError, SpecError


def warm_fleet_findings() -> list[Finding]:
    """Every warm fleet with what it takes: what it holds, no other run gets."""
    import ray

    found = []
    for name in warm_fleets():
        try:
            status = ray.get(find_fleet(name).status.remote(), timeout=10)
        except (SpecError, ray.exceptions.RayError) as error:
            cure = f"`tramontane down {name}` ends it"
            found.append(
                Finding("warning", "fleets", f"warm fleet {name} doesn't answer: {type(error).__name__}", cure)
            )
            continue
        held = [f"{len(pool['replicas'])} replicas, each with {pool['takes']}" for pool in status["pools"]]
        found.append(fine("fleets", f"warm fleet {name} holds {' and '.join(held)}"))
    return found


def attach_finding(job: KnownJob) -> Finding:
    """Whether the warm fleet that the job names is up and serves its model."""
    attach = job.spec.fleet.attach
    try:
        Attachment(attach, job.spec.model, job.files.digest, job.moe).find()
    except RunError as error:
        return refusal("fleet", error)
    return fine("fleet", f"warm fleet {attach} is up and serves this model")


def pool_findings(demand: FleetDemand, nodes: Sequence[Node], *, grows: bool) -> tuple[list[PoolPlan], list[Finding]]:
    """The pools that a run would start on these nodes, and what is wrong with them.

    `grows` says that an autoscaler may add nodes.
    """
    try:
        pools, notes = demand.plans(nodes, grows=grows)
    except SpecError as error:
        return [], [refusal("fleet", error)]
    takes = ", ".join(f"{pool.name} takes {pool.shape.describe()} per replica" for pool in pools)
    found = [fine("fleet", takes)]
    found += [refusal("fleet", SpecError(note), level="warning") for note in notes]
    return pools, [*found, *capacity_findings(pools, nodes, grows=grows, warm=warm_fleets())]


def capacity_findings(
    pools: Sequence[PoolPlan], nodes: Sequence[Node], *, grows: bool, warm: Sequence[str]
) -> list[Finding]:
    """Whether pools fit on nodes at all, and whether there is room now. Pure.

    `grows` says that an autoscaler may add nodes, `warm` names the fleets that may be what holds the room.
    """
    try:
        check_capacity(pools, nodes)
    except SpecError as error:
        if not grows:
            return [refusal("fleet", error)]
        refused = refusal("fleet", error, level="warning")
        return [Finding("warning", "fleet", f"{refused.found}, unless the autoscaler adds nodes", refused.cure)]
    if any(num_placeable(pool.shape, nodes) for pool in pools):
        return [fine("fleet", "the pools fit on the nodes, and there is room for a replica now")]
    holders = f" (`tramontane down {warm[0]}`, or `fleet: {{attach: {warm[0]}}}`)" if warm else ""
    cure = f"wait until they are free{holders}; a run waits for fleet.start_timeout"
    return [Finding("warning", "fleet", "the pools fit on the nodes, but others hold all of them now", cure)]
