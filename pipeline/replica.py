"""The Ray actor that owns one engine and its GPUs: rows in, reduced results out.

The engine lives on one thread, which alone touches it; calls and results cross over in queues. Routing is reduced to
statistics here, so per-token arrays never travel. An engine that dies takes the actor along: engines are replaced,
never repaired. Knows nothing of shards, attempts or other replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.engine import UNKNOWN_TIMING, Completion, Engine, EngineInfo, Failure, MoeShape, Request, Sample, Timing
from pipeline.errors import AttemptError, ReplicaDied, RequestError, RoutingInvalid
from pipeline.routing import RowRouting, summarize_row

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.05
"""How long the engine thread sleeps on an empty inbox; a new request wakes it at once."""
GATHER_S = 0.005
"""How long a poll lingers after the first result, so that rows finishing in one step travel together."""


class EngineConfig(Protocol):
    """Picklable description of an engine, built where the replica runs."""

    def build(self) -> Engine:
        """Load the model; runs once, on the engine's thread."""
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


@dataclass(frozen=True, slots=True)
class _Accepted:
    """What to remember of a request while the engine has it."""

    num_prompt_tokens: int
    num_samples: int
    deadline: float


@dataclass(frozen=True, slots=True)
class _Cancel:
    """Forget everything of one consumer."""

    consumer: str


class _Mailbox:
    """What one dispatcher is still to be told."""

    def __init__(self) -> None:
        self.results: list[RowResult] = []
        self.wake = asyncio.Event()


class Replica:
    """One engine behind an async actor interface; made an actor by the fleet.

    Guarantees:
    - each submitted request appears in exactly one poll of its consumer, as all of its samples or as a failure, unless
      it is cancelled or the replica dies.
    - once the engine has died every call raises ReplicaDied, and the process exits.
    """

    def __init__(self, config: EngineConfig, *, keep_expert_ids: bool, request_timeout_s: float) -> None:
        self._keep_expert_ids = keep_expert_ids
        self._request_timeout_s = request_timeout_s
        self._inbox: queue.SimpleQueue[Request | _Cancel] = queue.SimpleQueue()
        self._mailboxes: defaultdict[str, _Mailbox] = defaultdict(_Mailbox)
        self._ready = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._accepted: dict[str, _Accepted] = {}
        """Requests that the engine has, in order of arrival."""
        self._info: EngineInfo | None = None
        self._num_steps = 0
        self._death: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(config,), name="engine", daemon=True)

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
        if not mailbox.results:
            mailbox.wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(mailbox.wake.wait(), wait_s)
                await asyncio.sleep(GATHER_S)
        self._check_alive()
        results, mailbox.results = mailbox.results, []
        return Poll(tuple(results), self._num_steps)

    async def cancel(self, consumer: str) -> None:
        """Abort the consumer's unfinished requests and drop what it hasn't been told; it won't poll again."""
        self._inbox.put(_Cancel(consumer))

    def _check_alive(self) -> None:
        if self._death is not None:
            raise ReplicaDied(f"the engine died: {type(self._death).__name__}: {str(self._death)[:500]}")

    def _run(self, config: EngineConfig) -> None:
        """Body of the engine's thread."""
        assert self._loop is not None  # noqa: S101  set before the thread starts
        engine: Engine | None = None
        try:
            engine = config.build()
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
        for mailbox in self._mailboxes.values():
            mailbox.wake.set()
        # Long enough for waiting callers to be told why, in words better than "connection reset".
        asyncio.get_running_loop().call_later(2.0, os._exit, 1)

    def _step(self, engine: Engine) -> None:
        finished: list[RowResult] = []
        for message in self._take_messages():
            if isinstance(message, _Cancel):
                self._cancel(engine, message.consumer)
            elif (refusal := self._add(engine, message)) is not None:
                finished.append(refusal)
        finished.extend(self._reduce(output, engine.info.moe) for output in engine.step())
        finished.extend(self._expire(engine))
        self._num_steps += 1
        if finished:
            assert self._loop is not None  # noqa: S101
            self._loop.call_soon_threadsafe(self._deliver, finished)

    def _take_messages(self) -> list[Request | _Cancel]:
        messages: list[Request | _Cancel] = []
        try:
            if not self._accepted:  # nothing is running: sleep until something arrives
                messages.append(self._inbox.get(timeout=IDLE_WAIT_S))
            while True:
                messages.append(self._inbox.get_nowait())
        except queue.Empty:
            return messages

    def _add(self, engine: Engine, request: Request) -> RowResult | None:
        try:
            engine.add(request)
        except AttemptError as error:
            return _failure(request.request_id, error.kind, error.message)
        deadline = time.monotonic() + self._request_timeout_s
        self._accepted[request.request_id] = _Accepted(len(request.prompt_token_ids), request.sampling.n, deadline)
        return None

    def _cancel(self, engine: Engine, consumer: str) -> None:
        mine = [request_id for request_id in self._accepted if request_id.startswith(f"{consumer}/")]
        engine.abort(mine)
        for request_id in mine:
            del self._accepted[request_id]
        assert self._loop is not None  # noqa: S101
        self._loop.call_soon_threadsafe(self._mailboxes.pop, consumer, None)

    def _expire(self, engine: Engine) -> list[RowResult]:
        now = time.monotonic()
        late = list(itertools.takewhile(lambda request_id: self._accepted[request_id].deadline <= now, self._accepted))
        if not late:
            return []
        engine.abort(late)
        for request_id in late:
            del self._accepted[request_id]
        message = f"not finished within limits.request_timeout_s = {self._request_timeout_s:g}"
        return [_failure(request_id, "request_timeout", message) for request_id in late]

    def _reduce(self, output: Completion | Failure, moe: MoeShape | None) -> RowResult:
        request = self._accepted.pop(output.request_id)
        if isinstance(output, Failure):
            return RowResult(output.request_id, failure=output)
        if len(output.samples) != request.num_samples:
            message = f"the engine returned {len(output.samples)} samples instead of {request.num_samples}"
            return _failure(output.request_id, RequestError.kind, message)
        prompt = request.num_prompt_tokens
        samples = tuple(reduce_sample(s, prompt, moe, keep_ids=self._keep_expert_ids) for s in output.samples)
        return RowResult(output.request_id, samples, output.num_cached_tokens, output.timing)

    def _deliver(self, results: list[RowResult]) -> None:
        for result in results:
            mailbox = self._mailboxes[result.request_id.partition("/")[0]]
            mailbox.results.append(result)
            mailbox.wake.set()


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
    )


def replica_actor(*, num_cpus: float, num_gpus: float, env: dict[str, str]) -> Any:
    """Return the Ray actor class of `Replica` with these resources and environment.

    No restarts: an engine that died is replaced by the fleet, which knows whether that makes sense.
    """
    import ray

    options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_restarts": 0, "max_concurrency": 100}
    return ray.remote(Replica).options(**options, runtime_env={"env_vars": env} if env else None)
