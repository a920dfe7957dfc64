"""Drives the dispatch board against live replicas: submits microbatches, polls for results, notices deaths and hangs.

One dispatcher serves all shards of a run, on one event loop. It decides nothing itself: `dispatch` says what goes
where, the fleet says who is alive. It knows rows as (shard token, position) and nothing of columns or files.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.dispatch import Assignment, DispatchBoard
from pipeline.engine import Failure, Request
from pipeline.errors import AttemptError, InfrastructureError, ReplicaDied, ReplicaHung, RequestRefused
from pipeline.membership import Member, Membership
from pipeline.replica import Poll, RowResult

logger = logging.getLogger(__name__)

POLL_WAIT_S = 1.0
WATCH_WAIT_S = 5.0
MAX_FRUITLESS_LOSSES = 10
"""Replicas lost in a row without a single row finished in between: then it isn't the rows, and restarts would go on for
as many rows as there are."""
SAME_MOMENT_S = 0.5
WINDOW_FACTOR = 2
"""Rows with or on the way to a replica, per sequence its engine can run at once: it never waits for us."""

Key = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What finally became of one row."""

    result: RowResult
    attempts: int


@dataclass(slots=True)
class _Shard:
    requests: Sequence[Request | None]
    outcomes: list[Outcome | None]
    missing: int
    done: asyncio.Event
    begun: bool = False
    dropped: bool = False


class Dispatcher:
    """All shards of a run that are being generated.

    Guarantees:
    - `generate` returns an outcome for every request, or None for the whole shard when draining dropped it.
    """

    def __init__(
        self, fleet: Any, *, max_attempts: int, hang_timeout_s: float, on_outcome: Callable[[Request, Outcome], None]
    ) -> None:
        self._fleet = fleet
        self._hang_timeout_s = hang_timeout_s
        self._on_outcome = on_outcome
        self._board: DispatchBoard[Key] = DispatchBoard(max_attempts=max_attempts)
        self._shards: dict[int, _Shard] = {}
        self._members: dict[str, Member] = {}
        self._consumer = uuid.uuid4().hex[:12]
        self._sent: dict[str, Key] = {}
        self._sent_to: dict[str, set[str]] = {}
        self._next_token = 0
        self._num_sent = 0
        self._failure: InfrastructureError | None = None
        self._fruitless_losses = 0
        self._last_fruitless_loss = -math.inf
        self._max_attempts = max_attempts
        self._lost: set[str] = set()
        self._draining = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._started = False

    @property
    def num_in_flight(self) -> int:
        """Rows that are with replicas now."""
        return len(self._sent)

    @property
    def num_replicas(self) -> int:
        """Replicas that take work now."""
        return len(self._members)

    async def generate(self, requests: Sequence[Request | None]) -> list[Outcome | None] | None:
        """Run a shard's requests to their outcomes, in the order given; None entries stay None.

        Raises:
            InfrastructureError: the fleet has given up.
        """
        self._start()
        if self._failure is not None:
            raise InfrastructureError(self._failure.message)
        positions = [position for position, request in enumerate(requests) if request is not None]
        if self._draining:
            return None
        if not positions:
            return [None] * len(requests)
        token, self._next_token = self._next_token, self._next_token + 1
        shard = _Shard(requests, [None] * len(requests), len(positions), asyncio.Event())
        self._shards[token] = shard
        self._board.add_rows((token, position) for position in positions)
        self._send_all()
        try:
            await shard.done.wait()
        finally:
            del self._shards[token]
        if self._failure is not None:
            raise InfrastructureError(self._failure.message)
        return None if shard.dropped else shard.outcomes

    def drain(self) -> None:
        """Begin no further shards: those that no replica has seen a row of are dropped, the others finish."""
        self._draining = True
        for token in [token for token, shard in self._shards.items() if not shard.begun]:
            self._drop(token)

    def abandon(self) -> None:
        """Drop every shard that isn't finished."""
        self._draining = True
        for token in [token for token, shard in self._shards.items() if shard.missing]:
            self._drop(token)
        for replica, member in self._members.items():
            member.handle.cancel.remote(self._consumer)
            for request_id in self._sent_to[replica]:
                self._sent.pop(request_id, None)
            self._sent_to[replica].clear()

    def _drop(self, token: int) -> None:
        shard = self._shards[token]
        self._board.discard((token, position) for position in range(len(shard.requests)))
        shard.dropped = True
        shard.done.set()

    def _start(self) -> None:
        if not self._started:
            self._started = True
            self._spawn(self._watch_fleet())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._fail(f"dispatch failed: {task.exception()!r}")

    def _fail(self, message: str) -> None:
        logger.error("%s", message)
        self._failure = InfrastructureError(message)
        for shard in self._shards.values():
            shard.done.set()

    async def _watch_fleet(self) -> None:
        version = -1
        while True:
            try:
                membership: Membership = await self._fleet.watch.remote(version, WATCH_WAIT_S)
            except Exception as error:  # noqa: BLE001  without its fleet a run cannot go on
                self._fail(f"the fleet is gone: {type(error).__name__}")
                return
            version = membership.version
            for member in membership.members.values():
                # A list made before the fleet heard of a loss still names the lost one.
                if member.replica not in self._members and member.replica not in self._lost:
                    self._join(member)
            for replica in [name for name in self._members if name not in membership.members]:
                self._lose(replica, "engine_crash", rows_to_blame=False)
            if membership.verdict is not None and not membership.members:
                self._fail(membership.verdict)
                return

    def _join(self, member: Member) -> None:
        self._members[member.replica] = member
        self._sent_to[member.replica] = set()
        self._board.replica_up(member.replica, window=WINDOW_FACTOR * member.info.max_num_seqs)
        self._spawn(self._poll_replica(member))
        self._send_all()

    def _lose(self, replica: str, kind: str, *, rows_to_blame: bool = True) -> None:
        if self._members.pop(replica, None) is None:
            return
        self._lost.add(replica)
        for request_id in self._sent_to.pop(replica):
            self._sent.pop(request_id, None)
        for lost in self._board.replica_down(replica, kind, rows_to_blame=rows_to_blame):
            message = f"attempt {lost.attempts} of {self._max_attempts}, the last one, ended in {kind}"
            self._settle(lost.key, Outcome(_failed(kind, message), lost.attempts))
        self._send_all()

    def _send_all(self) -> None:
        while (assignment := self._board.next_assignment()) is not None:
            self._send(assignment)

    def _send(self, assignment: Assignment[Key]) -> None:
        requests = []
        for token, position in assignment.keys:
            shard = self._shards.get(token)
            request = shard.requests[position] if shard else None
            if shard is None or request is None:  # dropped while it waited for another attempt
                self._board.finished(assignment.replica, (token, position))
                continue
            shard.begun = True
            self._num_sent += 1
            # Names the attempt, not the row: a late answer to an earlier attempt can't be taken for this one's.
            request_id = f"{self._consumer}/{self._num_sent}"
            self._sent[request_id] = (token, position)
            self._sent_to[assignment.replica].add(request_id)
            requests.append(replace(request, request_id=request_id))
        if requests:
            self._spawn(self._submit(self._members[assignment.replica], requests))

    async def _submit(self, member: Member, requests: list[Request]) -> None:
        try:
            await member.handle.submit.remote(requests)
        except Exception as error:  # noqa: BLE001  the replica boundary: any failure to hand over means it is gone
            await self._report(member.replica, _cause(error))

    async def _poll_replica(self, member: Member) -> None:
        last_steps, last_life = -1, time.monotonic()
        while member.replica in self._members:
            try:
                call = member.handle.poll.remote(self._consumer, POLL_WAIT_S)
                poll: Poll = await asyncio.wait_for(_result(call), self._hang_timeout_s)
                if poll.num_steps != last_steps or not self._board.num_in_flight(member.replica):
                    last_steps, last_life = poll.num_steps, time.monotonic()
                elif time.monotonic() - last_life > self._hang_timeout_s:
                    raise ReplicaHung(f"no engine step for {self._hang_timeout_s:g} s")
            except TimeoutError:
                await self._report(member.replica, ReplicaHung(f"no answer for {self._hang_timeout_s:g} s"))
            except Exception as error:  # noqa: BLE001  the replica boundary: whatever it was, this replica is done for
                await self._report(member.replica, _cause(error))
            else:
                self._receive(member.replica, poll.results)

    async def _report(self, replica: str, cause: AttemptError) -> None:
        if replica not in self._members:
            return
        logger.warning("replica %s lost: %s", replica, cause.message)
        had_work = self._board.num_in_flight(replica) > 0
        self._lose(replica, cause.kind)
        self._note_fruitless_loss(had_work=had_work)
        if self._fruitless_losses >= MAX_FRUITLESS_LOSSES:
            lost = self._fruitless_losses
            self._fail(f"{lost} replicas in a row died without finishing a row; last: {cause.message}")
        await self._fleet.report.remote(replica, cause.kind, cause.message)

    def _note_fruitless_loss(self, *, had_work: bool) -> None:
        """Count losses that look like the work's doing; many at one moment are one event, such as a lost node."""
        now = time.monotonic()
        if had_work and now - self._last_fruitless_loss > SAME_MOMENT_S:
            self._fruitless_losses += 1
            self._last_fruitless_loss = now

    def _receive(self, replica: str, results: Sequence[RowResult]) -> None:
        for result in results:
            key = self._sent.pop(result.request_id, None)
            if key is None:
                continue
            self._sent_to[replica].discard(result.request_id)
            self._fruitless_losses = 0
            if result.failure is None:
                attempt = self._board.finished(replica, key)
                if attempt is not None:
                    self._settle(key, Outcome(result, attempt))
            else:
                kind = result.failure.kind
                lost = self._board.request_failed(replica, key, kind, final=kind == RequestRefused.kind)
                if lost is not None:
                    self._settle(key, Outcome(result, lost.attempts))
        self._send_all()

    def _settle(self, key: Key, outcome: Outcome) -> None:
        token, position = key
        shard = self._shards.get(token)
        if shard is None or shard.outcomes[position] is not None:
            return
        shard.outcomes[position] = outcome
        shard.missing -= 1
        request = shard.requests[position]
        if request is not None:
            self._on_outcome(request, outcome)
        if shard.missing == 0:
            shard.done.set()


async def _result(call: Any) -> Any:
    return await call


def _failed(kind: str, message: str) -> RowResult:
    return RowResult("", failure=Failure("", kind, message))


def _cause(error: Exception) -> AttemptError:
    """Read any failure of a call to a replica as the loss of that replica."""
    if isinstance(error, ReplicaHung):
        return error
    cause = getattr(error, "cause", None)  # Ray wraps what the actor raised
    if isinstance(cause, AttemptError):
        return cause
    return ReplicaDied(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error) else ''}")
