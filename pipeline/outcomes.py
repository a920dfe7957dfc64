"""The shards that are being generated: what is asked for, what is known, and who is told when the last row is.

Knows rows as (shard token, position), and nothing of replicas. Invariant: a row has one outcome, the first; a shard is
done when each of its rows has one, when it was dropped, or when the run has failed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from pipeline.engine import Piece, Request
from pipeline.errors import InfrastructureError
from pipeline.replica_answers import RowResult
from pipeline.twins import Twins

logger = logging.getLogger(__name__)

Key = tuple[int, int]
"""A row: its shard's token, and its position there."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What finally became of one row."""

    result: RowResult
    attempts: int
    copied: bool = False
    """Taken over from a row with the same request."""


@dataclass(slots=True)
class OpenShard:
    """One shard from its arrival to its last outcome."""

    token: int
    requests: Sequence[Request | None]
    outcomes: list[Outcome | None]
    missing: int
    """Rows without an outcome."""
    num_leading: int
    """Rows that wait for no twin."""
    on_piece: Callable[[int, Piece], None] | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)
    begun: bool = False
    """Whether a replica has seen a row of it."""
    dropped: bool = False
    streamed: set[int] = field(default_factory=set)
    """Positions of which somebody has seen a piece: what has been read can't be taken back for another attempt."""

    @property
    def keys(self) -> list[Key]:
        """All of its rows."""
        return [(self.token, position) for position in range(len(self.requests))]


class OpenShards:
    """All shards of a run that are open, and the rows that wait for an equal one's outcome."""

    def __init__(self, on_outcome: Callable[[Request, Outcome], None]) -> None:
        self.failure: InfrastructureError | None = None
        """Why the run has failed."""
        self._on_outcome = on_outcome
        self._shards: dict[int, OpenShard] = {}
        self._twins: Twins[Key, Outcome] = Twins()
        self._next_token = 0

    @property
    def num_leading_rows(self) -> int:
        """Rows of open shards that an engine has to do, or did; twins are not counted."""
        return sum(shard.num_leading for shard in self._shards.values())

    def open(
        self, requests: Sequence[Request | None], on_piece: Callable[[int, Piece], None] | None = None
    ) -> OpenShard:
        """Begin a shard; see `leading_rows` for what is to be done."""
        token, self._next_token = self._next_token, self._next_token + 1
        missing = sum(request is not None for request in requests)
        shard = OpenShard(token, requests, [None] * len(requests), missing, missing, on_piece)
        self._shards[token] = shard
        return shard

    def leading_rows(self, shard: OpenShard, digests: Sequence[bytes | None] | None) -> list[Key]:
        """The shard's rows that an engine has to do: no other row's outcome is theirs too."""
        keys = [key for key in shard.keys if shard.requests[key[1]] is not None]
        if digests is not None:
            keys = [key for key in keys if not self._has_twin(key, digests[key[1]])]
            shard.num_leading = len(keys)
        return keys

    def close(self, shard: OpenShard) -> None:
        """Nobody waits for it any more."""
        del self._shards[shard.token]

    def request(self, key: Key) -> Request | None:
        """What is asked for; None when its shard has gone."""
        shard = self._shards.get(key[0])
        return shard.requests[key[1]] if shard else None

    def note_begun(self, key: Key) -> None:
        """A replica is about to see this row."""
        self._shards[key[0]].begun = True

    def unbegun(self) -> list[OpenShard]:
        """Shards that no replica has seen a row of."""
        return [shard for shard in self._shards.values() if not shard.begun]

    def unfinished(self) -> list[OpenShard]:
        """Shards with rows that have no outcome."""
        return [shard for shard in self._shards.values() if shard.missing]

    def drop(self, shards: Iterable[OpenShard]) -> None:
        """End shards without their outcomes."""
        for shard in shards:
            shard.dropped = True
            shard.done.set()

    def fail(self, message: str) -> None:
        """End all shards: the run goes no further."""
        logger.error("%s", message)
        self.failure = InfrastructureError(message)
        for shard in self._shards.values():
            shard.done.set()

    def pass_on(self, key: Key, piece: Piece) -> None:
        """Tell whoever follows the row what it has gained."""
        shard = self._shards.get(key[0])
        if shard is not None and shard.on_piece is not None:
            shard.streamed.add(key[1])
            shard.on_piece(key[1], piece)

    def is_streamed(self, key: Key) -> bool:
        """Whether somebody has seen a piece of the row."""
        shard = self._shards.get(key[0])
        return shard is not None and key[1] in shard.streamed

    def settle(self, key: Key, outcome: Outcome) -> None:
        """A row has its outcome, and so have those that waited for it."""
        for twin in self._twins.settled(key, outcome, size=_size(outcome)):
            self.settle(twin, replace(outcome, copied=True))
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

    def forget(self, keys: Sequence[Key]) -> list[Key]:
        """These rows won't have an outcome; returns those that waited for theirs, of which an engine has to do now."""
        return self._twins.drop(keys)

    def _has_twin(self, key: Key, digest: bytes | None) -> bool:
        """Whether another row's outcome is this one's too: taken over at once if it is known, else waited for."""
        if digest is None:
            return False
        outcome = self._twins.known(digest)
        if outcome is None:
            return self._twins.follows(key, digest)
        self.settle(key, replace(outcome, copied=True))
        return True


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
