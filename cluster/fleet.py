"""Starts replicas, supervises them, replaces the dead ones, and tells dispatch who is alive.

One Ray actor owns all replicas of a run; it belongs to the driver, so nothing outlives the run. It decides about
replicas only: what became of their rows is dispatch's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import RunError
from pipeline.membership import Member, Membership
from pipeline.replica import EngineConfig, replica_actor

logger = logging.getLogger(__name__)

MAX_FAILED_STARTS = 3
"""In a row, over all of a pool: a model that can't be loaded won't load the hundredth time either."""
START_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """Replicas of one kind: how many, what each runs, and what each takes."""

    name: str
    num_replicas: int
    engine: EngineConfig
    max_num_seqs: int = 64
    """Sequences that the engine runs at once, for sizing what is kept ready for it."""
    env: dict[str, str] = field(default_factory=dict)
    num_cpus: float = 0
    num_gpus: float = 0


class Fleet:
    """All replicas of a run; made an actor by `start_fleet`.

    Guarantees:
    - a replica reported lost is killed before its replacement starts, and its name never comes back.
    - once no replica is alive and none can be started, `watch` carries a verdict that says why.
    """

    def __init__(self, pools: list[PoolPlan], *, keep_expert_ids: bool, request_timeout_s: float) -> None:
        self._pools = pools
        self._replica_options = {"keep_expert_ids": keep_expert_ids, "request_timeout_s": request_timeout_s}
        self._members: dict[str, Member] = {}
        self._starting: dict[str, Any] = {}
        self._num_named = 0
        self._first_ready_at: float | None = None
        self._version = 0
        self._last_refusal: str | None = None
        self._verdict_exit_code = 3
        self._failed_starts: dict[str, int] = {pool.name: 0 for pool in pools}
        self._losses: deque[dict[str, str]] = deque(maxlen=100)
        self._num_losses = 0
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start every pool's replicas; returns at once, work begins with the first that is ready."""
        for pool in self._pools:
            for _ in range(pool.num_replicas):
                self._launch(pool)

    async def watch(self, version: int, wait_s: float) -> Membership:
        """Return who is alive; see `pipeline.membership.Membership`."""
        if version == self._version:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), wait_s)
        return Membership(self._version, dict(self._members), self.verdict)

    @property
    def verdict(self) -> str | None:
        """Why no replica is alive and none will be; None while one is alive or starting."""
        return self._last_refusal if not self._members and not self._starting else None

    async def report(self, replica: str, kind: str, message: str) -> None:
        """Take note of a replica that dispatch found dead or hung: kill what is left of it and start another."""
        member = self._members.pop(replica, None)
        if member is None:
            return
        self._num_losses += 1
        self._losses.append({"replica": replica, "kind": kind, "message": message})
        _kill(member.handle)
        pool_name = replica.rsplit("-", 1)[0]
        self._launch(next(pool for pool in self._pools if pool.name == pool_name))
        self._announce()

    async def status(self) -> dict[str, Any]:
        """Plain data for progress and reports."""
        return {
            "replicas_up": len(self._members),
            "replicas_wanted": sum(pool.num_replicas for pool in self._pools),
            "first_ready_at": self._first_ready_at,
            "num_losses": self._num_losses,
            "losses": list(self._losses),
            "verdict": self.verdict,
            "verdict_exit_code": self._verdict_exit_code,
            "versions": next((m.info.versions for m in self._members.values()), {}),
        }

    async def stop(self) -> None:
        """Kill all replicas."""
        for task in self._tasks:
            task.cancel()
        for handle in [*self._starting.values(), *(member.handle for member in self._members.values())]:
            _kill(handle)
        self._members.clear()
        self._announce()

    def _launch(self, pool: PoolPlan) -> None:
        name = f"{pool.name}-{self._num_named}"
        self._num_named += 1
        actor = replica_actor(num_cpus=pool.num_cpus, num_gpus=pool.num_gpus, env=pool.env)
        self._starting[name] = actor.remote(pool.engine, **self._replica_options)
        task = asyncio.get_running_loop().create_task(self._await_ready(pool, name))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _await_ready(self, pool: PoolPlan, name: str) -> None:
        handle = self._starting[name]
        try:
            info = await asyncio.wait_for(_result(handle.info.remote()), START_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001  a start can fail in any way a model can; the verdict carries the words
            self._start_failed(pool, name, error)
            return
        del self._starting[name]
        self._failed_starts[pool.name] = 0
        self._members[name] = Member(name, handle, info)
        self._first_ready_at = self._first_ready_at or time.time()
        self._announce()

    def _start_failed(self, pool: PoolPlan, name: str, error: Exception) -> None:
        _kill(self._starting.pop(name))
        cause = getattr(error, "cause", None) or error  # Ray wraps what the actor raised
        logger.error("replica %s did not start: %s", name, cause)
        self._failed_starts[pool.name] += 1
        final = isinstance(cause, RunError)  # settings that are wrong stay wrong
        if final or self._failed_starts[pool.name] >= MAX_FAILED_STARTS:
            self._last_refusal = (
                f"replicas of pool {pool.name} don't start: {type(cause).__name__}: {str(cause)[:1000]}"
            )
            self._verdict_exit_code = cause.exit_code if isinstance(cause, RunError) else 3
            self._announce()
        else:
            self._launch(pool)

    def _announce(self) -> None:
        self._version += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


async def _result(call: Any) -> Any:
    return await call


def _kill(handle: Any) -> None:
    import ray

    ray.kill(handle, no_restart=True)


def start_fleet(pools: list[PoolPlan], *, keep_expert_ids: bool, request_timeout_s: float) -> Any:
    """Return the handle of a started fleet actor, owned by the calling driver."""
    import ray

    actor = ray.remote(Fleet).options(num_cpus=0, max_restarts=0, max_concurrency=1000)
    fleet = actor.remote(pools, keep_expert_ids=keep_expert_ids, request_timeout_s=request_timeout_s)
    ray.get(fleet.start.remote())
    return fleet


def stop_fleet(fleet: Any) -> None:
    """Kill all replicas and the fleet itself; it is no error when some are gone already."""
    import ray

    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(fleet.stop.remote(), timeout=30)
    ray.kill(fleet)
