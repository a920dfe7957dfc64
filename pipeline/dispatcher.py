"""Shards in, outcomes out: what a run or an endpoint asks of the fleet's replicas.

One dispatcher serves all shards of a run, on one event loop. It decides nothing itself: `dispatch` says what goes
where, `flights` has it done, the fleet says who is alive. It knows rows as (shard token, position) and nothing of
columns or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.engine import Piece, Request
from pipeline.errors import InfrastructureError
from pipeline.flights import Flights
from pipeline.outcomes import OpenShard, OpenShards, Outcome


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
        self._shards = OpenShards(on_outcome)
        self._flights = Flights(
            fleet,
            self._shards,
            max_attempts=max_attempts,
            hang_timeout_s=hang_timeout_s,
            begins_at_once=begins_at_once,
        )
        self._draining = False

    @property
    def num_in_flight(self) -> int:
        """Rows that are with replicas now."""
        return self._flights.num_in_flight

    @property
    def num_replicas(self) -> int:
        """Replicas that take work now."""
        return self._flights.num_replicas

    @property
    def num_seqs(self) -> int:
        """Sequences that their engines run at once."""
        return self._flights.num_seqs

    def replica_loads(self) -> dict[str, tuple[int, int]]:
        """Requests that each replica was last seen running, and with waiting, everybody's."""
        return self._flights.replica_loads()

    @property
    def num_open_rows(self) -> int:
        """Rows of unfinished shards that an engine has to do, or did; twins are not counted."""
        return self._shards.num_leading_rows

    @property
    def has_failed(self) -> bool:
        """Whether the fleet has given up: every `generate` raises."""
        return self._shards.failure is not None

    @property
    def num_unfinished(self) -> int:
        """Rows without an outcome that an engine has to do."""
        return self._flights.num_unfinished

    @property
    def wants_more(self) -> bool:
        """Whether with more rows open more of those that begin alike would meet."""
        return self._flights.wants_more

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
        self._flights.start()
        self._raise_failure()
        if self._draining:
            return None
        if all(request is None for request in requests):
            return [None] * len(requests)
        shard = self._shards.open(requests, on_piece)
        self._flights.add(self._shards.leading_rows(shard, digests))
        try:
            await shard.done.wait()
        finally:
            self._shards.close(shard)
            if shard.missing and not shard.done.is_set():
                self._flights.withdraw(shard)
        self._raise_failure()
        return None if shard.dropped else shard.outcomes

    def drain(self) -> None:
        """Begin no further shards: those that no replica has seen a row of are dropped, the others finish in order."""
        self._draining = True
        self._drop(self._shards.unbegun())
        self._flights.go_in_order()

    def abandon(self) -> None:
        """Drop every shard that isn't finished."""
        self._draining = True
        self._drop(self._shards.unfinished())
        self._flights.cancel_all()

    def _drop(self, shards: Sequence[OpenShard]) -> None:
        self._flights.forget([key for shard in shards for key in shard.keys])
        self._shards.drop(shards)

    def _raise_failure(self) -> None:
        if self._shards.failure is not None:
            raise InfrastructureError(self._shards.failure.message)
