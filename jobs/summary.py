"""What a run leaves besides its parts: `routing/`, a dataset card, and last of all `summary.json`.

All of it is computed from the footers of committed parts; doing it again changes nothing but times.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.card import dataset_card
from jobs.prepare import PreparedJob
from pipeline.counters import RunCounters
from pipeline.resume import fingerprint_digest
from pipeline.routing_report import coselection_table, experts_table, layers_table
from pipeline.storage import Store

SUMMARY = "summary.json"
SUMMARY_VERSION = 1


@dataclass(slots=True)
class Execution:
    """What one process did toward a run; times in seconds."""

    run_id: str
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    began: float = field(default_factory=time.monotonic)
    """The same on the clock that times are taken with."""
    timings: dict[str, float] = field(default_factory=dict)
    rows_done: int = 0
    """Rows finished by this execution, whether or not their shard was committed."""
    input_tokens: int = 0
    generated_tokens: int = 0
    copied: dict[str, int] = field(default_factory=dict)
    """Rows of `rows_done` that took over the outcome of a row with the same request, and their tokens, which no engine
    computed and the counts above leave out."""
    replica_losses: list[dict[str, str]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    """What went wrong while an execution that was to end early did so."""

    def rates(self) -> dict[str, float]:
        """Tokens and rows per second of generating, loading of the engine excluded."""
        seconds = self.timings.get("generate_s", 0.0)
        if seconds <= 0:
            return {}
        return {
            "rows_per_s": round(self.rows_done / seconds, 3),
            "input_tokens_per_s": round(self.input_tokens / seconds, 3),
            "output_tokens_per_s": round(self.generated_tokens / seconds, 3),
        }


def write_summary(
    store: Store,
    job: PreparedJob,
    totals: RunCounters,
    execution: Execution,
    *,
    status: str,
    exit_code: int,
    labels: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `routing/*.parquet`, `README.md` and then `summary.json`; returns the summary.

    `labels` is what a labelling run found, see `jobs.label_report`.
    """
    if totals.moe is not None:
        for name, table in routing_tables(totals).items():
            store.put(f"routing/{name}.parquet", _parquet(table))
    summary = build_summary(job, totals, execution, status=status, exit_code=exit_code)
    if labels is not None:
        summary["labels"] = labels
    store.put("README.md", dataset_card(job, summary).encode())
    store.put(SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False).encode())
    return summary


def routing_tables(totals: RunCounters) -> dict[str, pa.Table]:
    """The run-level routing tables by file name."""
    return {
        "experts": experts_table(totals),
        "layers": layers_table(totals),
        "coselection": coselection_table(totals),
    }


def build_summary(
    job: PreparedJob, totals: RunCounters, execution: Execution, *, status: str, exit_code: int
) -> dict[str, Any]:
    """Return `summary.json` as data; see the README for its fields."""
    rows = totals.totals
    return {
        "schema_version": SUMMARY_VERSION,
        "name": job.spec.name,
        "run_id": execution.run_id,
        "status": status,
        "exit_code": exit_code,
        "counts": {
            "input_rows": job.plan.num_rows,
            "committed_rows": rows.num_rows,
            "missing_rows": job.plan.num_rows - rows.num_rows,
            "output_rows": rows.num_samples,
            **{name: rows.samples.get(name, 0) for name in ("ok", "truncated", "invalid", "failed")},
            "shards": job.plan.num_shards,
        },
        "error_kinds": dict(sorted(rows.error_kinds.items())),
        "tokens": {
            "input": rows.num_input_tokens,
            "cached": rows.num_cached_tokens,
            "generated": rows.num_generated_tokens,
        },
        "routing": {
            "level": job.spec.routing.level if job.moe else "off",
            "off_because": job.routing_off_because,
            "invalid_samples": rows.num_routing_invalid,
        },
        "this_execution": {
            "started_at": execution.started_at.isoformat(timespec="seconds"),
            "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "timings": {name: round(seconds, 3) for name, seconds in execution.timings.items()},
            "rows_done": execution.rows_done,
            "input_tokens": execution.input_tokens,
            "generated_tokens": execution.generated_tokens,
            "copied": execution.copied,
            "rates": execution.rates(),
            "replica_losses": execution.replica_losses,
            "error": execution.error,
        },
        "model": job.model.describe(),
        "versions": execution.versions,
        "fingerprint": fingerprint_digest(job.fingerprint),
    }


def read_summary(store: Store) -> dict[str, Any] | None:
    """The last summary written, None when no execution ended yet."""
    try:
        summary: dict[str, Any] = json.loads(store.read(SUMMARY))
    except FileNotFoundError:
        return None
    return summary


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data
