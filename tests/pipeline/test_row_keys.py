"""Keys of rows: the same row is known again in another file, place and type; a search finds exactly what was seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from pipeline.inputs import list_inputs
from pipeline.row_keys import Keys, Search, one_of_each, read_keys, same_rows


def parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def keys_of(*paths: Path, id_column: str | None = "id", columns: tuple[str, ...] = ("text",)) -> Keys:
    return read_keys(list_inputs([str(path) for path in paths]), id_column=id_column, columns=columns)


def pairs(keys: Keys) -> list[tuple[int, int]]:
    return list(zip(keys.high.tolist(), keys.low.tolist(), strict=True))


def test_a_row_has_the_same_key_in_another_file_at_another_place_and_in_a_wider_type(tmp_path: Path) -> None:
    first = parquet(tmp_path / "a.parquet", id=pa.array([1, 2], pa.int32()), text=["x", "y"])
    second = parquet(tmp_path / "b.parquet", text=["y", "z", "x"], id=pa.array([2, 3, 1], pa.int64()))
    old, new = pairs(keys_of(first)), pairs(keys_of(second))
    assert (new[0], new[2]) == (old[1], old[0])
    assert len({*old, *new}) == 3
    both = keys_of(first, second)
    assert both.file_index.tolist() == [0, 0, 1, 1, 1]
    assert both.row.tolist() == [0, 1, 0, 1, 2]
    assert pairs(both) == [*old, *new]


def test_content_changes_with_its_columns_alone(tmp_path: Path) -> None:
    first = parquet(tmp_path / "a.parquet", id=[1, 2, 3], text=["x", "y", None], seen=[1, 1, 1])
    second = parquet(tmp_path / "b.parquet", id=[1, 2, 3], text=["x", "Y", ""], seen=[2, 2, 2])
    assert (keys_of(first).content == keys_of(second).content).tolist() == [True, False, False]
    by_content = {"id_column": None, "columns": ("text",)}
    same = np.array(pairs(keys_of(first, **by_content))) == np.array(pairs(keys_of(second, **by_content)))
    assert same.all(axis=1).tolist() == [True, False, False]


def test_rows_without_an_id_are_known_by_content_and_unreadable_ones_by_place(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", id=[None, None, "1"], text=["x", "y", "x"])
    (tmp_path / "b.jsonl").write_text('{"id": 1, "text": "x"}\nnonsense\nnonsense\n{"text": "y"}\n')
    keys = pairs(keys_of(tmp_path / "a.parquet", tmp_path / "b.jsonl"))
    assert keys[3] == keys[2]
    assert keys[6] == keys[1]
    assert len(set(keys)) == 5
    assert json.dumps(keys) == json.dumps(pairs(keys_of(tmp_path / "a.parquet", tmp_path / "b.jsonl")))


def made(values: list[tuple[int, int]], contents: list[int] | None = None) -> Keys:
    """Keys whose halves are small numbers, so that halves are shared."""
    high, low = (np.array([pair[half] for pair in values], np.uint64) for half in (0, 1))
    number = np.arange(len(values))
    return Keys(number.astype(np.int32), number, high, low, np.array(contents or [0] * len(values), np.uint64))


key_lists = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=40)


@given(key_lists, st.booleans(), st.integers(0, 2**40))
def test_of_rows_with_the_same_key_the_first_or_last_eligible_one_is_picked(
    values: list[tuple[int, int]], last: bool, chosen: int
) -> None:
    numbers = same_rows(made(values))
    assert set(numbers.tolist()) == set(range(len(set(values))))
    eligible = np.array([bool(chosen >> number & 1) for number in range(len(values))], np.bool_)
    expected = dict[tuple[int, int], int]()
    for number, value in enumerate(values):
        if eligible[number] and (last or value not in expected):
            expected[value] = number
    assert one_of_each(numbers, eligible, last=last).tolist() == sorted(expected.values())


@given(key_lists, st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=10, unique=True)))
def test_a_row_is_found_exactly_if_a_batch_had_its_key_with_the_content_of_the_last(
    values: list[tuple[int, int]], batches: list[list[tuple[int, int]]]
) -> None:
    wanted = made(list(dict.fromkeys(values)))
    search, seen = Search(wanted), dict[tuple[int, int], int]()
    for number, batch in enumerate(batches, start=1):
        search.see(made(batch, [number] * len(batch)))
        seen |= dict.fromkeys(batch, number)
    assert search.known.tolist() == [pair in seen for pair in pairs(wanted)]
    assert search.content.tolist() == [seen.get(pair, 0) for pair in pairs(wanted)]
