"""Where each routing counter of a sample, a part or a run lies in one flat vector.

One layout for all of them makes a row one value to send, a merge one addition and a footer one block of bytes. Knows
the shape of the model alone. Invariant: the order is part of the footer format and only changes with its version.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.engine import MoeShape

# Mixtral 8x7B has 896 (layer, pair) cells, 8x22B 1,568, 26 layers of 64 experts 52,416. 48 layers of 128 experts have
# 390,144: 3 MB per slice in memory and in every footer, which would make footers dearer to read than the rows.
MAX_COSELECTION_CELLS = 65_536


def num_expert_pairs(moe: MoeShape) -> int:
    """Unordered pairs of experts recorded per layer; 0 when nothing is co-selected or the model has too many pairs."""
    num_pairs = moe.num_experts * (moe.num_experts - 1) // 2
    fits = moe.num_layers * num_pairs <= MAX_COSELECTION_CELLS
    return num_pairs if moe.top_k > 1 and fits else 0


@lru_cache(maxsize=8)
def expert_pairs(num_experts: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The experts (a, b) with a < b, in the order that every co-selection array uses."""
    first, second = np.triu_indices(num_experts, 1)
    return first, second


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each counter lies in the vector, and the shape it is seen in."""

    shapes: dict[str, tuple[int, ...]]
    spans: dict[str, slice]
    size: int


@lru_cache(maxsize=8)
def layout(moe: MoeShape) -> Layout:
    """The vector's layout for one model."""
    layers = moe.num_layers
    shapes: dict[str, tuple[int, ...]] = {
        "num_samples": (1,),
        "num_tokens": (2,),
        "num_pairs": (2,),
        "selections": (2, layers, moe.num_experts),
        "same_first": (2, layers),
        "same_any": (2, layers),
        "coselection": (layers, num_expert_pairs(moe)),
    }
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()]).tolist()
    starts = [0, *ends[:-1]]
    spans = {name: slice(start, end) for name, start, end in zip(shapes, starts, ends, strict=True)}
    return Layout(shapes, spans, ends[-1])
