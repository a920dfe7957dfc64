"""A synthesis, whole: the run, rounds that ask again for broken records, a judge's scores, the records without doubles.

Every step reads only what the one before it committed and decides nothing by time or order, so a driver that is killed
anywhere and started again ends with the same records.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from cluster.pools import PoolPlan
from jobs.engines import KeptEngines, kept_engines
from jobs.prepare import PreparedJob
from jobs.run import RunOptions, run_job
from jobs.summary import SUMMARY
from jobs.synthesis_answers import Answer, Key
from jobs.synthesis_judge import Judgement, judge, judge_prompt
from jobs.synthesis_records import write_candidates, write_records
from jobs.synthesis_rounds import RoundEnded, RunStep, ask_again
from jobs.synthesis_turns import Talks, conversation_name, converse
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
        how = RunOptions(quiet=options.quiet, ray=options.ray)

        def step(asked: PreparedJob) -> dict[str, Any]:
            return run(asked, how)

        try:
            later, rounds = ask_again(job, store, step)
            talks = _talks(job, store, later, rounds, step)
            judgement = _judgement(job, store, talks, rounds, step)
        except RoundEnded as ended:
            return summary | {name: ended.summary[name] for name in ("status", "exit_code")}
        kept.end()  # what is left takes no GPU
        lease.check()
        store.delete(REPORT)  # written last: while it isn't there the folders may be half old
        synthesis = write_records(job, store, talks, judgement) | {"rounds": rounds}
        lease.check()
        store.put(REPORT, json.dumps({"key": key, "synthesis": synthesis}, indent=1).encode())
    return summary | {"synthesis": synthesis}


def _talks(
    job: PreparedJob, store: Store, later: Mapping[Key, Answer], rounds: list[dict[str, Any]], run: RunStep
) -> Talks:
    """The answers as they stand, with all turns of a conversation."""
    talks = Talks(job, store, later, Ledger(store).plan.files)
    settings = job.spec.synthesize.conversation if job.spec.synthesize is not None else None
    if settings is None:
        return talks
    return converse(job, talks, conversation_name(_said(store, rounds), settings), run)


def _said(store: Store, rounds: list[dict[str, Any]]) -> bytes:
    """Changes with the run's results and those of its rounds."""
    return store.read(SUMMARY) + json.dumps([each["output"] for each in rounds]).encode()


def _judgement(
    job: PreparedJob, store: Store, talks: Talks, rounds: list[dict[str, Any]], run: RunStep
) -> Judgement | None:
    """What the judge says of all that could be a record; None without one. Its run is named after what it is asked."""
    settings = job.spec.synthesize
    if settings is None or settings.judge is None:
        return None
    what = {"filters", "duplicates"} | ({"conversation"} if settings.conversation is not None else set())
    asked = settings.model_dump_json(include=what) + judge_prompt(settings.judge)
    name = hashlib.sha256(_said(store, rounds) + asked.encode()).hexdigest()[:12]
    return judge(job, name, lambda folder, there: write_candidates(job, there, talks, folder), run)


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
