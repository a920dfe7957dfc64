"""A synthesis, whole: the run, rounds that ask again for broken records, a judge's scores, the records without doubles.

Every step reads only what the one before it committed and decides nothing by time or order, so a driver that is killed
anywhere and started again ends with the same records.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from cluster.pools import PoolPlan
from jobs.engines import KeptEngines, kept_engines
from jobs.prepare import PreparedJob
from jobs.run import RunOptions, run_job
from jobs.summary import SUMMARY
from jobs.synthesis_judge import judge
from jobs.synthesis_records import candidates, write_records
from jobs.synthesis_rounds import RoundEnded, ask_again
from jobs.synthesis_turns import Talks, converse
from pipeline.lease import acquire_lease
from pipeline.ledger import Ledger
from pipeline.storage import Store

REPORT = "synthesis.json"


def run_synthesis(
    job: PreparedJob,
    options: RunOptions,
    *,
    say: Callable[[str], None],
    fleet: Any = None,
    pools: list[PoolPlan] | None = None,
) -> dict[str, Any]:
    """`run_job`, and what makes records of its answers; the summary has `synthesis` once all of it is done.

    Raises:
        RunError: as `run_job`; what was committed stays, and the same command goes on.
    """
    with kept_engines() as kept:

        def run(asked: PreparedJob, how: RunOptions) -> dict[str, Any]:
            return run_job(asked, how, say=say, fleet=fleet, pools=pools, kept=kept)

        summary = run(job, options)
        if summary["exit_code"] != 0:
            return summary
        return _records_of(job, summary, options, run, kept)


def _records_of(
    job: PreparedJob,
    summary: dict[str, Any],
    options: RunOptions,
    run: Callable[[PreparedJob, RunOptions], dict[str, Any]],
    kept: KeptEngines,
) -> dict[str, Any]:
    store = Store(job.spec.output.path)
    key = _key(job, store)
    if (done := _report(store, key)) is not None:
        return summary | {"synthesis": done}
    with acquire_lease(store, run_id=summary["run_id"]) as lease:
        # What failed in a step that was finished stays so, or all steps after it would begin anew.
        how = RunOptions(retry_failed=False, quiet=options.quiet, ray=options.ray)

        steps: list[dict[str, Any]] = []

        def step(asked: PreparedJob) -> dict[str, Any]:
            done = run(asked, how)
            tokens = {name: done["tokens"][name] for name in ("input", "generated")}
            steps.append({"step": asked.spec.output.path.removeprefix(store.root), **tokens})
            return done

        try:
            later, rounds = ask_again(job, store, step)
            talks = converse(Talks(job, store, later, Ledger(store).plan.files), step)
            judgement = judge(job, lambda: candidates(job, talks), step)
        except RoundEnded as ended:
            return summary | {name: ended.summary[name] for name in ("status", "exit_code")}
        kept.end()  # what is left takes no GPU
        lease.check()
        store.delete(REPORT)  # written last: while it isn't there the folders may be half old
        synthesis = write_records(job, store, talks, judgement) | {"rounds": rounds, "steps": steps}
        lease.check()
        store.put(REPORT, json.dumps({"key": key, "synthesis": synthesis}, indent=1).encode())
    return summary | {"synthesis": synthesis}


def _report(store: Store, key: str) -> dict[str, Any] | None:
    """What was made of these very answers before; None if nothing was."""
    try:
        report = json.loads(store.read(REPORT))
    except FileNotFoundError:
        return None
    return report["synthesis"] if report["key"] == key else None


def _key(job: PreparedJob, store: Store) -> str:
    """Changes with the run's results, and with what is made of them."""
    settings = job.spec.synthesize.model_dump_json() if job.spec.synthesize is not None else ""
    return hashlib.sha256(store.read(SUMMARY) + settings.encode()).hexdigest()
