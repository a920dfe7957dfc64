"""The Ray actor that owns one engine and its GPUs: rows in, reduced results out.

The engine lives on one thread, which alone touches it; calls and results cross over in queues. It is given what it
runs and a little more; the rest waits here, where it can be called back for a replica that has nothing left to do.
Routing is reduced to statistics here, so per-token arrays never travel. An engine that dies takes the actor along:
engines are replaced, never repaired. Knows nothing of shards, attempts or other replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import math
import os
import queue
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.engine import (
    ONLINE_PRIORITY,
    UNKNOWN_TIMING,
    Completion,
    Engine,
    EngineInfo,
    Failure,
    MoeShape,
    Piece,
    Request,
    Sample,
    Timing,
    TokenLog,
)
from pipeline.errors import AttemptError, ReplicaDied, RequestError, RoutingInvalid
from pipeline.meeting import Meeting, call_meeting
from pipeline.routing import RowRouting, summarize_row

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.05
"""How long the engine thread sleeps on an empty inbox; a new request wakes it at once."""
GATHER_S = 0.005
"""How long a poll lingers after the first result, so that rows finishing in one step travel together."""
EXPIRY_INTERVAL_S = 0.25
CONSUMER_GONE_S = 60.0
"""A consumer that hasn't polled for so long (they poll every second) is probably dead: nothing more is spent on its
requests. They are returned, in case it wakes up."""
ONLINE_MEMORY_S = 30.0
"""How long after the last request that somebody waits for the next one is expected."""
MAX_MADE_WAY = 2
"""How often a run's request makes way, and loses what it had generated; then it stays."""
ABORTS_REMEMBERED = 10_000
"""Requests that may be aborted before they arrive; Ray swaps calls that are milliseconds apart."""
RETURNED = "returned"
"""Failure kind of a request that comes back to be sent again: it was recalled, or the replica drains."""


class EngineConfig(Protocol):
    """Picklable description of an engine, built where the replica runs."""

    def build(self) -> Engine:
        """Load the model; runs once, on the engine's thread."""
        ...

    def lead(self, meeting: Meeting) -> Engine:
        """As `build`, for an engine over several nodes of which this is the first: wait for the others' parts."""
        ...

    def follow(self, meeting: Meeting, node_rank: int) -> None:
        """Load the part of a further node, the first of which is 1; return when one of its processes has ended."""
        ...


@dataclass(frozen=True)  # no slots here and in RowResult: they travel, see `engine`
class ReducedSample:
    """One sample as it travels: text and statistics, no per-token arrays unless asked for."""

    index: int
    text: str
    num_generated_tokens: int
    finish_reason: str
    stop_reason: str | None
    cumulative_logprob: float | None
    routing: RowRouting | None
    routing_invalid: bool
    expert_ids: bytes | None
    choice_logs: tuple[float, ...] | None = None
    """As in `engine.Sample`."""
    token_logs: tuple[TokenLog, ...] | None = None
    """As in `engine.Sample`."""


@dataclass(frozen=True)
class RowResult:
    """What became of one request: samples, or the failure of this attempt."""

    request_id: str
    samples: tuple[ReducedSample, ...] = ()
    num_cached_tokens: int = 0
    timing: Timing = UNKNOWN_TIMING
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Poll:
    """Answer to one poll: what finished since the last one, and a sign of life."""

    results: tuple[RowResult, ...]
    num_steps: int
    """Engine steps so far; a replica with work whose count stands still hangs."""
    in_company: bool = False
    """Whether the engine has requests of other consumers too, any of which may be what kills it."""
    pieces: tuple[Piece, ...] = ()
    """Of streamed requests, in order; they come before `results`."""
    num_running: int = 0
    """Requests that the engine has, everybody's."""
    num_waiting: int = 0
    """Requests that it hasn't got yet, everybody's."""


@dataclass(frozen=True, slots=True)
class _Accepted:
    """What to remember of a request while the engine has it."""

    num_prompt_tokens: int
    num_samples: int
    deadline: float
    timeout_s: float
    keep_expert_ids: bool
    request: Request
    """As it came, for when it has to make way and is begun again."""


@dataclass(frozen=True, slots=True)
class _Cancel:
    """Forget everything of one consumer, and whatever of it still arrives: Ray may swap two calls on their way."""

    consumer: str


@dataclass(frozen=True, slots=True)
class _Recall:
    """Give back up to `count` requests that the engine hasn't got yet."""

    consumer: str
    count: int


@dataclass(frozen=True, slots=True)
class _Abort:
    """Forget these requests, also if they are still to arrive: see `_Cancel`."""

    request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Drain:
    """Give back all that the engine hasn't got yet, and whatever is still submitted."""


_Message = Request | _Cancel | _Recall | _Abort | _Drain


class _Mailbox:
    """What one dispatcher is still to be told."""

    def __init__(self) -> None:
        self.results: list[RowResult] = []
        self.pieces: list[Piece] = []
        self.wake = asyncio.Event()
        self.polled_at = time.monotonic()


class _Waiting:
    """Requests that the engine hasn't got yet: by priority, then in order of arrival."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Request]] = []
        self._num_arrived = 0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, request: Request) -> None:
        heapq.heappush(self._heap, (request.priority, self._num_arrived, request))
        self._num_arrived += 1

    def pop(self) -> Request:
        return heapq.heappop(self._heap)[2]

    @property
    def next_priority(self) -> int:
        """Of the request that `pop` would give; there must be one."""
        return self._heap[0][0]

    def count_up_to(self, priority: int) -> int:
        """Requests of this priority number or a lower one."""
        if self.next_priority > priority:
            return 0
        return sum(entry[0] <= priority for entry in self._heap)

    def remove(self, request_ids: Collection[str]) -> None:
        """Drop these; unknown ids are ignored."""
        if any(entry[2].request_id in request_ids for entry in self._heap):
            self._heap = [entry for entry in self._heap if entry[2].request_id not in request_ids]
            heapq.heapify(self._heap)

    def take_back(self, consumer: str | None, count: int) -> list[Request]:
        """Remove up to `count` of the consumer's (None: anybody's), those that would have come last."""
        mine = [entry for entry in self._heap if consumer is None or _consumer_of(entry[2].request_id) == consumer]
        taken = heapq.nlargest(count, mine)
        gone = {entry[1] for entry in taken}
        self._heap = [entry for entry in self._heap if entry[1] not in gone]
        heapq.heapify(self._heap)
        return [entry[2] for entry in taken]


class Replica:
    """One engine behind an async actor interface; made an actor by the fleet.

    Guarantees:
    - each submitted request appears in exactly one poll of its consumer, as all of its samples, as a failure, or as
      returned, unless it is cancelled or the replica dies.
    - requests of a lower priority number reach the engine first.
    - a request that somebody waits for doesn't wait for one of a run, unless that has made way twice.
    - while an endpoint shares the replica, the engine has runs' requests for at most seven in eight of its sequences.
    - once the engine has died every call raises ReplicaDied, and the process exits.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._mailboxes: defaultdict[str, _Mailbox] = defaultdict(_Mailbox)
        self._waiting = _Waiting()
        self._cancelled: set[str] = set()
        self._aborted: OrderedDict[str, None] = OrderedDict()
        self._made_way: dict[str, int] = {}
        """How often each unfinished request of a run has made way for one that somebody waits for."""
        self._online_at = -math.inf
        """When a request that somebody waits for came last."""
        self._draining = False
        self._expired_at = 0.0
        self._ready = asyncio.Event()
        self._dead = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._accepted: dict[str, _Accepted] = {}
        """Requests that the engine has, in order of arrival."""
        self._meeting: Meeting | None = None
        """Where the engine's parts on other nodes find it; None when all of it is on this node."""
        self._info: EngineInfo | None = None
        self._num_steps = 0
        self._death: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(config,), name="engine", daemon=True)

    async def call_meeting(self, num_nodes: int) -> Meeting:
        """Before `info`: have the engine span so many nodes, this one first, and say where the others find it."""
        self._meeting = call_meeting(num_nodes)
        return self._meeting

    async def info(self) -> EngineInfo:
        """Start loading if need be, wait until the engine is ready, and describe it.

        Raises:
            Exception: whatever kept the engine from loading, as it was raised.
        """
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._thread.start()
        await self._ready.wait()
        if self._death is not None:
            raise self._death
        assert self._info is not None  # noqa: S101  set before _ready
        return self._info

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
            self._inbox.put(request)

    async def poll(self, consumer: str, wait_s: float) -> Poll:
        """Return what finished for the consumer since its last poll; waits up to `wait_s` for something to finish."""
        self._check_alive()
        mailbox = self._mailboxes[consumer]
        mailbox.polled_at = time.monotonic()
        if not mailbox.results and not mailbox.pieces:
            mailbox.wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(mailbox.wake.wait(), wait_s)
                await asyncio.sleep(GATHER_S)
        self._check_alive()
        results, mailbox.results = mailbox.results, []
        pieces, mailbox.pieces = mailbox.pieces, []
        others = any(_consumer_of(request_id) != consumer for request_id in tuple(self._accepted))
        num_waiting = len(self._waiting) + self._inbox.qsize()
        return Poll(tuple(results), self._num_steps, others, tuple(pieces), len(self._accepted), num_waiting)

    async def cancel(self, consumer: str) -> None:
        """Abort the consumer's unfinished requests and drop what it hasn't been told; its name must not come back."""
        self._inbox.put(_Cancel(consumer))

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Forget these requests: nobody waits for them any more, and nothing will be said of them."""
        self._inbox.put(_Abort(tuple(request_ids)))

    async def recall(self, consumer: str, count: int) -> None:
        """Return up to `count` of the consumer's requests that the engine hasn't begun, the last ones, by `poll`."""
        self._inbox.put(_Recall(consumer, count))

    async def drain(self) -> None:
        """Take no more work: what the engine hasn't begun, and whatever still arrives, comes back by `poll`."""
        self._inbox.put(_Drain())

    async def num_unfinished(self) -> int:
        """Requests here that nobody has been told the end of, those of dead consumers left out.

        A result on its way from the engine's thread is missed for a moment: believe a second 0 in a row.
        """
        now = time.monotonic()
        untold = (m for m in self._mailboxes.values() if now - m.polled_at < CONSUMER_GONE_S)
        return len(self._accepted) + len(self._waiting) + self._inbox.qsize() + sum(len(m.results) for m in untold)

    def _check_alive(self) -> None:
        if self._death is not None:
            raise ReplicaDied(f"the engine died: {type(self._death).__name__}: {str(self._death)[:500]}")

    def _run(self, config: EngineConfig) -> None:
        """Body of the engine's thread."""
        assert self._loop is not None  # noqa: S101  set before the thread starts
        engine: Engine | None = None
        try:
            engine = config.build() if self._meeting is None else config.lead(self._meeting)
            self._info = engine.info
            self._loop.call_soon_threadsafe(self._ready.set)
            while True:
                self._step(engine)
        except Exception as error:
            logger.exception("engine died")
            if engine is not None:
                engine.close()  # its worker processes would hold their GPUs against the replacement
            self._death = error
            self._loop.call_soon_threadsafe(self._announce_death)

    def _announce_death(self) -> None:
        self._ready.set()
        self._dead.set()
        for mailbox in self._mailboxes.values():
            mailbox.wake.set()
        # Long enough for waiting callers to be told why, in words better than "connection reset".
        asyncio.get_running_loop().call_later(2.0, os._exit, 1)

    def _step(self, engine: Engine) -> None:
        finished: list[RowResult] = []
        for message in self._take_messages():
            finished.extend(self._heed(engine, message))
        finished.extend(self._feed(engine))
        pieces: list[Piece] = []
        for output in engine.step():
            if isinstance(output, Piece):
                pieces.append(output)
            else:
                finished.append(self._reduce(output, engine.info.moe))
        now = time.monotonic()
        if now - self._expired_at > EXPIRY_INTERVAL_S:
            self._expired_at = now
            finished.extend(self._expire(engine, now))
            finished.extend(self._give_up_the_silent(engine, now))
        if not self._accepted and not self._waiting:
            self._made_way.clear()  # of those that were cancelled, or came too late
        self._num_steps += 1
        if finished or pieces:
            assert self._loop is not None  # noqa: S101
            self._loop.call_soon_threadsafe(self._deliver, finished, pieces)

    def _take_messages(self) -> list[_Message]:
        messages: list[_Message] = []
        try:
            if not self._accepted and not self._waiting:  # nothing is running: sleep until something arrives
                messages.append(self._inbox.get(timeout=IDLE_WAIT_S))
            while True:
                messages.append(self._inbox.get_nowait())
        except queue.Empty:
            return messages

    def _heed(self, engine: Engine, message: _Message) -> list[RowResult]:
        """Take in one message; returns what it sends straight back."""
        match message:
            case _Cancel():
                self._cancel(engine, message.consumer)
                return []
            case _Recall():
                return [
                    _returned(request.request_id)
                    for request in self._waiting.take_back(message.consumer, message.count)
                ]
            case _Abort():
                self._abort(engine, message.request_ids)
                return []
            case _Drain():
                self._draining = True
                return [_returned(request.request_id) for request in self._waiting.take_back(None, len(self._waiting))]
        if _consumer_of(message.request_id) in self._cancelled or message.request_id in self._aborted:
            return []
        if self._draining:
            return [_returned(message.request_id)]
        self._waiting.push(message)
        if message.priority <= ONLINE_PRIORITY:
            self._online_at = time.monotonic()
        return []

    def _feed(self, engine: Engine) -> list[RowResult]:
        """Hand over what the engine has room for; returns what it refuses."""
        refused = []
        room = engine.info.max_num_seqs + engine.info.lookahead - len(self._accepted)
        num_online = self._waiting.count_up_to(ONLINE_PRIORITY) if self._waiting else 0
        if num_online > max(room, 0):
            self._make_way(engine, num_online - max(room, 0))
            room = engine.info.max_num_seqs + engine.info.lookahead - len(self._accepted)
        kept = kept_free(engine.info, since_online_s=time.monotonic() - self._online_at)
        for left in range(room, 0, -1):
            if not self._waiting or (left <= kept and self._waiting.next_priority > ONLINE_PRIORITY):
                break
            request = self._waiting.pop()
            try:
                engine.add(request)
            except AttemptError as error:
                refused.append(_failure(request.request_id, error.kind, error.message))
                continue
            self._accepted[request.request_id] = _Accepted(
                num_prompt_tokens=len(request.prompt_token_ids),
                num_samples=request.sampling.n,
                deadline=time.monotonic() + request.timeout_s,
                timeout_s=request.timeout_s,
                keep_expert_ids=request.keep_expert_ids,
                request=request,
            )
        return refused

    def _make_way(self, engine: Engine, num_wanted: int) -> None:
        """Take so many of runs' requests off the engine, those begun last; they begin again once there is room."""
        gone: list[Request] = []
        for accepted in reversed(self._accepted.values()):
            request = accepted.request
            if len(gone) == num_wanted:
                break
            if request.priority > ONLINE_PRIORITY and self._made_way.get(request.request_id, 0) < MAX_MADE_WAY:
                gone.append(request)
        engine.abort([request.request_id for request in gone])
        for request in gone:
            del self._accepted[request.request_id]
            self._made_way[request.request_id] = self._made_way.get(request.request_id, 0) + 1
            self._waiting.push(request)

    def _cancel(self, engine: Engine, consumer: str) -> None:
        self._cancelled.add(consumer)
        self._waiting.take_back(consumer, len(self._waiting))
        mine = [request_id for request_id in self._accepted if _consumer_of(request_id) == consumer]
        engine.abort(mine)
        for request_id in mine:
            del self._accepted[request_id]
        assert self._loop is not None  # noqa: S101
        self._loop.call_soon_threadsafe(self._mailboxes.pop, consumer, None)

    def _abort(self, engine: Engine, request_ids: Sequence[str]) -> None:
        self._waiting.remove(set(request_ids))
        mine = [request_id for request_id in request_ids if self._accepted.pop(request_id, None) is not None]
        engine.abort(mine)
        self._aborted.update(dict.fromkeys(request_ids))
        while len(self._aborted) > ABORTS_REMEMBERED:
            self._aborted.popitem(last=False)

    def _expire(self, engine: Engine, now: float) -> list[RowResult]:
        late = {request_id: a.timeout_s for request_id, a in self._accepted.items() if a.deadline <= now}
        if not late:
            return []
        engine.abort(list(late))
        for request_id in late:
            del self._accepted[request_id]
        return [
            _failure(request_id, "request_timeout", f"not finished within limits.request_timeout_s = {timeout_s:g}")
            for request_id, timeout_s in late.items()
        ]

    def _give_up_the_silent(self, engine: Engine, now: float) -> list[RowResult]:
        """Return the requests of consumers that have fallen silent: a killed driver's would run on for hours."""
        mailboxes = dict(self._mailboxes)  # the actor's loop adds to it meanwhile
        silent = {name for name, mailbox in mailboxes.items() if now - mailbox.polled_at > CONSUMER_GONE_S}
        if not silent:
            return []
        begun = [request_id for request_id in self._accepted if _consumer_of(request_id) in silent]
        engine.abort(begun)
        for request_id in begun:
            del self._accepted[request_id]
        waiting = [r.request_id for name in silent for r in self._waiting.take_back(name, len(self._waiting))]
        return [_returned(request_id) for request_id in [*begun, *waiting]]

    def _reduce(self, output: Completion | Failure, moe: MoeShape | None) -> RowResult:
        request = self._accepted.pop(output.request_id)
        self._made_way.pop(output.request_id, None)
        if isinstance(output, Failure):
            return RowResult(output.request_id, failure=output)
        if len(output.samples) != request.num_samples:
            message = f"the engine returned {len(output.samples)} samples instead of {request.num_samples}"
            return _failure(output.request_id, RequestError.kind, message)
        prompt = request.num_prompt_tokens
        samples = tuple(reduce_sample(s, prompt, moe, keep_ids=request.keep_expert_ids) for s in output.samples)
        return RowResult(output.request_id, samples, output.num_cached_tokens, output.timing)

    def _deliver(self, results: list[RowResult], pieces: list[Piece]) -> None:
        for piece in pieces:
            mailbox = self._mailboxes[_consumer_of(piece.request_id)]
            mailbox.pieces.append(piece)
            mailbox.wake.set()
        for result in results:
            mailbox = self._mailboxes[_consumer_of(result.request_id)]
            mailbox.results.append(result)
            mailbox.wake.set()


def kept_free(info: EngineInfo, *, since_online_s: float) -> int:
    """Places that runs' requests leave free for those that somebody waits for, if there were any of late.

    Those ahead of the engine's sequences are among them: a run that fills those has filled all sequences before.
    """
    if since_online_s >= ONLINE_MEMORY_S or info.max_num_seqs == 1:
        return 0
    return max(1, info.max_num_seqs // 8) + info.lookahead


def _consumer_of(request_id: str) -> str:
    return request_id.partition("/")[0]


def _returned(request_id: str) -> RowResult:
    return _failure(request_id, RETURNED, "not finished, and not at fault")


def _failure(request_id: str, kind: str, message: str) -> RowResult:
    return RowResult(request_id, failure=Failure(request_id, kind, message))


def reduce_sample(sample: Sample, num_prompt: int, moe: MoeShape | None, *, keep_ids: bool) -> ReducedSample:
    """Turn per-token expert ids into statistics; ids that break the rules null the routing and are flagged."""
    routing: RowRouting | None = None
    invalid = False
    ids: bytes | None = None
    if moe is not None:
        try:
            if sample.routed_experts is None:
                raise RoutingInvalid("the engine returned no routing")
            routing = summarize_row(sample.routed_experts, num_prompt, len(sample.token_ids), moe)
            if keep_ids:
                ids = sample.routed_experts.astype("uint8").tobytes()
        except RoutingInvalid:
            invalid = True
    return ReducedSample(
        index=sample.index,
        text=sample.text,
        num_generated_tokens=len(sample.token_ids),
        finish_reason=sample.finish_reason,
        stop_reason=sample.stop_reason,
        cumulative_logprob=sample.cumulative_logprob,
        routing=routing,
        routing_invalid=invalid,
        expert_ids=ids,
        choice_logs=sample.choice_logs,
        token_logs=sample.token_logs,
    )


def replica_actor(*, env: dict[str, str], **options: Any) -> Any:
    """Return the Ray actor class of `Replica` with this environment and these Ray options.

    No restarts: an engine that died is replaced by the fleet, which knows whether that makes sense.
    """
    import ray

    runtime_env = {"env_vars": env} if env else None
    return ray.remote(Replica).options(max_restarts=0, max_concurrency=100, runtime_env=runtime_env, **options)
