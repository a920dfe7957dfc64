"""What generates, and the Ray it is in; kept over several runs, one after the other, weights are loaded once.

Invariant: whatever is started here has ended when its block ends, but for a fleet or a Ray that was live before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.capacity import beside_the_stages, check_capacity
from cluster.fleet import start_fleet, stop_fleet
from cluster.fleet_plan import FleetDemand
from cluster.nodes import can_grow, read_nodes
from cluster.pools import PoolPlan
from cluster.warm import Attachment
from jobs.interrupts import Interrupts
from jobs.ray_session import ray_session
from pipeline.errors import SpecError

STATUS_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Engines:
    """What generates."""

    pools: list[PoolPlan]
    """What is started for the run, or what `fleet` was started with; empty until the nodes are known."""
    demand: FleetDemand | None = None
    """What `pools` are worked out from once they are."""
    fleet: Any = None
    """A live fleet, left running."""
    warm: Attachment | None = None
    """A warm fleet to look up on the cluster, instead of pools."""
    address: str | None = None
    """Of the Ray cluster to work in; None for a Ray of the run's own on this machine."""


class KeptEngines:
    """What the first run that has work starts, for those after it that want the same.

    Guarantees: whatever was started has ended once the block of `kept_engines` has.
    """

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._wanted: Engines | None = None
        self._found: Engines | None = None
        self._is_used = False
        self.interrupts = Interrupts()
        """Heard between two runs."""

    def find(self, wanted: Engines, interrupts: Interrupts, *, say: Callable[[str], None]) -> Engines:
        """Be in a Ray that can hold the engines, worked out for its nodes, until the end; one that is there is left.

        Raises:
            SpecError: it never can.
        """
        if self.interrupts.count:
            raise KeyboardInterrupt  # one that was raised in a finalizer, where Python only prints it
        if self._found is None or wanted != self._wanted or not self._is_sound():
            self.end()
            self._found = self._stack.enter_context(_ray_for(wanted, interrupts, say=say))
            self._wanted = wanted
        return self._found

    def live(self, start_timeout_s: float) -> tuple[Any, Sequence[PoolPlan]]:
        """The fleet, and what it is made of: the one given, the warm one that the spec names, or one started here."""
        found = self._found
        if found is None:
            raise RuntimeError("`find` comes first")
        if found.warm is not None:
            fleet, warm = found.warm.find()
            return fleet, warm.pools
        if found.fleet is None:
            found = replace(found, fleet=start_fleet(found.pools, start_timeout_s=start_timeout_s))
            self._stack.callback(stop_fleet, found.fleet)
            self._found, self._is_used = found, True
        return found.fleet, found.pools

    def end(self) -> None:
        """End all that was started; a run after that starts anew."""
        self._wanted = self._found = None
        self._is_used = False
        self._stack.close()

    def _is_sound(self) -> bool:
        """Whether a fleet that an earlier run used can still be expected to do another."""
        if not self._is_used or self._found is None:
            return True
        import ray

        try:
            status = ray.get(self._found.fleet.status.remote(), timeout=STATUS_TIMEOUT_S)
        except ray.exceptions.RayError:
            return False
        # A pool that can't start would not start again either; what the others have loaded is not thrown away for it.
        return status["verdict"] is None and not all(pool["diagnosis"] for pool in status["pools"])


@contextlib.contextmanager
def kept_engines() -> Iterator[KeptEngines]:
    """Keep what is started in the block until its end; an interrupt between two runs is a KeyboardInterrupt."""
    kept = KeptEngines()
    with kept.interrupts.heard():
        try:
            yield kept
        finally:
            kept.end()


@contextlib.contextmanager
def _ray_for(engines: Engines, interrupts: Interrupts, *, say: Callable[[str], None]) -> Iterator[Engines]:
    """Run the block in a Ray that can hold the engines, worked out for its nodes; one that is there is used and left.

    Raises:
        SpecError: it never can.
    """
    replica_cpus = sum(pool.num_replicas * pool.shape.num_cpus * pool.shape.num_bundles for pool in engines.pools)
    replica_cpus += engines.demand.replica_cpus if engines.demand else 0
    with ray_session(engines.address, replica_cpus=replica_cpus):
        interrupts.install()  # `ray.init` has put a SIGTERM handler of its own in place
        _check_driver_node()
        if engines.warm is not None:
            engines.warm.find()
        elif engines.fleet is None:
            engines = _for_these_nodes(engines, say)
        yield engines


def _for_these_nodes(engines: Engines, say: Callable[[str], None]) -> Engines:
    import ray

    nodes, grows = read_nodes(), can_grow()
    if engines.demand is not None:
        pools, notes = engines.demand.plans(nodes, grows=grows)
        engines = replace(engines, pools=pools, demand=None)
        for note in notes:
            say(note)
    if not grows:
        check_capacity(engines.pools, beside_the_stages(nodes, ray.get_runtime_context().get_node_id()))
    return engines


def _check_driver_node() -> None:
    """Raise SpecError when reading, templating and writing, which run beside the driver, would wait for ever."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in read_nodes() if node.node_id == here)
    if node.total.get("CPU", 0) < 1:
        raise SpecError(
            f"the driver's node {node.address} offers Ray no CPU (num-cpus 0), but rows are read and templated on it; "
            "start the driver on a node with CPUs (`tramontane submit --driver-cpus 1`), or give the head some"
        )
