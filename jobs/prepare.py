"""Everything that can be known before a run spends anything: files, columns, model, shards, fingerprint.

Reads headers, footers and small files only; starts neither Ray nor an engine. `plan`, `preview`, `run` and `retry` all
begin here, so they agree. Whatever is wrong with spec or input is found here and is exit 2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pyarrow as pa

from jobs.fingerprint import fingerprint_fields
from pipeline.engine import MoeShape
from pipeline.errors import SpecError
from pipeline.ids import IdReport, check_ids
from pipeline.inputs import list_inputs
from pipeline.model import ModelFiles, fetch_model
from pipeline.rows import output_schema, routing_type
from pipeline.settings import JobSpec
from pipeline.shards import Plan, make_plan
from pipeline.templating import TemplateSettings, needed_columns
from pipeline.user_schema import user_schema


@dataclass(frozen=True, slots=True)
class PreparedJob:
    """A spec together with what it turned out to mean."""

    spec: JobSpec
    model: ModelFiles
    plan: Plan
    read_schema: pa.Schema
    """The user's columns that are read: carried ones and those that the prompt needs."""
    output_schema: pa.Schema
    template: TemplateSettings
    fingerprint: dict[str, str]
    routing_off_because: str | None
    """Why no routing is recorded, or None when it is."""

    @property
    def moe(self) -> MoeShape | None:
        """Shape of the routing that is recorded, None when none is."""
        return None if self.routing_off_because else self.model.moe

    @property
    def num_replicas(self) -> int:
        """Engines over all pools."""
        return sum(pool.replicas for pool in self.spec.fleet.pools)

    @property
    def input_root(self) -> str:
        """Folder that all input files share: identities below it survive a move of the whole input."""
        return common_folder([file.path for file in self.plan.files])

    def with_plan(self, plan: Plan) -> PreparedJob:
        """The same job by another plan: a resumed run works by the one it began with."""
        return replace(self, plan=plan)

    def tolerating_failures(self) -> PreparedJob:
        """The same job, for a look at some rows: however many fail, it goes on."""
        limits = self.spec.limits.model_copy(update={"max_failed_fraction": 1.0})
        return replace(self, spec=self.spec.model_copy(update={"limits": limits}))

    def too_many_failed(self, num_failed: int) -> bool:
        """Whether so many failed rows are more than `limits.max_failed_fraction` of the whole run allows."""
        return num_failed > self.spec.limits.max_failed_fraction * self.plan.num_rows

    def check_ids(self) -> IdReport | None:
        """Look for nulls and duplicates in the spec's id column; None when there is none. Reads that column."""
        column = self.spec.input.id
        return None if column is None else check_ids(self.plan.files, column)


def prepare(spec: JobSpec, *, weights: bool = True) -> PreparedJob:
    """Look at input and model, and cut the plan. Without `weights` the model's big files aren't fetched.

    Raises:
        SpecError: a path matches nothing, a column is missing, types don't unify, the model can't be used, ...
        InfrastructureError: storage or hub can't be reached.
    """
    files = list_inputs(spec.input.path)
    needed = needed_columns(spec.prompt, spec.sampling) | _named_columns(spec)
    read_schema = user_schema(files, required=sorted(needed), carried=spec.output.keep)
    model = fetch_model(spec.model, weights=weights)
    off = routing_off_reason(spec, model)
    moe = None if off else model.moe
    routing = routing_type(moe, tokens=spec.routing.level == "tokens") if moe else None
    num_replicas = sum(pool.replicas for pool in spec.fleet.pools)
    plan = make_plan(
        files,
        replicas=num_replicas,
        limit=spec.input.limit,
        samples=spec.sampling.n,
        result_bytes=result_bytes(spec, moe),
    )
    identity = {file.path: [file.size, file.version] for file in plan.files}
    return PreparedJob(
        spec=spec,
        model=model,
        plan=plan,
        read_schema=read_schema,
        output_schema=output_schema(_kept(read_schema, spec), routing),
        template=TemplateSettings(
            prompt=spec.prompt,
            sampling=spec.sampling,
            model_dir=model.path,
            max_model_len=spec.model.max_model_len,
        ),
        fingerprint=fingerprint_fields(spec, model_identity={"digest": model.digest}, input_identity=identity),
        routing_off_because=off,
    )


def result_bytes(spec: JobSpec, moe: MoeShape | None) -> int:
    """Most bytes that a sample adds to its row: 4 a token of text, 8 per layer and expert, and expert ids if kept."""
    size = 4 * spec.sampling.max_tokens
    if moe is not None:
        size += 8 * moe.num_layers * moe.num_experts
        if spec.routing.level == "tokens":
            size += spec.model.max_model_len * moe.num_layers * moe.top_k
    return size


def routing_off_reason(spec: JobSpec, model: ModelFiles) -> str | None:
    """Why this run records no routing, or None when it does.

    Raises:
        SpecError: expert ids are asked for, but don't fit the byte that they are stored in.
    """
    if spec.routing.level == "off":
        return "routing.level is off"
    if model.moe is None:
        return f"{model.architecture} is a dense model: it has no router"
    if spec.routing.level == "tokens" and model.moe.num_experts > 256:
        raise SpecError(
            f"routing.level tokens stores ids as bytes, but there are {model.moe.num_experts} experts; use counts"
        )
    return None


def common_folder(paths: list[str]) -> str:
    """Longest folder that contains all paths, with its final slash; URLs and local paths alike."""
    folders = [path.rpartition("/")[0].split("/") for path in paths]
    shared = 0
    while folders and all(shared < len(f) and f[shared] == folders[0][shared] for f in folders):
        shared += 1
    return "/".join([*folders[0][:shared], ""]) if folders else ""


def _named_columns(spec: JobSpec) -> set[str]:
    slice_by = spec.routing.slice_by if spec.routing.level != "off" else None
    return {name for name in (slice_by, spec.input.id) if name is not None}


def _kept(schema: pa.Schema, spec: JobSpec) -> list[pa.Field]:
    keep = spec.output.keep
    if keep == "all":
        return list(schema)
    return [field for field in schema if field.name in keep] if isinstance(keep, list) else []
