"""What a run would do and take, before it starts: exact counts of rows, and of tokens up to a sample's interval.

Templates rows with the run's own code, in this process; starts neither Ray nor an engine and writes nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from jobs.prepare import PreparedJob
from pipeline.ledger import Ledger
from pipeline.parts import committed_parts
from pipeline.read import read_shard
from pipeline.resume import changed_fields, fingerprint_digest
from pipeline.rows import ERROR, PROMPT_IDS, SAMPLING
from pipeline.sampling import sampling_from_json
from pipeline.storage import Store
from pipeline.templating import TemplateStage

Z95 = 1.96
"""Two-sided 95% quantile of the normal distribution."""


@dataclass(slots=True)
class _Seen:
    """What templating said of the rows looked at."""

    input_tokens: list[int] = field(default_factory=list)
    output_limit: list[int] = field(default_factory=list)
    """n x max_tokens of each sound row."""
    errors: Counter[str] = field(default_factory=Counter)


def estimate(job: PreparedJob, *, sample_rows: int) -> dict[str, Any]:
    """Template the rows, or an even sample of shards with at least `sample_rows` rows, and add it all up."""
    plan = job.plan
    chosen = even_sample(plan.num_shards, math.ceil(sample_rows / plan.rows_per_shard))
    seen, stage = _Seen(), TemplateStage(job.template)
    try:
        for index in chosen:
            shard = plan.shard(index)
            _look(stage(read_shard(plan.files[shard.file_index], shard, job.read_schema)), seen)
    finally:
        stage.close()
    exact = len(chosen) == plan.num_shards
    return {
        "name": job.spec.name,
        "files": len(plan.files),
        "input_bytes": sum(file.size for file in plan.files),
        "rows": plan.num_rows,
        "shards": plan.num_shards,
        "rows_per_shard": plan.rows_per_shard,
        "rows_tokenized": len(seen.input_tokens) + seen.errors.total(),
        "exact": exact,
        "input_tokens": total_with_interval(seen.input_tokens, seen.errors.total(), plan.num_rows),
        "max_output_tokens": total_with_interval(seen.output_limit, seen.errors.total(), plan.num_rows),
        "longest_prompt": max(seen.input_tokens, default=0),
        "rows_that_will_fail": dict(seen.errors),
        "output": describe_output(job),
        "model": job.model.describe(),
        "routing_off_because": job.routing_off_because,
        "fleet": [pool.model_dump(mode="json") for pool in job.spec.fleet.pools],
        "fingerprint": fingerprint_digest(job.fingerprint),
    }


def even_sample(num_items: int, wanted: int) -> list[int]:
    """Indices of `wanted` items spread evenly over all, or all if there are no more than that."""
    if num_items <= wanted:
        return list(range(num_items))
    return [(2 * position + 1) * num_items // (2 * wanted) for position in range(wanted)]


def total_with_interval(values: list[int], num_failed: int, num_rows: int) -> dict[str, int]:
    """Scale a sample's sum to all rows, with the 95% interval of the mean under simple random sampling.

    Rows of one shard resemble each other more than random ones, so the true interval is somewhat wider.
    """
    everything = [*values, *[0] * num_failed]
    count = len(everything)
    if count == 0:
        return {"total": 0, "low": 0, "high": 0}
    mean = sum(everything) / count
    total = round(mean * num_rows)
    if count >= num_rows or count < 2:
        return {"total": total, "low": total, "high": total}
    variance = sum((value - mean) ** 2 for value in everything) / (count - 1)
    half = Z95 * math.sqrt(variance / count * (1 - count / num_rows)) * num_rows
    return {"total": total, "low": max(0, round(total - half)), "high": round(total + half)}


def describe_output(job: PreparedJob) -> dict[str, Any]:
    """What lies in the output now, and what `run` would make of it."""
    store = Store(job.spec.output.path)
    ledger = Ledger(store)
    stored = ledger.fingerprint()
    if stored is None:
        return {"path": store.root, "state": "empty" if not committed_parts(store) else "unknown files"}
    changes = changed_fields(stored, job.fingerprint)
    if changes:
        return {"path": store.root, "state": "refused", "changed": [str(change) for change in changes]}
    todo = ledger.todo()
    left = sum(ledger.plan.shard(index).num_rows for index in todo)
    state = "resumes" if todo else "complete"
    return {"path": store.root, "state": state, "rows_committed": ledger.plan.num_rows - left, "rows_left": left}


def estimate_lines(report: dict[str, Any]) -> list[str]:
    """The same for people."""
    tokens, limit, output = report["input_tokens"], report["max_output_tokens"], report["output"]
    lines = [
        f"input     {report['rows']:,} rows in {report['files']:,} files, {report['input_bytes']:,} bytes",
        f"shards    {report['shards']:,} of up to {report['rows_per_shard']:,} rows",
        f"prompts   {_total(tokens, report)} tokens; longest {report['longest_prompt']:,} of the rows looked at",
        f"output    at most {_total(limit, report)} tokens (n x max_tokens; most answers are shorter)",
    ]
    failing = ", ".join(f"{kind} {count:,}" for kind, count in report["rows_that_will_fail"].items())
    lines.append(f"failures  {failing or 'none'} of {report['rows_tokenized']:,} rows looked at")
    model = report["model"]
    shape = (
        f"{model['layers']} layers x {model['experts']} experts, top {model['top_k']}" if model["experts"] else "dense"
    )
    lines.append(f"model     {model['source']}: {model['architecture']}, {shape}")
    if report["routing_off_because"]:
        lines.append(f"routing   off: {report['routing_off_because']}")
    for pool in report["fleet"]:
        lines.append(f"fleet     {pool['replicas']} x {pool['gpu']}, tensor parallel {pool['tensor_parallel']}")
    lines.append(f"writes    {output['path']}: {output['state']}{_committed(output)}")
    lines += [f"          changed: {change}" for change in output.get("changed", [])]
    return lines


def _total(total: dict[str, int], report: dict[str, Any]) -> str:
    if report["exact"]:
        return f"{total['total']:,}"
    return f"about {total['total']:,} (95% interval {total['low']:,} to {total['high']:,})"


def _committed(output: dict[str, Any]) -> str:
    if "rows_committed" not in output:
        return ""
    return f", {output['rows_committed']:,} rows committed, {output['rows_left']:,} left"


def _look(prompts: pa.Table, seen: _Seen) -> None:
    columns = (prompts.column(name).to_pylist() for name in (PROMPT_IDS, SAMPLING, ERROR))
    for ids, sampling, error in zip(*columns, strict=True):
        if error is not None or ids is None:
            seen.errors[(error or {}).get("kind", "unknown")] += 1
            continue
        settings = sampling_from_json(sampling)
        seen.input_tokens.append(len(ids))
        seen.output_limit.append(settings.n * settings.max_tokens)
