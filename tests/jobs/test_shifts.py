"""Shifts between two samples: what they measure, and that chance alone passes no limit."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.shifts import Histogram, Moments, Shift, distribution_shift, mean_shift, share_shift

RNG = np.random.default_rng(7)


def moments(*batches: list[float]) -> Moments:
    made = Moments()
    for batch in batches:
        made.add(np.array(batch, np.float64))
    return made


def histogram(values: np.ndarray) -> Histogram:
    made = Histogram()
    made.add(values)
    return made


numbers = st.lists(st.lists(st.floats(-1e3, 1e3), max_size=5), max_size=5)


@given(numbers)
def test_moments_of_batches_are_those_of_all_numbers(batches: list[list[float]]) -> None:
    everything = [number for batch in batches for number in batch]
    made = moments(*batches)
    assert made.count == len(everything)
    if everything:
        assert made.mean == pytest.approx(np.mean(everything), abs=1e-6)
    if len(everything) > 1:
        assert made.variance == pytest.approx(np.var(everything, ddof=1), abs=1e-3)


def test_equal_shares_are_0_apart_and_disjoint_ones_1() -> None:
    assert share_shift({"a": 3, "b": 1}, {"a": 300, "b": 100}).size == pytest.approx(0, abs=1e-7)
    assert share_shift({"a": 3}, {"b": 1}).size == pytest.approx(1)


def test_largest_difference_between_the_shares_below_a_value_is_the_shift_of_a_distribution() -> None:
    a, b = RNG.random(4000), RNG.random(3000) ** 2
    exact = max(abs((a <= x).mean() - (b <= x).mean()) for x in np.concatenate([a, b]))
    assert distribution_shift(histogram(a), histogram(b)).size == pytest.approx(exact, abs=2e-3)
    assert distribution_shift(histogram(np.zeros(9)), histogram(np.ones(9))).size == 1


def test_change_of_a_mean_is_relative_to_the_first() -> None:
    assert mean_shift(moments([10.0, 10.0]), moments([12.0])).size == pytest.approx(0.2)
    assert mean_shift(moments([10.0, 10.0]), moments([5.0])).size == pytest.approx(0.5)
    assert mean_shift(moments([0.0]), moments([0.0])).size == 0
    assert mean_shift(moments([0.0]), moments([1.0])).size == math.inf


def test_by_chance_is_what_two_samples_of_one_distribution_are_apart_on_average() -> None:
    """1,500 pairs each: within a tenth."""
    found: dict[str, list[Shift]] = {"labels": [], "confidence": [], "tokens": []}
    for _ in range(1500):
        draws = [RNG.choice(3, 400, p=[0.5, 0.3, 0.2]) for _ in range(2)]
        counts = [{str(n): int((draw == n).sum()) for n in range(3)} for draw in draws]
        found["labels"].append(share_shift(*counts))
        found["confidence"].append(distribution_shift(*(histogram(RNG.random(300)) for _ in range(2))))
        found["tokens"].append(mean_shift(*(moments(RNG.poisson(40, 200).tolist()) for _ in range(2))))
    assert np.sqrt(np.mean([shift.size**2 for shift in found["labels"]])) == pytest.approx(
        found["labels"][0].by_chance, rel=0.1
    )
    for name in ("confidence", "tokens"):
        sizes, chances = zip(*((shift.size, shift.by_chance) for shift in found[name]), strict=True)
        assert np.mean(sizes) == pytest.approx(np.mean(chances), rel=0.1)


def test_a_shift_counts_above_its_limit_and_above_twice_what_chance_gives() -> None:
    assert Shift(0.2, 0.05).exceeds(0.1)
    assert not Shift(0.2, 0.05).exceeds(0.2)
    assert not Shift(0.2, 0.11).exceeds(0.1)
