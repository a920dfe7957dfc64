"""A replica's requests between arrival and answer: those that wait, and those that its engine has.

The engine is given what it runs and a little more; the rest waits here, where it can be called back for a replica that
has nothing left to do. Belongs to the engine's thread; other threads may only count. Knows nothing of queues, mailboxes
or Ray.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.consumers import consumer_of
from pipeline.engine import ONLINE_PRIORITY, Completion, Engine, Failure, MoeShape, Piece, Request
from pipeline.errors import AttemptError, RequestError
from pipeline.making_way import is_online, kept_free, may_begin, who_makes_way
from pipeline.replica_answers import RowResult, failed, reduce_sample, returned
from pipeline.replica_inbox import Abort, Cancel, Drain, Message, Recall
from pipeline.waiting_requests import WaitingRequests

WITHDRAWALS_REMEMBERED = 10_000
"""Requests that may be aborted, and consumers that may be cancelled, before what they are about arrives; Ray swaps
calls that are milliseconds apart."""


@dataclass(frozen=True, slots=True)
class _Begun:
    """A request that the engine has."""

    request: Request
    """As it came, for when it has to make way and is begun again."""
    deadline: float


class OpenRequests:
    """Takes requests in, feeds the engine, and answers each request once.

    Guarantees:
    - requests of a lower priority number reach the engine first.
    - a request that somebody waits for doesn't wait for one of a run, unless that has made way often enough.
    """

    def __init__(self) -> None:
        self._waiting = WaitingRequests()
        self._begun: dict[str, _Begun] = {}
        """In order of arrival at the engine."""
        self._made_way: dict[str, int] = {}
        """How often each unfinished request of a run has made way for one that somebody waits for."""
        self._online_at = -math.inf
        """When a request that somebody waits for came last."""
        self._cancelled: OrderedDict[str, None] = OrderedDict()
        self._aborted: OrderedDict[str, None] = OrderedDict()
        self._draining = False

    @property
    def num_begun(self) -> int:
        """Requests that the engine has."""
        return len(self._begun)

    @property
    def num_waiting(self) -> int:
        """Requests that it hasn't got yet."""
        return len(self._waiting)

    def begun_ids(self) -> tuple[str, ...]:
        """Ids of the requests that the engine has."""
        return tuple(self._begun)

    def heed(self, engine: Engine, message: Message) -> list[RowResult]:
        """Take in one message; returns what it sends straight back."""
        match message:
            case Cancel():
                _remember(self._cancelled, [message.consumer])
                self.give_up(engine, {message.consumer})
                return []
            case Recall():
                return _all_returned(self._waiting.take_back(message.consumer, message.count))
            case Abort():
                _remember(self._aborted, message.request_ids)
                self._waiting.remove(set(message.request_ids))
                self._take_off(engine, [each for each in message.request_ids if each in self._begun])
                return []
            case Drain():
                self._draining = True
                return _all_returned(self._waiting.take_back(None, len(self._waiting)))
        return self._take_in(message)

    def _take_in(self, request: Request) -> list[RowResult]:
        if consumer_of(request.request_id) in self._cancelled or request.request_id in self._aborted:
            return []
        if self._draining:
            return [returned(request.request_id)]
        self._waiting.push(request)
        if is_online(request):
            self._online_at = time.monotonic()
        return []

    def feed(self, engine: Engine) -> list[RowResult]:
        """Hand over what the engine has room for; returns what it refuses."""
        refused = []
        num_places = engine.info.max_num_seqs + engine.info.lookahead
        num_short = self._waiting.samples_up_to(ONLINE_PRIORITY) - (num_places - engine.num_sequences)
        if num_short > 0:
            self._make_way(engine, num_short)
        kept = kept_free(engine.info, since_online_s=time.monotonic() - self._online_at)
        while self._waiting:
            free = num_places - engine.num_sequences
            begun = (each.request for each in self._begun.values())
            if not may_begin(self._waiting.first, free=free, kept=kept, begun=begun):
                break
            request = self._waiting.pop()
            try:
                engine.add(request)
            except AttemptError as error:
                refused.append(failed(request.request_id, error.kind, error.message))
            else:
                self._begun[request.request_id] = _Begun(request, time.monotonic() + request.timeout_s)
        return refused

    def step(self, engine: Engine) -> tuple[list[RowResult], list[Piece]]:
        """Advance the engine; returns what finished, and pieces of what is streamed."""
        finished: list[RowResult] = []
        pieces: list[Piece] = []
        for output in engine.step():
            if isinstance(output, Piece):
                pieces.append(output)
            else:
                finished.append(self._reduce(output, engine.info.moe))
        if not self._begun and not self._waiting:
            self._made_way.clear()  # of those that were cancelled, or came too late
        return finished, pieces

    def expire(self, engine: Engine, now: float) -> list[RowResult]:
        """Fail what has been with the engine for too long."""
        late = {name: begun.request.timeout_s for name, begun in self._begun.items() if begun.deadline <= now}
        self._take_off(engine, list(late))
        return [
            failed(request_id, "request_timeout", f"not finished within limits.request_timeout_s = {timeout_s:g}")
            for request_id, timeout_s in late.items()
        ]

    def give_up(self, engine: Engine, consumers: Iterable[str]) -> None:
        """Forget all requests of these consumers: a killed driver's would run on for hours."""
        for consumer in consumers:
            self._waiting.take_back(consumer, len(self._waiting))
            self._take_off(engine, [request_id for request_id in self._begun if consumer_of(request_id) == consumer])

    def _make_way(self, engine: Engine, num_wanted: int) -> None:
        """Take runs' requests off the engine, those begun last; they begin again once there is room."""
        last_first = (begun.request for begun in reversed(self._begun.values()))
        gone = who_makes_way(last_first, self._made_way, num_wanted=num_wanted)
        self._take_off(engine, [request.request_id for request in gone])
        for request in gone:
            self._made_way[request.request_id] = self._made_way.get(request.request_id, 0) + 1
            self._waiting.push(request)

    def _take_off(self, engine: Engine, request_ids: Sequence[str]) -> None:
        if not request_ids:
            return
        engine.abort(request_ids)
        for request_id in request_ids:
            del self._begun[request_id]

    def _reduce(self, output: Completion | Failure, moe: MoeShape | None) -> RowResult:
        request = self._begun.pop(output.request_id).request
        self._made_way.pop(output.request_id, None)
        if isinstance(output, Failure):
            return RowResult(output.request_id, failure=output)
        if len(output.samples) != request.sampling.n:
            message = f"the engine returned {len(output.samples)} samples instead of {request.sampling.n}"
            return failed(output.request_id, RequestError.kind, message)
        prompt, keep_ids = len(request.prompt_token_ids), request.keep_expert_ids
        samples = tuple(reduce_sample(each, prompt, moe, keep_ids=keep_ids) for each in output.samples)
        return RowResult(output.request_id, samples, output.num_cached_tokens, output.timing)


def _all_returned(requests: Iterable[Request]) -> list[RowResult]:
    return [returned(request.request_id) for request in requests]


def _remember(names: OrderedDict[str, None], more: Iterable[str]) -> None:
    names.update(dict.fromkeys(more))
    while len(names) > WITHDRAWALS_REMEMBERED:
        names.popitem(last=False)
