"""Does an execution's work: the flow under supervision, on live engines.

Knows what is to be done and with what, not why.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from cluster.capacity import most_replicas
from cluster.nodes import read_nodes
from cluster.pools import PoolPlan
from jobs.engines import KeptEngines
from jobs.interrupts import Interrupts
from jobs.prepare import PreparedJob, label_rule
from jobs.progress import ProgressDisplay
from jobs.summary import Execution
from jobs.supervise import Supervisor
from jobs.work import Work
from pipeline.counters import RowTotals
from pipeline.flights import WINDOW_FACTOR
from pipeline.flow import Flow, run_flow
from pipeline.generate import GenerateSettings
from pipeline.lease import Lease
from pipeline.monitor import start_monitor
from pipeline.resume import fingerprint_digest
from pipeline.sampling import is_greedy
from pipeline.storage import Store

SEED = "_run/seed.json"
PRIORITIES = {"high": -10, "normal": 0, "low": 10}
"""Of a run's requests, as the engine counts: lower first."""


def window_of(pools: Sequence[PoolPlan]) -> int:
    """Unfinished rows that these pools together can hold at their most; inside Ray."""
    nodes = read_nodes()
    return WINDOW_FACTOR * sum(most_replicas(pool, nodes) * pool.max_num_seqs for pool in pools)


def execute_work(
    job: PreparedJob,
    work: Work,
    store: Store,
    execution: Execution,
    before: RowTotals,
    engines: KeptEngines,
    interrupts: Interrupts,
    *,
    lease: Lease | None = None,
    quiet: bool = False,
) -> tuple[str, int]:
    """Do the work, with engines that are found; fills in `execution`, returns the status and exit code.

    With a lease, work ends as soon as the output turns out to be somebody else's.

    Raises:
        RunError: the flow or the fleet failed; what was committed stays.
    """
    with ProgressDisplay(store, quiet=quiet) as display:
        # The engines first: they load while the rest comes up, 0.15 s sooner than after the monitor.
        fleet, pools = engines.live(job.spec.fleet.start_timeout)
        flow = make_flow(job, store, window=window_of(pools), epoch=lease.epoch if lease else None)
        with _monitor() as monitor:
            supervisor = Supervisor(
                job,
                execution,
                fleet,
                monitor,
                display,
                rows_before=before,
                rows_to_do=work.num_rows(job),
                interrupts=interrupts,
                retries_failed="failed" in (work.retried_statuses or ()),
                lease=lease,
            )
            return supervisor.run(lambda: _run_flows(flow, work, supervisor, fleet, monitor))


def _run_flows(flow: Flow, work: Work, supervisor: Supervisor, fleet: Any, monitor: Any) -> None:
    """Missing shards, then single rows of parts that are there."""
    if work.shards:
        run_flow(flow, work.shards, fleet=fleet, monitor=monitor)
    if work.rows and supervisor.goes_on:
        rows, statuses = work.rows, work.retried_statuses
        run_flow(flow, sorted(rows), fleet=fleet, monitor=monitor, rows=rows, retried_statuses=statuses)


@contextlib.contextmanager
def _monitor() -> Iterator[Any]:
    import ray

    monitor = start_monitor()
    try:
        yield monitor
    finally:
        ray.kill(monitor)


def make_flow(job: PreparedJob, store: Store, *, window: int, epoch: int | None) -> Flow:
    """Put the data path's settings together; draws the run's seed if it has none yet."""
    return Flow(
        plan=job.plan,
        user_schema=job.read_schema,
        template=job.template,
        generate=GenerateSettings(
            seed=job_seed(store, job.spec.sampling.seed),
            input_root=job.input_root,
            schema=job.output_schema,
            routing=job.spec.routing,
            limits=job.spec.limits,
            moe=job.moe,
            priority=PRIORITIES[job.spec.fleet.priority],
            choices=job.choices,
            labels=label_rule(job.spec),
            dedupe=_may_have_twins(job),
        ),
        store=store,
        fingerprint=fingerprint_digest(job.fingerprint),
        epoch=epoch,
        window=window,
    )


def _may_have_twins(job: PreparedJob) -> bool:
    sampling = job.spec.sampling
    rows_decide = sampling.column is not None or job.spec.input.format == "openai_batch"
    return sampling.dedupe == "exact" and (job.choices is not None or is_greedy(sampling) or rows_decide)


def job_seed(store: Store, seed: int | None) -> int:
    """The spec's seed, or one drawn when the run began: a resumed run goes on with the same."""
    if seed is not None:
        return seed
    with contextlib.suppress(FileExistsError):
        store.create(SEED, json.dumps({"seed": secrets.randbits(62)}).encode())
    return int(json.loads(store.read(SEED))["seed"])
