"""How big a model is: its parameters by kind, counted from its config, and the bytes, KV cache and FLOPs they come to.

Pure arithmetic over `config.json`; reads no file and imports no ML library. A model family that isn't known here is
refused, never guessed: a wrong count would plan a fleet that can't load its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.precision import Precision
from pipeline.errors import SpecError
from pipeline.model import moe_shape

FAMILIES = ("mixtral", "mistral", "llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "olmoe")
# OLMoE normalises queries and keys over all heads at once, Qwen 3 each head by itself.
_NORM_PER_HEAD = ("qwen3", "qwen3_moe")
_NORM_OVER_HEADS = ("olmoe",)


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A decoder's shape, and its parameters over all layers by how tensor parallelism and quantization treat them.

    Guarantees:
    - `num_parameters` is what transformers allocates for the same config.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    """0 for a dense model."""
    top_k: int
    mlp_widths: tuple[int, ...]
    """Every MLP width there is: of experts, shared experts and dense layers. Tensor parallelism must divide each."""
    q_and_o: int
    """Query and output projections: split by heads, quantized."""
    k_and_v: int
    """Key and value projections: split by KV heads as long as there are enough, quantized."""
    experts: int
    """Routed experts: each split over all GPUs, quantized."""
    mlp: int
    """Dense layers' MLPs and shared experts: split, quantized."""
    embedding: int
    """Input embedding: split by vocabulary, never quantized."""
    head: int
    """Output projection: likewise; 0 when it is the embedding itself."""
    replicated: int
    """Routers, norms and biases: whole on every GPU, never quantized (vLLM's MixtralMoE: "Gate always runs at half /
    full precision"). Biases are split in truth; they are under 0.1%."""

    @property
    def num_parameters(self) -> int:
        """All parameters; tied ones once."""
        matrices = self.q_and_o + self.k_and_v + self.experts + self.mlp
        return matrices + self.embedding + self.head + self.replicated

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token uses: top_k of the routed experts, and all the rest."""
        chosen = self.experts * self.top_k // self.num_experts if self.num_experts else 0
        return self.num_parameters - self.experts + chosen

    def weight_bytes(self, precision: Precision, *, tensor_parallel: int = 1) -> int:
        """Bytes of weights on each of an engine's GPUs."""
        return round(self._bytes(precision, tensor_parallel, experts=self.experts, embedding=self.embedding))

    def streamed_bytes(self, precision: Precision, *, tensor_parallel: int, batch: int) -> int:
        """Bytes of weights that each GPU reads to advance `batch` sequences by one token.

        Of an input embedding only `batch` rows are read. Of E experts per layer, B tokens that each choose k evenly
        touch E * (1 - (1 - k/E)^B): at 16 tokens 99% of Mixtral's.
        """
        touched = 1 - (1 - self.top_k / self.num_experts) ** batch if self.num_experts else 0.0
        embedding = 0 if self.head else self.embedding
        return round(self._bytes(precision, tensor_parallel, experts=self.experts * touched, embedding=embedding))

    def kv_bytes_per_token(self, precision: Precision, *, tensor_parallel: int = 1) -> int:
        """Bytes of KV cache per token on each GPU; with more GPUs than KV heads, GPUs hold copies.

        Counts every layer in full, also those of a sliding window: the safe side.
        """
        kv_heads = max(1, self.num_kv_heads // tensor_parallel)
        return 2 * self.num_layers * kv_heads * self.head_dim * precision.kv_bytes

    def flops_per_token(self, *, context: float) -> float:
        """Floating-point operations of one token's forward pass that attends to `context` tokens.

        Two per weight it is multiplied with, and four per head, dimension and attended token, for the scores and the
        weighted sum (Kaplan et al. 2020, Scaling Laws for Neural Language Models, table 1). Looking up the input
        embedding multiplies nothing.
        """
        multiplied = self.num_active_parameters - (self.embedding if self.head else 0)
        return 2 * multiplied + 4 * self.num_layers * self.num_heads * self.head_dim * context

    def _bytes(self, precision: Precision, tensor_parallel: int, *, experts: float, embedding: int) -> float:
        kv_share = max(1 / tensor_parallel, 1 / self.num_kv_heads)
        matrices = (self.q_and_o + experts + self.mlp) / tensor_parallel + self.k_and_v * kv_share
        wide = (embedding + self.head) / tensor_parallel + self.replicated
        return precision.matrix_bytes * matrices + precision.wide_bytes * wide


def model_size(config: Mapping[str, Any]) -> ModelSize:
    """Count the parameters of a model from its `config.json`.

    Raises:
        SpecError: the model is of a family whose layers aren't known here.
    """
    config = {**config, **(config.get("text_config") or {})}
    if config.get("model_type") not in FAMILIES:
        raise SpecError(
            f"model_type {config.get('model_type')!r}: its parameters can't be counted from its config, so no GPUs can "
            f"be planned for it; give tensor_parallel yourself (planned are {', '.join(FAMILIES)})"
        )
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    vocabulary = config["vocab_size"] * hidden
    attention_extras = _attention_extras(config, q_width=heads * head_dim, kv_width=kv_heads * head_dim)
    mlps = _mlps(config)
    return ModelSize(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_experts=mlps.num_experts,
        top_k=mlps.top_k,
        mlp_widths=mlps.widths,
        q_and_o=layers * 2 * hidden * heads * head_dim,
        k_and_v=layers * 2 * hidden * kv_heads * head_dim,
        experts=mlps.experts,
        mlp=mlps.dense,
        embedding=vocabulary,
        head=0 if config.get("tie_word_embeddings") else vocabulary,
        replicated=mlps.replicated + layers * (2 * hidden + attention_extras) + hidden,
    )


@dataclass(frozen=True, slots=True)
class _Mlps:
    """What follows attention, over all layers."""

    num_experts: int
    top_k: int
    widths: tuple[int, ...]
    experts: int
    dense: int
    replicated: int


def _mlps(config: Mapping[str, Any]) -> _Mlps:
    """Count gate, up and down projections of experts, shared experts and dense layers; routers and biases apart."""
    hidden, dense_width = config["hidden_size"], config["intermediate_size"]
    moe = moe_shape(dict(config))
    num_dense_layers = config["num_hidden_layers"] - (moe.num_layers if moe else 0)
    bias = 2 * dense_width + hidden if config.get("mlp_bias") else 0
    dense = num_dense_layers * 3 * hidden * dense_width
    if moe is None:
        return _Mlps(0, 0, (dense_width,), 0, dense, num_dense_layers * bias)
    width = config.get("moe_intermediate_size") or dense_width
    shared = config.get("shared_expert_intermediate_size") or 0
    widths = {width, shared, dense_width if num_dense_layers else 0} - {0}
    router = hidden * moe.num_experts + (hidden if shared else 0)  # a shared expert has a gate of one output
    return _Mlps(
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        widths=tuple(sorted(widths)),
        experts=moe.num_layers * moe.num_experts * 3 * hidden * width,
        dense=dense + moe.num_layers * 3 * hidden * shared,
        replicated=moe.num_layers * router + num_dense_layers * bias,
    )


def _attention_extras(config: Mapping[str, Any], *, q_width: int, kv_width: int) -> int:
    """Biases and norms of one layer's attention."""
    family, extras = config["model_type"], 0
    if family == "qwen2" or (family == "qwen2_moe" and config.get("qkv_bias", True)):
        extras += q_width + 2 * kv_width
    elif family != "qwen2_moe" and config.get("attention_bias"):
        extras += q_width + 2 * kv_width + config["hidden_size"]
    if family in _NORM_PER_HEAD:
        extras += 2 * q_width // config["num_attention_heads"]
    if family in _NORM_OVER_HEADS:
        extras += q_width + kv_width
    return extras
