"""Rules between the fields of a spec, each naming the values, the rule and the cure at the field to change.

Functions of the sections that are valid by themselves, so that one wrong field doesn't hide a broken rule elsewhere.
Read no input, and of the disk only symbolic links in local paths and the installed vLLM's list of arguments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.gpus import GPU_TYPES, nearest_types
from cluster.settings import AUTO, FleetSettings
from jobs.spec_incremental import check_incremental
from jobs.spec_label import LABEL, check_label
from jobs.spec_openai import check_openai_batch
from jobs.spec_paths import check_paths
from jobs.spec_synthesize import check_synthesis
from jobs.spec_templates import check_template
from jobs.yaml_source import FieldPath, Problem
from pipeline.engine_arguments import known_arguments, likely_name
from pipeline.settings import (
    RANDOM,
    TINY,
    InputSettings,
    LabelSettings,
    ModelSettings,
    OutputSettings,
    PromptSettings,
    RoutingSettings,
    SamplingSettings,
    Settings,
)
from pipeline.synthesis_settings import SynthesisSettings

# vLLM treats smaller temperatures as greedy and then refuses n > 1 (vllm.sampling_params, _SAMPLING_EPS).
_GREEDY_BELOW = 1e-5
_GPU_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")

_NO_CODE = "leave it out; code is never loaded by name from a spec"
_LOAD_FORMATS = ("safetensors", "dummy", "fastsafetensors", "runai_streamer", "runai_streamer_sharded")
_LOAD_FORMAT_CURE = f"use one of {', '.join(_LOAD_FORMATS)}; the others may load pickled weights"
_ELSEWHERE = {
    "model": "set `model.source`",
    "model_weights": "set `model.source`",
    "served_model_name": "leave it out; nothing is served by this name",
    "tokenizer": "leave it out; the tokenizer comes with `model.source`",
    "tokenizer_mode": "leave it out; prompts arrive as token ids",
    "tokenizer_revision": "set `model.revision`; the tokenizer comes with the model",
    "skip_tokenizer_init": "leave it out; completions need the tokenizer",
    "revision": "set `model.revision`",
    "code_revision": "leave it out; code from a model repository is never run",
    "trust_remote_code": "leave it out; code from a model repository is never run",
    "hf_token": "set the HF_TOKEN environment variable; a spec is stored with its results",
    "dtype": "set `model.dtype`",
    "max_model_len": "set `model.max_model_len`",
    "seed": "set `sampling.seed`",
    "generation_config": "set the values under `sampling`",
    "override_generation_config": "set the values under `sampling`",
    "enable_return_routed_experts": "set `routing.level`",
    "tensor_parallel_size": "set `fleet.pools[0].tensor_parallel`",
    "data_parallel_size": "set `fleet.pools[0].replicas`",
    "distributed_executor_backend": "leave it out; each replica is placed and started by the fleet",
    "structured_outputs_config": "set `sampling.json_schema` or `sampling.json_object`",
    "scheduling_policy": "leave it out; requests carry priorities",
    "disable_log_stats": "leave it out; the `timing` column needs the engine's times",
    "worker_cls": _NO_CODE,
    "worker_extension_cls": _NO_CODE,
    "logits_processors": _NO_CODE,
    "model_impl": _NO_CODE,
    "config_format": "leave it out; the model's config.json is used",
    "hf_config_path": "leave it out; the model's own config.json is used",
    "model_loader_extra_config": "leave it out; only safetensors are loaded",
    "api_key": "leave it out; a spec is stored with its results, so it may hold no secret",
    "runner": "leave it out; every job generates",
    "convert": "leave it out; every job generates",
    "nnodes": "leave it out; `tensor_parallel` decides over how many nodes a replica goes",
    "node_rank": "leave it out; `tensor_parallel` decides over how many nodes a replica goes",
    "master_addr": "leave it out; `tensor_parallel` decides over how many nodes a replica goes",
    "master_port": "leave it out; `tensor_parallel` decides over how many nodes a replica goes",
}
SECTION_MODELS: dict[str, type[Settings]] = {
    "model": ModelSettings,
    "input": InputSettings,
    "prompt": PromptSettings,
    "sampling": SamplingSettings,
    "output": OutputSettings,
    "routing": RoutingSettings,
    "fleet": FleetSettings,
    "label": LabelSettings,
    "synthesize": SynthesisSettings,
}
_NO_ROUTING_WITH = (
    "pipeline_parallel_size",
    "prefill_context_parallel_size",
    "decode_context_parallel_size",
    "kv_transfer_config",
)


@dataclass(frozen=True, slots=True)
class Sections:
    """Sections of a spec without their wrong fields; None for one of which nothing is left to check."""

    wrong: frozenset[FieldPath] = frozenset()
    """Fields that stand at their defaults because what was given is wrong."""

    model: ModelSettings | None = None
    input: InputSettings | None = None
    prompt: PromptSettings | None = None
    sampling: SamplingSettings | None = None
    output: OutputSettings | None = None
    routing: RoutingSettings | None = None
    fleet: FleetSettings | None = None
    label: LabelSettings | None = None
    synthesize: SynthesisSettings | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    """The spec as written."""

    def knows(self, section: str, *names: str) -> bool:
        """Whether these fields hold what the spec says."""
        is_there = getattr(self, section) is not None
        return is_there and not any((section, name) == path[:2] for name in names for path in self.wrong)


def check_rules(sections: Sections) -> list[Problem]:
    """All broken rules among the sections that are there."""
    problems = [
        *_check_lengths(sections),
        *_check_sampling(sections),
        *_check_model(sections.model),
        *_check_engine_args(sections),
        *_check_fleet(sections),
        *check_paths(sections.input, sections.output, sections.model),
        *check_incremental(sections.input, sections.output),
    ]
    if sections.prompt is not None:
        problems += _check_prompt(sections.prompt)
    problems += check_label(sections.given, sections.label)
    problems += check_synthesis(sections.given, sections.synthesize)
    return [*problems, *check_openai_batch(sections.given), *_check_empty_names(sections)]


def _check_lengths(sections: Sections) -> Iterator[Problem]:
    model, sampling = sections.model, sections.sampling
    if model is None or sampling is None or sampling.fit or sections.given.get("kind") == LABEL:
        return
    if not (sections.knows("model", "max_model_len") and sections.knows("sampling", "max_tokens", "fit")):
        return
    if sampling.max_tokens >= model.max_model_len:
        path: FieldPath = ("sampling", "max_tokens")
        message = (
            f"`sampling.max_tokens` is {sampling.max_tokens}, which leaves no room for a prompt within "
            f"`model.max_model_len`, {model.max_model_len}"
        )
        yield Problem(path, message, hint="lower it, raise `model.max_model_len`, or set `sampling.fit: true`")


def _check_sampling(sections: Sections) -> Iterator[Problem]:
    sampling = sections.sampling
    if sampling is None or sampling.column is not None or not sections.knows("sampling", "n", "temperature", "column"):
        return
    if sampling.n > 1 and sampling.temperature < _GREEDY_BELOW:
        message = f"`sampling.n` is {sampling.n}, but temperature {sampling.temperature:g} makes all samples equal"
        yield Problem(("sampling", "n"), message, hint="set `sampling.n: 1`, or a temperature above 0")


def _check_model(model: ModelSettings | None) -> Iterator[Problem]:
    if model is None or model.revision is None:
        return
    comes_along = model.source in (TINY, RANDOM)
    if comes_along or "://" in model.source or model.source.startswith(("/", ".", "~")):
        message = f"`model.revision` is {model.revision}, but `{model.source}` has no revisions"
        yield Problem(("model", "revision"), message, hint="leave it out; only a Hugging Face id has revisions")


def _check_engine_args(sections: Sections) -> Iterator[Problem]:
    tables: list[tuple[FieldPath, Mapping[str, Any]]] = []
    if sections.model is not None:
        tables.append((("model", "engine_args"), sections.model.engine_args))
    if sections.fleet is not None:
        pools = enumerate(sections.fleet.pools)
        tables += [(("fleet", "pools", index, "engine_args"), pool.engine_args) for index, pool in pools]
    is_captured = sections.routing is not None and sections.routing.level != "off"
    is_captured = is_captured and sections.knows("routing", "level")
    for path, table in tables:
        for name, value in table.items():
            yield from _check_engine_arg((*path, name), value, is_captured=is_captured)


def _check_engine_arg(path: FieldPath, value: object, *, is_captured: bool) -> Iterator[Problem]:
    name = str(path[-1])
    flat = name.replace("-", "_")
    if flat == "load_format" and value not in _LOAD_FORMATS:
        yield Problem(path, f"`load_format` {value} is not allowed", hint=_LOAD_FORMAT_CURE)
    elif flat in _ELSEWHERE:
        yield Problem(path, f"`{name}` is not an engine argument to set here", hint=_ELSEWHERE[flat], on_key=True)
    elif flat.startswith(("data_parallel_", "_")):
        yield Problem(path, f"`{name}` is not an engine argument to set here", hint="leave it out", on_key=True)
    elif flat != name:
        yield Problem(path, f"`{name}` is not an engine argument", hint=f"did you mean `{flat}`?", on_key=True)
    elif is_captured and name in _NO_ROUTING_WITH and value not in (1, None):
        hint = "leave it out, or set `routing.level: off`"
        yield Problem(path, f"vLLM captures no routing with `{name}`: {value}", hint=hint, on_key=True)
    elif (known := known_arguments()) is not None and name not in known:
        message = f"`{name}` is not an engine argument of the installed vLLM"
        yield Problem(path, message, hint=likely_name(name, known), on_key=True)


def _check_fleet(sections: Sections) -> Iterator[Problem]:
    fleet, seen = sections.fleet, set[str]()
    pools = fleet.pools if fleet else []
    known = {AUTO, *GPU_TYPES, *(gpu.name for gpu in (fleet.gpu_types if fleet else ()))}
    for index, pool in enumerate(pools):
        path: FieldPath = ("fleet", "pools", index, "gpu")
        if pool.gpu.casefold() == "cpu" != pool.gpu:
            yield Problem(path, f"`{pool.gpu}` is no GPU type", hint="did you mean `cpu`?")
        elif not _GPU_NAME.fullmatch(pool.gpu):
            hint = "give a type such as H100-80G or A100-40G, `cpu` or `auto`"
            yield Problem(path, f'"{pool.gpu}" can\'t be a GPU type', hint=hint)
        elif pool.gpu not in known and sections.knows("fleet", "gpu_types"):
            hint = nearest_types(pool.gpu, known)
            yield Problem(path, f"`{pool.gpu}` is no GPU type known here", hint=hint)
        elif pool.gpu in seen:
            hint = "a pool is all replicas of one GPU type; raise `replicas` of the first one"
            yield Problem(path, f"a second pool of `{pool.gpu}`", hint=hint)
        elif pool.gpu == AUTO and len(pools) > 1:
            hint = "leave the other pools out, or name each pool's type"
            yield Problem(path, "`auto` takes every GPU type that the cluster has", hint=hint)
        seen.add(pool.gpu)


def _check_prompt(prompt: PromptSettings) -> Iterator[Problem]:
    for index, example in enumerate(prompt.examples):
        for role in ("user", "assistant"):
            if not getattr(example, role).strip():
                path: FieldPath = ("prompt", "examples", index, role)
                message = f"`prompt.examples[{index}].{role}` is empty"
                yield Problem(path, message, hint="write what was said, or leave the example out")
    for name in ("template", "system"):
        if (text := getattr(prompt, name)) is not None:
            yield from check_template(("prompt", name), text)


def _check_empty_names(sections: Sections) -> Iterator[Problem]:
    for section, name in (("prompt", "messages"), ("input", "id"), ("sampling", "column"), ("routing", "slice_by")):
        if getattr(getattr(sections, section), name, None) == "":
            message = f"`{section}.{name}` is empty, but must name a column of the input"
            yield Problem((section, name), message, hint="leave it out, or write null, for none")
