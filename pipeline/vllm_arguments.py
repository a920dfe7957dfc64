"""With which environment and arguments a vLLM engine is started, and why. Pure: needs no vLLM.

Decides what a run's settings leave open, and what they can't change; most of it keeps an engine from failing, from
losing something, or from doing what nobody asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pipeline import worker_end
from pipeline.engine_arguments import likely_name
from pipeline.errors import SpecError
from pipeline.meeting import Meeting


def engine_environment(*, on_cpu: bool, num_threads: int, tensor_parallel: int, num_nodes: int = 1) -> dict[str, str]:
    """Environment variables that must be set before the replica's process imports torch.

    On CPU: in-process core (ready in 8 s instead of 18, one process instead of three), no compilation (2 s off the
    first request, no change in speed seen), and a fixed KV size, without which the CPU build refuses to start
    unless 92% of memory is free.
    """
    env = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not on_cpu:
        return env
    env |= {"OMP_NUM_THREADS": str(num_threads), "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    if tensor_parallel == 1:
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    else:
        env["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(core) for core in range(tensor_parallel // num_nodes))
    return env


def engine_arguments(
    given: Mapping[str, Any],
    *,
    model_path: str,
    dtype: str,
    max_model_len: int,
    max_num_seqs: int,
    tensor_parallel: int,
    with_routing: bool,
    on_cpu: bool,
) -> dict[str, Any]:
    """All arguments by name, the spec's `given` ones among them; the vLLM that is installed may not know some."""
    # from_engine_args defaults to 128 sequences and 2,048 batched tokens whatever the GPU: set both always.
    args: dict[str, Any] = {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max(2048, max_model_len) if on_cpu else 8192,
        "enable_prefix_caching": True,
        "tokenizer_mode": "hf",
        "config_format": "hf",
        "load_format": "safetensors",  # never pickled weights; `dummy` may be asked for
        **given,
        "model": model_path,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "tensor_parallel_size": tensor_parallel,
        "enable_return_routed_experts": with_routing,
        "trust_remote_code": False,
        # Under `fcfs`, the default, vLLM takes a priority and ignores it without a word. Costs 0.4 us a request.
        "scheduling_policy": "priority",
        "disable_log_stats": False,  # per-request timings
        # The default, xgrammar, drops what it doesn't know and lets control characters into strings; this refuses both.
        "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
        "seed": 0,
    }
    if on_cpu:
        args.setdefault("enforce_eager", True)
        # A prompt split over two steps takes back the random number drawn for the unfinished one, by moving its seeded
        # generator's offset; CPU generators have none, and 0.30 dies: "CPU Generator does not use offset".
        args.setdefault("enable_chunked_prefill", False)
    if tensor_parallel > 1:
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


def refuse_unknown(given: Iterable[str], known: Collection[str]) -> None:
    """Raise SpecError for an argument of the spec's that the installed vLLM doesn't know.

    Replicas look too, in case the driver's machine has no vLLM: each of them would fail to start.
    """
    for name in given:
        if name not in known:
            cure = likely_name(name, known)
            raise SpecError(f"engine_args: `{name}` is not an engine argument of the installed vLLM; {cure}")


def lookahead(max_num_seqs: int) -> int:
    """Requests that a core in a process of its own should hold in store: it takes several steps between our looks."""
    return max(4, max_num_seqs // 8)
