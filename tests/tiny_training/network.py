"""A Mixtral for training on a CPU, the same function as transformers' `MixtralForCausalLM`, whose names it exports.

Prompts of a step are one flat list of tokens; only attention sees them as padded groups of like length. Experts are
run one after the other on the tokens that chose them, and logits are computed where there is a target only: together
10,000 tokens/s on 2 cores. `test_network.py` compares it with transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "attention_dropout": 0.0,
    "router_aux_loss_coef": 0.02,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
HIDDEN, INNER, LAYERS = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["num_hidden_layers"]
HEADS, KV_HEADS, HEAD_DIM = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"], CONFIG["head_dim"]
EXPERTS, TOP_K, VOCAB = CONFIG["num_local_experts"], CONFIG["num_experts_per_tok"], CONFIG["vocab_size"]
# Embeddings start out larger than what layers add to them, lest rare tokens are drowned. These learnt to copy 64 words
# in 340 steps; a third of each took more than 400.
EMBEDDING_STD, MATRIX_STD, OUTPUT_STD = 0.3, 0.06, 0.02
GROUP_LIMITS = (48, 96, 192, 512, 1 << 30)


@dataclass(frozen=True, slots=True)
class Groups:
    """Where the tokens of several prompts lie: `ids` is flat, shape [tokens]; groups index into it."""

    ids: Tensor
    positions: Tensor
    """Of each token in its own prompt."""
    weights: Tensor
    """Of each token in the balancing loss: a prompt's sum to 1, so that long ones don't drown the others."""
    tables: list[tuple[Tensor, Tensor]]
    """Per group: flat index of each place [prompts, longest] (padding repeats the last), and which places are real."""
    starts: list[int]
    """Flat index of each prompt's first token, in the order given."""


def group(prompts: Sequence[Sequence[int]]) -> Groups:
    """Lay prompts out one after the other, and group them by length for attention."""
    starts, flat, positions, weights = [], [], [], []
    members: dict[int, list[int]] = {}
    for index, ids in enumerate(prompts):
        starts.append(len(flat))
        flat += ids
        positions += range(len(ids))
        weights += [1 / len(ids)] * len(ids)
        members.setdefault(next(limit for limit in GROUP_LIMITS if len(ids) <= limit), []).append(index)
    tables = []
    for indices in members.values():
        lengths = torch.tensor([len(prompts[index]) for index in indices])
        places = torch.arange(int(lengths.max()))
        real = places < lengths[:, None]
        first = torch.tensor([starts[index] for index in indices])
        tables.append((first[:, None] + torch.minimum(places, lengths[:, None] - 1), real))
    return Groups(torch.tensor(flat), torch.tensor(positions), torch.tensor(weights), tables, starts)


class Layer(nn.Module):
    """Attention and a mixture of experts, each behind an RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.q = _matrix(HEADS * HEAD_DIM, HIDDEN)
        self.k = _matrix(KV_HEADS * HEAD_DIM, HIDDEN)
        self.v = _matrix(KV_HEADS * HEAD_DIM, HIDDEN)
        self.o = _matrix(HIDDEN, HEADS * HEAD_DIM, OUTPUT_STD)
        self.gate = _matrix(EXPERTS, HIDDEN)
        self.w1 = nn.ParameterList([_matrix(INNER, HIDDEN) for _ in range(EXPERTS)])
        self.w2 = nn.ParameterList([_matrix(HIDDEN, INNER, OUTPUT_STD) for _ in range(EXPERTS)])
        self.w3 = nn.ParameterList([_matrix(INNER, HIDDEN) for _ in range(EXPERTS)])
        self.attention_norm = nn.Parameter(torch.ones(HIDDEN))
        self.experts_norm = nn.Parameter(torch.ones(HIDDEN))

    def forward(
        self, x: Tensor, groups: Groups, rope: tuple[Tensor, Tensor], places: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the next states, of all tokens or of those at `places`, and the balancing loss (1 when balanced)."""
        x = x + self._attend(_norm(x, self.attention_norm), groups, rope)
        mixed, balance = self._mix(_norm(x, self.experts_norm), groups.weights, places)
        return (x if places is None else x[places]) + mixed, balance

    def _attend(self, x: Tensor, groups: Groups, rope: tuple[Tensor, Tensor]) -> Tensor:
        q = _rotate((x @ self.q.T).view(-1, HEADS, HEAD_DIM), rope)
        k = _rotate((x @ self.k.T).view(-1, KV_HEADS, HEAD_DIM), rope)
        v = (x @ self.v.T).view(-1, KV_HEADS, HEAD_DIM)
        outs, places = [], []
        for table, real in groups.tables:
            flat = table.flatten()
            shape = (*table.shape, -1, HEAD_DIM)
            keys, values = (
                t.index_select(0, flat).view(shape).repeat_interleave(HEADS // KV_HEADS, dim=2).transpose(1, 2)
                for t in (k, v)
            )
            queries = q.index_select(0, flat).view(shape).transpose(1, 2)
            out = scaled_dot_product_attention(queries, keys, values, is_causal=True)
            outs.append(out.transpose(1, 2).reshape(*table.shape, HEADS * HEAD_DIM)[real])
            places.append(table[real])
        order = torch.argsort(torch.cat(places))
        return torch.cat(outs).index_select(0, order) @ self.o.T

    def _mix(self, x: Tensor, weights: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
        probabilities = (x @ self.gate.T).softmax(-1)
        best, chosen = probabilities.topk(TOP_K, dim=-1)
        share = weights / weights.sum()
        selected = torch.zeros(EXPERTS).index_add_(0, chosen.flatten(), share.repeat_interleave(TOP_K) / TOP_K)
        balance = EXPERTS * (selected * (probabilities * share[:, None]).sum(0)).sum()
        if places is not None:
            x, best, chosen = x[places], best[places], chosen[places]
        best = best / best.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)
        tokens = order // TOP_K
        counts = chosen.flatten().bincount(minlength=EXPERTS).tolist()
        outs = [
            (silu(part @ w1.T) * (part @ w3.T)) @ w2.T
            for part, w1, w2, w3 in zip(x.index_select(0, tokens).split(counts), self.w1, self.w2, self.w3, strict=True)
        ]
        mixed = torch.cat(outs) * best.flatten().index_select(0, order)[:, None]
        return torch.zeros_like(x).index_add_(0, tokens, mixed), balance


class TinyMixtral(nn.Module):
    """The whole model; embeddings are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(VOCAB, HIDDEN) * EMBEDDING_STD)
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
        self.norm = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, groups: Groups, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return normed final states, shape [tokens or places, hidden], and the layers' mean balancing loss.

        The last layer's experts are run at `places` only: nothing else would look at what they make of other tokens.
        """
        x = self.embedding.index_select(0, groups.ids)
        rope = rope_of(groups.positions)
        balances = []
        for index, layer in enumerate(self.layers):
            x, balance = layer(x, groups, rope, places if index == LAYERS - 1 else None)
            balances.append(balance)
        return _norm(x, self.norm), torch.stack(balances).mean()

    def export(self, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
        """The weights under the names that Mixtral's checkpoints have."""
        return {name: tensor.detach().to(dtype).contiguous() for name, tensor in self._by_name().items()}

    @torch.no_grad()
    def load_export(self, tensors: dict[str, Tensor]) -> None:
        """Take over weights that `export` wrote, as exact as they were written."""
        for name, parameter in self._by_name().items():
            parameter.copy_(tensors[name])

    def _by_name(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            prefix = f"model.layers.{index}."
            tensors |= {f"{prefix}self_attn.{name}_proj.weight": getattr(layer, name) for name in "qkvo"}
            tensors[f"{prefix}input_layernorm.weight"] = layer.attention_norm
            tensors[f"{prefix}post_attention_layernorm.weight"] = layer.experts_norm
            tensors[f"{prefix}block_sparse_moe.gate.weight"] = layer.gate
            for name in ("w1", "w2", "w3"):
                for expert, matrix in enumerate(getattr(layer, name)):
                    tensors[f"{prefix}block_sparse_moe.experts.{expert}.{name}.weight"] = matrix
        return tensors


def rope_of(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, each [tokens, 1, head_dim]."""
    inverse = CONFIG["rope_theta"] ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = positions[:, None] * inverse
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat([-second, first], dim=-1) * rope[1]


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, (HIDDEN,), weight, CONFIG["rms_norm_eps"])


def _matrix(rows: int, columns: int, std: float = MATRIX_STD) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) * std)
