"""One replica of a fleet from the request for its slot to its end: waiting, starting, up, draining, gone.

It is told what to do by `cluster.fleet` and answers what became of it; it knows nothing of its pool's other replicas,
nor of rows. Invariant: after `kill` neither its process nor its slot is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cluster.pools import PoolPlan
from cluster.scaling import State
from cluster.slots import Slot
from pipeline.replica import replica_actor

PLACEMENT_POLL_S = 0.1


@dataclass(slots=True)
class FleetReplica:
    """One replica, as its fleet sees it."""

    name: str
    pool: PoolPlan
    slot: Slot
    not_on: frozenset[str] = frozenset()
    """Ids of the nodes on which its slot can't be."""
    handle: Any = None
    """Of its actor, once its slot is placed."""
    state: State = "waiting"
    node_ids: tuple[str, ...] = ()
    """Where it is; empty while it waits."""
    began_at: float = field(default_factory=time.monotonic)
    ready_at: float = 0.0
    """Monotonic, as `began_at`; 0 before it was up."""
    drains_until: float = 0.0
    """Monotonic; while it drains."""
    end: asyncio.Event = field(default_factory=asyncio.Event)
    """Set to end it now, whatever it does."""

    def may_be_on(self, node_id: str) -> bool:
        """Whether it is on this node, or might be once its slot is placed."""
        return node_id in self.node_ids if self.node_ids else node_id not in self.not_on

    async def until_placed(self) -> None:
        """Wait for its slot.

        Raises:
            CancelledError: it was told to end first.
        """
        while (nodes := self.slot.placed_on()) is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.end.wait(), PLACEMENT_POLL_S)
                raise asyncio.CancelledError
        self.node_ids = tuple(nodes)

    async def load(self, *, timeout_s: float) -> Any:
        """Start its actor in its slot; returns what the engine turned out to be, None when it was told to end first.

        Raises:
            TimeoutError: the model wasn't loaded in that time.
            Exception: whatever kept the engine from loading.
        """
        self.state = "starting"
        shape = self.pool.shape
        actor = replica_actor(
            env=self.pool.env,
            num_cpus=shape.num_cpus,
            num_gpus=shape.num_gpus,
            scheduling_strategy=self.slot.strategy(),
        )
        self.handle = actor.remote(self.pool.engine)
        return await self._unless_ended(self.handle.info.remote(), timeout_s)

    def is_up(self) -> None:
        """It takes work from now on."""
        self.state, self.ready_at = "up", time.monotonic()

    async def until_death(self) -> None:
        """Return when it was told to end.

        Raises:
            Exception: its death, in Ray's words or its own; see `pipeline.membership.read_death`.
        """
        await self._unless_ended(self.handle.until_death.remote(), None)

    async def drain(self, within_s: float) -> None:
        """Let it finish what its engine has begun, at most so long, then have it end."""
        with contextlib.suppress(Exception):  # it died: that is seen elsewhere
            async with asyncio.timeout(within_s):
                await result_of(self.handle.drain.remote())
                zeros = 0
                while zeros < 2:
                    zeros = zeros + 1 if await result_of(self.handle.num_unfinished.remote()) == 0 else 0
                    await asyncio.sleep(PLACEMENT_POLL_S)
        self.end.set()

    def kill(self) -> None:
        """End its process and give its slot back; harmless when they are gone."""
        import ray

        if self.handle is not None:
            ray.kill(self.handle, no_restart=True)
        self.slot.release()

    async def _unless_ended(self, call: Any, timeout_s: float | None) -> Any:
        """Result of the call, or None when the replica is told to end first."""
        result = asyncio.ensure_future(result_of(call))
        ended = asyncio.ensure_future(self.end.wait())
        try:
            await asyncio.wait({result, ended}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if result.done():
                return result.result()
            if ended.done():
                return None
            raise TimeoutError(f"the model wasn't loaded within {timeout_s:g} s")
        finally:
            result.cancel()
            ended.cancel()


def pool_status(pool: PoolPlan, replicas: Iterable[FleetReplica], diagnosis: str | None) -> dict[str, Any]:
    """A pool's replicas as plain data."""
    states = [{"replica": each.name, "state": each.state, "nodes": list(each.node_ids)} for each in replicas]
    return {"pool": pool.name, "takes": pool.shape.describe(), "replicas": states, "diagnosis": diagnosis}


async def result_of(call: Any) -> Any:
    """Await a Ray call where asyncio wants a coroutine."""
    return await call
