"""Executes a prepared job: lease, what is left to do, the work, finish. The only place where a run is put together.

Guarantees:
- what can be refused is refused before anything in the output changes.
- one execution owns the output from its first write to its last.
- committed rows are never done again, unless they failed: for a reason that may have passed, or by `retry`.
- the exit code says what happened: 0 done, 1 too many failed rows, 2 nothing ran, 3 infrastructure, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.fleet_plan import FleetDemand
from cluster.pools import PoolPlan
from cluster.warm import Attachment
from jobs.engines import Engines, KeptEngines, kept_engines
from jobs.execute import execute_work
from jobs.interrupts import Interrupts
from jobs.label_report import report_labels
from jobs.preflight import preflight, reaching
from jobs.prepare import PreparedJob
from jobs.summary import SUMMARY, Execution, build_summary, read_summary, write_summary
from jobs.work import RunOptions, Work, find_work
from pipeline.counters import RunCounters
from pipeline.errors import InfrastructureError, RunError, SpecError
from pipeline.lease import Lease, acquire_lease
from pipeline.ledger import Ledger
from pipeline.storage import Store
from pipeline.templating import TemplateStage

__all__ = ["RunOptions", "engines_of", "run_job"]

SPEC = "_run/spec.json"
CAUSE_CHARS = 4000
"""Of an error's cause, which may be a worker's traceback, the end is kept in `_run/events`."""


def engines_of(
    job: PreparedJob, *, fleet: Any = None, pools: list[PoolPlan] | None = None, address: str | None = None
) -> Engines:
    """What answers the job's rows: the spec's pools, unless others are given, or a fleet that is live already."""
    spec = job.spec
    name = spec.fleet.attach
    if name is not None and pools is None and fleet is None:
        if address in (None, "local"):
            raise SpecError(f"fleet.attach {name!r} is a fleet on a Ray cluster, but none is named; add --ray ADDRESS")
        return Engines([], warm=Attachment(name, spec.model, job.model.digest, job.moe), address=address)
    if pools is not None or fleet is not None:
        return Engines(pools or [], fleet=fleet, address=address)
    return Engines([], FleetDemand(spec.fleet, spec.model, job.model.path, job.moe), address=address)


def run_job(
    job: PreparedJob,
    options: RunOptions,
    *,
    say: Callable[[str], None],
    fleet: Any = None,
    pools: list[PoolPlan] | None = None,
    kept: KeptEngines | None = None,
) -> dict[str, Any]:
    """Execute the job and return its summary, whose `exit_code` is the process's.

    Args:
        job: from `prepare`.
        options: what to do about earlier executions.
        say: prints one line for people.
        fleet: a live fleet to use and leave running, instead of one of the run's own.
        pools: what to run instead of the spec's pools.
        kept: where engines are left for the next run, instead of ending with this one.

    Raises:
        RunError: it could not go on; `exit_code` says why. What was committed stays.
        KeyboardInterrupt: it was interrupted (or got SIGTERM) before work began or after it ended.
    """
    store = Store(job.spec.output.path)
    execution = Execution(run_id=options.run_id or uuid.uuid4().hex[:8])
    interrupts = Interrupts()
    with interrupts.heard(), contextlib.nullcontext(kept) if kept is not None else kept_engines() as own:
        wanted = engines_of(job, fleet=fleet, pools=pools, address=options.ray)
        means = _Means(wanted, interrupts, own, ends=kept is None)
        TemplateStage(job.template).close()  # finds broken templates and tokenizers before anything is written
        if preflight(job, options, store):
            own.find(wanted, interrupts, say=say)
        with acquire_lease(store, run_id=execution.run_id) as lease:
            return _execute(job, options, Ledger(store, lease=lease), lease, execution, say, means)


@dataclass(frozen=True, slots=True)
class _Means:
    """What an execution does its work with."""

    wanted: Engines
    interrupts: Interrupts
    kept: KeptEngines
    ends: bool
    """Whether engines and a Ray of the run's own end with the work."""


def _execute(
    job: PreparedJob,
    options: RunOptions,
    ledger: Ledger,
    lease: Lease,
    execution: Execution,
    say: Callable[[str], None],
    means: _Means,
) -> dict[str, Any]:
    with reaching(ledger.store):
        job = job.with_plan(ledger.open_run(job.plan, job.fingerprint, resume=job.spec.output.resume).plan)
        work, before = find_work(ledger, job, options)
    say(opening_line(execution.run_id, job, before, work, ledger.store))
    status, exit_code = "done", 0
    if work.shards or work.rows:
        means.kept.find(means.wanted, means.interrupts, say=say)  # it is there already, unless work came up since
        with contextlib.ExitStack() as end:
            end.callback(means.kept.end)  # before the output is finished: a given-up flow commits nothing after it
            status, exit_code = _work(job, options, ledger, lease, execution, work, before, means)
            if status == "done" and not means.ends:
                end.pop_all()
    elif (finished := _already_finished(ledger.store, job, before)) is not None:
        return finished
    execution.timings["total_s"] = time.monotonic() - execution.began
    try:
        with reaching(ledger.store, nothing_ran=False):
            return _finish(job, ledger, lease, execution, status=status, exit_code=exit_code)
    except RunError as error:
        _record_failure(ledger, execution, error)
        raise


def _work(
    job: PreparedJob,
    options: RunOptions,
    ledger: Ledger,
    lease: Lease,
    execution: Execution,
    work: Work,
    before: RunCounters,
    means: _Means,
) -> tuple[str, int]:
    """From the first change to what an earlier execution left, to the last commit."""
    store = ledger.store
    with reaching(store):
        if not options.only_failed:
            store.put(SPEC, job.spec.model_dump_json(indent=1).encode())
        store.delete(SUMMARY)  # written last, so while there is work there is none
        ledger.record_event(
            "started", run_id=execution.run_id, shards=len(work.shards), retry_rows=work.num_single_rows
        )
    kept, interrupts, quiet = means.kept, means.interrupts, options.quiet
    try:
        return execute_work(job, work, store, execution, before.totals, kept, interrupts, lease=lease, quiet=quiet)
    except RunError as error:
        _record_failure(ledger, execution, error)
        raise


def _already_finished(store: Store, job: PreparedJob, totals: RunCounters) -> dict[str, Any] | None:
    """The summary of a run to which nothing was or will be added; None when it is missing or older than the parts."""
    summary = read_summary(store)
    if summary is None or summary["status"] not in ("done", "too_many_failures"):
        return None
    current = build_summary(job, totals, Execution(summary["run_id"]), status="done", exit_code=0)
    exit_code = 1 if job.too_many_failed(totals.totals.samples.get("failed", 0)) else 0  # the limit may have changed
    label = job.spec.label
    if label is not None and summary.get("labels", {}).get("review_below") != label.review_below:
        return None
    return summary if (summary["counts"], summary["exit_code"]) == (current["counts"], exit_code) else None


def _record_failure(ledger: Ledger, execution: Execution, error: RunError) -> None:
    cause = error.__cause__
    ended = {"status": "failed", "exit_code": error.exit_code, "message": error.message[:1000]}
    with contextlib.suppress(OSError, InfrastructureError):  # if the storage is what failed, its error is on its way
        ledger.record_event(
            "ended", run_id=execution.run_id, **ended, cause=None if cause is None else str(cause)[-CAUSE_CHARS:]
        )


def opening_line(run_id: str, job: PreparedJob, before: RunCounters, work: Work, store: Store) -> str:
    """What is already there and what will be done."""
    total, done = job.plan.num_rows, before.totals.num_rows
    if not work.shards and not work.rows:
        return f"nothing to do: all {done:,} of {total:,} rows are committed in {store.root}"
    if not done:
        return f"run {run_id}: {total:,} rows in {job.plan.num_shards:,} shards -> {store.root}"
    status = " or ".join(work.retried_statuses or ("failed",))
    retried = f", {work.num_single_rows:,} {status} rows will be retried" if work.rows else ""
    return f"run {run_id} resumes {store.root}: {done:,} of {total:,} rows already committed{retried}"


def _finish(
    job: PreparedJob, ledger: Ledger, lease: Lease, execution: Execution, *, status: str, exit_code: int
) -> dict[str, Any]:
    totals = ledger.totals()
    missing = job.plan.num_rows - totals.totals.num_rows
    if status == "done" and missing:
        raise InfrastructureError(
            f"the run ended without an error, but {missing:,} of {job.plan.num_rows:,} rows have no result; "
            "rerun the same command, and report this: it should be impossible"
        )
    if status == "done" and job.too_many_failed(totals.totals.samples.get("failed", 0)):
        status, exit_code = "too_many_failures", 1
    label = job.spec.label
    # Reads parts, of which there may be thousands: nothing for somebody who wants to see an end.
    labels = report_labels(ledger.store, label) if label is not None and status != "interrupted" else None
    lease.check()
    ledger.record_event("ended", run_id=execution.run_id, status=status, exit_code=exit_code)
    if totals.totals.num_rows == 0 and job.plan.num_rows:
        return build_summary(job, totals, execution, status=status, exit_code=exit_code)
    return write_summary(ledger.store, job, totals, execution, status=status, exit_code=exit_code, labels=labels)
