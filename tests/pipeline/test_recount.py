"""Recounting some rows of a part, against a count in plain Python; the rest of `recount` is in test_counters.py."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from pipeline.counters import RowTotals
from pipeline.engine import MoeShape
from pipeline.recount import ROW_COLUMNS, recount
from pipeline.rows import STATUSES, output_schema, routing_type

MOE = MoeShape(num_layers=2, num_experts=3, top_k=1)
WIDTH = MOE.num_layers * MOE.num_experts


def random_part(seed: int) -> pa.Table:
    """Rows of two files, some with several samples, in any order and in several chunks."""
    rng, records = random.Random(seed), []
    for number in range(60):
        statuses = rng.choices(STATUSES, k=rng.randint(1, 3))
        for status in statuses:
            routing = None
            if status != "failed" and rng.random() < 0.9:
                prompt, completion = ([rng.randrange(1 << 32) for _ in range(WIDTH)] for _ in range(2))
                routing = {"prompt_expert_counts": prompt, "completion_expert_counts": completion}
            records.append(
                {
                    "input_file": f"file-{number % 2}",
                    "input_row": number // 2,
                    "sample_index": 0,
                    "status": status,
                    "num_input_tokens": rng.choice([None, rng.randint(0, 9)]),
                    "num_cached_tokens": rng.choice([None, rng.randint(0, 9)]),
                    "num_generated_tokens": rng.choice([None, rng.randint(0, 9)]),
                    "error": {"kind": rng.choice("xyz")} if status == "failed" else None,
                    "routing": routing,
                }
            )
    rng.shuffle(records)
    schema = output_schema([], routing_type(MOE, tokens=False))
    return pa.concat_tables([pa.Table.from_pylist(records[i::3], schema=schema) for i in range(3)])


def counted_by_hand(samples: list[dict[str, object]]) -> tuple[RowTotals, dict[str, list[list[int]]]]:
    rows: dict[tuple[object, object], list[dict[str, object]]] = {}
    for sample in samples:
        rows.setdefault((sample["input_file"], sample["input_row"]), []).append(sample)
    selections: dict[str, list[list[int]]] = {}
    for members in rows.values():
        label = "+".join(sorted({str(sample["status"]) for sample in members}))
        for sample in members:
            if sample["routing"] is not None:
                total = selections.setdefault(label, [[0] * WIDTH, [0] * WIDTH])
                for phase, name in enumerate(("prompt_expert_counts", "completion_expert_counts")):
                    total[phase] = [x + y for x, y in zip(total[phase], sample["routing"][name], strict=True)]
    totals = RowTotals(
        num_rows=len(rows),
        samples=Counter(sample["status"] for sample in samples),
        error_kinds=Counter(sample["error"]["kind"] for sample in samples if sample["error"]),
        num_input_tokens=sum(max(sample["num_input_tokens"] or 0 for sample in members) for members in rows.values()),
        num_cached_tokens=sum(max(sample["num_cached_tokens"] or 0 for sample in members) for members in rows.values()),
        num_generated_tokens=sum(sample["num_generated_tokens"] or 0 for sample in samples),
        num_routing_invalid=sum(sample["routing"] is None and sample["status"] != "failed" for sample in samples),
    )
    return totals, selections


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_kept_rows_count_as_if_they_were_alone(seed: int, share: float) -> None:
    table = random_part(seed)
    keep = np.array([hash((row, seed)) % 100 < 100 * share for row in table["input_row"].to_pylist()], np.bool_)
    found = recount(table, keep=keep)
    totals, selections = counted_by_hand(table.filter(pa.array(keep)).to_pylist())
    assert found.totals == totals
    assert {label: total.tolist() for label, total in found.selections.items()} == selections
    assert recount(table.filter(pa.array(keep))).differences(found) == []


def test_routing_in_pieces_counts_like_routing_in_the_table() -> None:
    table = random_part(9)
    keep = np.arange(table.num_rows) % 4 > 0  # rows that lose a sample have other statuses then: alike in both
    rows = table.select(sorted({name.partition(".")[0] for name in ROW_COLUMNS}))
    routing = table["routing"].combine_chunks()
    for size in (1, 7, 1000):
        pieces = (routing[start : start + size] for start in range(0, len(routing), size))
        assert recount(rows, keep=keep, routing=pieces).differences(recount(table, keep=keep)) == []


def test_an_unknown_status_is_refused() -> None:
    table = random_part(1)
    index = table.schema.get_field_index("status")
    statuses = ["done", *table["status"].to_pylist()[1:]]
    with pytest.raises(ValueError, match="status 'done' is unknown; it must be one of ok, truncated, invalid, failed"):
        recount(table.set_column(index, "status", pa.array(statuses)))
