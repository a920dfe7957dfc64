"""Samples' routing -> the `routing` column of a shard, all rows at once.

Knows the column's type from the schema and the counters' places from `routing_layout`. Invariant: a sample without
valid routing is a null, never zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.engine import MoeShape
from pipeline.routing import RowRouting
from pipeline.routing_layout import layout


def routing_column(
    rows: Sequence[RowRouting | None], expert_ids: Sequence[bytes | None], kind: pa.StructType, moe: MoeShape
) -> pa.Array:
    """Return one struct per sample; `kind` is `rows.routing_type` of the same shape."""
    missing = np.array([row is None for row in rows], dtype=bool)
    matrix = _counters([row for row in rows if row is not None], moe)
    spans = layout(moe).spans
    width = moe.num_layers * moe.num_experts
    selections = np.zeros((len(rows), 2, width), np.uint32)
    selections[~missing] = matrix[:, spans["selections"]].reshape(-1, 2, width)
    arrays = {
        "prompt_expert_counts": _lists(selections[:, 0], missing),
        "completion_expert_counts": _lists(selections[:, 1], missing),
        "repeat_first": _shares(matrix[:, spans["same_first"]], matrix[:, spans["num_pairs"]], missing),
        "repeat_any": _shares(matrix[:, spans["same_any"]], matrix[:, spans["num_pairs"]], missing),
        "expert_ids": pa.array(expert_ids, pa.binary()),
    }
    fields = list(kind)
    return pa.StructArray.from_arrays([arrays[f.name] for f in fields], fields=fields, mask=pa.array(missing))


def _counters(rows: Sequence[RowRouting], moe: MoeShape) -> NDArray[np.uint32]:
    """[rows, counters in layout order]."""
    return np.frombuffer(b"".join([row.counters for row in rows]), np.uint32).reshape(-1, layout(moe).size)


def _lists(counts: NDArray[np.uint32], missing: NDArray[np.bool_]) -> pa.Array:
    values = pa.array(np.ascontiguousarray(counts).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, counts.shape[1], mask=pa.array(missing))


def _shares(hits: NDArray[np.uint32], pairs: NDArray[np.uint32], missing: NDArray[np.bool_]) -> pa.Array:
    """As `RowRouting.repeat_first` and `repeat_any`: hits over pairs x layers; null without pairs."""
    possible = np.zeros(len(missing), np.float64)
    found = np.zeros(len(missing), np.float64)
    possible[~missing] = pairs.sum(axis=1, dtype=np.uint64) * (hits.shape[1] // 2)
    found[~missing] = hits.sum(axis=1, dtype=np.uint64)
    share = np.divide(found, possible, out=np.zeros_like(found), where=possible > 0)
    return pa.array(share.astype(np.float32), mask=possible == 0)
