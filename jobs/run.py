"""Executes a prepared job: lease, what is left to do, fleet, flow, finish. The only place where a run is put together.

Guarantees:
- one execution owns the output from its first write to its last.
- committed rows are never done again, unless they failed: for a reason that may have passed, or by `retry`.
- the exit code says what happened: 0 done, 1 too many failed rows, 2 nothing ran, 3 infrastructure, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.fleet import PoolPlan, start_fleet, stop_fleet
from cluster.pools import pool_plans
from jobs.interrupts import Interrupts
from jobs.prepare import PreparedJob
from jobs.progress import ProgressDisplay
from jobs.ray_session import local_ray
from jobs.summary import SUMMARY, Execution, build_summary, read_summary, write_summary
from jobs.supervise import Supervisor
from jobs.work import RunOptions, Work, find_work
from pipeline.counters import RowTotals, RunCounters
from pipeline.dispatcher import WINDOW_FACTOR
from pipeline.errors import InfrastructureError, RunError, SpecError
from pipeline.flow import Flow, run_flow
from pipeline.generate import GenerateSettings
from pipeline.lease import Lease, acquire_lease
from pipeline.ledger import Ledger
from pipeline.monitor import start_monitor
from pipeline.resume import fingerprint_digest
from pipeline.storage import Store
from pipeline.templating import TemplateStage

__all__ = ["Engines", "RunOptions", "execute_work", "run_job"]

SEED = "_run/seed.json"
SPEC = "_run/spec.json"


@dataclass(frozen=True, slots=True)
class Engines:
    """What generates, when it isn't the spec's own pools, started for the run."""

    fleet: Any = None
    """A live fleet, left running."""
    pools: list[PoolPlan] | None = None


def run_job(
    job: PreparedJob,
    options: RunOptions,
    *,
    say: Callable[[str], None],
    fleet: Any = None,
    pools: list[PoolPlan] | None = None,
) -> dict[str, Any]:
    """Execute the job and return its summary, whose `exit_code` is the process's.

    Args:
        job: from `prepare`.
        options: what to do about earlier executions.
        say: prints one line for people.
        fleet: a live fleet to use and leave running, instead of one of the run's own.
        pools: what to run instead of the spec's pools.

    Raises:
        RunError: it could not go on; `exit_code` says why. What was committed stays.
        KeyboardInterrupt: it was interrupted (or got SIGTERM) before work began or after it ended.
    """
    store = Store(job.spec.output.path)
    execution = Execution(run_id=uuid.uuid4().hex[:8])
    interrupts = Interrupts()
    with interrupts.heard():
        TemplateStage(job.template).close()  # finds broken templates and tokenizers before anything is written
        with acquire_lease(store, run_id=execution.run_id) as lease:
            return _execute(job, options, store, lease, execution, say, Engines(fleet, pools), interrupts)


def _execute(
    job: PreparedJob,
    options: RunOptions,
    store: Store,
    lease: Lease,
    execution: Execution,
    say: Callable[[str], None],
    engines: Engines,
    interrupts: Interrupts,
) -> dict[str, Any]:
    began = time.monotonic()
    ledger = Ledger(store, lease=lease)
    if options.only_failed and ledger.fingerprint() is None:
        raise SpecError(f"output.path {store.root} holds no run, so there is nothing to retry; use `tramontane run`")
    opened = ledger.open_run(job.plan, job.fingerprint, resume=job.spec.output.resume)
    job = job.with_plan(opened.plan)
    before = ledger.totals()
    work = find_work(ledger, job, before, options)
    say(opening_line(execution.run_id, job, before, work, store))
    status, exit_code = "done", 0
    if work.shards or work.rows:
        if not options.only_failed:
            store.put(SPEC, job.spec.model_dump_json(indent=1).encode())
        store.delete(SUMMARY)  # written last, so while there is work there is none
        ledger.record_event(
            "started", run_id=execution.run_id, shards=len(work.shards), retry_rows=work.num_single_rows
        )
        try:
            status, exit_code = execute_work(
                job, work, store, execution, before.totals, engines, interrupts, lease=lease, quiet=options.quiet
            )
        except RunError as error:
            _record_failure(ledger, execution, error)
            raise
    elif (finished := _already_finished(store, job, before)) is not None:
        return finished
    execution.timings["total_s"] = time.monotonic() - began
    return _finish(job, ledger, lease, execution, status=status, exit_code=exit_code)


def _already_finished(store: Store, job: PreparedJob, totals: RunCounters) -> dict[str, Any] | None:
    """The summary of a run to which nothing was or will be added; None when it is missing or older than the parts."""
    summary = read_summary(store)
    if summary is None or summary["status"] not in ("done", "too_many_failures"):
        return None
    current = build_summary(job, totals, Execution(summary["run_id"]), status="done", exit_code=0)
    exit_code = 1 if job.too_many_failed(totals.totals.samples.get("failed", 0)) else 0  # the limit may have changed
    return summary if (summary["counts"], summary["exit_code"]) == (current["counts"], exit_code) else None


def _record_failure(ledger: Ledger, execution: Execution, error: RunError) -> None:
    with contextlib.suppress(OSError, InfrastructureError):  # if the storage is what failed, its error is on its way
        ledger.record_event(
            "ended", run_id=execution.run_id, status="failed", exit_code=error.exit_code, message=error.message[:1000]
        )


def opening_line(run_id: str, job: PreparedJob, before: RunCounters, work: Work, store: Store) -> str:
    """What is already there and what will be done."""
    total, done = job.plan.num_rows, before.totals.num_rows
    if not work.shards and not work.rows:
        return f"nothing to do: all {done:,} of {total:,} rows are committed in {store.root}"
    if not done:
        return f"run {run_id}: {total:,} rows in {job.plan.num_shards:,} shards -> {store.root}"
    retried = f", {work.num_single_rows:,} failed rows will be retried" if work.rows else ""
    return f"run {run_id} resumes {store.root}: {done:,} of {total:,} rows already committed{retried}"


def execute_work(
    job: PreparedJob,
    work: Work,
    store: Store,
    execution: Execution,
    before: RowTotals,
    engines: Engines,
    interrupts: Interrupts,
    *,
    lease: Lease | None = None,
    quiet: bool = False,
) -> tuple[str, int]:
    """Start Ray and the fleet, do the work, and end both; fills in `execution`, returns the status and exit code.

    With a lease, work ends as soon as the output turns out to be somebody else's.

    Raises:
        RunError: the flow or the fleet failed; what was committed stays.
    """
    import ray

    spec = job.spec
    pools = engines.pools or pool_plans(spec.fleet, spec.model, model_path=job.model.path, moe=job.moe)
    window = WINDOW_FACTOR * sum(pool.num_replicas * pool.max_num_seqs for pool in pools)
    seed, epoch = job_seed(store, spec.sampling.seed), lease.epoch if lease else None
    flow = make_flow(job, store, seed, window=window, epoch=epoch)
    with local_ray(), ProgressDisplay(store, quiet=quiet) as display:
        interrupts.install()
        if engines.fleet is None:
            require_gpus(pools)
        monitor = start_monitor()
        fleet = engines.fleet or start_fleet(
            pools,
            keep_expert_ids=spec.routing.level == "tokens",
            request_timeout_s=spec.limits.request_timeout_s,
        )
        rows_to_do = work.num_rows(job)
        supervisor = Supervisor(
            job,
            execution,
            fleet,
            monitor,
            display,
            rows_before=before,
            rows_to_do=rows_to_do,
            interrupts=interrupts,
            lease=lease,
        )

        def flows() -> None:
            if work.shards:
                run_flow(flow, work.shards, fleet=fleet, monitor=monitor)
            if work.rows and supervisor.goes_on:
                rows, statuses = work.rows, work.retried_statuses
                run_flow(flow, sorted(rows), fleet=fleet, monitor=monitor, rows=rows, retried_statuses=statuses)

        try:
            return supervisor.run(flows)
        finally:
            if engines.fleet is None:
                stop_fleet(fleet)
            ray.kill(monitor)


def require_gpus(pools: list[PoolPlan]) -> None:
    """Raise SpecError when the machine can never hold the pools: waiting for it would be waiting for ever."""
    import ray

    wanted = sum(pool.num_gpus * pool.num_replicas for pool in pools)
    there = ray.cluster_resources().get("GPU", 0)
    if wanted > there:
        names = ", ".join(pool.name for pool in pools if pool.num_gpus)
        raise SpecError(
            f"fleet.pools ({names}) need {wanted:g} GPUs, but this machine has {there:g}; lower replicas or "
            "tensor_parallel, or set gpu: cpu"
        )


def make_flow(job: PreparedJob, store: Store, seed: int, *, window: int, epoch: int | None) -> Flow:
    """Put the data path's settings together."""
    return Flow(
        plan=job.plan,
        user_schema=job.read_schema,
        template=job.template,
        generate=GenerateSettings(
            seed=seed,
            input_root=job.input_root,
            schema=job.output_schema,
            routing=job.spec.routing,
            limits=job.spec.limits,
            moe=job.moe,
        ),
        store=store,
        fingerprint=fingerprint_digest(job.fingerprint),
        epoch=epoch,
        window=window,
    )


def job_seed(store: Store, seed: int | None) -> int:
    """The spec's seed, or one drawn when the run began: a resumed run goes on with the same."""
    if seed is not None:
        return seed
    with contextlib.suppress(FileExistsError):
        store.create(SEED, json.dumps({"seed": secrets.randbits(62)}).encode())
    return int(json.loads(store.read(SEED))["seed"])


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
    lease.check()
    ledger.record_event("ended", run_id=execution.run_id, status=status, exit_code=exit_code)
    if totals.totals.num_rows == 0 and job.plan.num_rows:
        return build_summary(job, totals, execution, status=status, exit_code=exit_code)
    return write_summary(ledger.store, job, totals, execution, status=status, exit_code=exit_code)
