"""Does an execution's work: Ray, the engines, and the flow under supervision.

Knows what is to be done and with what, not why. Invariant: whatever is started here has ended when its block ends, but
for a fleet that was live before.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.capacity import beside_the_stages, check_capacity, most_replicas
from cluster.fleet import start_fleet, stop_fleet
from cluster.fleet_plan import FleetDemand
from cluster.nodes import can_grow, read_nodes
from cluster.pools import PoolPlan
from cluster.warm import Attachment
from jobs.interrupts import Interrupts
from jobs.prepare import PreparedJob, label_rule
from jobs.progress import ProgressDisplay
from jobs.ray_session import ray_session
from jobs.summary import Execution
from jobs.supervise import Supervisor
from jobs.work import Work
from pipeline.counters import RowTotals
from pipeline.errors import SpecError
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


@dataclass(frozen=True, slots=True)
class Engines:
    """What generates."""

    pools: list[PoolPlan]
    """What is started for the run, or what `fleet` was started with; empty until the nodes are known."""
    demand: FleetDemand | None = None
    """What `pools` are worked out from once they are."""
    fleet: Any = None
    """A live fleet, left running."""
    warm: Attachment | None = None
    """A warm fleet to look up on the cluster, instead of pools."""
    address: str | None = None
    """Of the Ray cluster to work in; None for a Ray of the run's own on this machine."""


def window_of(pools: Sequence[PoolPlan]) -> int:
    """Unfinished rows that these pools together can hold at their most; inside Ray."""
    nodes = read_nodes()
    return WINDOW_FACTOR * sum(most_replicas(pool, nodes) * pool.max_num_seqs for pool in pools)


@contextlib.contextmanager
def ray_for(
    engines: Engines, interrupts: Interrupts, *, say: Callable[[str], None] = lambda _: None
) -> Iterator[Engines]:
    """Run the block in a Ray that can hold the engines, worked out for its nodes; one that is there is used and left.

    Raises:
        SpecError: it never can.
    """
    replica_cpus = sum(pool.num_replicas * pool.shape.num_cpus * pool.shape.num_bundles for pool in engines.pools)
    replica_cpus += engines.demand.replica_cpus if engines.demand else 0
    with ray_session(engines.address, replica_cpus=replica_cpus):
        interrupts.install()  # `ray.init` has put a SIGTERM handler of its own in place
        check_driver_node()
        if engines.warm is not None:
            engines.warm.find()
        elif engines.fleet is None:
            engines = _for_these_nodes(engines, say)
        yield engines


def _for_these_nodes(engines: Engines, say: Callable[[str], None]) -> Engines:
    import ray

    nodes, grows = read_nodes(), can_grow()
    if engines.demand is not None:
        pools, notes = engines.demand.plans(nodes, grows=grows)
        engines = replace(engines, pools=pools, demand=None)
        for note in notes:
            say(note)
    if not grows:
        check_capacity(engines.pools, beside_the_stages(nodes, ray.get_runtime_context().get_node_id()))
    return engines


def check_driver_node() -> None:
    """Raise SpecError when reading, templating and writing, which run beside the driver, would wait for ever."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in read_nodes() if node.node_id == here)
    if node.total.get("CPU", 0) < 1:
        raise SpecError(
            f"the driver's node {node.address} offers Ray no CPU (num-cpus 0), but rows are read and templated on it; "
            "start the driver on a node with CPUs (`tramontane submit --driver-cpus 1`), or give the head some"
        )


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
    """Do the work, inside `ray_for`; fills in `execution`, returns the status and exit code.

    With a lease, work ends as soon as the output turns out to be somebody else's.

    Raises:
        RunError: the flow or the fleet failed; what was committed stays.
    """
    with (
        ProgressDisplay(store, quiet=quiet) as display,
        _monitor() as monitor,
        _fleet(engines, job) as (fleet, pools),
    ):
        flow = make_flow(job, store, window=window_of(pools), epoch=lease.epoch if lease else None)
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


@contextlib.contextmanager
def _fleet(engines: Engines, job: PreparedJob) -> Iterator[tuple[Any, Sequence[PoolPlan]]]:
    """A live fleet with what it is made of: the one given, the warm one that the spec names, or one for the block."""
    if engines.fleet is not None:
        yield engines.fleet, engines.pools
    elif engines.warm is not None:
        fleet, warm = engines.warm.find()
        yield fleet, warm.pools
    else:
        fleet = start_fleet(engines.pools, start_timeout_s=job.spec.fleet.start_timeout)
        try:
            yield fleet, engines.pools
        finally:
            stop_fleet(fleet)


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
