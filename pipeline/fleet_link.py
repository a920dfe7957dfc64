"""Dispatch's line to the fleet and its replicas: who is there, what they say, what they are told.

Every call to another process is here, and nothing is decided: a `Listener` is told what happened. Invariant: a replica
that was lost never comes back, however late the fleet hears of it.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
import uuid
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol

from pipeline.engine import Request
from pipeline.errors import AttemptError, ReplicaHung
from pipeline.membership import RETIRED, Departure, Member, Membership, read_death
from pipeline.replica_answers import Poll

logger = logging.getLogger(__name__)

POLL_WAIT_S = 1.0
WATCH_WAIT_S = 5.0
FLEET_GONE = (
    "the fleet's process or its node died, and all replicas with it; what is committed is safe: rerun the same "
    "command, after `tramontane up` if the run was attached to a warm fleet"
)


class Listener(Protocol):
    """Who is told."""

    def joined(self, member: Member) -> None:
        """A replica takes work from now on."""
        ...

    def leaving(self, replica: str) -> None:
        """It takes no more; said any number of times."""
        ...

    def lost(self, replica: str, why: Departure) -> None:
        """It is gone, and whatever it had."""
        ...

    def polled(self, replica: str, poll: Poll) -> None:
        """It has answered a poll."""
        ...

    def has_work(self, replica: str) -> bool:
        """Whether it owes us anything, so that it ought to make progress."""
        ...

    def failed(self, message: str) -> None:
        """There will be no more replicas."""
        ...


class Pulse:
    """Whether one replica's engine goes on."""

    def __init__(self, timeout_s: float, now: float) -> None:
        self._timeout_s = timeout_s
        self._num_steps = -1
        self._felt_at = now

    def feel(self, num_steps: int, now: float, *, has_work: bool) -> None:
        """Take in a sign of life.

        Raises:
            ReplicaHung: it has had work for long, and hasn't made a step.
        """
        if num_steps != self._num_steps or not has_work:
            self._num_steps, self._felt_at = num_steps, now
        elif now - self._felt_at > self._timeout_s:
            raise ReplicaHung(f"no engine step for {self._timeout_s:g} s")


class FleetLink:
    """Watches a fleet, polls its replicas, and carries what is to be said to them."""

    def __init__(self, fleet: Any, listener: Listener, *, hang_timeout_s: float) -> None:
        self.consumer = uuid.uuid4().hex[:12]
        """Our name at all replicas."""
        self._fleet = fleet
        self._listener = listener
        self._hang_timeout_s = hang_timeout_s
        self._members: dict[str, Member] = {}
        self._lost: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._started = False
        self._ended = False

    def start(self) -> None:
        """Begin to listen, if it hasn't yet."""
        if not self._started:
            self._started = True
            self._spawn(self._watch_fleet())

    def end(self) -> None:
        """Poll nobody any more."""
        self._ended = True

    def submit(self, member: Member, requests: list[Request]) -> None:
        """Send requests; a replica that can't be reached is lost."""
        self._spawn(self._submit(member, requests))

    def abort(self, member: Member, request_ids: list[str]) -> None:
        """Have a replica forget these requests."""
        self._spawn(_abort(member, request_ids))

    def recall(self, member: Member, count: int) -> None:
        """Have it give back up to so many that its engine hasn't begun."""
        member.handle.recall.remote(self.consumer, count)

    def cancel(self, member: Member) -> None:
        """Have it forget everything of ours."""
        member.handle.cancel.remote(self.consumer)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        # In a context of its own: when Ray cancels a call of an actor (an endpoint's, whose client hung up), it cancels
        # what was called in that call's context too. Our word to replicas was then lost, and a request ran on for ever.
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._listener.failed(f"dispatch failed: {task.exception()!r}")

    async def _watch_fleet(self) -> None:
        version = -1
        while True:
            try:
                membership: Membership = await self._fleet.watch.remote(version, WATCH_WAIT_S)
            except Exception as error:  # noqa: BLE001  without its fleet a run cannot go on
                self._listener.failed(f"{FLEET_GONE} ({type(error).__name__})")
                return
            version = membership.version
            for member in membership.members.values():
                # A list made before the fleet heard of a loss still names the lost one.
                if member.replica not in self._members and member.replica not in self._lost:
                    self._join(member)
                if member.draining:
                    self._listener.leaving(member.replica)
            for replica in [name for name in self._members if name not in membership.members]:
                self._lose(replica, membership.departed.get(replica, Departure(RETIRED)))
            if membership.verdict is not None and not membership.members:
                self._listener.failed(membership.verdict)
                return

    def _join(self, member: Member) -> None:
        self._members[member.replica] = member
        self._spawn(self._poll_replica(member))
        self._listener.joined(member)

    def _lose(self, replica: str, why: Departure) -> None:
        if self._members.pop(replica, None) is not None:
            self._lost.add(replica)
            self._listener.lost(replica, why)

    async def _submit(self, member: Member, requests: list[Request]) -> None:
        try:
            await member.handle.submit.remote(requests)
        except Exception as error:  # noqa: BLE001  the replica boundary: any failure to hand over means it is gone
            await self._report(member.replica, read_death(error))

    async def _poll_replica(self, member: Member) -> None:
        replica, pulse = member.replica, Pulse(self._hang_timeout_s, time.monotonic())
        while replica in self._members and not self._ended:
            try:
                call = member.handle.poll.remote(self.consumer, POLL_WAIT_S)
                poll: Poll = await asyncio.wait_for(_result(call), self._hang_timeout_s)
                pulse.feel(poll.num_steps, time.monotonic(), has_work=self._listener.has_work(replica))
            except TimeoutError:
                await self._report(replica, ReplicaHung(f"no answer for {self._hang_timeout_s:g} s"))
            except Exception as error:  # noqa: BLE001  the replica boundary: whatever it was, this replica is done for
                await self._report(replica, read_death(error))
            else:
                self._listener.polled(replica, poll)

    async def _report(self, replica: str, cause: AttemptError) -> None:
        if replica not in self._members:
            return
        logger.warning("replica %s lost: %s", replica, cause.message)
        self._listener.leaving(replica)
        try:
            # The fleet may know better: a call to a dead process says only that it is dead.
            departure = await self._fleet.report.remote(replica, cause.kind, cause.message)
        except Exception as error:  # noqa: BLE001  it took its replicas along
            self._listener.failed(f"{FLEET_GONE} ({type(error).__name__})")
        else:
            self._lose(replica, departure)


async def _abort(member: Member, request_ids: Sequence[str]) -> None:
    member.handle.abort.remote(request_ids)


async def _result(call: Any) -> Any:
    return await call
