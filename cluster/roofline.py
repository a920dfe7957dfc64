"""How fast an engine could be at best, and what a run would take: seconds, GPU-hours, cost. Pure.

The roofline model (Williams, Waterman, Patterson 2009): nothing is faster than its bytes over the memory's bandwidth,
or its operations over the arithmetic's peak. What real engines reach of that is a range, stated and kept apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.gpus import GpuType, peak_tflops
from cluster.model_size import ModelSize
from cluster.precision import Precision

MEMORY_EFFICIENCY = 0.9
"""Of the peak bandwidth, what a copy reaches: 4.3 of 4.8 TB/s measured on an H200."""
ARITHMETIC_EFFICIENCY = 0.8
"""Of the peak, what a large matrix product reaches: 790 of 989 TFLOP/s measured on an H200."""
LINK_EFFICIENCY = 0.75
"""Of the peak, what NCCL's all-reduce reaches inside a node: 230 of 300 GB/s on an A100 (nccl-tests, busbw)."""
NETWORK_GB_PER_S = 25.0
"""Between nodes, one direction: 200 Gb/s, a guess. Cloud nodes with such GPUs have 100 to 3,200 Gb/s."""
REAL_SHARE_LOW, REAL_SHARE_HIGH = 0.2, 0.6
"""What engines reach of the ideal, prompts counted. TensorRT-LLM 0.9's published figures for Mixtral 8x7B in FP8 on
2 x H200 come to 20 to 24%; MLPerf's for 8 x H200 (v4.1, v5.0) to 28 to 48% if prompts have 200 to 400 tokens."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One replica: a model on some GPUs."""

    size: ModelSize
    gpu: GpuType
    tensor_parallel: int
    precision: Precision
    num_nodes: int = 1
    """Over which its GPUs are spread."""

    @property
    def bytes_per_s(self) -> float:
        """Of each GPU's memory."""
        return self.gpu.memory_gb_per_s * 1e9 * MEMORY_EFFICIENCY

    @property
    def flops_per_s(self) -> float:
        """Of all its GPUs."""
        return peak_tflops(self.gpu, self.precision) * 1e12 * ARITHMETIC_EFFICIENCY * self.tensor_parallel

    @property
    def communication_s_per_token(self) -> float:
        """Two all-reduces of a hidden state per layer, after attention and MLP (Shoeybi et al. 2019, Megatron-LM).

        A ring sends 2 (t-1)/t of the data through each of t GPUs, and is as fast as its slowest hop: over several
        nodes, the network. Latency isn't counted: a few microseconds each within a node, tens between nodes.
        """
        if self.tensor_parallel == 1:
            return 0.0
        data = 2 * self.size.num_layers * self.size.hidden_size * self.precision.wide_bytes
        sent = 2 * (self.tensor_parallel - 1) / self.tensor_parallel * data
        link = self.gpu.link_gb_per_s if self.num_nodes == 1 else min(self.gpu.link_gb_per_s, NETWORK_GB_PER_S)
        return sent / (link * 1e9 * LINK_EFFICIENCY)


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """Seconds that the parts of one step take at best, in which every running sequence grows by one token."""

    batch: int
    weights_s: float
    """Reading the weights that the batch touches."""
    kv_s: float
    """Reading the KV cache of the batch."""
    compute_s: float
    communication_s: float

    @property
    def ideal_s(self) -> float:
        """Memory and arithmetic overlap in full; the all-reduces wait for both."""
        return max(self.weights_s + self.kv_s, self.compute_s) + self.communication_s

    @property
    def tokens_per_s(self) -> float:
        """Of the engine, at best, while no prompt is being read."""
        return self.batch / self.ideal_s


def decode_step(engine: Engine, *, batch: int, context: float) -> DecodeStep:
    """Work out a step of `batch` sequences that are `context` tokens long on average.

    Guarantees:
    - more bandwidth is never slower.
    """
    size, precision, tensor_parallel = engine.size, engine.precision, engine.tensor_parallel
    weights = size.streamed_bytes(precision, tensor_parallel=tensor_parallel, batch=batch)
    kv = batch * context * size.kv_bytes_per_token(precision, tensor_parallel=tensor_parallel)
    return DecodeStep(
        batch=batch,
        weights_s=weights / engine.bytes_per_s,
        kv_s=kv / engine.bytes_per_s,
        compute_s=batch * size.flops_per_token(context=context) / engine.flops_per_s,
        communication_s=batch * engine.communication_s_per_token,
    )


@dataclass(frozen=True, slots=True)
class TokenTotal:
    """A count of tokens over a run, with the interval it is known in; as `jobs.estimate` reports them."""

    total: int
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Work:
    """What a run has to do."""

    num_sequences: int
    """Rows times samples per row."""
    input_tokens: TokenTotal
    """Over all rows; samples of one row share its prompt."""
    output_tokens: TokenTotal
    """Over all samples."""


@dataclass(frozen=True, slots=True)
class RunEstimate:
    """What a run would take, without the engines' start and the tail of the last rows."""

    num_gpus: int
    ideal_s: float
    """No schedule on these GPUs can be faster, for the totals given."""
    wall_low_s: float
    """The low end of the tokens at the best share of the ideal that is expected."""
    wall_high_s: float
    """The high end of the tokens at the worst share."""
    usd_per_gpu_hour: float | None = None

    @property
    def gpu_hours(self) -> tuple[float, float]:
        """Low and high."""
        return self.wall_low_s * self.num_gpus / 3600, self.wall_high_s * self.num_gpus / 3600

    @property
    def usd(self) -> tuple[float, float] | None:
        """Low and high; None without a price."""
        if self.usd_per_gpu_hour is None:
            return None
        low, high = self.gpu_hours
        return low * self.usd_per_gpu_hour, high * self.usd_per_gpu_hour


def estimate_run(
    engine: Engine, *, num_replicas: int, max_num_seqs: int, work: Work, usd_per_gpu_hour: float | None = None
) -> RunEstimate:
    """Work out what `num_replicas` engines need for a run whose rows are spread evenly over them."""
    tokens = work.input_tokens, work.output_tokens
    ideal, low, high = (
        _ideal_s(engine, num_replicas, max_num_seqs, work.num_sequences, *(getattr(each, end) for each in tokens))
        for end in ("total", "low", "high")
    )
    return RunEstimate(
        num_gpus=num_replicas * engine.tensor_parallel,
        ideal_s=ideal,
        wall_low_s=low / REAL_SHARE_HIGH,
        wall_high_s=high / REAL_SHARE_LOW,
        usd_per_gpu_hour=usd_per_gpu_hour,
    )


def _ideal_s(
    engine: Engine, num_replicas: int, max_num_seqs: int, num_sequences: int, input_tokens: int, output_tokens: int
) -> float:
    """Bytes of all decode steps over bandwidth, or operations of prompts and completions over the peak: the longer.

    Chunked prefill runs prompts in the decode steps, so neither waits for the other; prompts read no weights of their
    own, since a step that has prompt tokens has others' decode tokens too.
    """
    if not num_sequences:
        return 0.0
    batch = max(1, min(max_num_seqs, num_sequences // num_replicas))
    prompt, completion = input_tokens / num_sequences, output_tokens / num_sequences
    step = decode_step(engine, batch=batch, context=prompt + completion / 2)
    inputs, outputs = input_tokens / num_replicas, output_tokens / num_replicas
    memory_s = outputs / batch * (step.weights_s + step.kv_s)
    prompt_flops = inputs * engine.size.flops_per_token(context=prompt / 2)
    compute_s = outputs / batch * step.compute_s + prompt_flops / engine.flops_per_s
    return max(memory_s, compute_s) + (inputs + outputs) * engine.communication_s_per_token
