"""Starts replicas in their slots, supervises, replaces, scales and drains them, and tells dispatch who is alive.

One Ray actor owns all slots and replicas; all of them go when it goes, and it goes with its driver unless it is warm
(`cluster.warm`). It decides about replicas only: what became of their rows is dispatch's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Sequence
from typing import Any

from cluster.capacity import beside_the_stages, full_nodes, num_placeable
from cluster.fleet_replica import FleetReplica, pool_status
from cluster.nodes import Node, can_grow, leaving_at, own_node_id, read_nodes
from cluster.pools import PoolPlan
from cluster.reachability import cause_of_death
from cluster.roster import Roster
from cluster.scaling import (
    KEPT_FIRST,
    SHORT_LIFE_S,
    SURPLUS_S,
    Demands,
    StartRecord,
    num_attainable,
    num_launches,
    obstacle,
    wanted_replicas,
)
from cluster.slots import request_slot
from pipeline.errors import NodeLost, ReplicaDied, ReplicaUnreachable, RunError
from pipeline.membership import RETIRED, Departure, Membership, read_death

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S = 0.5
LOAD_TIMEOUT_S = 1800.0
DRAIN_TIMEOUT_S = 600.0
"""How long a replica that is one too many may take to finish what it has begun."""
MAX_STUMBLES = 20
"""Looks at the cluster that may fail in a row, half a second apart."""


class Fleet:
    """All replicas of a run, or of several; made an actor by `start_fleet`.

    Guarantees:
    - a lost replica is killed and its slot released before its replacement starts, and its name never comes back.
    - a replica that is one too many, or whose node is about to go, drains before it goes.
    - no replica is placed on the last CPU of a node on which a driver is expected.
    - once no replica is alive and none can be started, `watch` carries a verdict that says why.
    """

    def __init__(
        self,
        pools: Sequence[PoolPlan],
        *,
        start_timeout_s: float = 1800.0,
        backoff_s: float = 1.0,
        description: Any = None,
        drivers_on: Collection[str] = (),
    ) -> None:
        """`drivers_on`: ids of the nodes, beside this actor's own, on which runs read, template and write rows."""
        self._pools = list(pools)
        self._description = description
        """What a warm fleet is; see `cluster.warm.WarmFleet`."""
        self._start_timeout_s = start_timeout_s
        self._slot_prefix = f"tramontane/{description.name if description is not None else ''}/"
        self._replicas: dict[str, FleetReplica] = {}
        self._roster = Roster()
        self._starts = {pool.name: StartRecord(backoff_s) for pool in pools}
        self._demands = Demands()
        self._surplus_since: dict[str, float] = {}
        self._num_named = 0
        self._first_ready_at: float | None = None
        self._deserted_since = time.monotonic()
        """When it last had a replica that was up; its start, until the first is."""
        self._drivers_on = {own_node_id(), *drivers_on}
        self._nodes: list[Node] = []
        """As last seen, less what drivers need of theirs."""
        self._can_grow = False
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to start replicas; returns at once, work begins with the first that is ready."""
        self._spawn(self._supervise())

    async def watch(self, version: int, wait_s: float) -> Membership:
        """Return who is alive; see `pipeline.membership.Membership`."""
        return await self._roster.watch(version, wait_s)

    async def report(self, replica: str, kind: str, message: str) -> Departure:
        """Take note of a replica that dispatch found dead or hung: what is left of it is killed, another starts.

        Returns why it is gone: what was known here before, or else what is reported.
        """
        lost = self._replicas.get(replica)
        if lost is not None and replica in self._roster.members:
            if kind in (ReplicaUnreachable.kind, ReplicaDied.kind):
                said = ReplicaDied(message) if kind == ReplicaDied.kind else ReplicaUnreachable(message)
                kind = (await cause_of_death(lost, said, live_nodes=lambda: self._nodes)).kind
            self._roster.lose(replica, kind, message)
            lost.end.set()
        return self._roster.departure_of(replica) or Departure(kind, message)

    async def want(self, consumer: str, rows_left: int) -> int:
        """Take note of what a run has left to do, 0 says goodbye; returns how many replicas are wanted now."""
        self._demands.tell(consumer, rows_left, time.monotonic())
        return sum(self._wanted())

    async def status(self) -> dict[str, Any]:
        """Plain data for progress and reports."""
        states = [replica.state for replica in self._replicas.values()]
        verdict, exit_code = self._roster.verdict or (None, 3)
        return {
            "rows_left": self._demands.by_consumer(time.monotonic()),
            "replicas_up": states.count("up"),
            "replicas_wanted": sum(self._wanted()),
            "pools": [pool_status(pool, self._of(pool), self._starts[pool.name].diagnosis) for pool in self._pools],
            "first_ready_at": self._first_ready_at,
            "num_losses": self._roster.num_losses,
            "losses": self._roster.losses,
            "verdict": verdict,
            "verdict_exit_code": exit_code,
            "versions": next((m.info.versions for m in self._roster.members.values()), {}),
        }

    async def waits_for(self) -> str | None:
        """What keeps all of its replicas from being placed, in words; None once one is."""
        is_placed = any(replica.state != "waiting" for replica in self._replicas.values())
        return None if is_placed else self._obstacles()

    async def described(self) -> Any:
        """What it was started with as a warm fleet."""
        return self._description

    async def expect_driver(self, node_id: str) -> float:
        """Leave a CPU of this node to a run whose driver is there; returns its CPUs that replicas hold already."""
        self._drivers_on.add(node_id)
        return self._held_cpus(node_id)

    async def stop(self) -> None:
        """Kill all replicas and give every slot back; returns when Ray has been told of all of it."""
        for task in self._tasks:
            task.cancel()
        for replica in list(self._replicas.values()):
            self._remove(replica)
        self._roster.announce()

    def _wanted(self) -> list[int]:
        told = self._demands.by_consumer(time.monotonic()).values()
        rows_left = sum(told) if told else None if self._first_ready_at is None else 0
        return wanted_replicas(self._pools, rows_left, attainable=[self._attainable(pool) for pool in self._pools])

    def _attainable(self, pool: PoolPlan) -> int:
        states = [replica.state for replica in self._of(pool)]
        room = num_placeable(pool.shape, self._nodes)
        return num_attainable(self._starts[pool.name], states, room=room, can_grow=self._can_grow)

    def _of(self, pool: PoolPlan) -> list[FleetReplica]:
        return [replica for replica in self._replicas.values() if replica.pool is pool]

    def _held_cpus(self, node_id: str) -> float:
        """CPUs of a node that replicas hold, or might once their slots are placed."""
        return sum(r.pool.shape.num_cpus for r in self._replicas.values() if r.may_be_on(node_id))

    async def _supervise(self) -> None:
        stumbles = 0
        while True:
            try:
                self._nodes, self._can_grow = beside_the_stages(read_nodes(), *self._drivers_on), can_grow()
                self._look()
                stumbles = 0
            except Exception as error:  # noqa: BLE001  Ray's control plane may be away for a moment
                stumbles += 1
                logger.warning("the fleet can't be supervised: %s", error)
                if stumbles == MAX_STUMBLES:
                    words = f"the fleet can't be supervised: {type(error).__name__}: {str(error)[:500]}"
                    self._roster.give_up(words, 3)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), LOOK_INTERVAL_S)
            self._wake.clear()

    def _look(self) -> None:
        now = time.monotonic()
        for pool, wanted in zip(self._pools, self._wanted(), strict=True):
            mine = [replica for replica in self._of(pool) if replica.state != "draining"]
            if len(mine) <= wanted:
                self._surplus_since.pop(pool.name, None)
            if len(mine) < wanted:
                self._launch_some(pool, mine, wanted, now)
            elif len(mine) > wanted and now - self._surplus_since.setdefault(pool.name, now) >= SURPLUS_S:
                for replica in sorted(mine, key=lambda r: KEPT_FIRST.index(r.state))[wanted:]:  # then the youngest
                    self._retire(replica, DRAIN_TIMEOUT_S)
        self._leave_nodes()
        self._judge(now)

    def _launch_some(self, pool: PoolPlan, mine: list[FleetReplica], wanted: int, now: float) -> None:
        room = num_placeable(pool.shape, self._nodes)
        states = [replica.state for replica in mine]
        record = self._starts[pool.name]
        for _ in range(num_launches(pool, record, states, wanted, room=room, can_grow=self._can_grow, now=now)):
            self._launch(pool)

    def _launch(self, pool: PoolPlan) -> None:
        name = f"{pool.name}-{self._num_named}"
        self._num_named += 1
        # Ray places a slot wherever there is room, so the driver's last CPU must be out of bounds for it.
        held = {node_id: self._held_cpus(node_id) for node_id in self._drivers_on}
        not_on = full_nodes(self._nodes, held, pool.shape)
        slot = request_slot(pool.shape, name=f"{self._slot_prefix}{name}", not_on=not_on)
        self._replicas[name] = replica = FleetReplica(name, pool, slot, not_on=frozenset(not_on))
        self._spawn(self._live(replica))

    async def _live(self, replica: FleetReplica) -> None:
        """See one replica through its life."""
        try:
            await replica.until_placed()
            info = await replica.load(timeout_s=max(LOAD_TIMEOUT_S, self._start_timeout_s))
        except Exception as error:  # noqa: BLE001  a start can fail in any way a model can; the diagnosis has the words
            self._start_failed(replica, error)
        else:
            if info is not None:
                await self._be_member(replica, info)
        finally:
            self._remove(replica)
            self._wake.set()

    async def _be_member(self, replica: FleetReplica, info: Any) -> None:
        """Have it take work until it dies, is reported dead, or has drained."""
        record = self._starts[replica.pool.name]
        record.succeeded()
        replica.is_up()
        self._first_ready_at = self._first_ready_at or time.time()
        self._roster.join(replica.name, replica.handle, info)
        try:
            await replica.until_death()
        except Exception as error:  # noqa: BLE001  however it died
            death = await cause_of_death(replica, read_death(error), live_nodes=lambda: self._nodes)
            self._roster.lose(replica.name, death.kind, death.message)
        if replica.state != "draining" and time.monotonic() - replica.ready_at < SHORT_LIFE_S:
            record.died_young(time.monotonic())

    def _start_failed(self, replica: FleetReplica, error: Exception) -> None:
        cause = getattr(error, "cause", None) or error  # Ray wraps what the actor raised
        logger.error("replica %s did not start: %s", replica.name, cause)
        if isinstance(read_death(error), (NodeLost, ReplicaUnreachable)):
            return  # says nothing of the model
        self._starts[replica.pool.name].failed(
            time.monotonic(),
            began=replica.began_at,
            message=f"replicas of pool {replica.pool.name} don't start: {type(cause).__name__}: {str(cause)[:1000]}",
            final_exit_code=cause.exit_code if isinstance(cause, RunError) else None,  # settings that are wrong stay so
        )

    def _retire(self, replica: FleetReplica, within_s: float) -> None:
        """Let the replica finish what it has begun, then let it go."""
        if replica.state == "draining" and within_s >= replica.drains_until - time.monotonic():
            return
        if replica.state in ("waiting", "starting"):
            replica.end.set()
            return
        replica.state, replica.drains_until = "draining", time.monotonic() + within_s
        if self._roster.drain(replica.name):  # else it has just died
            self._spawn(replica.drain(within_s))

    def _leave_nodes(self) -> None:
        """Drain replicas from nodes that announced their end, in the time that is left to them."""
        for replica in list(self._replicas.values()):
            leaves_at = leaving_at(self._nodes, replica.node_ids)
            if leaves_at is not None:
                self._retire(replica, max(0.0, leaves_at - time.time() - 1.0))

    def _judge(self, now: float) -> None:
        """Give up when there is no replica, though there should be one, and none will come."""
        if self._roster.members or not sum(self._wanted()):
            self._deserted_since = now
            return
        hopeless = [self._starts[pool.name] for pool in self._pools if self._starts[pool.name].diagnosis]
        if len(hopeless) == len(self._pools) and not self._replicas:
            self._roster.give_up("; ".join(str(record.diagnosis) for record in hopeless), hopeless[0].exit_code)
        elif now - self._deserted_since > self._start_timeout_s:
            self._roster.give_up(f"no replica for {self._start_timeout_s:g} s: {self._obstacles()}", 3)

    def _obstacles(self) -> str:
        """What each pool waits for, in words."""
        states = [[replica.state for replica in self._of(pool)] for pool in self._pools]
        return "; ".join(obstacle(p, self._starts[p.name], s) for p, s in zip(self._pools, states, strict=True))

    def _remove(self, replica: FleetReplica) -> None:
        self._roster.depart(replica.name, Departure(RETIRED))
        if self._replicas.pop(replica.name, None) is not None:
            replica.kill()

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def start_fleet(pools: Sequence[PoolPlan], *, start_timeout_s: float = 1800.0, backoff_s: float = 1.0) -> Any:
    """Return the handle of a started fleet actor, owned by the calling driver and on its node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(own_node_id(), soft=False)
    actor = ray.remote(Fleet).options(num_cpus=0, max_restarts=0, max_concurrency=1000, scheduling_strategy=here)
    fleet = actor.remote(list(pools), start_timeout_s=start_timeout_s, backoff_s=backoff_s)
    ray.get(fleet.start.remote())
    return fleet


def stop_fleet(fleet: Any) -> None:
    """Kill all replicas and the fleet itself; it is no error when some are gone already."""
    import ray

    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(fleet.stop.remote(), timeout=30)
    ray.kill(fleet)
