"""Which batch is worked at when: files are checked as they come, runs wait for each other in order.

Each step of a batch is a process, which the layer above knows how to start. Invariant: but for processes and their
failures nothing is known here that isn't in the batches' folders; after a restart all that was open is taken up again.
A folder that can't be read is left alone for a while, and costs no other batch anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from openai.types import BatchError, BatchRequestCounts

from cluster.batch_records import LOG, RECORD, BatchFacts, BatchFolder, BatchRecords, Ended
from cluster.batch_states import NO_COUNTS, Step, end_of, is_over, is_to_end, next_step
from cluster.batch_upkeep import drop_oldest, sweep
from pipeline.settings import ModelSettings

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S = 1.0
SCAN_INTERVAL_S = 60.0
MAX_FAILURES = 10
"""In a row, of one batch's processes; they are some six minutes apart together. Then as many that write its results."""
LONGEST_WAIT_S = 60.0
KILL_AFTER_S = 60.0
"""After what a run may take to finish what it has begun: it still has to write its results."""
CANNOT_RUN = "this endpoint could not run the batch"


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
    - a batch that fails again and again lets others pass meanwhile, and is failed in the end, with what was answered.
    - a folder that is gone or broken is that batch's alone.
    """

    records: BatchRecords
    runner: BatchRunner
    served: Served
    at_once: int
    now: Callable[[], float] = time.time
    failure: str | None = None
    """Why nothing is worked at any more."""
    _open: dict[Path, BatchFolder] = field(default_factory=dict)
    """In the order of their creation; changed under the lock, by the queue's thread and by those of requests."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _over: set[Path] = field(default_factory=set)
    """Those that nothing is left to do about, so that each scan reads the others only."""
    _scanned_at: float | None = None
    _going: dict[Path, _Going] = field(default_factory=dict)
    _failures: dict[Path, _Failures] = field(default_factory=dict)
    _woken: asyncio.Event = field(default_factory=asyncio.Event)
    _closed: bool = False
    # One thread that lives as long as the endpoint: processes are told when the thread that started them ends.
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="batches"))

    def __post_init__(self) -> None:
        self.scan()

    def add(self, folder: BatchFolder) -> None:
        """Take a new batch; from any thread."""
        with self._lock:
            self._open[folder.path] = folder

    def num_open(self, owner: str) -> int:
        """Batches of this owner that aren't over; from any thread."""
        with self._lock:
            return sum(folder.owner == owner for folder in self._open.values())

    def begin(self) -> asyncio.Task[None]:
        """Have `work` done; whatever ends it is in `failure`. Who calls keeps the task."""
        working = asyncio.get_running_loop().create_task(self.work())
        working.add_done_callback(self._note_failure)
        return working

    def _note_failure(self, working: asyncio.Task[None]) -> None:
        if not working.cancelled() and (error := working.exception()) is not None:
            self.failure = f"batches aren't worked at any more: {error!r}"
            logger.error(self.failure, exc_info=error)

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
            with self._left_alone(path):
                self._watch(path, going)
        if self._closed:
            return
        if self._scanned_at is None or self.now() - self._scanned_at >= SCAN_INTERVAL_S:
            self.scan()
        with self._lock:
            folders = list(self._open.values())
        for folder in folders:
            path = folder.path
            if path not in self._going and self._failures.get(path, _Failures()).not_before <= self.now():
                with self._left_alone(path):
                    self._advance(folder)

    def scan(self) -> None:
        """Take up batches that another endpoint made, and remove what one that died had yet to remove.

        Those for a model that isn't served here wait for an endpoint that serves it; any may end what is to end.
        """
        self._scanned_at = self.now()
        sweep(self.records.root)
        found = self.records.everybodys()
        known = {folder.path for folder in found}
        self._over &= known
        fresh: dict[Path, BatchFolder] = {}
        for folder in found:
            if folder.path not in self._over:
                with self._left_alone(folder.path):
                    facts = folder.facts()
                    if is_over(facts):
                        self._tidy(folder, facts)
                    elif facts.created.model == self.served.model_name or is_to_end(facts, self._scanned_at):
                        fresh[folder.path] = folder
        drop_oldest(folder for folder in found if folder.path in self._over)
        places = {folder.path: place for place, folder in enumerate(found)}
        with self._lock:
            both = fresh | self._open
            self._open = {path: both[path] for path in sorted(both, key=lambda each: places.get(each, len(places)))}

    def _tidy(self, folder: BatchFolder, facts: BatchFacts) -> None:
        if facts.ended is None or not facts.ended.keeps_rows:
            folder.forget_rows()
        self._over.add(folder.path)

    def _look_safely(self) -> None:
        try:
            self.look()
        except OSError as error:  # of the directory itself; the next look may find it mended
            logger.warning("batches: %s", error)

    @contextlib.contextmanager
    def _left_alone(self, path: Path) -> Iterator[None]:
        """Should the block fail, for this batch only and for a minute; a full disk may be mended by then."""
        try:
            yield
        except (OSError, ValueError) as error:  # pydantic's are ValueErrors
            if not (path / RECORD).exists():
                logger.warning("batch %s is gone", path)
                self._forget(path)
            else:
                logger.warning("batch %s is left alone for a minute: %s", path, error)
                self._failures.setdefault(path, _Failures()).not_before = self.now() + LONGEST_WAIT_S

    def _forget(self, path: Path) -> None:
        with self._lock:
            self._open.pop(path, None)
        self._failures.pop(path, None)

    def _advance(self, folder: BatchFolder) -> None:
        facts = folder.facts()
        step = next_step(facts, self.now())
        if step is None:
            self._forget(folder.path)
        elif step == "end":
            counts = NO_COUNTS.model_copy(update={"total": facts.checked.num_requests if facts.checked else 0})
            status = end_of(facts)
            errors = facts.given_up.errors if facts.given_up is not None and status == "failed" else []
            folder.note_ended(Ended(at=int(self.now()), status=status, counts=counts, errors=errors))
        elif sum(going.step == step for going in self._going.values()) < (self.at_once if step == "run" else 1):
            process = self.runner.start(step, folder.path, self.served)
            self._going[folder.path] = _Going(process, step, writes_results=is_to_end(facts, self.now()))

    def _watch(self, path: Path, going: _Going) -> None:
        exit_code = going.process.poll()
        if exit_code is not None:
            del self._going[path]
            if path in self._open:
                self._note_exit(path, exit_code, was_told=going.told_at is not None)
        elif going.told_at is None:
            if self._closed or path not in self._open or self._must_stop(path, going):
                going.process.terminate()
                going.told_at = self.now()
        elif self.now() - going.told_at > self.served.drain_timeout_s + KILL_AFTER_S:
            going.process.kill()

    def _must_stop(self, path: Path, going: _Going) -> bool:
        facts = self._open[path].facts()
        runs_on = going.step == "run" and facts.finalizing is None and not going.writes_results
        return runs_on and is_to_end(facts, self.now())

    def _note_exit(self, path: Path, exit_code: int, *, was_told: bool) -> None:
        facts = self._open[path].facts()
        if exit_code == 0 or was_told or is_over(facts):
            self._failures.pop(path, None)
            return
        failures = self._failures.setdefault(path, _Failures())
        failures.count += 1
        failures.not_before = self.now() + min(LONGEST_WAIT_S, 2.0**failures.count)
        logger.warning("a process ended with %d, number %d in a row; see %s", exit_code, failures.count, path / LOG)
        if failures.count >= MAX_FAILURES:
            self._give_up(self._open[path], facts)
            del self._failures[path]

    def _give_up(self, folder: BatchFolder, facts: BatchFacts) -> None:
        """Have what was answered written to its files; if that is what fails, leave it where it is."""
        errors = [BatchError(code="server_error", message=": ".join(filter(None, [CANNOT_RUN, folder.last_words()])))]
        if facts.given_up is None:
            folder.note_given_up(errors)
            return
        counts = self.runner.counts(folder.path) or NO_COUNTS
        errors = facts.given_up.errors + errors
        logger.error("the results of batch %s can't be written; what it has stays there", folder.path)
        folder.note_ended(
            Ended(at=int(self.now()), status="failed", counts=counts, errors=errors, keeps_rows=True),
        )
