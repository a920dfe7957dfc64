"""Requests of people through the pipeline's dispatcher: who is let in, in one piece or as a stream, until when.

Knows nothing of HTTP. Invariant: whoever stops waiting, for whatever reason, leaves nothing running on any replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any

from cluster.serve_errors import ApiError, of_failure, overloaded, timed_out
from cluster.serve_limits import has_room
from cluster.serve_prompts import Asked
from cluster.serve_settings import ServeSettings
from pipeline.dispatcher import Dispatcher
from pipeline.engine import Piece
from pipeline.errors import InfrastructureError
from pipeline.outcomes import Outcome
from pipeline.replica_answers import RowResult

MAX_ATTEMPTS = 3
HANG_TIMEOUT_S = 60.0
"""A replica with work and no progress for so long is given up; runs give it 300 s, but here somebody waits."""
TELL_INTERVAL_S = 3.0
CONSUMER = "endpoint"


@dataclass(frozen=True, slots=True)
class Told:
    """What a sample of the prompt at `position` has gained."""

    position: int
    piece: Piece


class Generation:
    """All requests of one endpoint that are being answered.

    Guarantees:
    - a request beyond the limits is refused before anything of it is sent to a replica.
    - a caller that is cancelled, or a stream that is closed, takes its requests back from the replicas.
    """

    def __init__(self, fleet: Any, settings: ServeSettings) -> None:
        self._fleet = fleet
        self._settings = settings
        self._dispatcher = Dispatcher(
            fleet,
            max_attempts=MAX_ATTEMPTS,
            hang_timeout_s=HANG_TIMEOUT_S,
            on_outcome=lambda *_: None,
            begins_at_once=True,
        )
        self._num_unfinished = 0
        self._most_seqs = 0
        """Sequences of all replicas when there were most."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._failure: str | None = None
        self._teller = asyncio.get_running_loop().create_task(self._tell())

    @property
    def draining(self) -> bool:
        """Whether nobody is let in any more."""
        return self._draining

    @property
    def failure(self) -> str | None:
        """Why there will be no more answers; None while all is well."""
        return self._failure

    @property
    def num_unfinished(self) -> int:
        """Samples that have been let in and aren't done."""
        return self._num_unfinished

    @property
    def num_replicas(self) -> int:
        """Replicas that take work."""
        return self._dispatcher.num_replicas

    def replica_loads(self) -> dict[str, tuple[int, int]]:
        """Requests that each replica runs, and that wait there, runs' included."""
        return self._dispatcher.replica_loads()

    async def whole(self, asked: Asked) -> list[RowResult]:
        """All results, in the order of the prompts.

        Raises:
            ApiError: there is no room, it took too long, or an engine failed it.
        """
        with self._let_in(asked):
            try:
                async with asyncio.timeout(self._settings.request_timeout_s):
                    return self._results(await self._generate(asked, None))
            except TimeoutError:
                raise timed_out() from None

    async def stream(self, asked: Asked) -> AsyncGenerator[Told | list[RowResult]]:
        """What samples gain as they gain it, then all results.

        Raises:
            ApiError: as `whole`, at any time.
        """
        told: asyncio.Queue[Told | None] = asyncio.Queue()
        ends_at = time.monotonic() + self._settings.request_timeout_s
        with self._let_in(asked):
            work = asyncio.ensure_future(self._generate(asked, told))
            work.add_done_callback(lambda _: told.put_nowait(None))
            try:
                while (event := await _next(told, ends_at)) is not None:
                    yield event
                yield self._results(work.result())
            except TimeoutError:
                raise timed_out() from None
            finally:
                work.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await work

    async def drain(self) -> bool:
        """Let nobody in any more and wait for the rest, as long as the settings say; returns whether all is done."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_timeout_s):
                await self._idle.wait()
        return self._num_unfinished == 0

    async def _generate(self, asked: Asked, told: asyncio.Queue[Told | None] | None) -> list[Outcome | None] | None:
        def pass_on(position: int, piece: Piece) -> None:
            if told is not None:
                told.put_nowait(Told(position, piece))

        try:
            return await self._dispatcher.generate(asked.requests, on_piece=pass_on)
        except InfrastructureError as error:
            self._failure = error.message
            raise overloaded("the model is not available; try again later", retry_after_s=10) from error

    @staticmethod
    def _results(outcomes: list[Outcome | None] | None) -> list[RowResult]:
        results = [outcome.result for outcome in outcomes or () if outcome is not None]
        for result in results:
            if result.failure is not None:
                raise of_failure(result.failure)
        return results

    @contextlib.contextmanager
    def _let_in(self, asked: Asked) -> Iterator[None]:
        if self._draining:
            raise overloaded("the endpoint is about to end; try another", retry_after_s=10)
        self._most_seqs = max(self._most_seqs, self._dispatcher.num_seqs)
        most = self._most_seqs + self._settings.max_waiting
        if asked.num_samples > most and self._most_seqs:
            raise ApiError(400, f"at most {most} samples can be asked for at once", code="too_many_samples")
        room = has_room(
            asked.num_samples,
            num_unfinished=self._num_unfinished,
            num_seqs=self._dispatcher.num_seqs,
            max_waiting=self._settings.max_waiting,
        )
        if not room:
            raise overloaded(f"{self._num_unfinished} samples are being generated or wait; try again")
        self._num_unfinished += asked.num_samples
        self._idle.clear()
        try:
            yield
        finally:
            self._num_unfinished -= asked.num_samples
            if not self._num_unfinished:
                self._idle.set()

    async def _tell(self) -> None:
        """Keep the fleet told of our work, so that one that follows the work has a replica for us."""
        with contextlib.suppress(InfrastructureError):
            await self._dispatcher.generate([])  # it begins to learn who is there
        while True:
            with contextlib.suppress(Exception):  # a fleet that is gone is noticed by the dispatcher
                await self._fleet.want.remote(CONSUMER, max(1, self._num_unfinished))
            await asyncio.sleep(TELL_INTERVAL_S)


async def _next(told: asyncio.Queue[Told | None], ends_at: float) -> Told | None:
    """What comes next, by then; not with `wait_for`, which in Python 3.11 can swallow the hang-up of a client."""
    async with asyncio.timeout(ends_at - time.monotonic()):
        return await told.get()
