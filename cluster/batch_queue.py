"""Which batch is worked at when: files are checked as they come, runs wait for each other in order.

Each step of a batch is a process, which the layer above knows how to start. Invariant: but for processes and their
failures nothing is known here that isn't in the batches' folders; after a restart all that was open is taken up again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from openai.types import BatchError, BatchRequestCounts

from cluster.batch_records import LOG, BatchFacts, BatchFolder, BatchRecords, End, Ended
from cluster.batch_states import NO_COUNTS, Step, is_over, is_to_end, next_step
from pipeline.settings import ModelSettings

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S = 1.0
MAX_FAILURES = 10
"""In a row, of one batch's processes; they are some six minutes apart together."""
LONGEST_WAIT_S = 60.0
KILL_AFTER_S = 60.0
"""After what a run may take to finish what it has begun: it still has to write its results."""
CANNOT_RUN = BatchError(
    code="server_error", message="this endpoint could not run the batch; whoever operates it finds out why in its log"
)


@dataclass(frozen=True, slots=True)
class Served:
    """What answers the requests."""

    fleet: str
    """Name of the warm fleet."""
    address: str
    """Of its Ray cluster."""
    model_name: str
    """What requests and answers call the model."""
    model: ModelSettings
    captures_routing: bool
    marker_text: str
    request_timeout_s: float
    drain_timeout_s: float


class Process(Protocol):
    """As `subprocess.Popen`."""

    def poll(self) -> int | None:
        """Exit code; None while it runs."""

    def terminate(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """End it."""


class BatchRunner(Protocol):
    """Starts processes that do a batch's steps; the layer above has one. Picklable."""

    def start(self, step: Step, folder: Path, served: Served) -> Process:
        """Start a process that does this step of the batch in the folder, and notes there how it ended."""

    def counts(self, folder: Path) -> BatchRequestCounts | None:
        """What its run has done so far, from its files; None when it has none."""


@dataclass(slots=True)
class _Going:
    process: Process
    step: Step
    writes_results: bool
    """Whether that is all that it was started for: then an order to end would keep the batch from its end."""
    told_at: float | None = None
    """When it was asked to end."""


@dataclass(slots=True)
class _Failures:
    count: int = 0
    not_before: float = 0.0


@dataclass(slots=True)
class BatchQueue:
    """All open batches of one endpoint.

    Guarantees:
    - of sound batches those that were created first are run first, at most `at_once` at a time.
    - a batch that fails again and again lets others pass meanwhile, and is failed in the end.
    """

    records: BatchRecords
    runner: BatchRunner
    served: Served
    at_once: int
    now: Callable[[], float] = time.time
    _open: dict[Path, BatchFolder] = field(default_factory=dict)
    """In the order of their creation."""
    _going: dict[Path, _Going] = field(default_factory=dict)
    _failures: dict[Path, _Failures] = field(default_factory=dict)
    _woken: asyncio.Event = field(default_factory=asyncio.Event)
    _closed: bool = False
    # One thread that lives as long as the endpoint: processes are told when the thread that started them ends.
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="batches"))

    def __post_init__(self) -> None:
        for folder in self.records.everybodys():
            if not is_over(folder.facts()):
                self._open[folder.path] = folder

    def add(self, folder: BatchFolder) -> None:
        """Take a new batch."""
        self._open[folder.path] = folder

    def num_open(self, owner: str) -> int:
        """Batches of this owner that aren't over."""
        return sum(folder.owner == owner for folder in list(self._open.values()))

    def wake(self) -> None:
        """Look at once; from the event loop's thread."""
        self._woken.set()

    async def work(self) -> None:
        """Do all there is to do, for ever."""
        while True:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._look_safely)
            self._woken.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_INTERVAL_S):
                    await self._woken.wait()

    async def close(self) -> None:
        """Start nothing more, and have what runs finish what it has begun; the next endpoint goes on with it."""
        self._closed = True
        deadline = self.now() + self.served.drain_timeout_s + KILL_AFTER_S
        while self._going and self.now() < deadline:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._look_safely)
            await asyncio.sleep(0.1)
        for going in self._going.values():
            going.process.kill()

    def look(self) -> None:
        """See what has ended, what must end, and what can begin."""
        for path, going in list(self._going.items()):
            self._watch(path, going)
        for path, folder in list(self._open.items()):
            if self._closed:
                return
            if path not in self._going and self._failures.get(path, _Failures()).not_before <= self.now():
                self._advance(folder)

    def _look_safely(self) -> None:
        try:
            self.look()
        except OSError as error:  # a full disk, say; the next look may find it mended
            logger.warning("batches: %s", error)

    def _advance(self, folder: BatchFolder) -> None:
        facts = folder.facts()
        step = next_step(facts, self.now())
        if step is None:
            del self._open[folder.path]
        elif step == "end":
            counts = NO_COUNTS.model_copy(update={"total": facts.checked.num_requests if facts.checked else 0})
            status: End = "cancelled" if facts.cancel is not None else "expired"
            folder.note_ended(Ended(at=int(self.now()), status=status, counts=counts))
        elif sum(going.step == step for going in self._going.values()) < (self.at_once if step == "run" else 1):
            process = self.runner.start(step, folder.path, self.served)
            self._going[folder.path] = _Going(process, step, writes_results=is_to_end(facts, self.now()))

    def _watch(self, path: Path, going: _Going) -> None:
        exit_code = going.process.poll()
        facts = self._open[path].facts()
        if exit_code is not None:
            del self._going[path]
            self._note_exit(path, facts, exit_code, was_told=going.told_at is not None)
        elif going.told_at is None:
            runs_on = going.step == "run" and facts.finalizing is None and not going.writes_results
            if self._closed or (runs_on and is_to_end(facts, self.now())):
                going.process.terminate()
                going.told_at = self.now()
        elif self.now() - going.told_at > self.served.drain_timeout_s + KILL_AFTER_S:
            going.process.kill()

    def _note_exit(self, path: Path, facts: BatchFacts, exit_code: int, *, was_told: bool) -> None:
        if exit_code == 0 or was_told or is_over(facts):
            self._failures.pop(path, None)
            return
        failures = self._failures.setdefault(path, _Failures())
        failures.count += 1
        failures.not_before = self.now() + min(LONGEST_WAIT_S, 2.0**failures.count)
        logger.warning("a process ended with %d, number %d in a row; see %s", exit_code, failures.count, path / LOG)
        if failures.count >= MAX_FAILURES:
            live = self.runner.counts(path) or NO_COUNTS
            self._open[path].note_ended(Ended(at=int(self.now()), status="failed", counts=live, errors=[CANNOT_RUN]))
