"""What a result depends on, as flat {field: value} text; `pipeline.resume` compares two of them.

Owns the list of what doesn't count. A field that nobody thought of counts: refusing to resume is safe, mixing the
results of two settings in one output is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from jobs.job_spec import JobSpec
from pipeline.rows import SCHEMA_VERSION

_NEUTRAL_FIELDS = frozenset(
    {
        *("name", "limits", "drift", "fleet", "output.path", "output.resume", "model.engine_args"),
        *("sampling.dedupe", "label.review_below"),
        # What a synthesis does with the answers once they are there.
        *("synthesize.retries", "synthesize.filters", "synthesize.duplicates", "synthesize.judge"),
        "synthesize.conversation",
        # Which rows a run of an incremental job has is in its plan; which tell them apart, in the chain of its claims.
        *("input.new", "input.new_by", "input.changed", "input.partition", "input.timezone"),
    }
)

_WHOLE_FIELDS = frozenset({"sampling.json_schema"})
"""Shown as one value, in the order given: a model writes properties in it."""

# Where things run, how fast, and in what order; not what is computed. Batch-dependent rounding on GPUs is not counted:
# it varies between two identical runs too.
NEUTRAL_ENGINE_ARGS = frozenset(
    {
        "aggregate_engine_logging",
        "async_scheduling",
        "block_size",
        "cpu_offload_gb",
        "disable_custom_all_reduce",
        "distributed_timeout_seconds",
        "download_dir",
        "enable_chunked_prefill",
        "enable_expert_parallel",
        "enable_prefix_caching",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "long_prefill_token_threshold",
        "max_num_batched_tokens",
        "max_num_scheduled_tokens",
        "max_num_seqs",
        "max_parallel_loading_workers",
        "num_gpu_blocks_override",
        "numa_bind",
        "otlp_traces_endpoint",
        "pipeline_parallel_size",
        "prefix_caching_hash_algo",
        "ray_workers_use_nsight",
        "safetensors_load_strategy",
        "scheduler_reserve_full_isl",
        "shutdown_timeout",
        "stream_interval",
        "swap_space",
        "tensor_parallel_size",
    }
)
_LONGEST_VALUE = 400


def fingerprint_fields(
    spec: JobSpec, *, model_identity: Mapping[str, Any], input_identity: Mapping[str, Any]
) -> dict[str, str]:
    """Every field that changes results, sorted by name, each value as compact JSON.

    `model_identity` and `input_identity` say what the sources really held, e.g. a commit and hashes, or files with
    sizes and versions; they appear as `model_files.*` and `input_files.*`. Long values are cut and carry their SHA-256.
    """
    fields = dict(_flatten(spec.model_dump(mode="json"), ""))
    fields |= _engine_args(spec)
    fields |= {f"model_files.{name}": _shown(value) for name, value in model_identity.items()}
    fields |= {f"input_files.{name}": _shown(value) for name, value in input_identity.items()}
    fields["schema_version"] = str(SCHEMA_VERSION)
    return dict(sorted(fields.items()))


def _flatten(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        if dotted in _NEUTRAL_FIELDS:
            continue
        if dotted in _WHOLE_FIELDS:
            yield dotted, _shown(value, sort_keys=False)
        elif isinstance(value, dict):
            yield from _flatten(value, f"{dotted}.")
        else:
            yield dotted, _shown(value)


def _engine_args(spec: JobSpec) -> dict[str, str]:
    """What each pool's engines are really given; pools that agree count once, so adding one more changes nothing."""
    merged = [{**spec.model.engine_args, **pool.engine_args} for pool in spec.fleet.pools]
    names = {name for table in merged for name in table} - NEUTRAL_ENGINE_ARGS
    given = {name: {_shown(table[name]) if name in table else "not set" for table in merged} for name in names}
    return {f"engine_args.{name}": " | ".join(sorted(values)) for name, values in given.items()}


def _shown(value: object, *, sort_keys: bool = True) -> str:
    text = json.dumps(value, sort_keys=sort_keys, ensure_ascii=False, separators=(",", ":"))
    if len(text) <= _LONGEST_VALUE:
        return text
    return f"{text[:_LONGEST_VALUE]}... sha256:{hashlib.sha256(text.encode()).hexdigest()}"
