"""One sample's expert ids -> counts, repetition and co-selection.

Pure numpy, run inside the replica on every sample, so there is no Python loop over tokens. Knows nothing of rows, runs
or slices. Invariant: ids that no router can have chosen are refused, so whatever comes out of here may enter totals.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.engine import MoeShape
from pipeline.errors import RoutingInvalid
from pipeline.routing_layout import expert_pairs, layout, num_expert_pairs

PHASES = ("prompt", "completion")


@dataclass(frozen=True, eq=False)  # no slots: to pickle those of a frozen class runs Python code for every field
class RowRouting:
    """What one sample contributes to routing statistics. L layers, E experts, axis "phase" = (prompt, completion).

    Guarantees:
    - the counts of both phases add up to `num_tokens x layers x top_k`.
    - a pair of consecutive tokens belongs to the phase of its second token, so phases add up to the whole.
    """

    moe: MoeShape
    counters: bytes
    """uint32 in the order of `routing_layout`. Bytes, because millions of these travel and an array travels 20 times
    slower than its bytes."""

    @property
    def vector(self) -> NDArray[np.uint32]:
        """All counters, flat."""
        return np.frombuffer(self.counters, np.uint32)

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Tokens with routing, per phase: P and G - 1."""
        prompt, completion = self._view("num_tokens").tolist()
        return prompt, completion

    @property
    def num_pairs(self) -> tuple[int, int]:
        """Pairs of consecutive tokens, per phase."""
        prompt, completion = self._view("num_pairs").tolist()
        return prompt, completion

    @property
    def prompt_counts(self) -> NDArray[np.uint32]:
        """[L*E], row-major: how often the prompt's tokens chose each expert."""
        counts: NDArray[np.uint32] = self._view("selections")[0].reshape(-1)
        return counts

    @property
    def completion_counts(self) -> NDArray[np.uint32]:
        """[L*E], as above for the generated tokens but the last, which the engine never feeds back."""
        counts: NDArray[np.uint32] = self._view("selections")[1].reshape(-1)
        return counts

    @property
    def same_first(self) -> NDArray[np.uint32]:
        """[phase, L]: pairs that keep their first choice."""
        return self._view("same_first")

    @property
    def same_any(self) -> NDArray[np.uint32]:
        """[phase, L]: pairs that share at least one expert."""
        return self._view("same_any")

    @property
    def coselection(self) -> NDArray[np.uint32]:
        """[L, pairs] in `expert_pairs` order: tokens that chose both; [L, 0] when the shape is not recorded."""
        return self._view("coselection")

    @property
    def repeat_first(self) -> float | None:
        """Share of consecutive tokens that keep their first choice, averaged over layers; None below two tokens.

        Mixtral of Experts (arXiv:2401.04088), section 5, table 5, column "first choice".
        """
        return self._share(self.same_first)

    @property
    def repeat_any(self) -> float | None:
        """As `repeat_first`, for sharing at least one expert (table 5, "first or second choice")."""
        return self._share(self.same_any)

    def _view(self, name: str) -> NDArray[np.uint32]:
        at = layout(self.moe)
        return self.vector[at.spans[name]].reshape(at.shapes[name])

    def _share(self, hits: NDArray[np.uint32]) -> float | None:
        num_pairs = sum(self.num_pairs)
        return float(hits.sum(dtype=np.uint64)) / (num_pairs * hits.shape[1]) if num_pairs else None


def check_row(routed_experts: NDArray[Any], num_prompt: int, num_generated: int, moe: MoeShape) -> NDArray[Any]:
    """Return the ids as a contiguous [top_k, tokens, layers] array if a router can have chosen them.

    The array must be integer, [num_prompt + num_generated - 1, layers, top_k], every id below the number of experts,
    and a token's ids within a layer must differ: some kernels once returned silent zeros. With top_k = 1 zeros can't be
    told from a router that always picks expert 0, and pass.

    Raises:
        RoutingInvalid: naming what is impossible.
    """
    ids = np.asarray(routed_experts)
    expected = (num_prompt + num_generated - 1, moe.num_layers, moe.top_k)
    if num_prompt < 1 or num_generated < 0 or ids.shape != expected or ids.dtype.kind not in "iu":
        raise RoutingInvalid(
            f"expert ids are {ids.dtype} {list(ids.shape)}, but {num_prompt} prompt and {num_generated} generated "
            f"tokens need integers {list(expected)} ([prompt + generated - 1, layers, top_k])"
        )
    _check_range(ids, moe)
    planes = np.ascontiguousarray(ids.transpose(2, 0, 1))
    for i, j in combinations(range(moe.top_k), 2):
        _check_distinct(planes, i, j)
    return planes


def _check_range(ids: NDArray[Any], moe: MoeShape) -> None:
    if not ids.size:
        return
    lowest, highest = (int(ids.min()) if ids.dtype.kind == "i" else 0), int(ids.max())
    if lowest < 0 or highest >= moe.num_experts:
        wrong = lowest if lowest < 0 else highest
        raise RoutingInvalid(f"expert id {wrong} is out of range: the model has experts 0..{moe.num_experts - 1}")


def _check_distinct(planes: NDArray[Any], i: int, j: int) -> None:
    equal = planes[i] == planes[j]
    if equal.any():
        token, layer = (int(index) for index in np.argwhere(equal)[0])
        raise RoutingInvalid(
            f"token {token} chose expert {int(planes[i, token, layer])} twice in layer {layer}; "
            f"{int(equal.sum())} of {equal.size} token-layers repeat an id, so the engine's capture can't be trusted"
        )


def summarize_row(routed_experts: NDArray[Any], num_prompt: int, num_generated: int, moe: MoeShape) -> RowRouting:
    """Reduce one sample's ids, [num_prompt + num_generated - 1, layers, top_k], first choice first.

    The first `num_prompt` tokens are the prompt's, the others the completion's. About 0.1 ms for 300 tokens of Mixtral
    8x7B on one CPU core; time grows linearly with tokens.

    Raises:
        RoutingInvalid: see `check_row`; null the sample's routing and count it.
    """
    planes = check_row(routed_experts, num_prompt, num_generated, moe)
    num_tokens = planes.shape[1]
    split = min(num_prompt, num_tokens)
    pairs = max(num_tokens - 1, 0)
    pair_split = max(split - 1, 0)
    vector = np.concatenate(
        [
            np.array([1, split, num_tokens - split, pair_split, pairs - pair_split]),
            *_selections(np.asarray(routed_experts), split, moe),
            *_hits_by_phase(planes[0, 1:] == planes[0, :-1], pair_split),
            *_hits_by_phase(_shares_expert(planes), pair_split),
            _coselection(planes, moe),
        ],
        dtype=np.uint32,
        casting="unsafe",
    )
    return RowRouting(moe, vector.tobytes())


@lru_cache(maxsize=8)
def _layer_offsets(num_layers: int, step: int, repeats: int) -> NDArray[np.intp]:
    return np.repeat(np.arange(num_layers, dtype=np.intp) * step, repeats)


def _selections(ids: NDArray[Any], split: int, moe: MoeShape) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Counts [L*E] before and from token `split` on."""
    bins = moe.num_layers * moe.num_experts
    codes = ids.reshape(ids.shape[0], moe.num_layers * moe.top_k) + _layer_offsets(
        moe.num_layers, moe.num_experts, moe.top_k
    )
    prompt = np.bincount(codes[:split].ravel(), minlength=bins)
    completion = np.bincount(codes[split:].ravel(), minlength=bins)
    return prompt, completion


def _shares_expert(planes: NDArray[Any]) -> NDArray[np.bool_]:
    """[tokens - 1, L]: whether a token and the one before it have an expert in common."""
    top_k, num_tokens, num_layers = planes.shape
    shared = np.zeros((max(num_tokens - 1, 0), num_layers), dtype=np.bool_)
    for i, j in product(range(top_k), repeat=2):
        shared |= planes[i, 1:] == planes[j, :-1]
    return shared


def _hits_by_phase(hits: NDArray[np.bool_], split: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """[pairs, L] -> [L] before and from pair `split` on."""
    return hits[:split].sum(axis=0), hits[split:].sum(axis=0)


def _coselection(planes: NDArray[Any], moe: MoeShape) -> NDArray[np.intp]:
    """[L*pairs] counts of tokens that chose both experts of a pair."""
    num_experts, num_layers = moe.num_experts, moe.num_layers
    if not num_expert_pairs(moe):
        return np.zeros(0, dtype=np.intp)
    offsets = _layer_offsets(num_layers, num_experts * num_experts, 1)
    ordered = np.zeros(num_layers * num_experts * num_experts, dtype=np.intp)
    for i, j in combinations(range(moe.top_k), 2):
        codes = planes[i] * np.intp(num_experts) + planes[j] + offsets
        ordered += np.bincount(codes.ravel(), minlength=ordered.size)
    matrix = ordered.reshape(num_layers, num_experts, num_experts)
    first, second = expert_pairs(num_experts)
    return (matrix[:, first, second] + matrix[:, second, first]).reshape(-1)
