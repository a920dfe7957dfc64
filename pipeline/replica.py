"""The Ray actor that owns one engine and its GPUs: rows in, reduced results out.

An async face for the engine's thread. Routing is reduced to statistics there, so per-token arrays never travel. An
engine that dies takes the actor along. Knows nothing of shards, attempts or other replicas.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from typing import Any

from pipeline.consumers import Mailboxes, consumer_of
from pipeline.engine import EngineInfo, Request
from pipeline.engine_thread import EngineConfig, EngineThread
from pipeline.errors import ReplicaDied
from pipeline.meeting import Meeting, call_meeting
from pipeline.replica_answers import Poll
from pipeline.replica_inbox import Abort, Cancel, Drain, Recall


class Replica:
    """One engine behind an async actor interface; made an actor by the fleet.

    Guarantees:
    - each submitted request appears in exactly one poll of its consumer, as all of its samples, as a failure, or as
      returned, unless it is cancelled, the replica dies, or the consumer has been silent for long, which it is told.
    - requests of a lower priority number reach the engine first.
    - a request that somebody waits for doesn't wait for one of a run, unless that has made way twice.
    - while an endpoint shares the replica, the engine has runs' requests for at most seven in eight of its sequences.
    - once the engine has died every call raises ReplicaDied, and the process exits.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._mailboxes = Mailboxes()
        self._ready = asyncio.Event()
        self._dead = asyncio.Event()
        self._engine = EngineThread(config, self._mailboxes, tell=self._hear)

    async def call_meeting(self, num_nodes: int) -> Meeting:
        """Before `info`: have the engine span so many nodes, this one first, and say where the others find it."""
        self._engine.meeting = call_meeting(num_nodes)
        return self._engine.meeting

    async def info(self) -> EngineInfo:
        """Start loading if need be, wait until the engine is ready, and describe it.

        Raises:
            Exception: whatever kept the engine from loading, as it was raised.
        """
        self._engine.start()
        await self._ready.wait()
        if self._engine.death is not None:
            raise self._engine.death
        assert self._engine.info is not None  # noqa: S101  set before _ready
        return self._engine.info

    async def pid(self) -> int:
        """Process id, for supervision and for tests that kill real processes."""
        return os.getpid()

    async def node_id(self) -> str:
        """Node that this replica's process runs on; answers while the model loads."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    async def until_death(self) -> None:
        """Never return; raise ReplicaDied when the engine dies (or Ray's error when the process does)."""
        await self._dead.wait()
        self._check_alive()

    async def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests; answers come through `poll` of the consumer that their ids begin with (`consumer/...`).

        Several consumers may share a replica: runs that overlap by a moment, or a run and an endpoint.
        """
        self._check_alive()
        for request in requests:
            self._engine.inbox.put(request)

    async def poll(self, consumer: str, wait_s: float) -> Poll:
        """Return what finished for the consumer since its last poll; waits up to `wait_s` for something to finish."""
        self._check_alive()
        mail = await self._mailboxes.take(consumer, wait_s)
        self._check_alive()
        begun = self._engine.requests.begun_ids()
        return Poll(
            mail.results,
            self._engine.num_steps,
            in_company=any(consumer_of(request_id) != consumer for request_id in begun),
            pieces=mail.pieces,
            num_running=len(begun),
            num_waiting=self._num_waiting(),
            is_first=mail.is_first,
        )

    async def cancel(self, consumer: str) -> None:
        """Abort the consumer's unfinished requests and drop what it hasn't been told; its name must not come back."""
        self._engine.inbox.put(Cancel(consumer))

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Forget these requests: nobody waits for them any more, and nothing will be said of them."""
        self._engine.inbox.put(Abort(tuple(request_ids)))

    async def recall(self, consumer: str, count: int) -> None:
        """Return up to `count` of the consumer's requests that the engine hasn't begun, the last ones, by `poll`."""
        self._engine.inbox.put(Recall(consumer, count))

    async def drain(self) -> None:
        """Take no more work: what the engine hasn't begun, and whatever still arrives, comes back by `poll`."""
        self._engine.inbox.put(Drain())

    async def num_unfinished(self) -> int:
        """Requests here that nobody has been told the end of, those of dead consumers left out.

        A result on its way from the engine's thread is missed for a moment: believe a second 0 in a row.
        """
        return self._engine.requests.num_begun + self._num_waiting() + self._mailboxes.num_untold(time.monotonic())

    def _num_waiting(self) -> int:
        return self._engine.requests.num_waiting + len(self._engine.inbox)

    def _check_alive(self) -> None:
        death = self._engine.death
        if death is not None:
            raise ReplicaDied(f"the engine died: {type(death).__name__}: {str(death)[:500]}")

    def _hear(self) -> None:
        """The engine is ready, or dead."""
        self._ready.set()
        if self._engine.death is not None:
            self._dead.set()
            self._mailboxes.wake_all()
            # Long enough for waiting callers to be told why, in words better than "connection reset".
            asyncio.get_running_loop().call_later(2.0, os._exit, 1)


def replica_actor(*, env: dict[str, str], **options: Any) -> Any:
    """Return the Ray actor class of `Replica` with this environment and these Ray options.

    No restarts: an engine that died is replaced by the fleet, which knows whether that makes sense.
    """
    import ray

    runtime_env = {"env_vars": env} if env else None
    return ray.remote(Replica).options(max_restarts=0, max_concurrency=100, runtime_env=runtime_env, **options)
