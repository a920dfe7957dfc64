"""The fingerprint changes with every field that changes results, and with no other."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from jobs.fingerprint import NEUTRAL_ENGINE_ARGS, fingerprint_fields
from jobs.spec import parse_spec
from jobs.spec_fields import all_fields
from pipeline.resume import Change, changed_fields

BASE = """
name: job
model: {source: org/model}
input: {path: in.parquet}
prompt: {template: "{{ text }}"}
output: {path: out}
"""
MODEL = {"commit": "abc", "config_sha256": "1"}
INPUT = {"files": [["in.parquet", 10, "etag"]]}

NEUTRAL = [
    "sampling.dedupe=off",
    "name=other",
    "output.path=elsewhere",
    "output.resume=always",
    "input.new=since_last_run",
    "input={path: in.parquet, new: since_last_run, new_by: content}",
    "input={path: in.parquet, new: since_last_run, changed: redo}",
    "input={path: in.parquet, new: since_last_run, new_by: partition, partition: date, timezone: Asia/Tokyo}",
    "drift.label=0.1",
    "drift.confidence=0.1",
    "drift.tokens=0.1",
    "drift.routing=0.1",
    "limits.max_failed_fraction=0.5",
    "limits.request_timeout_s=1",
    "limits.max_attempts=1",
    "limits.hang_timeout_s=1",
    "limits.drain_timeout_s=1",
    "fleet.pools[0].gpu=H100-80G",
    "fleet.pools[0].replicas=7",
    "fleet.pools[0].engine_args={max_num_seqs: 8}",
    "fleet.pools[0].tensor_parallel=2",
    "fleet.pools[0].tensor_parallel=auto",
    "fleet.pools[0].usd_per_gpu_hour=2.5",
    "fleet.pools[0].cpu_threads=1",
    "fleet=auto",
    "fleet.gpu_types=[{name: H20, memory_gib: 94.8, memory_gb_per_s: 4000, tflops: 148}]",
    "fleet.start_timeout=30m",
    "fleet.attach=warm",
    "fleet.priority=high",
    "fleet.pools=[{gpu: A100-80G}, {gpu: H100-80G, engine_args: {max_num_seqs: 9}}]",
    "model.engine_args={max_num_seqs: 8}",
]
COUNTING = {
    "model.source": "other/model",
    "model.revision": "abc",
    "model.dtype": "float32",
    "model.max_model_len": "1024",
    "input.path": "b.parquet",
    "input.id": "key",
    "input.limit": "5",
    "input.prefix": "draft_",
    "prompt.messages": "chat",
    "prompt.template": "'{{ other }}'",
    "prompt.system": "Be brief",
    "prompt.examples": "[{user: a, assistant: b}]",
    "prompt.safe_prompt": "true",
    "prompt.marker_text": "reject",
    "sampling.n": "2",
    "sampling.temperature": "0.5",
    "sampling.top_p": "0.5",
    "sampling.top_k": "5",
    "sampling.min_p": "0.5",
    "sampling.presence_penalty": "1",
    "sampling.frequency_penalty": "1",
    "sampling.repetition_penalty": "2",
    "sampling.max_tokens": "9",
    "sampling.min_tokens": "1",
    "sampling.seed": "2",
    "sampling.stop": "[x]",
    "sampling.ignore_eos": "true",
    "sampling.logprob": "true",
    "sampling.json_object": "true",
    "sampling.json_schema": "{type: array, items: {type: integer}}",
    "sampling.fit": "true",
    "sampling.column": "s",
    "output.keep": "none",
    "routing.level": "tokens",
    "routing.slice_by": "domain",
}


def fields(*overrides: str, **identity: dict[str, Any]) -> dict[str, str]:
    spec = parse_spec(BASE, name="job.yaml", overrides=overrides)
    return fingerprint_fields(
        spec, model_identity=identity.get("model", MODEL), input_identity=identity.get("inputs", INPUT)
    )


@pytest.mark.parametrize("override", NEUTRAL)
def test_neutral_change_keeps_the_fingerprint(override: str) -> None:
    assert changed_fields(fields(), fields(override)) == []


@pytest.mark.parametrize("name", sorted(NEUTRAL_ENGINE_ARGS))
def test_neutral_engine_argument_keeps_the_fingerprint(name: str) -> None:
    spec = parse_spec(BASE, name="job.yaml")
    tuned = spec.model_copy(update={"model": spec.model.model_copy(update={"engine_args": {name: 1}})})
    changed = fingerprint_fields(tuned, model_identity=MODEL, input_identity=INPUT)
    assert changed_fields(fields(), changed) == []


@pytest.mark.parametrize("name", COUNTING)
def test_change_of_results_is_named(name: str) -> None:
    overrides = [f"{name}={COUNTING[name]}"] + (["prompt.template=null"] if name == "prompt.messages" else [])
    names = [change.field for change in changed_fields(fields(), fields(*overrides))]
    assert name in names
    assert set(names) <= {name, "prompt.template"}


def test_every_field_of_the_spec_is_known_to_count_or_to_be_neutral() -> None:
    known = {*COUNTING, *(text.partition("=")[0].replace("[0]", "") for text in NEUTRAL)}
    known |= {"prompt.examples.user", "prompt.examples.assistant", "kind", "input.format"}
    known |= {"input.new_by", "input.changed", "input.partition", "input.timezone"}  # neutral together, see above
    leaves = {node.dotted for node in all_fields() if not node.children and node.path[:2] != ("fleet", "gpu_types")}
    assert leaves <= known


def test_reading_a_file_as_requests_counts() -> None:
    changes = changed_fields(fields(), fields("input.format=openai_batch", "prompt.template=null"))
    assert {change.field for change in changes} == {"input.format", "prompt.messages", "prompt.template"}


LABEL_BASE = "kind: label\nlabel: {text: body, choices: [a, b]}\n" + re.sub(r"(?m)^(prompt|sampling):.*\n", "", BASE)


@pytest.mark.parametrize(
    "override",
    [
        "text=title",
        "choices=[a, c]",
        "instructions=Choose.",
        "examples=[{text: x, label: a}]",
        "abstain_below=0.5",
        "default=none",
        "temperature=2.0",
    ],
)
def test_every_field_of_a_label_counts(override: str) -> None:
    specs = [parse_spec(LABEL_BASE, name="job.yaml", overrides=each) for each in ([], [f"label.{override}"])]
    old, new = (fingerprint_fields(spec, model_identity=MODEL, input_identity=INPUT) for spec in specs)
    assert f"label.{override.partition('=')[0]}" in {
        change.field.removesuffix(".a") for change in changed_fields(old, new)
    }


def test_what_is_copied_for_review_does_not_count() -> None:
    specs = [parse_spec(LABEL_BASE, name="job.yaml", overrides=each) for each in ([], ["label.review_below=0.5"])]
    old, new = (fingerprint_fields(spec, model_identity=MODEL, input_identity=INPUT) for spec in specs)
    assert changed_fields(old, new) == []


@pytest.mark.parametrize("owner", ["model", "fleet.pools[0]"])
def test_engine_argument_that_nobody_declared_neutral_counts(owner: str) -> None:
    changes = changed_fields(fields(), fields(f"{owner}.engine_args.quantization=fp8"))
    assert changes == [Change("engine_args.quantization", None, '"fp8"')]


def test_pools_that_compute_differently_count() -> None:
    pools = "[{gpu: A100-80G}, {gpu: H100-80G, engine_args: {quantization: fp8}}]"
    changes = changed_fields(fields(), fields(f"fleet.pools={pools}"))
    assert changes == [Change("engine_args.quantization", None, '"fp8" | not set')]


def test_moving_an_engine_argument_to_the_pool_changes_nothing() -> None:
    here, there = fields("model.engine_args.quantization=fp8"), fields("fleet.pools[0].engine_args.quantization=fp8")
    assert changed_fields(here, there) == []


def test_changed_model_and_input_files_are_named() -> None:
    other = fields(model={**MODEL, "commit": "def"}, inputs={"files": [["in.parquet", 11, "etag"]]})
    assert [change.field for change in changed_fields(fields(), other)] == ["input_files.files", "model_files.commit"]


def test_long_values_are_cut_and_still_told_apart() -> None:
    first, second = fields(f"prompt.system={'x' * 5000}a"), fields(f"prompt.system={'x' * 5000}b")
    assert len(first["prompt.system"]) < 600
    assert [change.field for change in changed_fields(first, second)] == ["prompt.system"]


def test_fields_survive_json() -> None:
    assert json.loads(json.dumps(fields())) == fields()


SYNTHESIS_BASE = BASE + "kind: synthesize\nsynthesize: {samplers: {tone: {category: [a, b]}}}\n"


@pytest.mark.parametrize(
    ("override", "counts"),
    [
        ("samplers={tone: {category: [a, c]}}", True),
        ("sampler_seed=2", True),
        ("retries=5", False),
        ("filters={min_chars: 3}", False),
        ('conversation={turns: 2, user: "{{ conversation }}"}', False),
        ("duplicates={near: 0.9}", False),
    ],
)
def test_of_a_synthesis_only_what_prompts_draw_counts(override: str, *, counts: bool) -> None:
    specs = [parse_spec(SYNTHESIS_BASE, name="job.yaml", overrides=each) for each in ([], [f"synthesize.{override}"])]
    old, new = (fingerprint_fields(spec, model_identity=MODEL, input_identity=INPUT) for spec in specs)
    assert bool(changed_fields(old, new)) is counts
