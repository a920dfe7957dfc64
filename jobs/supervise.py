"""Watches a run while it works: progress, too many failures, interrupts, and how it ends.

The flow runs on a thread of its own, so that signals and the clock are always heard. Talks to the run through its
monitor only: it gives orders and never touches a row.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from jobs.interrupts import Interrupts
from jobs.prepare import PreparedJob
from jobs.progress import ProgressDisplay, ProgressTracker
from jobs.summary import Execution
from pipeline.counters import RowTotals
from pipeline.errors import InfrastructureError, RunError
from pipeline.generate import DISPATCH_DIED
from pipeline.lease import Lease
from pipeline.monitor import Figures

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S = 0.25
DEMAND_INTERVAL_S = 2.0
"""How often the fleet hears what is left to do, so that it can grow, shrink, and forget a run that has died."""
WAIT_SAID_AFTER_S = 10.0
"""How long a run waits for a place for its engines before it says so."""
DISPATCH_SILENT_S = 60.0
"""Dispatch speaks twice a second. When its process dies, Ray Data 2.60 mostly ends the flow, but at times, and always
when no shard is with it, waits for ever."""
MONITOR_DIED = (
    "the run's monitor process died, killed from outside or for lack of memory; what is committed is safe: "
    "rerun the same command"
)
GIVE_UP_S = 20.0
"""How long a flow that was given up may take for its end: Ray Data waits for its own thread, then stops its actors."""
GRACE_S = 10.0
"""How long a flow may take to end after everything unfinished was dropped, or all that was begun is committed."""


class Supervisor:
    """One execution's watch."""

    def __init__(
        self,
        job: PreparedJob,
        execution: Execution,
        fleet: Any,
        monitor: Any,
        display: ProgressDisplay,
        *,
        rows_before: RowTotals,
        rows_to_do: int,
        interrupts: Interrupts,
        retries_failed: bool = True,
        lease: Lease | None = None,
    ) -> None:
        self._job = job
        self._execution = execution
        self._fleet = fleet
        self._monitor = monitor
        self._display = display
        self._lease = lease
        self._rows_to_do = rows_to_do
        self._demanded_at = -math.inf
        self._wanted: Any = None
        """The fleet's answer on its way: replicas that it wants."""
        self._began_at = time.monotonic()
        self._obstacle: Any = None
        """Likewise: what it waits for."""
        self._obstacle_said: str | None = None
        retried = rows_to_do + rows_before.num_rows - job.plan.num_rows if retries_failed else 0
        self._failed_before = max(0, rows_before.samples.get("failed", 0) - retried)
        self._tracker = ProgressTracker(
            run_id=execution.run_id,
            rows_total=job.plan.num_rows,
            rows_before=job.plan.num_rows - rows_to_do,
            failed_before=self._failed_before,
            replicas_wanted=job.num_replicas,
        )
        self._interrupts = interrupts
        self._reason: tuple[str, int] | None = None
        self._drain_deadline: float | None = None
        self._stopped_at: float | None = None
        self._abandoned_at: float | None = None
        self._lease_lost: InfrastructureError | None = None
        self._error: BaseException | None = None
        self._monitor_lost = False
        self._figures = Figures()
        self._ready_at: float | None = None
        """When the fleet's first replica could take work; seconds since the epoch, as the fleet is another process."""

    @property
    def goes_on(self) -> bool:
        """Whether nothing has ordered the run to end early."""
        return self._reason is None and self._lease_lost is None

    def run(self, flows: Callable[[], None]) -> tuple[str, int]:
        """Run the flow to its end; returns the run's status and exit code.

        Raises:
            RunError: the flow failed.
        """
        began = time.time()
        thread = threading.Thread(target=self._guard, args=(flows,), name="flow", daemon=True)
        with self._interrupts.watched():
            thread.start()
            while thread.is_alive() and not self._given_up():
                thread.join(LOOK_INTERVAL_S)
                self._look(thread)
            self._give_up(thread)
            self._show("ended")
        ended = time.time()
        self._note_fleet()
        generating_since = max(began, self._ready_at or ended)
        self._execution.timings["start_s"] = generating_since - began
        self._execution.timings["generate_s"] = ended - generating_since
        if self._lease_lost is not None:
            raise self._lease_lost
        if self._reason is not None:
            if self._error is not None and self._stopped_at is None:  # not the end that was ordered
                self._execution.error = self._as_run_error(self._error).message
            return self._reason
        if self._error is not None:
            raise self._as_run_error(self._error) from self._error
        return "done", 0

    def _guard(self, flows: Callable[[], None]) -> None:
        try:
            flows()
        except BaseException as error:  # noqa: BLE001  the thread's boundary: raised again by `run`
            self._error = error

    def _given_up(self) -> bool:
        lost = self._figures.dispatch_died or self._figures.silent_s > DISPATCH_SILENT_S
        if self._monitor_lost:
            return True
        if lost and self._error is None:
            self._error = InfrastructureError(DISPATCH_DIED)
            return True
        now = time.monotonic()
        ends = [ordered for ordered in (self._abandoned_at, self._stopped_at) if ordered is not None]
        return any(now - ordered > GRACE_S for ordered in ends) or self._interrupts.count > 2

    def _give_up(self, thread: threading.Thread) -> None:
        """End a flow that still runs, or it would be there when Ray is shut down."""
        from pipeline.flow import give_up_flows

        error = self._error
        if thread.is_alive():
            give_up_flows(InfrastructureError("given up"))
            thread.join(GIVE_UP_S)
            self._error = error  # what the flow says now is our own word

    def _look(self, thread: threading.Thread) -> None:
        import ray

        try:
            self._figures = ray.get(self._monitor.read.remote(), timeout=5)
        except ray.exceptions.ActorDiedError:  # dispatch would hear no order any more, this one included
            self._error = self._error or InfrastructureError(MONITOR_DIED)
            self._monitor_lost = True
        except ray.exceptions.RayError:
            logger.debug("the monitor doesn't answer", exc_info=True)
        if self._reason is None and self._interrupts.count:
            self._reason = ("interrupted", 130)
            limit = self._job.spec.limits.drain_timeout_s
            self._display.say(f"interrupted: finishing what is begun, up to {limit:g} s; once more drops it")
        failed = self._figures.rows_failed + self._failed_before
        if self._reason is None and self._job.too_many_failed(failed):
            self._reason = ("too_many_failures", 1)
        self._check_lease()
        self._tell_fleet()
        self._give_orders()
        if thread.is_alive():
            starting = self.goes_on and not self._figures.replicas_up
            self._show("starting" if starting else "running" if self.goes_on else "draining")

    def _show(self, state: str) -> None:
        self._display.show(self._tracker.look(self._figures, state), final=state == "ended")

    def _tell_fleet(self) -> None:
        import ray

        now = time.monotonic()
        if now - self._demanded_at < DEMAND_INTERVAL_S:
            return
        self._demanded_at = now
        if self._wanted is not None and ray.wait([self._wanted], timeout=0)[0]:
            with contextlib.suppress(ray.exceptions.RayError):
                self._tracker.replicas_wanted = ray.get(self._wanted)
        rows_left = self._rows_to_do - self._figures.rows_done if self.goes_on else self._figures.rows_in_flight
        self._wanted = self._fleet.want.remote(self._execution.run_id, max(0, rows_left))
        self._say_what_it_waits_for(now)

    def _say_what_it_waits_for(self, now: float) -> None:
        import ray

        if self._figures.replicas_up or now - self._began_at < WAIT_SAID_AFTER_S:
            return
        if self._obstacle is None:
            self._obstacle = self._fleet.waits_for.remote()
        elif ray.wait([self._obstacle], timeout=0)[0]:
            with contextlib.suppress(ray.exceptions.RayError):
                words = ray.get(self._obstacle)
                if words is not None and words != self._obstacle_said:
                    self._obstacle_said = words
                    self._display.say(f"no replica yet: {words}")
            self._obstacle = None

    def _check_lease(self) -> None:
        if self._lease is None or self._lease_lost is not None:
            return
        try:
            self._lease.check()
        except InfrastructureError as error:
            self._lease_lost = error

    def _give_orders(self) -> None:
        if self.goes_on:
            return
        now = time.monotonic()
        if self._drain_deadline is None:
            self._drain_deadline = now + self._job.spec.limits.drain_timeout_s
            self._monitor.give_order.remote("drain")
        too_late = self._interrupts.count > 1 or self._lease_lost is not None or now > self._drain_deadline
        if self._abandoned_at is None and too_late:
            self._abandoned_at = now
            self._monitor.give_order.remote("abandon")
        if self._stopped_at is None and self._figures.drained:
            # Left alone, the flow would still read and template the whole rest of the input.
            self._stopped_at = now
            self._monitor.give_order.remote("stop")

    def _note_fleet(self) -> None:
        import ray

        execution = self._execution
        execution.rows_done = self._figures.rows_done
        execution.input_tokens = self._figures.input_tokens
        execution.generated_tokens = self._figures.generated_tokens
        execution.copied = {
            "rows": self._figures.copied_rows,
            "input_tokens": self._figures.copied_input_tokens,
            "generated_tokens": self._figures.copied_generated_tokens,
        }
        execution.versions = {"ray": ray.__version__}
        with contextlib.suppress(ray.exceptions.RayError):
            status = ray.get(self._fleet.status.remote(), timeout=10)
            self._ready_at = status["first_ready_at"]
            began = execution.started_at.isoformat(timespec="milliseconds")
            execution.replica_losses = [loss for loss in status["losses"] if loss["at"] >= began]  # not earlier runs'
            self._fleet.want.remote(execution.run_id, 0)
            execution.versions |= status["versions"]
            if status["verdict"] is not None and status["verdict"] in str(self._error):
                error = RunError(status["verdict"])
                error.exit_code = status["verdict_exit_code"]
                self._error = error

    @staticmethod
    def _as_run_error(error: BaseException) -> RunError:
        """Find what was raised inside the layers that Ray wraps around it."""
        import ray

        cause: BaseException | None = error
        innermost = error
        for _ in range(20):
            if cause is None:
                break
            if isinstance(cause, RunError):
                return cause
            if str(cause):  # Ray Data raises actors' deaths `from` an empty SystemException
                innermost = cause
            cause = getattr(cause, "cause", None) or cause.__cause__ or cause.__context__
        logger.debug("the flow failed", exc_info=error)
        first_line = next((line for line in str(innermost).splitlines() if line.strip()), "")
        cure = "rerun the same command"
        if not isinstance(innermost, OSError | ray.exceptions.RayError):  # a mistake of ours, which a rerun repeats
            cure = "report this, with the last line of _run/events; a rerun may well end like this one"
        return InfrastructureError(f"{type(innermost).__name__}: {first_line[:500]}; what is committed is safe: {cure}")
