"""How a run is doing, from its files alone."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.chain import latest_run, read_chain
from jobs.chain_status import describe_runs, run_lines
from jobs.progress import PROGRESS, Progress, duration
from jobs.summary import read_summary
from pipeline.errors import SpecError
from pipeline.lease import current_owner
from pipeline.ledger import Ledger
from pipeline.storage import Store

STALE_S = 60.0


def read_status(output: str) -> dict[str, Any]:
    """Collect plan, parts, progress, owner and summary of the run in `output` (or of the spec file named there).

    Raises:
        SpecError: there is no run.
    """
    store = Store(output_of(output))
    ledger = Ledger(store)
    if ledger.fingerprint() is None:
        raise SpecError(f"{store.root} holds no run; give an output directory or URL, or a spec that was run")
    plan = ledger.plan
    todo = ledger.todo()
    owner = current_owner(store)
    return {
        "output": store.root,
        "rows": plan.num_rows,
        "shards": plan.num_shards,
        "committed_shards": plan.num_shards - len(todo),
        "committed_rows": plan.num_rows - sum(plan.shard(index).num_rows for index in todo),
        "owner": None
        if owner is None
        else {
            "host": owner.process.host,
            "pid": owner.process.pid,
            "run_id": owner.run_id,
            "known_to_be_gone": owner.process.is_gone(),
        },
        "progress": _read_progress(store),
        "summary": read_summary(store),
        "last_events": ledger.events()[-5:],
        "job": _describe_job(output, store),
    }


def _describe_job(output: str, run: Store) -> dict[str, Any] | None:
    """Of an incremental job all runs, not only the latest; None for any other."""
    job = Store(job_output_of(output))
    if job.root == run.root:
        return None
    chain = read_chain(job)
    return {"output": job.root, "num_runs": len(chain.links), "latest_runs": describe_runs(chain)}


def output_of(text: str) -> str:
    """The run that a word of the command line stands for: an output directory or URL, or a spec's.

    Of an incremental job's output it is the latest run.
    """
    return latest_run(job_output_of(text))


def job_output_of(text: str) -> str:
    """The output directory or URL that a word of the command line stands for: itself, or that of a spec."""
    if text.endswith((".yaml", ".yml")) and Path(text).is_file():
        from jobs.spec import load_spec

        return load_spec(text, runs_files=False).output.path
    return text


def status_lines(report: dict[str, Any]) -> list[str]:
    """The same for people."""
    shards = f"{report['committed_shards']:,} of {report['shards']:,} shards"
    lines = [f"{report['output']}: {report['committed_rows']:,} of {report['rows']:,} rows committed, {shards}"]
    if (job := report["job"]) is not None:
        lines[:0] = [f"{job['output']}: {job['num_runs']:,} runs", *run_lines(job["num_runs"], job["latest_runs"])]
    progress, summary = report["progress"], report["summary"]
    if progress is not None and progress["state"] != "ended":
        lines += [Progress(**progress).line(), _sign_of_life(progress, report["owner"])]
    if summary is not None:
        counts = summary["counts"]
        lines.append(
            f"last finished execution: {summary['status']} (exit {summary['exit_code']}), {counts['ok']:,} ok, "
            f"{counts['truncated']:,} truncated, {counts['invalid']:,} invalid, {counts['failed']:,} failed"
        )
    return lines


def _sign_of_life(progress: dict[str, Any], owner: dict[str, Any] | None) -> str:
    """Whether the execution that wrote this, and didn't write that it ended, still runs."""
    age = duration(time.time() - progress["updated_at"])
    run_id = progress["run_id"]
    if owner is None or owner["run_id"] != run_id:
        return f"run {run_id} ended without a word {age} ago; the output has changed hands since"
    where = f"run {run_id} on {owner['host']}, pid {owner['pid']}"
    if owner["known_to_be_gone"]:
        return f"{where} ended without a word (killed?) {age} ago; rerun the same command"
    if time.time() - progress["updated_at"] > STALE_S:
        return f"{where} has been silent for {age}; if it is dead, rerun the same command"
    return f"{where}, updated {age} ago"


def _read_progress(store: Store) -> dict[str, Any] | None:
    try:
        progress = Progress(**json.loads(store.read(PROGRESS)))
    except FileNotFoundError:
        return None
    return asdict(progress)
