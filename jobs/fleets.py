"""Warm fleets on the command line: start one from a fleet file, look at one, end one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from cluster.capacity import beside_the_stages, check_capacity
from cluster.fleet_file import FleetFile
from cluster.fleet_plan import FleetDemand, refuse_impossible
from cluster.nodes import can_grow, read_nodes
from cluster.warm import WarmFleet, describe_fleet, driver_nodes, find_fleet, raise_fleet, take_down
from jobs.ray_session import ray_session
from pipeline.errors import InfrastructureError, SpecError
from pipeline.model import fetch_model

LOOK_INTERVAL_S = 0.5


def require_cluster(address: str | None) -> str:
    """The address, where a Ray of the command's own would be gone with the command.

    Raises:
        SpecError: none is given.
    """
    if address in (None, "local"):
        raise SpecError("a warm fleet lives on a Ray cluster, but none is named; add --ray ADDRESS, or set RAY_ADDRESS")
    return str(address)


def up(file: FleetFile, address: str | None, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Start the fleet, wait for its first replica, and return its status.

    Raises:
        SpecError: the cluster can never hold it, there is one of that name, or its model can't be used.
        InfrastructureError: no replica came up; the fleet is taken down again.
    """
    address = require_cluster(address)
    refuse_impossible(file.fleet, file.model, fetch_model(file.model, weights=False).path)
    with ray_session(address):
        try:
            return start_fleet_of(file, say=say)
        except KeyboardInterrupt:
            say(f"fleet {file.name} goes on starting; `tramontane down {file.name}` ends it")
            raise


def start_fleet_of(file: FleetFile, *, say: Callable[[str], None]) -> dict[str, Any]:
    """As `up`, in the Ray that this process is connected to."""
    refuse_impossible(file.fleet, file.model, fetch_model(file.model, weights=False).path)
    files = fetch_model(file.model)
    moe = None if file.routing.level == "off" else files.moe
    nodes, grows = read_nodes(), can_grow()
    pools, notes = FleetDemand(file.fleet, file.model, files.path, moe).plans(nodes, grows=grows)
    for note in notes:
        say(note)
    if not grows:
        check_capacity(pools, beside_the_stages(nodes, *driver_nodes(nodes)))
    warm = WarmFleet(file.name, file.model, files.digest, moe, tuple(pools), time.time())
    fleet = raise_fleet(warm, start_timeout_s=file.fleet.start_timeout)
    say(f"fleet {file.name}: waiting for its first replica")
    return _until_up(file.name, fleet)


def _until_up(name: str, fleet: Any) -> dict[str, Any]:
    import ray

    while True:
        try:
            status = dict(ray.get(fleet.status.remote(), timeout=30))
        except ray.exceptions.RayError as silence:
            kind = type(silence).__name__
            raise InfrastructureError(f"fleet {name} doesn't answer: {kind}; is its node up?") from silence
        if status["replicas_up"]:
            return {"fleet": name, **status}
        if status["verdict"] is not None:
            take_down(name)
            failure = InfrastructureError(f"fleet {name}: {status['verdict']}; it is down again")
            failure.exit_code = status["verdict_exit_code"]
            raise failure
        time.sleep(LOOK_INTERVAL_S)


def down(name: str, address: str | None) -> float:
    """End the fleet and wait until its GPUs are free; returns the seconds it took.

    Raises:
        SpecError: there is none of that name.
    """
    with ray_session(require_cluster(address)):
        return take_down(name)


def fleet_status(name: str, address: str | None) -> dict[str, Any]:
    """What the fleet serves and how its replicas are.

    Raises:
        SpecError: there is none of that name.
    """
    import ray

    with ray_session(require_cluster(address)):
        fleet = find_fleet(name)
        warm = describe_fleet(fleet)
        status = dict(ray.get(fleet.status.remote(), timeout=10))
    model = {"source": warm.model.source, "dtype": warm.model.dtype, "max_model_len": warm.model.max_model_len}
    return {"fleet": name, "model": model, "up_s": time.time() - warm.started_at, **status}


def fleet_lines(status: dict[str, Any]) -> list[str]:
    """The status for people."""
    lines = [f"fleet {status['fleet']}: {status['replicas_up']} of {status['replicas_wanted']} replicas up"]
    for pool in status["pools"]:
        states = [replica["state"] for replica in pool["replicas"]]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "none"
        lines.append(f"  {pool['pool']:<14} {counts}; each takes {pool['takes']}")
        if pool["diagnosis"]:
            lines.append(f"  {'':<14} {pool['diagnosis']}")
    lines += [f"  {rows:,} rows left of run {run}" for run, rows in status["rows_left"].items() if rows]
    lines += [f"  lost {loss['replica']}: {loss['kind']}" for loss in status["losses"][-3:]]
    return lines
