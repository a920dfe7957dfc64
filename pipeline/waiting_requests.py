"""Requests that a replica's engine hasn't got yet: by priority, then in order of arrival. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Collection

from pipeline.consumers import consumer_of
from pipeline.engine import Request


class WaitingRequests:
    """A queue from whose end requests can be called back."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Request]] = []
        self._num_arrived = 0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, request: Request) -> None:
        """Queue one behind those of its priority."""
        heapq.heappush(self._heap, (request.priority, self._num_arrived, request))
        self._num_arrived += 1

    def pop(self) -> Request:
        """Remove and return the next one; there must be one."""
        return heapq.heappop(self._heap)[2]

    @property
    def first(self) -> Request:
        """The one that `pop` would give; there must be one."""
        return self._heap[0][2]

    def samples_up_to(self, priority: int) -> int:
        """Samples of the requests of this priority number or a lower one."""
        if not self._heap or self.first.priority > priority:
            return 0
        return sum(request.sampling.n for number, _, request in self._heap if number <= priority)

    def remove(self, request_ids: Collection[str]) -> None:
        """Drop these; unknown ids are ignored."""
        if any(entry[2].request_id in request_ids for entry in self._heap):
            self._heap = [entry for entry in self._heap if entry[2].request_id not in request_ids]
            heapq.heapify(self._heap)

    def take_back(self, consumer: str | None, count: int) -> list[Request]:
        """Remove up to `count` of the consumer's (None: anybody's), those that would have come last."""
        mine = [entry for entry in self._heap if consumer is None or consumer_of(entry[2].request_id) == consumer]
        taken = heapq.nlargest(count, mine)
        gone = {entry[1] for entry in taken}
        self._heap = [entry for entry in self._heap if entry[1] not in gone]
        heapq.heapify(self._heap)
        return [entry[2] for entry in taken]
