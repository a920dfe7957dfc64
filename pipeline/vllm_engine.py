"""vLLM behind the `Engine` protocol; the only module that imports vllm.

Works on vLLM 0.30 (CPU build) and is written for 0.32+ (GPU) against the public contract of routing capture, unchanged
from 0.22 to 0.33. What differs between versions is probed for, never compared by version number.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.engine import Completion, EngineInfo, Failure, MoeShape, Piece, Request, plain_ids
from pipeline.errors import RequestRefused, SpecError
from pipeline.json_schemas import schema_text
from pipeline.meeting import Meeting, own_address
from pipeline.model import fetch_model, read_config, routing_layers
from pipeline.read_ahead import read_ahead
from pipeline.settings import ModelSettings, SamplingSettings
from pipeline.vllm_arguments import (
    engine_arguments,
    engine_environment,
    lookahead,
    refuse_unknown,
    span_arguments,
)
from pipeline.vllm_requests import VllmRequests

CORE_WATCH_INTERVAL_S = 0.25
WORKER_WATCH_INTERVAL_S = 1.0
"""A dead worker is noticed at once; this is for when the system's sign of that fails."""


@dataclass(frozen=True)
class VllmEngineConfig:
    """Everything needed to build a `VllmEngine` in another process; picklable and small."""

    model_path: str
    dtype: str
    max_model_len: int
    moe: MoeShape | None
    """Shape of the model's routing, or None to capture nothing."""
    tensor_parallel: int = 1
    num_nodes: int = 1
    """Over which the tensor-parallel workers are spread evenly."""
    on_cpu: bool = False
    num_threads: int = 1
    """CPU build only: threads of the forward pass."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    source: ModelSettings | None = None
    """Where to get the model on a node that hasn't got it at `model_path`; None: it must be there."""

    @property
    def max_num_seqs(self) -> int:
        """Sequences that the engine runs at once."""
        return int(self.engine_args.get("max_num_seqs", 64 if self.on_cpu else 512))

    def environment(self) -> dict[str, str]:
        """Environment variables that must be set before the replica's process imports torch."""
        return engine_environment(
            on_cpu=self.on_cpu,
            num_threads=self.num_threads,
            tensor_parallel=self.tensor_parallel,
            num_nodes=self.num_nodes,
        )

    def build(self) -> VllmEngine:
        """Load the model; takes 8 s for a tiny one on CPU, minutes for Mixtral 8x7B.

        Raises:
            SpecError: an engine argument that this vLLM doesn't know, or a value that it refuses; a model that isn't
                on this node and can't be had from here.
        """
        return VllmEngine(self._with_model())

    def lead(self, meeting: Meeting) -> VllmEngine:
        """As `build`, with as many further nodes' workers as the meeting says, once they are there."""
        _be_known_as(meeting.address)
        return VllmEngine(self._with_model(), span_arguments(meeting, 0))

    def follow(self, meeting: Meeting, node_rank: int) -> None:
        """Run a further node's workers until one of them ends; the others end with this process.

        What `vllm serve --headless` does, but for its monitor, which can take a worker that still loads for a dead one,
        and asks the others to go, which takes 10 s and more while they wait for the dead one.
        """
        os.environ.update(self.environment())
        _be_known_as(own_address())
        from vllm.v1.executor.multiproc_executor import MultiprocExecutor

        args = _engine_args(self._with_model(), span_arguments(meeting, node_rank))
        with _refusals_as_spec_errors():
            vllm_config = args.create_engine_config(headless=True)
        executor = MultiprocExecutor(vllm_config, monitor_workers=False)
        while all(worker.proc.is_alive() for worker in executor.workers):
            wait([worker.proc.sentinel for worker in executor.workers], timeout=WORKER_WATCH_INTERVAL_S)

    def _with_model(self) -> VllmEngineConfig:
        """With the model on this node, and on its way into memory."""
        found = self
        if self.source is not None and not Path(self.model_path, "config.json").is_file():
            found = replace(self, model_path=fetch_model(self.source).path)
        read_ahead(found.model_path)
        return found


class VllmEngine:
    """One vLLM engine, stepped by the thread that made it."""

    def __init__(self, config: VllmEngineConfig, span: Mapping[str, Any] | None = None) -> None:
        """`span`: this node's part in an engine over several nodes, see `span_arguments`."""
        os.environ.update(config.environment())
        _stay_in_this_cluster()
        from vllm import LLMEngine

        args = _engine_args(config, span or {})
        # vLLM collects garbage three times while it loads: 1.0 of 3.0 s, among all that the imports have made.
        gc.freeze()
        with _refusals_as_spec_errors():
            self._engine = LLMEngine.from_engine_args(args)
        # vLLM fills in zeros for layers without a router, which no guard could tell from a broken capture.
        self._open = VllmRequests(routing_layers(read_config(Path(config.model_path) / "config.json")))
        self._closed = threading.Event()
        threading.Thread(target=self._watch_core, name="core-watch", daemon=True).start()
        vllm_config = self._engine.vllm_config
        self.info = EngineInfo(
            max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
            max_model_len=vllm_config.model_config.max_model_len,
            moe=config.moe,
            versions=_versions(),
            lookahead=lookahead(vllm_config.scheduler_config.max_num_seqs) if _core_runs_ahead() else 0,
        )

    @property
    def num_sequences(self) -> int:
        """See `Engine.num_sequences`; vLLM counts each of `n` samples."""
        return self._open.num_sequences(self._engine.get_num_unfinished_requests())

    def add(self, request: Request) -> None:
        """Queue one request; see `Engine.add`."""
        if request.choices is not None:
            self._add_choice(request)
            return
        params = _sampling_params(request.sampling, request.seed)
        _ask_for_more(params, request)
        self._add(request.request_id, plain_ids(request.prompt_token_ids), params, request.priority)
        self._open.open(request)

    def _add_choice(self, request: Request) -> None:
        try:
            for probe in self._open.open_choice(request):
                self._add(probe.probe_id, probe.prompt_token_ids, _probe_params(probe.tokens), request.priority)
        except RequestRefused:
            self.abort([request.request_id])
            raise

    def _add(self, request_id: str, prompt_token_ids: list[int], params: Any, priority: int) -> None:
        from vllm.inputs import TokensPrompt

        prompt = TokensPrompt(prompt_token_ids=prompt_token_ids)
        try:
            self._engine.add_request(request_id, prompt, params, priority=priority)
        except (_refusal(), ValueError, TypeError) as error:  # nothing was queued
            raise RequestRefused(f"the engine refused the request: {error}") from error

    def step(self) -> Sequence[Completion | Failure | Piece]:
        """Advance all running requests by one step; see `Engine.step`."""
        if not self._engine.has_unfinished_requests():
            return []
        taken = self._open.take(self._engine.step())
        if taken.stale:
            self._engine.abort_request(taken.stale)
        return taken.results

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget these requests."""
        self._engine.abort_request(self._open.forget(request_ids))

    def _watch_core(self) -> None:
        """Wake up `step` when a core in a process of its own has died.

        vLLM 0.30's synchronous client notices in 0.1 s, ends its receiving thread, and lets `step` wait for ever.
        """
        core = self._engine.engine_core
        resources, outputs = getattr(core, "resources", None), getattr(core, "outputs_queue", None)
        if resources is None or outputs is None:
            return
        while not self._closed.wait(CORE_WATCH_INTERVAL_S):
            if resources.engine_dead:
                outputs.put_nowait(RuntimeError("the engine core's process died"))
                return

    def close(self) -> None:
        """Stop the engine's own processes, if it has any."""
        self._closed.set()
        gc.unfreeze()
        with contextlib.suppress(Exception):
            self._engine.engine_core.shutdown()


def _core_runs_ahead() -> bool:
    from vllm import envs

    return bool(envs.VLLM_ENABLE_V1_MULTIPROCESSING)


def _engine_args(config: VllmEngineConfig, span: Mapping[str, Any]) -> Any:
    from vllm import EngineArgs

    args = engine_arguments(
        config.engine_args,
        model_path=config.model_path,
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        tensor_parallel=config.tensor_parallel,
        with_routing=config.moe is not None,
        on_cpu=config.on_cpu,
    )
    known = {field.name for field in fields(EngineArgs)}
    if not known.issuperset(span):
        raise SpecError(
            "the installed vLLM can't run one engine over several nodes (no engine argument `nnodes`); install a newer "
            "one, or lower tensor_parallel to what a node has"
        )
    refuse_unknown(config.engine_args, known)
    return EngineArgs(**{name: value for name, value in {**args, **span}.items() if name in known})


def _be_known_as(address: str) -> None:
    """Have this node's part listen where the others reach it; vLLM would take the way to 8.8.8.8 for that."""
    os.environ.setdefault("VLLM_HOST_IP", address)
    _stay_in_this_cluster()


@contextlib.contextmanager
def _refusals_as_spec_errors() -> Iterator[None]:
    """Within the block a value that vLLM's own settings refuse is the spec's mistake: it stays refused."""
    try:
        yield
    except ValidationError as error:
        reasons = "; ".join(str(detail["msg"]).removeprefix("Value error, ") for detail in error.errors())
        raise SpecError(f"vLLM refuses these settings: {reasons[:800]}; correct the spec") from error


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
        structured_outputs=_structured_outputs(sampling),
        # CUMULATIVE, the default, makes an object per token and loses all but one of n samples.
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _structured_outputs(sampling: SamplingSettings) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    if sampling.json_schema is not None:
        return StructuredOutputsParams(json=schema_text(sampling.json_schema))
    return StructuredOutputsParams(json_object=True) if sampling.json_object else None


def _ask_for_more(params: Any, request: Request) -> None:
    """Have vLLM tell of a request as it goes on, or of its tokens' probabilities, where somebody waits for that."""
    from vllm.sampling_params import RequestOutputKind

    if request.stream:
        params.output_kind = RequestOutputKind.DELTA
    if request.num_top_logs is not None:
        params.logprobs = request.num_top_logs


def _probe_params(tokens: Sequence[int]) -> Any:
    """For one token, of which only the probabilities of `tokens` are wanted."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        logprob_token_ids=list(tokens),
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _refusal() -> type[Exception]:
    """The class of errors with which vLLM refuses a request: no ValueError in 0.30, and absent in older versions."""
    import vllm.exceptions

    refusal: type[Exception] = getattr(vllm.exceptions, "VLLMValidationError", ValueError)
    return refusal


def _versions() -> dict[str, str]:
    import torch
    import transformers
    import vllm

    # torch's is a class of its own: fleet, dispatch and driver would each import torch to read it, 2 to 4 s apiece.
    return {"vllm": vllm.__version__, "torch": str(torch.__version__), "transformers": transformers.__version__}
