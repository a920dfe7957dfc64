"""vLLM behind the `Engine` protocol; the only module that imports vllm.

Works on vLLM 0.30 (CPU build) and is written for 0.32+ (GPU) against the public contract of routing capture, unchanged
from 0.22 to 0.33. What differs between versions is probed for, never compared by version number.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.choice_requests import Answer, OpenChoices
from pipeline.choices import ChoiceTree
from pipeline.engine import Completion, EngineInfo, Failure, MoeShape, Piece, Request
from pipeline.engine_arguments import likely_name
from pipeline.errors import RequestRefused, SpecError
from pipeline.json_schemas import schema_text
from pipeline.meeting import Meeting, own_address
from pipeline.model import fetch_model, read_config, routing_layers
from pipeline.settings import ModelSettings, SamplingSettings
from pipeline.vllm_arguments import arguments_of, span_arguments
from pipeline.vllm_outputs import convert
from pipeline.vllm_streams import OpenStreams

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
            env["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(
                str(core) for core in range(self.tensor_parallel // self.num_nodes)
            )
        return env

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
        """With the model on this node."""
        if self.source is None or Path(self.model_path, "config.json").is_file():
            return self
        return replace(self, model_path=fetch_model(self.source).path)


class VllmEngine:
    """One vLLM engine, stepped by the thread that made it."""

    def __init__(self, config: VllmEngineConfig, span: Mapping[str, Any] | None = None) -> None:
        """`span`: this node's part in an engine over several nodes, see `span_arguments`."""
        os.environ.update(config.environment())
        _stay_in_this_cluster()
        from vllm import LLMEngine

        args = _engine_args(config, span or {})
        with _refusals_as_spec_errors():
            self._engine = LLMEngine.from_engine_args(args)
        # vLLM fills in zeros for layers without a router, which no guard could tell from a broken capture.
        self._layers = routing_layers(read_config(Path(config.model_path) / "config.json"))
        self._choices = OpenChoices()
        self._streams = OpenStreams(self._layers)
        self._logged: set[str] = set()
        """Requests in one piece that ask for their tokens' log-probabilities."""
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

    def add(self, request: Request) -> None:
        """Queue one request; see `Engine.add`."""
        if request.choices is not None:
            self._add_choices(request, request.choices)
        else:
            params = _sampling_params(request.sampling, request.seed)
            _ask_for_more(params, request)
            self._add(request.request_id, list(request.prompt_token_ids), params, request.priority)
            if request.stream:
                self._streams.open(request.request_id, request.sampling.n)
            elif request.num_top_logs is not None:
                self._logged.add(request.request_id)

    def _add_choices(self, request: Request, tree: ChoiceTree) -> None:
        probes = self._choices.open(request, tree)
        try:
            for probe in probes:
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
        streamed, outputs = self._streams.take(self._engine.step()) if self._streams else ([], self._engine.step())
        finished = [output for output in outputs if output.finished]
        probes = [output for output in finished if output.request_id in self._choices]
        ended = [self._ended(output) for output in finished if output.request_id not in self._choices]
        return [*streamed, *ended, *(one for one in map(self._take_probe, probes) if one is not None)]

    def _ended(self, output: Any) -> Completion | Failure:
        with_logs = output.request_id in self._logged
        if with_logs:
            self._logged.discard(output.request_id)
        return convert(output, self._layers, with_logs=with_logs)

    def _take_probe(self, output: Any) -> Completion | Failure | None:
        converted = convert(output, self._layers)
        if output.request_id not in self._choices:  # another one of its request has failed in this step
            return None
        if isinstance(converted, Failure):
            request_id = self._choices.request_of(output.request_id)
            self.abort([request_id])
            return Failure(request_id, converted.kind, converted.message)
        [sample] = converted.samples
        logs = {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}
        answer = Answer(logs, sample.routed_experts, converted.num_cached_tokens, converted.timing)
        return self._choices.answer(output.request_id, answer)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget these requests."""
        self._streams.forget(request_ids)
        self._logged.difference_update(request_ids)
        self._engine.abort_request([*request_ids, *self._choices.forget(request_ids)])

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
        with contextlib.suppress(Exception):
            self._engine.engine_core.shutdown()


def lookahead(max_num_seqs: int) -> int:
    """Requests that a core in a process of its own should hold in store: it takes several steps between our looks."""
    return max(4, max_num_seqs // 8)


def _core_runs_ahead() -> bool:
    from vllm import envs

    return bool(envs.VLLM_ENABLE_V1_MULTIPROCESSING)


def _engine_args(config: VllmEngineConfig, span: Mapping[str, Any]) -> Any:
    from vllm import EngineArgs

    args = {**arguments_of(config), **span}
    known = {field.name for field in fields(EngineArgs)}
    if not known.issuperset(span):
        raise SpecError(
            "the installed vLLM can't run one engine over several nodes (no engine argument `nnodes`); install a newer "
            "one, or lower tensor_parallel to what a node has"
        )
    for name in config.engine_args:  # here, too, if the driver's machine has no vLLM: each replica would fail to start
        if name not in known:
            cure = likely_name(name, known)
            raise SpecError(f"engine_args: `{name}` is not an engine argument of the installed vLLM; {cure}")
    return EngineArgs(**{name: value for name, value in args.items() if name in known})


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

    return {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
