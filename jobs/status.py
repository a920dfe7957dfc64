"""How a run is doing, from its files alone."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
    store = Store(_output_of(output))
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
        else {"host": owner.process.host, "pid": owner.process.pid, "run_id": owner.run_id},
        "progress": _read_progress(store),
        "summary": read_summary(store),
        "last_events": ledger.events()[-5:],
    }


def status_lines(report: dict[str, Any]) -> list[str]:
    """The same for people."""
    shards = f"{report['committed_shards']:,} of {report['shards']:,} shards"
    lines = [f"{report['output']}: {report['committed_rows']:,} of {report['rows']:,} rows committed, {shards}"]
    progress, summary = report["progress"], report["summary"]
    if progress is not None and progress["state"] != "ended":
        age = time.time() - progress["updated_at"]
        owner = report["owner"] or {}
        lines.append(Progress(**progress).line())
        where = f"run {progress['run_id']} on {owner.get('host')}, pid {owner.get('pid')}"
        if age > STALE_S:
            lines.append(f"{where} has been silent for {duration(age)}; if it is dead, rerun the same command")
        else:
            lines.append(f"{where}, updated {duration(age)} ago")
    if summary is not None:
        counts = summary["counts"]
        lines.append(
            f"last finished execution: {summary['status']} (exit {summary['exit_code']}), {counts['ok']:,} ok, "
            f"{counts['truncated']:,} truncated, {counts['invalid']:,} invalid, {counts['failed']:,} failed"
        )
    return lines


def _output_of(text: str) -> str:
    if text.endswith((".yaml", ".yml")) and Path(text).is_file():
        from jobs.spec import load_spec

        return load_spec(text).output.path
    return text


def _read_progress(store: Store) -> dict[str, Any] | None:
    try:
        progress = Progress(**json.loads(store.read(PROGRESS)))
    except FileNotFoundError:
        return None
    return asdict(progress)
