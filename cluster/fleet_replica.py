"""One replica of a fleet from the request for its slot to its end: waiting, starting, up, draining, gone.

It is told what to do by `cluster.fleet` and answers what became of it; it knows nothing of its pool's other replicas,
nor of rows. One over several nodes lives and dies as one: whatever ends on any of them is the replica's end.
Invariant: after `kill` neither its processes nor its slot are left.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

from cluster.pools import PoolPlan
from cluster.scaling import State
from cluster.slots import Slot
from pipeline.follower import follower_actor
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
    """Of its actor, in the slot's first bundle, once that is placed."""
    followers: list[Any] = field(default_factory=list)
    """Handles of the actors that hold its engine's GPUs in the other bundles."""
    follower_ends: list[asyncio.Future[Any]] = field(default_factory=list)
    """One for each of them, done when it has died."""
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
        self.handle = replica_actor(env=self.pool.env, **self._placed(0)).remote(self.pool.engine)
        if self.pool.shape.num_bundles > 1:
            await self._unless_ended(self._start_followers(), timeout_s)
            if self.end.is_set():
                return None
        return await self._unless_ended(result_of(self.handle.info.remote()), timeout_s)

    async def _start_followers(self) -> None:
        """Give the engine its GPUs on the slot's other nodes; whatever kills one of them kills the replica."""
        meeting = await result_of(self.handle.call_meeting.remote(self.pool.shape.num_bundles))
        for bundle in range(1, self.pool.shape.num_bundles):
            actor = follower_actor(env=self.pool.env, **self._placed(bundle))
            follower = actor.remote(self.pool.engine, meeting, bundle)
            self.followers.append(follower)
            end = asyncio.ensure_future(result_of(follower.follow.remote()))
            end.add_done_callback(lambda done: done.cancelled() or done.exception())  # heard, even if another was first
            self.follower_ends.append(end)

    def _placed(self, bundle: int) -> dict[str, Any]:
        """Ray's options for an actor that takes all of a bundle."""
        shape = self.pool.shape
        strategy = self.slot.strategy(bundle)
        return {"num_cpus": shape.num_cpus, "num_gpus": shape.num_gpus, "scheduling_strategy": strategy}

    def is_up(self) -> None:
        """It takes work from now on."""
        self.state, self.ready_at = "up", time.monotonic()

    async def until_death(self) -> None:
        """Return when it was told to end.

        Raises:
            Exception: its death, in Ray's words or its own; see `pipeline.membership.read_death`.
        """
        await self._unless_ended(result_of(self.handle.until_death.remote()), None)

    async def answer(self) -> None:
        """Return when all of its processes have answered, which a follower does only when it no longer follows.

        Raises:
            Exception: as `until_death`, of any of them.
        """
        await asyncio.gather(*(result_of(actor.pid.remote()) for actor in (self.handle, *self.followers)))

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
        """End its processes and give its slot back; harmless when they are gone."""
        import ray

        for end in self.follower_ends:
            end.cancel()
        for actor in (self.handle, *self.followers):
            if actor is not None:
                ray.kill(actor, no_restart=True)
        self.slot.release()

    async def _unless_ended(self, work: Coroutine[Any, Any, Any], timeout_s: float | None) -> Any:
        """Result of the work, or None when the replica is told to end first; raises what kills a follower meanwhile."""
        result = asyncio.ensure_future(work)
        ended = asyncio.ensure_future(self.end.wait())
        try:
            first = {result, ended, *self.follower_ends}
            await asyncio.wait(first, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            dead = next((end for end in self.follower_ends if end.done()), None)
            if dead is not None:
                return dead.result()  # raises
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
