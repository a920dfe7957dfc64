"""What a command says at its end, for people: a short table, where to look, what to type next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jobs.label_report import label_lines
from jobs.prepare import PreparedJob
from jobs.progress import duration
from jobs.synthesis_text import synthesis_lines
from pipeline.errors import RETRYABLE_KINDS

HEADLINES = {
    "done": "done in {time}",
    "too_many_failures": "stopped after {time}: more rows failed than limits.max_failed_fraction allows",
    "interrupted": "interrupted after {time}; what is committed is safe",
}


def id_warnings(job: PreparedJob) -> list[str]:
    """Say what is odd about the spec's id column; nothing if all is well."""
    report = job.check_ids()
    if report is None or not (report.nulls or report.duplicates):
        return []
    looked = "" if report.complete else f" among the first {report.checked_rows:,} rows"
    warning = (
        f"warning: id column {job.spec.input.id!r} has {report.nulls:,} nulls and {report.duplicates:,} duplicates"
        f"{looked}; rows are identified by (input_file, input_row), so none is lost, but don't join on that column"
    )
    return [warning]


def closing_lines(
    job: PreparedJob, summary: dict[str, Any], *, spec_words: Sequence[str], began: datetime
) -> list[str]:
    """The end of a run, in a few lines.

    Args:
        job: what was run.
        summary: what came of it; an earlier execution's when there was nothing left to do.
        spec_words: arguments that name this job on the command line: the spec and its overrides.
        began: when the command started.
    """
    counts, tokens, this = summary["counts"], summary["tokens"], summary["this_execution"]
    rates = this["rates"]
    by_status = ", ".join(f"{counts[name]:,} {name}" for name in ("ok", "truncated", "invalid", "failed"))
    of = f"{counts['output_rows']:,} samples, " if job.spec.sampling.n > 1 else ""
    lines = [
        _headline(summary, began),
        f"  rows      {counts['committed_rows']:,} of {counts['input_rows']:,} committed: {of}{by_status}",
        f"  tokens    {tokens['input']:,} in ({tokens['cached']:,} cached), {tokens['generated']:,} out",
    ]
    if rates:
        lines.append(
            f"  rate      {rates['rows_per_s']:,.1f} rows/s, {rates['output_tokens_per_s']:,.0f} output tokens/s "
            f"over {duration(this['timings']['generate_s'])}"
        )
    if this.get("copied", {}).get("rows"):
        copied = this["copied"]
        lines.append(
            f"  saved     {copied['rows']:,} rows with the same prompt as another: "
            f"{copied['input_tokens']:,} tokens in, {copied['generated_tokens']:,} out"
        )
    if summary["error_kinds"]:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in summary["error_kinds"].items())
        lines.append(f"  errors    {kinds}")
    if "labels" in summary:
        lines += label_lines(summary["labels"])
    makes_records = "synthesis" in summary
    rows = f"{job.spec.output.path.rstrip('/')}/{'records' if makes_records else 'data'}/*.parquet"
    if counts["committed_rows"] or not counts["input_rows"]:  # an interrupted run may have written nothing
        lines += _routing_lines(job, summary)
        lines += synthesis_lines(summary)
        beside = "dropped/, synthesis.json; first answers in data/" if makes_records else "summary.json"
        lines.append(f"  output    {rows}, {beside}")
    if job.spec.input.format == "openai_batch":
        export = shlex.join(["tramontane", "export", job.spec.output.path, "--openai-batch"])
        lines.append(f"  openai    `{export} FOLDER` makes output.jsonl and error.jsonl of it")
    lines.append(f"next: {next_step(summary, shlex.join(spec_words), rows)}")
    return lines


def next_step(summary: dict[str, Any], spec: str, data: str) -> str:
    """What to do next: usually a command to type."""
    if summary["status"] == "too_many_failures":
        return (
            f"read the column `error` of {data}; mend the cause or raise limits.max_failed_fraction, then "
            f"`tramontane run {spec}`"
        )
    if summary["counts"]["missing_rows"]:
        return f"tramontane run {spec}   (continues where this one stopped)"
    if not summary["counts"]["failed"]:
        return f"read {data}; running the same command again finds nothing to do"
    if RETRYABLE_KINDS & summary["error_kinds"].keys():
        return f"tramontane retry {spec}   (does the failed rows again)"
    return f"read the column `error` of {data}; these rows would fail again as they are"


def _headline(summary: dict[str, Any], began: datetime) -> str:
    this = summary["this_execution"]
    text = HEADLINES[summary["status"]].format(time=duration(this["timings"].get("total_s", 0.0)))
    is_earlier = datetime.fromisoformat(this["started_at"]) < began.replace(microsecond=0)
    return f"the execution of {this['started_at']}: {text}" if is_earlier else text


def _routing_lines(job: PreparedJob, summary: dict[str, Any]) -> list[str]:
    routing = summary["routing"]
    if routing["off_because"]:
        return [f"  routing   off: {routing['off_because']}"]
    invalid = f", {routing['invalid_samples']:,} samples with impossible ids" if routing["invalid_samples"] else ""
    moe = job.moe
    shape = f"{moe.num_layers} layers x {moe.num_experts} experts, top {moe.top_k}" if moe else ""
    return [f"  routing   {shape} -> routing/*.parquet{invalid}"]
