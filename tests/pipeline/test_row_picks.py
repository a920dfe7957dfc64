"""Picked rows come back as they went in, in a bit each."""

from __future__ import annotations

import pickle

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.row_picks import PickedRows

numbers = st.lists(st.integers(0, 5000), max_size=200)


@given(numbers, st.integers(0, 10**12))
def test_picked_rows_are_the_rows_in_order_and_each_once(rows: list[int], offset: int) -> None:
    expected = sorted({offset + row for row in rows})
    picked = PickedRows.of([offset + row for row in rows])
    assert list(picked) == expected
    assert (len(picked), bool(picked)) == (len(expected), bool(expected))
    assert np.asarray(picked, np.int64).tolist() == expected
    assert picked[1:3] == expected[1:3]
    assert not expected or (picked[0], picked[-1], expected[0] in picked) == (expected[0], expected[-1], True)
    assert pickle.loads(pickle.dumps(picked)) == picked == PickedRows.of(expected)


@given(numbers)
def test_they_take_a_bit_for_each_row_from_the_first_to_the_last(rows: list[int]) -> None:
    picked = PickedRows.of(rows)
    span = max(rows) - min(rows) + 1 if rows else 0
    assert len(picked.bits) == -(-span // 8)
