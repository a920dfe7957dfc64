"""What a run would do and take, before it starts: exact counts of rows, and of tokens up to a sample's interval.

Templates rows with the run's own code, in this process; starts neither Ray nor an engine and writes nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from cluster.capacity import describe_nodes
from cluster.hardware import Hardware, assumed_hardware, seen_hardware
from cluster.nodes import read_nodes
from cluster.roofline import TokenTotal, Work
from jobs.chain import read_chain
from jobs.estimate_steps import Step, columns_of_steps, later_steps, whole_work
from jobs.gpu_plan import Question, expected_output, plan_gpus
from jobs.gpu_plan_text import gpu_lines
from jobs.job_spec import JobSpec
from jobs.prepare import PreparedJob
from jobs.spec_incremental import SINCE_LAST_RUN
from pipeline.ledger import Ledger
from pipeline.parts import committed_parts
from pipeline.read import read_shard
from pipeline.resume import changed_fields, fingerprint_digest
from pipeline.rows import ERROR, PROMPT_IDS, sampling_texts
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
    chars: Counter[str] = field(default_factory=Counter)
    """Of the columns that later steps insert into their prompts."""


@dataclass(frozen=True, slots=True)
class Machines:
    """What the job is to be planned on."""

    hardware: Hardware | None = None
    """None when no cluster was looked at."""
    assumed: bool = False
    """Supposed rather than seen."""
    where: str = "none was looked at; name one with --ray ADDRESS, or suppose one: --assume H100-80G:8x4"
    """In words."""


def estimate(job: PreparedJob, *, sample_rows: int, machines: Machines | None = None) -> dict[str, Any]:
    """Template the rows, or an even sample of shards with at least `sample_rows` rows, and add it all up."""
    plan = job.plan
    chosen = even_sample(plan.num_shards, math.ceil(sample_rows / plan.rows_per_shard))
    seen, stage = _Seen(), TemplateStage(job.template)
    try:
        for index in chosen:
            shard = plan.shard(index)
            table = stage(read_shard(plan.files[shard.file_index], shard, job.read_schema))
            _look(table, seen)
            _measure(table, job, seen)
    finally:
        stage.close()
    exact = len(chosen) == plan.num_shards
    looked_at = len(seen.input_tokens) + seen.errors.total()
    mean_chars = {name: count / max(1, looked_at) for name, count in seen.chars.items()}
    input_tokens = total_with_interval(seen.input_tokens, seen.errors.total(), plan.num_rows)
    output_limit = total_with_interval(seen.output_limit, seen.errors.total(), plan.num_rows)
    return {
        "name": job.spec.name,
        "files": len(plan.files),
        "input_bytes": sum(file.size for file in plan.files),
        "rows": plan.num_rows,
        "shards": plan.num_shards,
        "rows_per_shard": plan.rows_per_shard,
        "rows_tokenized": looked_at,
        "exact": exact,
        "input_tokens": input_tokens,
        "max_output_tokens": output_limit,
        "longest_prompt": max(seen.input_tokens, default=0),
        "rows_that_will_fail": dict(seen.errors),
        "too_many_will_fail": too_many_will_fail(job, seen.errors.total(), looked_at),
        "output": describe_output(job),
        "model": job.model.describe(),
        "routing_off_because": job.routing_off_because,
        "fleet": [pool.model_dump(mode="json") for pool in job.spec.fleet.pools],
        "gpus": _gpus(job, input_tokens, output_limit, machines or Machines(), mean_chars),
        "fingerprint": fingerprint_digest(job.fingerprint),
    }


def too_many_will_fail(job: PreparedJob, failing: int, looked_at: int) -> bool:
    """Whether rows that can't be templated alone are, by their share of those looked at, more than the limit allows."""
    return failing > job.spec.limits.max_failed_fraction * looked_at


def _measure(table: pa.Table, job: PreparedJob, seen: _Seen) -> None:
    if job.spec.synthesize is None:
        return
    for name in frozenset[str]().union(*columns_of_steps(job.spec.synthesize)) & set(table.column_names):
        seen.chars[name] += sum(len(str(value)) for value in table.column(name).to_pylist())


def _gpus(
    job: PreparedJob,
    inputs: dict[str, int],
    limit: dict[str, int],
    machines: Machines,
    mean_chars: Mapping[str, float],
) -> dict[str, Any]:
    """What the job would take on GPUs."""
    spec, is_exact = job.spec, job.spec.sampling.ignore_eos
    output = expected_output(TokenTotal(**limit), is_exact=is_exact)
    work = Work(job.plan.num_rows * spec.sampling.n, TokenTotal(**inputs), output)
    steps = _later(job, work, mean_chars)
    question = Question(spec.fleet, spec.model, job.model.path, whole_work(work, steps))
    planned = plan_gpus(question, machines.hardware, assumed=machines.assumed)
    return {
        "cluster": machines.where,
        "was_looked_at": machines.hardware is not None,
        "notes": list(planned.notes),
        "output_tokens": asdict(output),
        "output_is_exact": is_exact,
        "later_steps": [step.to_json() for step in steps],
        "pools": [pool.to_json() for pool in planned.pools],
        "total": planned.total(),
    }


def _later(job: PreparedJob, work: Work, mean_chars: Mapping[str, float]) -> list[Step]:
    """What a synthesis goes on with; samples of a row share its prompt in the run, but each goes on by itself."""
    if job.spec.synthesize is None:
        return []
    n, inputs = job.spec.sampling.n, work.input_tokens
    prompts = TokenTotal(n * inputs.total, n * inputs.low, n * inputs.high)
    return later_steps(
        job.spec.synthesize,
        samples=work.num_sequences,
        prompts=prompts,
        answers=work.output_tokens,
        column_chars=mean_chars,
    )


def machines_of(spec: JobSpec, assume: Sequence[str], ray: str | None) -> Machines:
    """What to plan on: what is assumed, else the cluster that is named, else nothing.

    Raises:
        SpecError: an assumption is malformed, or there is no such cluster.
    """
    if assume:
        hardware = assumed_hardware(assume, spec.fleet.gpu_types)
        nodes = ", ".join(f"{kind.num_nodes} x {kind.gpus_per_node} {kind.gpu}" for kind in hardware.kinds)
        return Machines(hardware, assumed=True, where=f"assumed: {nodes} (nodes x GPUs)")
    if ray in (None, "local"):
        return Machines()
    from jobs.ray_session import ray_session

    with ray_session(ray):
        nodes_seen = read_nodes()
    hardware = seen_hardware(nodes_seen, spec.fleet.gpu_types)
    return Machines(hardware, where=f"at {ray}: {describe_nodes(nodes_seen)}")


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
    if job.spec.input.new == SINCE_LAST_RUN:
        return {"path": store.root, "state": f"{len(read_chain(store).effective):,} runs, this would be the next"}
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
        f"prompts   {_total(tokens, report)} tokens; longest that fits {report['longest_prompt']:,}",
        f"output    at most {_total(limit, report)} tokens (n x max_tokens; most answers are shorter)",
    ]
    failing = ", ".join(f"{kind} {count:,}" for kind, count in report["rows_that_will_fail"].items())
    lines.append(f"failures  {failing or 'none'} of {report['rows_tokenized']:,} rows looked at")
    if report["too_many_will_fail"]:
        lines.append("          more than limits.max_failed_fraction allows: the run would stop early, exit code 1")
    model = report["model"]
    shape = (
        f"{model['layers']} layers x {model['experts']} experts, top {model['top_k']}" if model["experts"] else "dense"
    )
    lines.append(f"model     {model['source']}: {model['architecture']}, {shape}")
    if report["routing_off_because"]:
        lines.append(f"routing   off: {report['routing_off_because']}")
    for pool in report["fleet"]:
        lines.append(
            f"fleet     {_replicas(pool['replicas'])} x {pool['gpu']}, tensor parallel {pool['tensor_parallel']}"
        )
    lines += gpu_lines(report["gpus"])
    lines.append(f"writes    {output['path']}: {output['state']}{_committed(output)}")
    lines += [f"          changed: {change}" for change in output.get("changed", [])]
    return lines


def _replicas(replicas: int | str | dict[str, int]) -> str:
    return f"{replicas['min']} to {replicas['max']}" if isinstance(replicas, dict) else str(replicas)


def _total(total: dict[str, int], report: dict[str, Any]) -> str:
    if report["exact"]:
        return f"{total['total']:,}"
    return f"about {total['total']:,} (95% interval {total['low']:,} to {total['high']:,})"


def _committed(output: dict[str, Any]) -> str:
    if "rows_committed" not in output:
        return ""
    return f", {output['rows_committed']:,} rows committed, {output['rows_left']:,} left"


def _look(prompts: pa.Table, seen: _Seen) -> None:
    columns = (prompts.column(PROMPT_IDS).to_pylist(), sampling_texts(prompts), prompts.column(ERROR).to_pylist())
    for ids, sampling, error in zip(*columns, strict=True):
        if error is not None or ids is None:
            seen.errors[(error or {}).get("kind", "unknown")] += 1
            continue
        settings = sampling_from_json(sampling)
        seen.input_tokens.append(len(ids))
        seen.output_limit.append(settings.n * settings.max_tokens)
