"""Which tensor-parallel size a model needs on a GPU type, what fits then, and why the others were refused. Pure.

Memory is counted as vLLM does at start-up (`Worker.determine_available_memory`): of a share of the GPU's total memory,
the KV cache gets what weights, activations and runtime leave.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum

from cluster.gpus import GpuType, precision_problem
from cluster.model_size import ModelSize
from cluster.precision import Precision
from cluster.spread import nodes_of_replica
from pipeline.errors import SpecError

GIB = 2**30
UTILISATION = 0.92
"""vLLM's `gpu_memory_utilization`; the rest holds the CUDA context and what no profile foresees."""
RUNTIME_GIB = 2.0
"""NCCL's buffers, CUDA graphs, sampling. Public vLLM logs of engines on 1 to 4 GPUs show 0.1 to 2.1 GiB outside torch,
and 0.4 GiB and more for graphs."""
MAX_NUM_SEQS = 1024
"""vLLM's own choice for offline work on GPUs with 70 GiB and more (EngineArgs, default_max_num_seqs)."""
MAX_NUM_BATCHED_TOKENS = 8192
"""vLLM's own choice for offline work on an A100. A prefill step of so many tokens computes 12 times as long as it reads
Mixtral's weights on an H200: more would speed nothing up, and costs activations."""
WANTED_SEQUENCES = 128
"""Sequences that should run at once. A decode step reads all weights whatever the batch, so fewer waste the GPU: of the
tokens per second that a Mixtral 8x7B makes on an H200 with 512 sequences of 600 tokens, 128 make a third, 16 a
twentieth."""


MAX_NODES = 4
"""Of a replica, that the planner suggests; a user may ask for more."""


class Fit(Enum):
    """How well an engine of some size holds a job's sequences."""

    REFUSED = "refused"
    TIGHT = "tight"
    """It runs, with fewer sequences at once than pays."""
    ROOMY = "roomy"


@dataclass(frozen=True, slots=True)
class Demand:
    """What an engine has to hold."""

    max_model_len: int
    """Tokens of the longest sequence allowed."""
    tokens_per_sequence: int
    """Prompt plus completion of the job's mean sequence."""
    precision: Precision = field(default_factory=Precision)
    utilisation: float = UTILISATION
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS
    min_kv_tokens: int | None = None
    """Insist on so much KV cache; None wants room for a sensible batch, and makes do with less."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One tensor-parallel size: what each of its GPUs holds, and what fits into the whole engine."""

    tensor_parallel: int
    fit: Fit
    problem: str | None
    """Why it is refused, or tight; None when roomy."""
    weights_gib: float
    """Per GPU."""
    overhead_gib: float
    """Per GPU: activations and runtime."""
    kv_gib: float
    """Per GPU: what is left for the KV cache."""
    kv_tokens: int
    """Of the engine."""
    num_sequences: int
    """Of the job's mean length, at once in the KV cache."""
    max_num_seqs: int
    """Suggested for the engine."""
    max_num_batched_tokens: int
    """Suggested for the engine."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The planner's answer for one model on one GPU type."""

    gpu: str
    gpus_per_node: int
    chosen: Candidate | None
    """None when nothing fits."""
    reason: str
    """Why this one; or why none, with the cure."""
    candidates: tuple[Candidate, ...]
    """All sizes looked at, smallest first; empty when the GPU can't run this model at any size."""

    @property
    def replicas_per_node(self) -> int:
        """Engines that fit on one node."""
        return self.gpus_per_node // self.chosen.tensor_parallel if self.chosen else 0


def choose_tensor_parallel(size: ModelSize, *, gpu: GpuType, demand: Demand, gpus_per_node: int = 8) -> Choice:
    """Return the smallest tensor-parallel size with room for a sensible batch, else the largest that runs at all.

    The smallest, since each doubling halves the number of replicas and adds communication to every layer.

    Guarantees:
    - the chosen size divides heads and MLP widths, and KV heads divide it or are divided by it.
    - more memory never needs a larger size; more weights never a smaller one.
    """
    problem = precision_problem(gpu, demand.precision)
    if problem:
        return Choice(gpu.name, gpus_per_node, None, problem, ())
    candidates = tuple(
        assess(size, gpu=gpu, demand=demand, tensor_parallel=number) for number in range(1, gpus_per_node + 1)
    )
    roomy = next((each for each in candidates if each.fit is Fit.ROOMY), None)
    tight = next((each for each in reversed(candidates) if each.fit is Fit.TIGHT), None)
    chosen = roomy or tight
    reason = _why(chosen, demand) if chosen else _why_none(size, candidates, gpu, demand, gpus_per_node)
    return Choice(gpu.name, gpus_per_node, chosen, reason, candidates)


def require_fit(size: ModelSize, *, gpu: GpuType, demand: Demand, tensor_parallel: int, gpus_per_node: int = 8) -> None:
    """Refuse a size that a user gave when it can't run.

    Raises:
        SpecError: with the reason, and the size to use instead if there is one.
    """
    problem = precision_problem(gpu, demand.precision)
    if problem:
        raise SpecError(problem)
    candidate = assess(size, gpu=gpu, demand=demand, tensor_parallel=tensor_parallel)
    if candidate.fit is not Fit.REFUSED:
        return
    choice = choose_tensor_parallel(size, gpu=gpu, demand=demand, gpus_per_node=gpus_per_node)
    cure = f"use tensor_parallel={choice.chosen.tensor_parallel}" if choice.chosen else choice.reason
    raise SpecError(f"{candidate.problem}; {cure}")


def assess(size: ModelSize, *, gpu: GpuType, demand: Demand, tensor_parallel: int) -> Candidate:
    """Work out one tensor-parallel size, whether it fits or not."""
    weights = size.weight_bytes(demand.precision, tensor_parallel=tensor_parallel)
    overhead = RUNTIME_GIB * GIB + activation_bytes(size, demand=demand, tensor_parallel=tensor_parallel)
    left = demand.utilisation * gpu.memory_gib * GIB - weights - overhead
    kv_bytes = size.kv_bytes_per_token(demand.precision, tensor_parallel=tensor_parallel)
    kv_tokens = max(0, int(left / kv_bytes))
    num_sequences = kv_tokens // demand.tokens_per_sequence
    max_num_seqs = suggested_max_num_seqs(num_sequences)
    candidate = Candidate(
        tensor_parallel=tensor_parallel,
        fit=Fit.ROOMY,
        problem=None,
        weights_gib=weights / GIB,
        overhead_gib=overhead / GIB,
        kv_gib=left / GIB,
        kv_tokens=kv_tokens,
        num_sequences=num_sequences,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(demand.max_num_batched_tokens, max_num_seqs),
    )
    gravest = next(_objections(candidate, size, gpu, demand), None)
    return replace(candidate, fit=gravest[0], problem=gravest[1]) if gravest else candidate


def activation_bytes(size: ModelSize, *, demand: Demand, tensor_parallel: int) -> int:
    """Peak of activations on each GPU in a step of `max_num_batched_tokens`.

    Dominated by the two workspaces of vLLM's fused experts (TritonExperts.workspace_shapes): tokens x top_k x the
    larger of hidden size and the experts' width, once with gate and up side by side. A dense MLP counts as one expert
    that all choose. Besides, four hidden states: the residual, its norm, attention's output and the result.
    """
    width = max(size.mlp_widths) / tensor_parallel
    per_expert = max(width, size.hidden_size) + max(2 * width, size.hidden_size)
    per_token = max(1, size.top_k) * per_expert + 4 * size.hidden_size
    return round(demand.max_num_batched_tokens * per_token * demand.precision.wide_bytes)


def suggested_max_num_seqs(num_sequences: int) -> int:
    """As many as the KV cache holds at the job's mean length, in eights as CUDA graphs are captured, within reason."""
    return max(1, min(MAX_NUM_SEQS, num_sequences - num_sequences % 8 if num_sequences >= 8 else num_sequences))


def wanted_kv_tokens(size: ModelSize, demand: Demand) -> int:
    """KV cache below which an engine is tight: room for a sensible batch.

    No more than takes as many bytes as the weights do: from there on even an endless batch could at most double the
    tokens per byte read, and hence per second.
    """
    if demand.min_kv_tokens is not None:
        return demand.min_kv_tokens
    as_weights = size.weight_bytes(demand.precision) // size.kv_bytes_per_token(demand.precision)
    return max(demand.max_model_len, min(WANTED_SEQUENCES * demand.tokens_per_sequence, as_weights))


def _objections(candidate: Candidate, size: ModelSize, gpu: GpuType, demand: Demand) -> Iterator[tuple[Fit, str]]:
    """What speaks against a size, the gravest first."""
    name, kv_tokens = f"tensor_parallel={candidate.tensor_parallel}", candidate.kv_tokens
    rule = _broken_rule(size, candidate.tensor_parallel)
    if rule:
        yield Fit.REFUSED, f"{name} {rule}"
    if kv_tokens == 0:
        budget = demand.utilisation * gpu.memory_gib
        yield (
            Fit.REFUSED,
            (
                f"{name} puts {candidate.weights_gib:.1f} GiB of {demand.precision} weights and "
                f"{candidate.overhead_gib:.1f} GiB of workspace on each GPU, but {gpu.name} has {budget:.1f} GiB to "
                f"give ({demand.utilisation:g} of {gpu.memory_gib:g})"
            ),
        )
    least = max(demand.max_model_len, demand.min_kv_tokens or 0)
    if kv_tokens < least:
        what = "one sequence of max_model_len needs" if least == demand.max_model_len else "min_kv_tokens asks for"
        yield Fit.REFUSED, f"{name} leaves room for {kv_tokens:,} KV tokens, but {what} {least:,}"
    wanted = wanted_kv_tokens(size, demand)
    if kv_tokens < wanted:
        yield Fit.TIGHT, f"{name} leaves room for {_room(candidate, demand)}; {wanted:,} tokens make a batch that pays"


def _broken_rule(size: ModelSize, tensor_parallel: int) -> str | None:
    """What vLLM's layers assert of a tensor-parallel size."""
    if size.num_heads % tensor_parallel:
        return f"doesn't divide the model's {size.num_heads} attention heads"
    if size.num_kv_heads % tensor_parallel and tensor_parallel % size.num_kv_heads:
        return f"neither divides the model's {size.num_kv_heads} KV heads nor is a multiple of them"
    width = next((width for width in size.mlp_widths if width % tensor_parallel), None)
    return f"doesn't divide an MLP width of {width:,}" if width else None


def _room(candidate: Candidate, demand: Demand) -> str:
    sequences = f"{candidate.num_sequences:,} sequences of {demand.tokens_per_sequence:,}"
    return f"{candidate.kv_tokens:,} KV tokens, {sequences}"


def _why(chosen: Candidate, demand: Demand) -> str:
    what = (
        f"tensor_parallel={chosen.tensor_parallel}, {chosen.weights_gib:.1f} GiB of {demand.precision} weights a GPU,"
    )
    if chosen.fit is Fit.ROOMY:
        return f"{what} is the smallest with room enough: {_room(chosen, demand)}"
    return f"{what} is the largest that model and node allow: {_room(chosen, demand)}, too few for a batch that pays"


def _why_none(
    size: ModelSize, candidates: tuple[Candidate, ...], gpu: GpuType, demand: Demand, gpus_per_node: int
) -> str:
    allowed = [each for each in candidates if not _broken_rule(size, each.tensor_parallel)]
    cure = "" if demand.precision.quantization else "an FP8, AWQ or GPTQ model, "
    return (
        f"nothing fits on a node of {gpus_per_node}: {allowed[-1].problem}; use {cure}a smaller max_model_len or a GPU "
        f"type with more memory{_over_nodes(size, gpu, demand, gpus_per_node)}"
    )


def _over_nodes(size: ModelSize, gpu: GpuType, demand: Demand, gpus_per_node: int) -> str:
    """The size that fits over several nodes, to be asked for by name: between nodes the network decides the speed."""
    for number in range(gpus_per_node + 1, MAX_NODES * gpus_per_node + 1):
        num_nodes = nodes_of_replica(number, [gpus_per_node] * MAX_NODES)
        if num_nodes <= MAX_NODES and assess(size, gpu=gpu, demand=demand, tensor_parallel=number).fit is Fit.ROOMY:
            return f", or set tensor_parallel={number}, over {num_nodes} nodes with a fast network"
    return ""
