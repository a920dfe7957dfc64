"""What a command says at its end, for people: a short table, where to look, what to type next."""

from __future__ import annotations

from typing import Any

from jobs.prepare import PreparedJob
from jobs.progress import duration

ABOUT_STATUS = {
    "done": "done",
    "too_many_failures": "stopped: more rows failed than limits.max_failed_fraction allows",
    "interrupted": "interrupted; what is committed is safe",
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


def closing_lines(job: PreparedJob, summary: dict[str, Any], *, command: str) -> list[str]:
    """The end of a run, in a few lines."""
    counts, tokens, this = summary["counts"], summary["tokens"], summary["this_execution"]
    rates = this["rates"]
    by_status = ", ".join(f"{counts[name]:,} {name}" for name in ("ok", "truncated", "invalid", "failed"))
    lines = [
        f"{ABOUT_STATUS.get(summary['status'], summary['status'])} in {duration(this['timings'].get('total_s', 0.0))}",
        f"  rows      {counts['committed_rows']:,} of {counts['input_rows']:,} committed: {by_status}",
        f"  tokens    {tokens['input']:,} in ({tokens['cached']:,} cached), {tokens['generated']:,} out",
    ]
    if rates:
        lines.append(
            f"  rate      {rates['rows_per_s']:,.1f} rows/s, {rates['output_tokens_per_s']:,.0f} output tokens/s "
            f"over {duration(this['timings']['generate_s'])}"
        )
    if summary["error_kinds"]:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in summary["error_kinds"].items())
        lines.append(f"  errors    {kinds}")
    lines += _routing_lines(job, summary)
    lines.append(f"  output    {job.spec.output.path.rstrip('/')}/data/*.parquet, summary.json")
    lines.append(f"next: {next_command(summary, command)}")
    return lines


def next_command(summary: dict[str, Any], command: str) -> str:
    """What to type next."""
    output = "data/*.parquet"
    if summary["status"] == "interrupted" or summary["counts"]["missing_rows"]:
        return f"{command}   (continues where this one stopped)"
    if summary["counts"]["failed"]:
        return f"{command.replace(' run ', ' retry ')}   (does the failed rows again)"
    return f"read {output}; running the same command again finds nothing to do"


def _routing_lines(job: PreparedJob, summary: dict[str, Any]) -> list[str]:
    routing = summary["routing"]
    if routing["off_because"]:
        return [f"  routing   off: {routing['off_because']}"]
    invalid = f", {routing['invalid_samples']:,} samples with impossible ids" if routing["invalid_samples"] else ""
    moe = job.moe
    shape = f"{moe.num_layers} layers x {moe.num_experts} experts, top {moe.top_k}" if moe else ""
    return [f"  routing   {shape} -> routing/*.parquet{invalid}"]
