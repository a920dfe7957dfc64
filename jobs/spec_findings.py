"""What a spec asks for and whether it is there: model, rows, output. Reads headers and some rows, no weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.fleet_plan import FleetDemand, PlannedModel, planned_model, refuse_impossible
from cluster.precision import model_precision
from jobs.estimate import estimate
from jobs.findings import Finding, fine, refusal
from jobs.node_findings import Needs
from jobs.prepare import prepare, routing_off_reason
from jobs.storage_findings import input_finding, output_finding
from pipeline.engine import MoeShape
from pipeline.errors import RunError, SpecError
from pipeline.model import ModelFiles, cache_directory, fetch_model, read_config
from pipeline.settings import TINY
from pipeline.storage import split_url

SAMPLE_ROWS = 64
"""Rows to template: enough to see a template that fails."""


@dataclass(frozen=True, slots=True)
class KnownJob:
    """A spec, and what could be made out of it."""

    spec: Any
    files: ModelFiles
    moe: MoeShape | None
    """Routing that it records."""
    planned: PlannedModel | None = None
    """None for a model whose memory can't be counted."""
    needs: Needs = field(default_factory=Needs)

    @property
    def demand(self) -> FleetDemand | None:
        """The fleet that it starts; None for a job on a warm fleet."""
        if self.spec.fleet.attach is not None:
            return None
        return FleetDemand(self.spec.fleet, self.spec.model, self.files.path, self.moe)

    @property
    def model_folder(self) -> str:
        """Where a node would fetch the model to."""
        source = self.spec.model.source
        if source == TINY or split_url(source)[0] != "file" or _is_directory(source):
            return str(cache_directory())
        return str(Path(self.files.path).parents[2])  # the hub's cache / models--x--y / snapshots / z


def spec_findings(spec: Any) -> tuple[KnownJob | None, list[Finding]]:
    """Look at input, output and model of a valid spec; no job where the model can't be used."""
    about_input = input_finding(spec.input.path)
    found = [about_input, output_finding(spec.output.path)]
    try:
        files = fetch_model(spec.model, weights=False)
        off = routing_off_reason(spec, files)
        refuse_impossible(spec.fleet, spec.model, files.path)
    except RunError as error:
        return None, [*found, refusal("model", error)]
    found.append(fine("model", f"{spec.model.source}: {files.architecture} in {files.path}"))
    if about_input.level == "ok":
        found += _row_findings(spec)
    moe = None if off else files.moe
    try:
        planned = planned_model(spec.model, files.path, spec.model.engine_args)
        return KnownJob(spec, files, moe, planned, _needs(spec, files, planned)), found
    except SpecError as error:
        return KnownJob(spec, files, moe), [*found, refusal("model", error, level="warning")]


def _row_findings(spec: Any) -> list[Finding]:
    """Columns, the template on some rows, and what the output holds already."""
    try:
        seen = estimate(prepare(spec, weights=False), sample_rows=SAMPLE_ROWS)
    except RunError as error:
        return [refusal("rows", error)]
    found = [
        fine("rows", f"{seen['rows']:,} rows; the longest prompt seen that fits has {seen['longest_prompt']:,} tokens")
    ]
    failing = seen["rows_that_will_fail"]
    if failing:
        kinds = ", ".join(f"{count} {kind}" for kind, count in failing.items())
        cure = "correct prompt or input, or raise limits.max_failed_fraction; `tramontane preview` shows some rows"
        said = f"of {seen['rows_tokenized']:,} looked at will fail: {kinds}"
        if seen["too_many_will_fail"]:
            said += ", more than limits.max_failed_fraction allows"
        found.append(Finding("problem" if seen["too_many_will_fail"] else "warning", "rows", said, cure))
    return [*found, *_past_findings(seen["output"])]


def _past_findings(output: dict[str, Any]) -> list[Finding]:
    """By `jobs.estimate.describe_output`."""
    if output["state"] == "refused":
        said = f"{output['path']} holds results of another job: {'; '.join(output['changed'])}"
    elif output["state"] == "unknown files":
        said = f"{output['path']} holds parts of no known run"
    else:
        return []
    return [Finding("problem", "output", said, "give another output.path, or undo the change")]


def _needs(spec: Any, files: ModelFiles, planned: PlannedModel) -> Needs:
    local = _is_directory(spec.model.source)
    stored = model_precision(read_config(Path(files.path) / "config.json"), dtype="auto", engine_args={})
    return Needs(
        fetched=0 if local or spec.model.source == TINY else planned.size.weight_bytes(stored),
        directory=files.path if local else None,
        engine=planned.size.weight_bytes(planned.demand.precision),
    )


def _is_directory(source: str) -> bool:
    scheme, path = split_url(source)
    return scheme == "file" and Path(path).expanduser().is_dir()
