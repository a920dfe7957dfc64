"""The routing column against each row's own statistics."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pipeline.engine import MoeShape
from pipeline.routing import RowRouting, summarize_row
from pipeline.routing_columns import routing_column
from pipeline.rows import routing_type

MOE = MoeShape(num_layers=3, num_experts=5, top_k=2)


def random_row(prompt: int, generated: int, seed: int = 0) -> RowRouting:
    scores = np.random.default_rng(seed).random((prompt + generated - 1, MOE.num_layers, MOE.num_experts))
    return summarize_row(scores.argsort(axis=-1)[..., : MOE.top_k].astype(np.uint8), prompt, generated, MOE)


def test_each_row_of_the_column_is_what_its_sample_says() -> None:
    samples = [random_row(4, 3, 1), None, random_row(1, 2, 2), random_row(7, 1, 3)]
    kind = routing_type(MOE, tokens=True)
    column = routing_column(samples, [b"a", None, b"b", b"c"], kind, MOE)
    assert column.type == kind
    column.validate(full=True)
    for sample, row, ids in zip(samples, column.to_pylist(), [b"a", None, b"b", b"c"], strict=True):
        if sample is None:
            assert row is None
            continue
        assert row["prompt_expert_counts"] == sample.prompt_counts.tolist()
        assert row["completion_expert_counts"] == sample.completion_counts.tolist()
        assert row["repeat_first"] == pytest.approx(sample.repeat_first)
        assert row["repeat_any"] == pytest.approx(sample.repeat_any)
        assert row["expert_ids"] == ids


def test_repetition_of_a_single_token_is_null_not_zero() -> None:
    [row] = routing_column([random_row(1, 1)], [None], routing_type(MOE, tokens=False), MOE).to_pylist()
    assert row["repeat_first"] is None
    assert row["repeat_any"] is None
    assert sum(row["prompt_expert_counts"]) == MOE.num_layers * MOE.top_k


@pytest.mark.parametrize("samples", [[], [None], [None, None]])
def test_a_shard_without_any_routing_is_all_nulls(samples: list[None]) -> None:
    kind = routing_type(MOE, tokens=False)
    column = routing_column(samples, samples, kind, MOE)
    assert column.type == kind
    assert column.null_count == len(samples) == len(column)
    assert pa.table({"routing": column}).num_rows == len(samples)
