"""Everything that can be known before a run spends anything: files, columns, model, shards, fingerprint.

Reads headers, footers and small files only; starts neither Ray nor an engine. `plan`, `preview`, `run` and `retry` all
begin here, so they agree. Whatever is wrong with spec or input is found here and is exit 2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pyarrow as pa

from cluster.fleet_plan import refuse_impossible
from jobs.fingerprint import fingerprint_fields
from jobs.job_spec import JobSpec
from jobs.new_rows import Source, source_of
from jobs.sampler_values import personas_identity, samplers_of
from jobs.synthesis_needs import columns_of_turns, refuse_what_records_lack
from pipeline.chat_encoder import choose_encoder
from pipeline.choice_tokens import choice_tree, yes_no_tree
from pipeline.choices import ChoiceTree
from pipeline.engine import MoeShape
from pipeline.errors import SpecError
from pipeline.ids import IdReport, check_ids
from pipeline.labels import LabelRule
from pipeline.model import ModelFiles, fetch_model
from pipeline.multi_labels import THRESHOLD, MultiLabelRule
from pipeline.openai_requests import KEPT_OF_REQUESTS
from pipeline.record_fields import refuse_taken_names
from pipeline.rows import output_schema, routing_type
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
    choices: ChoiceTree | None = None
    """The labels as the model's tokens, of a labelling job."""

    @property
    def moe(self) -> MoeShape | None:
        """Shape of the routing that is recorded, None when none is."""
        return None if self.routing_off_because else self.model.moe

    @property
    def num_replicas(self) -> int:
        """Engines over all pools."""
        return num_replicas(self.spec)

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


def prepare(spec: JobSpec, *, weights: bool = True, source: Source | None = None) -> PreparedJob:
    """Look at input and model, and cut the plan. Without `weights` the model's big files aren't fetched.

    `source` is what the spec's input was found to hold; None to look.

    Raises:
        SpecError: a path matches nothing, a column is missing, types don't unify, the model can't be used, ...
        InfrastructureError: storage or hub can't be reached.
    """
    source = source or source_of(spec)
    needed = needed_columns(spec.prompt, spec.sampling) | _named_columns(spec)
    if spec.synthesize is not None:
        needed = (needed | columns_of_turns(spec.synthesize)) - set(spec.synthesize.samplers)
    read_schema = user_schema(list(source.files), required=sorted(needed), carried=spec.output.keep)
    samplers = samplers_of(spec, common_folder([file.path for file in source.files]), read_schema.names)
    model = _fitting_model(spec, weights=weights)
    choices = label_choices(spec, model)
    if choices is not None:
        room = spec.sampling.model_copy(update={"max_tokens": max(map(len, choices.choices))})
        spec = spec.model_copy(update={"sampling": room})
    off = routing_off_reason(spec, model)
    moe = None if off else model.moe
    plan = make_plan(
        list(source.files),
        replicas=num_replicas(spec),
        limit=spec.input.limit,
        samples=spec.sampling.n,
        result_bytes=result_bytes(spec, moe),
        picks=source.picks,
    )
    identity = {file.path: [file.size, file.version] for file in plan.files} | personas_identity(spec, samplers)
    kept = [*_kept(read_schema, spec), *(samplers.fields if samplers else ())]
    return PreparedJob(
        spec=spec,
        model=model,
        plan=plan,
        read_schema=read_schema,
        output_schema=_rows_schema(spec, moe, kept),
        template=TemplateSettings(
            prompt=spec.prompt,
            sampling=spec.sampling,
            model_dir=model.path,
            max_model_len=spec.model.max_model_len,
            requests=spec.input.format == "openai_batch",
            samplers=samplers,
        ),
        fingerprint=fingerprint_fields(spec, model_identity={"digest": model.digest}, input_identity=identity),
        routing_off_because=off,
        choices=choices,
    )


def _fitting_model(spec: JobSpec, *, weights: bool) -> ModelFiles:
    model = fetch_model(spec.model, weights=False)
    # Before gigabytes are fetched for GPUs that can't hold them.
    check_context_length(spec, model)
    refuse_impossible(spec.fleet, spec.model, model.path)
    return fetch_model(spec.model) if weights else model


def _rows_schema(spec: JobSpec, moe: MoeShape | None, kept: list[pa.Field]) -> pa.Schema:
    if spec.synthesize is not None:
        refuse_taken_names(field.name for field in kept)
        refuse_what_records_lack(spec.synthesize, [field.name for field in kept])
    routing = routing_type(moe, tokens=spec.routing.level == "tokens") if moe else None
    rule = label_rule(spec)
    return output_schema(kept, routing, extra=rule.fields() if rule else ())


def label_choices(spec: JobSpec, model: ModelFiles) -> ChoiceTree | None:
    """The labels of a labelling job as this model's tokens.

    Raises:
        SpecError: the model can't tell them apart.
    """
    if spec.label is None:
        return None
    encoder = choose_encoder(model.path, marker_text=spec.prompt.marker_text)
    return (yes_no_tree if spec.label.multi else choice_tree)(encoder, spec.label.names)


def label_rule(spec: JobSpec) -> LabelRule | MultiLabelRule | None:
    """How a labelling job makes labels of probabilities."""
    label = spec.label
    if label is None:
        return None
    if label.multi:
        threshold = THRESHOLD if label.threshold is None else label.threshold
        return MultiLabelRule(label.names, label.temperature, threshold, label.abstain_below, label.default)
    return LabelRule(label.names, label.temperature, label.abstain_below, label.default)


def num_replicas(spec: JobSpec) -> int:
    """Engines to prepare for; a pool that takes as many as there are counts for 16, which makes shards small enough."""
    return sum(16 if pool.most is None else pool.most for pool in spec.fleet.pools)


def result_bytes(spec: JobSpec, moe: MoeShape | None) -> int:
    """Most bytes that a sample adds to its row: 4 a token of text, 8 per layer and expert, and expert ids if kept."""
    size = 4 * spec.sampling.max_tokens
    if moe is not None:
        size += 8 * moe.num_layers * moe.num_experts
        if spec.routing.level == "tokens":
            size += spec.model.max_model_len * moe.num_layers * moe.top_k
    return size


def check_context_length(spec: JobSpec, model: ModelFiles) -> None:
    """Raise SpecError where engines would refuse to start: vLLM takes no `max_model_len` above the model's own."""
    wanted, longest = spec.model.max_model_len, model.context_length
    if longest is not None and wanted > longest:
        raise SpecError(
            f"model.max_model_len is {wanted}, but {spec.model.source} was made for {longest} tokens "
            f"(max_position_embeddings in its config.json); lower model.max_model_len to {longest} or less"
        )


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
    requests = KEPT_OF_REQUESTS if spec.input.format == "openai_batch" else ()
    return {name for name in (slice_by, spec.input.id, *requests) if name is not None}


def _kept(schema: pa.Schema, spec: JobSpec) -> list[pa.Field]:
    if spec.output.keep == "all":
        return list(schema)
    keep = spec.output.keep if isinstance(spec.output.keep, list) else []
    always = KEPT_OF_REQUESTS if spec.input.format == "openai_batch" else ()
    return [field for field in schema if field.name in (*keep, *always)]
