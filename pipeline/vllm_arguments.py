"""What vLLM's engine is told: our choices, the user's, and what this program depends on. Pure.

The user's `engine_args` come after our choices and before what must not differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline import worker_end
from pipeline.meeting import Meeting

if TYPE_CHECKING:  # a config builds an engine, and so imports what is here
    from pipeline.vllm_engine import VllmEngineConfig


def arguments_of(config: VllmEngineConfig) -> dict[str, Any]:
    """Engine arguments of an engine on one node; names that a version of vLLM doesn't know are left to the caller."""
    # from_engine_args defaults to 128 sequences and 2,048 batched tokens whatever the GPU: set both always.
    args: dict[str, Any] = {
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": max(2048, config.max_model_len) if config.on_cpu else 8192,
        "enable_prefix_caching": True,
        "tokenizer_mode": "hf",
        "config_format": "hf",
        "load_format": "safetensors",  # never pickled weights; `dummy` may be asked for
        **config.engine_args,
        "model": config.model_path,
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "tensor_parallel_size": config.tensor_parallel,
        "enable_return_routed_experts": config.moe is not None,
        "trust_remote_code": False,
        # Under `fcfs`, the default, vLLM takes a priority and ignores it without a word. Costs 0.4 us a request.
        "scheduling_policy": "priority",
        "disable_log_stats": False,  # per-request timings
        # The default, xgrammar, drops what it doesn't know and lets control characters into strings; this refuses both.
        "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
        "seed": 0,
    }
    if config.on_cpu:
        args.setdefault("enforce_eager", True)
        # A prompt split over two steps takes back the random number drawn for the unfinished one, by moving its seeded
        # generator's offset; CPU generators have none, and 0.30 dies: "CPU Generator does not use offset".
        args.setdefault("enable_chunked_prefill", False)
    if config.tensor_parallel > 1:
        # Inside a placement group vLLM would pick `ray`, which CPU doesn't support and which may join another cluster.
        args.setdefault("distributed_executor_backend", "mp")
    return args


def span_arguments(meeting: Meeting, node_rank: int) -> dict[str, Any]:
    """Engine arguments of one node's part, over vLLM's own processes (`mp`) and not over its Ray actors.

    Those can't run on CPU, so would go untested; want bundles of one GPU, and the engine's actor outside of them.
    """
    return {
        "distributed_executor_backend": "mp",
        "nnodes": meeting.num_nodes,
        "node_rank": node_rank,
        "master_addr": meeting.address,
        "master_port": meeting.port,
        "worker_extension_cls": worker_end.QUALIFIED_NAME,
    }
