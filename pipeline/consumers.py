"""Who uses a replica: the mailbox of each consumer, and who has fallen silent.

Runs, endpoints: whoever submits and polls under a name. Belongs to the actor's event loop; the engine's thread only
asks who is silent. Invariant: a consumer that hasn't polled for `CONSUMER_GONE_S` costs nothing any more, so that a
replica can outlive any number of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.engine import Piece
from pipeline.replica_answers import RowResult

GATHER_S = 0.005
"""How long a poll lingers after the first result, so that rows finishing in one step travel together."""
CONSUMER_GONE_S = 60.0
"""A consumer that hasn't polled for so long (they poll every second) is probably dead: nothing more is spent on its
requests, and it is forgotten. In case it wakes up, its next poll tells it so (`Poll.is_first`)."""


def consumer_of(request_id: str) -> str:
    """Whose request it is: ids are `consumer/...`."""
    return request_id.partition("/")[0]


@dataclass(frozen=True, slots=True)
class Mail:
    """What one poll finds in a mailbox."""

    results: tuple[RowResult, ...]
    pieces: tuple[Piece, ...]
    is_first: bool
    """Whether the consumer wasn't known before."""


@dataclass(slots=True)
class _Mailbox:
    """What one consumer is still to be told."""

    results: list[RowResult] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    polled_at: float = field(default_factory=time.monotonic)
    is_known: bool = False
    """Whether it has been polled; what is told can make a mailbox too, for one that was forgotten."""


class Mailboxes:
    """The mailboxes of a replica's consumers."""

    def __init__(self) -> None:
        self._open: defaultdict[str, _Mailbox] = defaultdict(_Mailbox)

    def __len__(self) -> int:
        return len(self._open)

    async def take(self, consumer: str, wait_s: float) -> Mail:
        """Empty the consumer's mailbox; waits up to `wait_s` for something to be in it."""
        mailbox = self._open[consumer]
        mailbox.polled_at = time.monotonic()
        is_first, mailbox.is_known = not mailbox.is_known, True
        if not mailbox.results and not mailbox.pieces:
            mailbox.wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(mailbox.wake.wait(), wait_s)
                await asyncio.sleep(GATHER_S)
        results, mailbox.results = mailbox.results, []
        pieces, mailbox.pieces = mailbox.pieces, []
        return Mail(tuple(results), tuple(pieces), is_first)

    def deliver(self, results: Iterable[RowResult], pieces: Iterable[Piece]) -> None:
        """Put each into the mailbox of its consumer."""
        for piece in pieces:
            mailbox = self._open[consumer_of(piece.request_id)]
            mailbox.pieces.append(piece)
            mailbox.wake.set()
        for result in results:
            mailbox = self._open[consumer_of(result.request_id)]
            mailbox.results.append(result)
            mailbox.wake.set()

    def drop(self, consumer: str) -> None:
        """Forget a consumer with all that it hasn't been told."""
        self._open.pop(consumer, None)

    def wake_all(self) -> None:
        """End the waiting of every poll."""
        for mailbox in self._open.values():
            mailbox.wake.set()

    def silent(self, now: float) -> set[str]:
        """Consumers that have not polled for long; may be called from another thread."""
        mailboxes = dict(self._open)  # the actor's loop adds to it meanwhile
        return {name for name, mailbox in mailboxes.items() if now - mailbox.polled_at > CONSUMER_GONE_S}

    def num_untold(self, now: float) -> int:
        """Results that consumers haven't fetched, those of dead ones left out."""
        untold = (each for each in self._open.values() if now - each.polled_at < CONSUMER_GONE_S)
        return sum(len(mailbox.results) for mailbox in untold)
