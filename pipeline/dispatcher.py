"""Drives the dispatch board against live replicas: submits microbatches, polls for results, notices deaths and hangs.

One dispatcher serves all shards of a run, on one event loop. It decides nothing itself: `dispatch` says what goes
where, the fleet says who is alive. It knows rows as (shard token, position) and nothing of columns or files.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.balance import Load, SpeedMeter, choose_recall
from pipeline.dispatch import Assignment, DispatchBoard
from pipeline.engine import Failure, Piece, Request
from pipeline.errors import (
    AttemptError,
    InfrastructureError,
    NodeLost,
    ReplicaHung,
    ReplicaUnreachable,
    RequestRefused,
)
from pipeline.membership import RETIRED, Departure, Member, Membership, read_death
from pipeline.replica import RETURNED, Poll, RowResult
from pipeline.twins import Twins

logger = logging.getLogger(__name__)

POLL_WAIT_S = 1.0
WATCH_WAIT_S = 5.0
MAX_FRUITLESS_LOSSES = 10
"""Replicas lost in a row without a single row finished in between: then it isn't the rows, and restarts would go on for
as many rows as there are."""
SAME_MOMENT_S = 0.5
WINDOW_FACTOR = 2
"""Rows with or on the way to a replica, per sequence its engine can run at once: it never waits for us."""

RECALL_INTERVAL_S = 0.2
"""Least time between two looks at whether rows should be called back from a slow replica."""
RECALL_PATIENCE_S = 2.0
"""How long to wait for what was called back before calling again: an engine step may take a second."""

FLEET_GONE = (
    "the fleet's process or its node died, and all replicas with it; what is committed is safe: rerun the same "
    "command, after `tramontane up` if the run was attached to a warm fleet"
)
BROKEN_OFF = "its replica was lost after the answer had begun"
BLAMELESS = frozenset({RETIRED, NodeLost.kind, ReplicaUnreachable.kind})
"""Ends of a replica that no row of its can have brought about."""

Key = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What finally became of one row."""

    result: RowResult
    attempts: int
    copied: bool = False
    """Taken over from a row with the same request."""


@dataclass(slots=True)
class _Live:
    """One replica that takes work."""

    member: Member
    sent: set[str] = field(default_factory=set)
    """Ids of requests that it hasn't answered."""
    speed: SpeedMeter = field(default_factory=SpeedMeter)
    met_at: float = field(default_factory=time.monotonic)
    """When its speed was last looked at."""
    recalled_at: float = -math.inf
    in_company: bool = False
    """Whether it was last seen with requests of other runs."""
    num_running: int = 0
    num_waiting: int = 0
    """What it was last seen with, everybody's."""

    def load(self, now: float) -> Load:
        info = self.member.info
        spare = max(0, len(self.sent) - info.max_num_seqs - info.lookahead)
        patient = now - self.recalled_at < RECALL_PATIENCE_S
        return Load(len(self.sent), info.max_num_seqs, 0 if patient else spare, self.speed.rate)


@dataclass(slots=True)
class _Shard:
    requests: Sequence[Request | None]
    outcomes: list[Outcome | None]
    missing: int
    num_leading: int
    """Rows that wait for no twin."""
    done: asyncio.Event
    begun: bool = False
    dropped: bool = False
    on_piece: Callable[[int, Piece], None] | None = None
    streamed: set[int] = field(default_factory=set)
    """Positions of which somebody has seen a piece: what has been read can't be taken back for another attempt."""


class Dispatcher:
    """All shards of a run that are being generated.

    Guarantees:
    - `generate` returns an outcome for every request, or None for the whole shard when draining dropped it.
    - a caller of `generate` that is cancelled leaves nothing behind on any replica.
    - a streamed request of which a piece has been told is not tried again: it fails with its replica.
    """

    def __init__(
        self,
        fleet: Any,
        *,
        max_attempts: int,
        hang_timeout_s: float,
        on_outcome: Callable[[Request, Outcome], None],
        begins_at_once: bool = False,
    ) -> None:
        """With `begins_at_once` no request waits at one replica while another could begin it: for people who wait."""
        self._fleet = fleet
        self._hang_timeout_s = hang_timeout_s
        self._on_outcome = on_outcome
        self._begins_at_once = begins_at_once
        self._board: DispatchBoard[Key] = DispatchBoard(max_attempts=max_attempts)
        self._shards: dict[int, _Shard] = {}
        self._twins: Twins[Key, Outcome] = Twins()
        self._members: dict[str, _Live] = {}
        self._consumer = uuid.uuid4().hex[:12]
        self._sent: dict[str, Key] = {}
        self._balanced_at = -math.inf
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

    @property
    def num_seqs(self) -> int:
        """Sequences that their engines run at once."""
        return sum(live.member.info.max_num_seqs for live in self._members.values())

    def replica_loads(self) -> dict[str, tuple[int, int]]:
        """Requests that each replica was last seen running, and with waiting, everybody's."""
        return {name: (live.num_running, live.num_waiting) for name, live in self._members.items()}

    @property
    def num_open_rows(self) -> int:
        """Rows of unfinished shards that an engine has to do, or did; twins are not counted."""
        return sum(shard.num_leading for shard in self._shards.values())

    async def generate(
        self,
        requests: Sequence[Request | None],
        digests: Sequence[bytes | None] | None = None,
        *,
        on_piece: Callable[[int, Piece], None] | None = None,
    ) -> list[Outcome | None] | None:
        """Run a shard's requests to their outcomes, in the order given; None entries stay None.

        Requests with equal `digests` have equal outcomes, so that one of them is run for all; None for none.
        `on_piece` is told what streamed requests gain meanwhile, and at which position they are.

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
        shard = _Shard(
            requests, [None] * len(requests), len(positions), len(positions), asyncio.Event(), on_piece=on_piece
        )
        self._shards[token] = shard
        leading = [(token, position) for position in positions]
        if digests is not None:
            leading = [key for key in leading if not self._has_twin(key, digests[key[1]])]
            shard.num_leading = len(leading)
        self._board.add_rows(leading)
        self._send_all()
        try:
            await shard.done.wait()
        finally:
            del self._shards[token]
            if shard.missing and not shard.done.is_set():
                self._withdraw(token, shard)
        if self._failure is not None:
            raise InfrastructureError(self._failure.message)
        return None if shard.dropped else shard.outcomes

    def _has_twin(self, key: Key, digest: bytes | None) -> bool:
        """Whether another row's outcome is this one's too: taken over at once if it is known, else waited for."""
        if digest is None:
            return False
        outcome = self._twins.known(digest)
        if outcome is None:
            return self._twins.follows(key, digest)
        self._settle(key, replace(outcome, copied=True))
        return True

    def drain(self) -> None:
        """Begin no further shards: those that no replica has seen a row of are dropped, the others finish."""
        self._draining = True
        self._drop([token for token, shard in self._shards.items() if not shard.begun])
        self._send_all()

    def abandon(self) -> None:
        """Drop every shard that isn't finished."""
        self._draining = True
        self._drop([token for token, shard in self._shards.items() if shard.missing])
        for live in self._members.values():
            live.member.handle.cancel.remote(self._consumer)
            for request_id in live.sent:
                self._sent.pop(request_id, None)
            live.sent.clear()

    def _withdraw(self, token: int, shard: _Shard) -> None:
        """Nobody waits for the shard any more: have replicas forget what they have of it."""
        for name, live in self._members.items():
            mine = [request_id for request_id in live.sent if self._sent[request_id][0] == token]
            for request_id in mine:
                live.sent.discard(request_id)
                self._board.finished(name, self._sent.pop(request_id))
            if mine:
                self._spawn(_abort(live.member, mine))
        self._forget([(token, position) for position in range(len(shard.requests))])
        self._send_all()

    def _drop(self, tokens: Sequence[int]) -> None:
        sizes = {token: len(self._shards[token].requests) for token in tokens}
        self._forget([(token, position) for token, size in sizes.items() for position in range(size)])
        for token in tokens:
            self._shards[token].dropped = True
            self._shards[token].done.set()

    def _forget(self, keys: Sequence[Key]) -> None:
        """Take rows off the board; others that waited for theirs go there instead."""
        self._board.discard(keys)
        self._board.add_rows(self._twins.drop(keys))

    def _start(self) -> None:
        if not self._started:
            self._started = True
            self._spawn(self._watch_fleet())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        # In a context of its own: when Ray cancels a call of an actor (an endpoint's, whose client hung up), it cancels
        # what was called in that call's context too. Our word to replicas was then lost, and a request ran on for ever.
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
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
                self._fail(f"{FLEET_GONE} ({type(error).__name__})")
                return
            version = membership.version
            for member in membership.members.values():
                # A list made before the fleet heard of a loss still names the lost one.
                if member.replica not in self._members and member.replica not in self._lost:
                    self._join(member)
                if member.draining:
                    self._board.drain(member.replica)
            for replica in [name for name in self._members if name not in membership.members]:
                self._lose(replica, membership.departed.get(replica, Departure(RETIRED)))
            if membership.verdict is not None and not membership.members:
                self._fail(membership.verdict)
                return

    def _join(self, member: Member) -> None:
        self._members[member.replica] = _Live(member)
        self._board.replica_up(member.replica, window=WINDOW_FACTOR * member.info.max_num_seqs)
        self._spawn(self._poll_replica(member))
        self._send_all()

    def _lose(self, replica: str, why: Departure) -> None:
        """Take back what a lost replica had; its rows are charged with an attempt if they may be what killed it."""
        live = self._members.pop(replica, None)
        if live is None:
            return
        rows_to_blame = why.kind not in BLAMELESS
        self._note_fruitless_loss(why, had_work=bool(live.sent) and rows_to_blame and not live.in_company)
        self._lost.add(replica)
        for request_id in live.sent:
            key = self._sent.pop(request_id, None)
            if key is not None and self._is_streamed(key):
                attempt = self._board.finished(replica, key)
                self._settle(key, Outcome(_failed(why.kind, BROKEN_OFF), attempt or 1))
        for lost in self._board.replica_down(
            replica, why.kind, rows_to_blame=rows_to_blame, in_company=live.in_company
        ):
            message = f"attempt {lost.attempts} of {self._max_attempts}, the last one, ended in {why.kind}"
            self._settle(lost.key, Outcome(_failed(why.kind, message), lost.attempts))
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
            self._members[assignment.replica].sent.add(request_id)
            requests.append(replace(request, request_id=request_id))
        if requests:
            self._spawn(self._submit(self._members[assignment.replica].member, requests))

    async def _submit(self, member: Member, requests: list[Request]) -> None:
        try:
            await member.handle.submit.remote(requests)
        except Exception as error:  # noqa: BLE001  the replica boundary: any failure to hand over means it is gone
            await self._report(member.replica, read_death(error))

    async def _poll_replica(self, member: Member) -> None:
        last_steps, last_life = -1, time.monotonic()
        while member.replica in self._members and self._failure is None:
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
                await self._report(member.replica, read_death(error))
            else:
                live = self._members.get(member.replica)
                if live is not None:
                    live.in_company = poll.in_company
                    live.num_running, live.num_waiting = poll.num_running, poll.num_waiting
                self._pass_on(poll.pieces)
                self._receive(member.replica, poll.results)

    async def _report(self, replica: str, cause: AttemptError) -> None:
        if replica not in self._members:
            return
        logger.warning("replica %s lost: %s", replica, cause.message)
        self._board.drain(replica)
        try:
            # The fleet may know better: a call to a dead process says only that it is dead.
            departure = await self._fleet.report.remote(replica, cause.kind, cause.message)
        except Exception as error:  # noqa: BLE001  it took its replicas along
            self._fail(f"{FLEET_GONE} ({type(error).__name__})")
        else:
            self._lose(replica, departure)

    def _note_fruitless_loss(self, why: Departure, *, had_work: bool) -> None:
        """Count losses that look like the work's doing; many at one moment are one event, such as a lost node."""
        now = time.monotonic()
        if had_work and now - self._last_fruitless_loss > SAME_MOMENT_S:
            self._fruitless_losses += 1
            self._last_fruitless_loss = now
        if self._fruitless_losses >= MAX_FRUITLESS_LOSSES:
            self._fail(f"{self._fruitless_losses} replicas in a row died without finishing a row; last: {why.message}")

    def _pass_on(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            token, position = self._sent.get(piece.request_id, (-1, -1))
            shard = self._shards.get(token)
            if shard is not None and shard.on_piece is not None:
                shard.streamed.add(position)
                shard.on_piece(position, piece)

    def _is_streamed(self, key: Key) -> bool:
        shard = self._shards.get(key[0])
        return shard is not None and key[1] in shard.streamed

    def _receive(self, replica: str, results: Sequence[RowResult]) -> None:
        live = self._members.get(replica)
        if live is None:
            return
        had_work, num_begun = bool(live.sent), 0
        for result in results:
            key = self._sent.pop(result.request_id, None)
            if key is None:
                continue
            live.sent.discard(result.request_id)
            if result.failure is not None and result.failure.kind == RETURNED and not self._is_streamed(key):
                live.recalled_at = -math.inf
                self._board.returned(replica, key)
                continue
            num_begun += 1
            self._fruitless_losses = 0
            if result.failure is None:
                attempt = self._board.finished(replica, key)
                if attempt is not None:
                    self._settle(key, Outcome(result, attempt))
            else:
                kind = result.failure.kind
                final = kind == RequestRefused.kind or self._is_streamed(key)
                lost = self._board.request_failed(replica, key, kind, final=final)
                if lost is not None:
                    self._settle(key, Outcome(result, lost.attempts))
        now = time.monotonic()
        if had_work:
            live.speed.add(num_begun, now - live.met_at)
        live.met_at = now
        self._send_all()
        self._balance(now)

    def _balance(self, now: float) -> None:
        """When nothing waits any more, let the fast take over what the slow haven't begun."""
        if self._board.num_waiting or now - self._balanced_at < RECALL_INTERVAL_S or len(self._members) < 2:
            return
        self._balanced_at = now
        loads = {name: live.load(now) for name, live in self._members.items() if self._board.takes_work(name)}
        recall = choose_recall(loads, at_once=self._begins_at_once)
        if recall is not None:
            live = self._members[recall.replica]
            live.recalled_at = now
            live.member.handle.recall.remote(self._consumer, recall.count)

    def _settle(self, key: Key, outcome: Outcome) -> None:
        for twin in self._twins.settled(key, outcome, size=_size(outcome)):
            self._settle(twin, replace(outcome, copied=True))
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


async def _abort(member: Member, request_ids: list[str]) -> None:
    member.handle.abort.remote(request_ids)


async def _result(call: Any) -> Any:
    return await call


def _size(outcome: Outcome) -> int:
    """Bytes that a good outcome takes in memory, about; 0 for a failure, which another row need not share."""
    if outcome.result.failure is not None:
        return 0
    return 850 + sum(
        2 * len(sample.text)
        + 32 * len(sample.choice_logs or ())
        + len(sample.expert_ids or b"")
        + (len(sample.routing.counters) if sample.routing else 0)
        + 100 * len(sample.token_logs or ())
        for sample in outcome.result.samples
    )


def _failed(kind: str, message: str) -> RowResult:
    return RowResult("", failure=Failure("", kind, message))
