"""vLLM behind the `Engine` protocol; the only module that imports vllm.

Works on vLLM 0.30 (CPU build) and is written for 0.32+ (GPU) against the public contract of routing capture, unchanged
from 0.22 to 0.33. What differs between versions is probed for, never compared by version number.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.engine import Completion, EngineInfo, Failure, MoeShape, Request, Sample, Timing
from pipeline.errors import RequestRefused, SpecError
from pipeline.model import read_config, routing_layers
from pipeline.settings import SamplingSettings


@dataclass(frozen=True)
class VllmEngineConfig:
    """Everything needed to build a `VllmEngine` in another process; picklable and small."""

    model_path: str
    dtype: str
    max_model_len: int
    moe: MoeShape | None
    """Shape of the model's routing, or None to capture nothing."""
    tensor_parallel: int = 1
    on_cpu: bool = False
    num_threads: int = 1
    """CPU build only: threads of the forward pass."""
    engine_args: dict[str, Any] = field(default_factory=dict)

    @property
    def max_num_seqs(self) -> int:
        """Sequences that the engine runs at once."""
        return int(self.engine_args.get("max_num_seqs", 64 if self.on_cpu else 512))

    def environment(self) -> dict[str, str]:
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
        if not self.on_cpu:
            return env
        env |= {"OMP_NUM_THREADS": str(self.num_threads), "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        if self.tensor_parallel == 1:
            env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        else:
            env["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(rank) for rank in range(self.tensor_parallel))
        return env

    def build(self) -> VllmEngine:
        """Load the model; takes 8 s for a tiny one on CPU, minutes for Mixtral 8x7B.

        Raises:
            SpecError: an engine argument that this vLLM doesn't know, or a value that it refuses.
        """
        return VllmEngine(self)


class VllmEngine:
    """One vLLM engine, stepped by the thread that made it."""

    def __init__(self, config: VllmEngineConfig) -> None:
        os.environ.update(config.environment())
        _stay_in_this_cluster()
        from vllm import LLMEngine

        args = _engine_args(config)
        try:
            self._engine = LLMEngine.from_engine_args(args)
        except ValidationError as error:  # a value that vLLM's own settings refuse stays refused
            reasons = "; ".join(str(detail["msg"]).removeprefix("Value error, ") for detail in error.errors())
            raise SpecError(f"vLLM refuses these settings: {reasons[:800]}; correct the spec") from error
        # vLLM fills in zeros for layers without a router, which no guard could tell from a broken capture.
        self._layers = routing_layers(read_config(Path(config.model_path) / "config.json"))
        vllm_config = self._engine.vllm_config
        self.info = EngineInfo(
            max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
            max_model_len=vllm_config.model_config.max_model_len,
            moe=config.moe,
            versions=_versions(),
        )

    def add(self, request: Request) -> None:
        """Queue one request; see `Engine.add`."""
        from vllm.inputs import TokensPrompt

        try:
            self._engine.add_request(
                request.request_id,
                TokensPrompt(prompt_token_ids=list(request.prompt_token_ids)),
                _sampling_params(request.sampling, request.seed),
                priority=request.priority,
            )
        except (_refusal(), ValueError, TypeError) as error:  # nothing was queued
            raise RequestRefused(f"the engine refused the request: {error}") from error

    def step(self) -> Sequence[Completion | Failure]:
        """Advance all running requests by one step; see `Engine.step`."""
        if not self._engine.has_unfinished_requests():
            return []
        return [_convert(output, self._layers) for output in self._engine.step() if output.finished]

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget these requests."""
        self._engine.abort_request(list(request_ids))

    def close(self) -> None:
        """Stop the engine's own processes, if it has any."""
        with contextlib.suppress(Exception):
            self._engine.engine_core.shutdown()


def _engine_args(config: VllmEngineConfig) -> Any:
    from vllm import EngineArgs

    # from_engine_args defaults to 128 sequences and 2,048 batched tokens whatever the GPU: set both always.
    args: dict[str, Any] = {
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": max(2048, config.max_model_len) if config.on_cpu else 8192,
        "enable_prefix_caching": True,
        "tokenizer_mode": "hf",
        "config_format": "hf",
        "load_format": "safetensors",  # never pickled weights; `dummy` may be asked for
        "scheduling_policy": "priority",
        **config.engine_args,
        "model": config.model_path,
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "tensor_parallel_size": config.tensor_parallel,
        "enable_return_routed_experts": config.moe is not None,
        "trust_remote_code": False,
        "disable_log_stats": False,  # per-request timings
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
    known = {field.name for field in fields(EngineArgs)}
    _check_names(config.engine_args, known)
    return EngineArgs(**{name: value for name, value in args.items() if name in known})


def _check_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse misspelt names here, with the likely one: every replica would fail to start, one after the other."""
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            cure = f"did you mean `{close[0]}`?" if close else "leave it out, or correct it"
            raise SpecError(f"engine_args: `{name}` is not an engine argument of the installed vLLM; {cure}")


def _stay_in_this_cluster() -> None:
    """Pin child processes to this actor's cluster; else vLLM's may `ray.init()` into any on the machine."""
    import ray

    if ray.is_initialized():
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


def _sampling_params(sampling: SamplingSettings, seed: int | None) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=sampling.n,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        seed=seed,
        stop=list(sampling.stop) or None,
        ignore_eos=sampling.ignore_eos,
        logprobs=0 if sampling.logprob else None,
        # CUMULATIVE, the default, makes an object per token and loses all but one of n samples.
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _convert(output: Any, layers: Sequence[int]) -> Completion | Failure:
    bad = next((o for o in output.outputs if o.finish_reason not in ("stop", "length")), None)
    if bad is not None:
        return Failure(output.request_id, "request_error", f"the engine ended the request with {bad.finish_reason!r}")
    samples = tuple(_sample(o, layers) for o in sorted(output.outputs, key=lambda o: o.index))
    return Completion(output.request_id, samples, output.num_cached_tokens or 0, _timing(output.metrics))


def _sample(output: Any, layers: Sequence[int]) -> Sample:
    routed = getattr(output, "routed_experts", None)
    if routed is not None and routed.ndim == 3 and len(layers) < routed.shape[1]:
        routed = routed[:, layers]
    return Sample(
        index=output.index,
        text=output.text,
        token_ids=tuple(output.token_ids),
        finish_reason=output.finish_reason,
        stop_reason=None if output.stop_reason is None else str(output.stop_reason),
        cumulative_logprob=output.cumulative_logprob,
        routed_experts=routed,
    )


def _refusal() -> type[Exception]:
    """The class of errors with which vLLM refuses a request: no ValueError in 0.30, and absent in older versions."""
    import vllm.exceptions

    refusal: type[Exception] = getattr(vllm.exceptions, "VLLMValidationError", ValueError)
    return refusal


def _timing(metrics: Any) -> Timing:
    if metrics is None or not metrics.queued_ts:
        return Timing(0.0, 0.0, 0.0)
    queued = metrics.queued_ts  # the three stamps share one monotonic clock; arrival_time is wall clock
    return Timing(
        queue_s=max(0.0, metrics.scheduled_ts - queued),
        first_token_s=max(0.0, metrics.first_token_ts - queued),
        total_s=max(0.0, metrics.last_token_ts - queued),
    )


def _versions() -> dict[str, str]:
    import torch
    import transformers
    import vllm

    return {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
