"""Warm fleets: a fleet under a name that outlives the process that started it, and that several runs share.

A warm fleet belongs to the Ray cluster: it ends with `take_down` or with the cluster. Runs that die on it are
forgotten (`cluster.scaling.DEMAND_MEMORY_S`, `pipeline.consumers.CONSUMER_GONE_S`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.fleet import Fleet, stop_fleet
from cluster.nodes import Node, own_node_id, read_nodes
from cluster.pools import PoolPlan
from pipeline.engine import MoeShape
from pipeline.errors import InfrastructureError, SpecError
from pipeline.settings import ModelSettings

NAMESPACE = "tramontane"
PREFIX = "fleet-"
HEAD = "node:__internal_head__"
"""Resource that Ray gives the head node alone."""
RELEASE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class WarmFleet:
    """What a warm fleet serves, and with what."""

    name: str
    model: ModelSettings
    model_digest: str
    """Of the model's files; see `pipeline.model.ModelFiles`."""
    moe: MoeShape | None
    """Shape of the routing that its engines capture; None for none."""
    pools: tuple[PoolPlan, ...]
    started_at: float
    """Seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """What a job wants of a warm fleet."""

    name: str
    model: ModelSettings
    model_digest: str
    moe: MoeShape | None
    """Routing that it records; None for none."""

    def find(self) -> tuple[Any, WarmFleet]:
        """The fleet's handle and description; it leaves a CPU of this node to the job from now on.

        Raises:
            SpecError: there is no such fleet, its engines would not give the results that the job asks for, or its
                replicas have taken all CPUs of this node.
            InfrastructureError: it doesn't answer.
        """
        fleet = find_fleet(self.name)
        warm = describe_fleet(fleet)
        differences = _differences(warm, self)
        if differences:
            raise SpecError(f"the warm fleet {warm.name!r} serves something else: {'; '.join(differences)}")
        claim_cpu(fleet, self.name, node_id=own_node_id())
        return fleet, warm


def raise_fleet(warm: WarmFleet, *, start_timeout_s: float) -> Any:
    """Start a warm fleet and return its handle; replicas come up behind it.

    Raises:
        SpecError: there is one of that name.
    """
    import ray

    actor = ray.remote(Fleet).options(
        name=PREFIX + warm.name,
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=0,
        resources={HEAD: 0.001},  # which the cluster outlives no more than its control plane
        max_restarts=0,
        max_concurrency=1000,
    )
    try:
        fleet = actor.remote(
            list(warm.pools), start_timeout_s=start_timeout_s, description=warm, drivers_on=driver_nodes(read_nodes())
        )
        ray.get(fleet.start.remote())
    except ValueError as error:
        raise SpecError(
            f"a fleet named {warm.name!r} is up already; `tramontane down {warm.name}` ends it, or choose another name"
        ) from error
    return fleet


def driver_nodes(nodes: Sequence[Node]) -> set[str]:
    """Ids of the nodes that runs on a warm fleet are expected from: the head, and the one that it is started on."""
    return {own_node_id(), *(node.node_id for node in nodes if HEAD in node.total)}


def warm_fleets() -> list[str]:
    """Names of the cluster's warm fleets."""
    import ray

    everyone = ray.util.list_named_actors(all_namespaces=True)
    return sorted(
        actor["name"].removeprefix(PREFIX)
        for actor in everyone
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(PREFIX)
    )


def find_fleet(name: str) -> Any:
    """Handle of a warm fleet.

    Raises:
        SpecError: there is none of that name; says which there are.
    """
    import ray

    try:
        return ray.get_actor(PREFIX + name, namespace=NAMESPACE)
    except ValueError:
        others = warm_fleets()
        there = f"it has {', '.join(others)}" if others else "it has none"
        raise SpecError(
            f"no warm fleet {name!r} on this Ray cluster ({there}); start it with `tramontane up`"
        ) from None


def describe_fleet(fleet: Any) -> WarmFleet:
    """What a warm fleet serves.

    Raises:
        InfrastructureError: it doesn't answer.
    """
    described: WarmFleet = _asked(fleet.described.remote())
    return described


def _asked(call: Any) -> Any:
    import ray

    try:
        return ray.get(call, timeout=10)
    except ray.exceptions.RayError as error:
        raise InfrastructureError(f"the fleet doesn't answer: {type(error).__name__}; is its node up?") from error


def claim_cpu(fleet: Any, name: str, *, node_id: str) -> None:
    """Have a warm fleet leave a CPU of a driver's node to the driver's run.

    Raises:
        SpecError: its replicas hold all of them.
    """
    held = _asked(fleet.expect_driver.remote(node_id))
    num_cpus = next(node.total.get("CPU", 0) for node in read_nodes() if node.node_id == node_id)
    if num_cpus - held < 1:
        raise SpecError(
            f"replicas of the warm fleet {name!r} hold {held:g} of the {num_cpus:g} CPUs of this node, but one is "
            "needed to read and template rows; start the run on another node, such as the head"
        )


def _differences(warm: WarmFleet, job: Attachment) -> list[str]:
    has, wants = warm.model, job.model
    found = []
    if job.model_digest != warm.model_digest:
        found.append(f"model.source: the fleet has {has.source!r} (other files), the job {wants.source!r}")
    if wants.dtype != has.dtype:
        found.append(f"model.dtype: the fleet has {has.dtype}, the job {wants.dtype}")
    if wants.max_model_len > has.max_model_len:
        found.append(f"model.max_model_len: the fleet has {has.max_model_len}, the job {wants.max_model_len}")
    if wants.engine_args and wants.engine_args != has.engine_args:
        found.append(f"model.engine_args: the fleet has {has.engine_args}, the job {wants.engine_args}")
    if job.moe is not None and warm.moe is None:
        found.append("routing.level: the fleet captures no routing; set `routing: {level: off}` or start another fleet")
    return found


def take_down(name: str) -> float:
    """End a warm fleet and wait until its slots are free; returns the seconds it took.

    Raises:
        SpecError: there is none of that name.
        InfrastructureError: Ray doesn't let go of its slots.
    """
    from ray.util import placement_group_table

    fleet = find_fleet(name)
    mine = {group["placement_group_id"] for group in placement_group_table().values() if _of(group, name)}
    began = time.monotonic()
    stop_fleet(fleet)
    while any(group["state"] != "REMOVED" for key, group in placement_group_table().items() if key in mine):
        if time.monotonic() - began > RELEASE_TIMEOUT_S:
            raise InfrastructureError(f"slots of fleet {name!r} aren't released after {RELEASE_TIMEOUT_S:g} s")
        time.sleep(0.1)
    return time.monotonic() - began


def _of(group: dict[str, Any], name: str) -> bool:
    return str(group["name"]).startswith(f"tramontane/{name}/") and group["state"] != "REMOVED"
