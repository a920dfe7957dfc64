"""The thread that owns a replica's engine and alone touches it: takes messages, steps, hands results over.

Results cross to the actor's event loop, as messages cross from there. An engine that dies ends the thread, and is told:
engines are replaced, never repaired.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from pipeline.consumers import Mailboxes
from pipeline.engine import Engine, EngineInfo
from pipeline.meeting import Meeting
from pipeline.open_requests import OpenRequests
from pipeline.replica_answers import RowResult
from pipeline.replica_inbox import Cancel, Inbox

logger = logging.getLogger(__name__)

EXPIRY_INTERVAL_S = 0.25


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


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Loading is mostly imports, which make a million objects to keep: looking through them for garbage, again and
    again, was 1.5 of 17 s.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class EngineThread:
    """Loads the engine, and steps it until the process ends or the engine dies."""

    def __init__(self, config: EngineConfig, mailboxes: Mailboxes, *, tell: Callable[[], None]) -> None:
        """`tell` is called on the event loop once `info` is known, and again, or for the first time, at `death`."""
        self.inbox = Inbox()
        self.requests = OpenRequests()
        self.info: EngineInfo | None = None
        self.death: Exception | None = None
        """What ended it."""
        self.meeting: Meeting | None = None
        """Where the engine's parts on other nodes find it, set before `start`; None when all of it is on this node."""
        self.num_steps = 0
        self._mailboxes = mailboxes
        self._tell = tell
        self._loop: asyncio.AbstractEventLoop | None = None
        self._looked_at = 0.0
        """When somebody late or silent was last looked for."""
        self._thread = threading.Thread(target=self._run, args=(config,), name="engine", daemon=True)

    def start(self) -> None:
        """Begin, if it hasn't yet; on the event loop that gets its results."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._thread.start()

    def _run(self, config: EngineConfig) -> None:
        assert self._loop is not None  # noqa: S101  set before the thread starts
        engine: Engine | None = None
        try:
            with _without_collection():
                engine = config.build() if self.meeting is None else config.lead(self.meeting)
            self.info = engine.info
            self._on_loop(self._tell)
            while not self._loop.is_closed():  # then nobody is left to be told anything
                self._step(engine)
        except Exception as error:
            logger.exception("engine died")
            if engine is not None:
                engine.close()  # its worker processes would hold their GPUs against the replacement
            self.death = error
            self._on_loop(self._tell)

    def _step(self, engine: Engine) -> None:
        finished: list[RowResult] = []
        is_idle = not self.requests.num_begun and not self.requests.num_waiting
        for message in self.inbox.take(wait=is_idle):
            finished.extend(self.requests.heed(engine, message))
            if isinstance(message, Cancel):
                self._on_loop(self._mailboxes.drop, message.consumer)
        finished.extend(self.requests.feed(engine))
        done, pieces = self.requests.step(engine)
        finished.extend(done)
        now = time.monotonic()
        if now - self._looked_at > EXPIRY_INTERVAL_S:
            self._looked_at = now
            finished.extend(self.requests.expire(engine, now))
            self._give_up_the_silent(engine, now)
        self.num_steps += 1
        if finished or pieces:
            self._on_loop(self._mailboxes.deliver, finished, pieces)

    def _give_up_the_silent(self, engine: Engine, now: float) -> None:
        silent = self._mailboxes.silent(now)
        self.requests.give_up(engine, silent)
        for consumer in silent:
            # Also when it polls at this very moment: its requests are gone, which the next poll has to say.
            self._on_loop(self._mailboxes.drop, consumer)

    def _on_loop(self, do: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None  # noqa: S101  set before the thread starts
        self._loop.call_soon_threadsafe(do, *arguments)
