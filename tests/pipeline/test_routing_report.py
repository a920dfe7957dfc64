"""The report's tables against plain-Python formulas, their extremes, and drift as a distance."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline import routing_report
from pipeline.counters import ALL, RunCounters, SampleFacts
from pipeline.engine import MoeShape
from pipeline.errors import SpecError
from pipeline.routing import summarize_row
from pipeline.routing_measures import (
    chance_distance,
    coselection_lift,
    jain_index,
    jensen_shannon_distance,
    max_over_mean,
    normalised_entropy,
    random_repetition,
    shares_of,
)
from pipeline.routing_report import coselection_table, drift, experts_table, layers_table

MIXTRAL = MoeShape(num_layers=4, num_experts=8, top_k=2)
LOADS = arrays(np.uint64, 8, elements=st.integers(0, 10**6)).filter(lambda load: load.sum() > 0)


def random_ids(seed: int, num_tokens: int, moe: MoeShape = MIXTRAL) -> np.ndarray:
    scores = np.random.default_rng(seed).random((num_tokens, moe.num_layers, moe.num_experts))
    return np.argsort(scores, axis=-1)[..., : moe.top_k].astype(np.uint8)


def counters_of(samples: list[tuple[str, np.ndarray, int]], moe: MoeShape = MIXTRAL) -> RunCounters:
    """(slice, ids, prompt tokens) -> counters."""
    counters = RunCounters()
    for name, ids, num_prompt in samples:
        num_generated = len(ids) + 1 - num_prompt
        facts = SampleFacts("ok", num_generated, routing=summarize_row(ids, num_prompt, num_generated, moe))
        counters.add_row([facts], num_input_tokens=num_prompt, num_cached_tokens=0, moe=moe, slice_name=name)
    return counters


def sliced() -> RunCounters:
    return counters_of([("de", random_ids(1, 40), 30), ("fr", random_ids(2, 25), 5), ("de", random_ids(3, 9), 9)])


def pick(table: pa.Table, **wanted: object) -> list[dict[str, object]]:
    return [row for row in table.to_pylist() if all(row[name] == value for name, value in wanted.items())]


# Measures


@settings(max_examples=200, deadline=None)
@given(LOADS)
def test_measures_equal_their_formulas_in_plain_python(load: np.ndarray) -> None:
    values = [int(value) for value in load]
    total = sum(values)
    entropy = -sum(value / total * math.log(value / total) for value in values if value) / math.log(8)
    assert normalised_entropy(load) == pytest.approx(entropy, abs=1e-12)
    assert jain_index(load) == pytest.approx(total**2 / (8 * sum(value**2 for value in values)), rel=1e-12)
    assert max_over_mean(load) == pytest.approx(max(values) / (total / 8), rel=1e-12)
    assert 0 <= normalised_entropy(load) <= 1
    assert 1 / 8 - 1e-12 <= jain_index(load) <= 1 + 1e-12


def test_perfect_balance_and_a_single_expert_are_the_extremes() -> None:
    even, single = np.full(8, 7), np.array([0, 0, 9, 0, 0, 0, 0, 0])
    assert (normalised_entropy(even), jain_index(even), max_over_mean(even)) == (1.0, 1.0, 1.0)
    assert (normalised_entropy(single), jain_index(single), max_over_mean(single)) == (0.0, 1 / 8, 8.0)
    assert not np.signbit(normalised_entropy(single))


def test_least_entropy_of_top_2_of_8_is_a_third() -> None:
    assert normalised_entropy(np.array([5, 5, 0, 0, 0, 0, 0, 0])) == pytest.approx(1 / 3)


def test_without_selections_measures_are_nan_and_warn_of_nothing() -> None:
    nothing = np.zeros((2, 8), dtype=np.uint64)
    with np.errstate(all="raise"):
        for measure in (normalised_entropy, jain_index, max_over_mean):
            assert np.isnan(measure(nothing)).all()


@pytest.mark.parametrize(
    ("moe", "first", "shared"),
    [
        (MoeShape(32, 8, 2), 0.125, 1 - 6 / 8 * 5 / 7),
        (MoeShape(1, 64, 6), 1 / 64, None),
        (MoeShape(1, 3, 2), 1 / 3, 1.0),
        (MoeShape(1, 4, 1), 1 / 4, 1 / 4),
    ],
)
def test_random_repetition_equals_counting_all_draws(moe: MoeShape, first: float, shared: float | None) -> None:
    expected = random_repetition(moe)
    assert expected.first == pytest.approx(first)
    if shared is None:  # 75 million draws: count those that miss by hand instead
        shared = 1 - math.prod((58 - i) / (64 - i) for i in range(6))
    else:
        draws = list(combinations(range(moe.num_experts), moe.top_k))
        counted = sum(bool(set(draw) & set(draws[0])) for draw in draws) / len(draws)
        assert expected.any == pytest.approx(counted)
    assert expected.any == pytest.approx(shared)


# Co-selection


def test_lift_is_one_for_pairs_drawn_by_weight_however_skewed() -> None:
    rng = np.random.default_rng(0)
    for spread in (0.1, 1.0, 3.0):
        weights = np.exp(spread * rng.standard_normal((16, 8)))
        matrix = weights[:, :, None] * weights[:, None, :] * (1 - np.eye(8))
        lift = coselection_lift(matrix)
        assert np.nanmax(np.abs(lift - 1)) < 1e-9
        assert np.isnan(np.diagonal(lift, axis1=1, axis2=2)).all()


def test_expected_counts_keep_every_expert_total() -> None:
    rng = np.random.default_rng(1)
    upper = np.triu(rng.integers(1, 1_000, (6, 8, 8)), 1)
    matrix = upper + upper.transpose(0, 2, 1)
    with np.errstate(invalid="ignore"):
        expected = np.nan_to_num(matrix / coselection_lift(matrix))
    assert np.allclose(expected.sum(axis=-1), matrix.sum(axis=-1), rtol=1e-9)


@pytest.mark.parametrize("extra", [0, 5])
def test_an_expert_in_every_pair_does_not_break_lift(extra: int) -> None:
    matrix = np.zeros((1, 8, 8))
    matrix[0, 0, 1:] = matrix[0, 1:, 0] = 100
    matrix[0, 1, 2] = matrix[0, 2, 1] = extra
    lift = coselection_lift(matrix)[0]
    assert np.allclose(lift[0, 1:], 1, rtol=0.05)
    assert (lift[1, 2] > 10) == bool(extra)
    assert lift[3, 4] == 0


def test_unused_experts_have_no_lift_and_empty_layers_none_at_all() -> None:
    matrix = np.zeros((2, 8, 8))
    matrix[0, 0, 1] = matrix[0, 1, 0] = 100
    with np.errstate(all="raise"):
        lift = coselection_lift(matrix)
    assert lift[0, 0, 1] == pytest.approx(1)
    assert np.isnan(lift).sum() == lift.size - 2


def test_coselection_table_counts_tokens_that_chose_both() -> None:
    ids = random_ids(4, 60)
    table = coselection_table(counters_of([(ALL, ids, 30)]))
    assert table.num_rows == 4 * 28
    for row in table.to_pylist():
        both = sum({row["expert_a"], row["expert_b"]} == set(token[row["layer"]].tolist()) for token in ids)
        assert row["count"] == both
    assert pc.all(pc.less(table["expert_a"], table["expert_b"])).as_py()


def test_balanced_experts_that_only_go_in_four_fixed_pairs_have_a_lift_of_seven() -> None:
    # Each of the 28 pairs is expected in 1/28 of the tokens; the four fixed ones are in 1/4 each.
    ids = random_ids(5, 400)
    ids[:, 0] = np.array([(0, 1), (3, 2), (4, 5), (7, 6)] * 100)
    lifts = {(row["expert_a"], row["expert_b"]): row["lift"] for row in pick(table_of(ids), layer=0)}
    together = {pair for pair, lift in lifts.items() if lift > 0}
    assert together == {(0, 1), (2, 3), (4, 5), (6, 7)}
    assert [lifts[pair] for pair in sorted(together)] == pytest.approx([7.0] * 4)


def table_of(ids: np.ndarray) -> pa.Table:
    return coselection_table(counters_of([(ALL, ids, 100)]))


def test_coselection_sums_slices_when_the_table_would_grow_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    full = coselection_table(sliced())
    monkeypatch.setattr(routing_report, "MAX_COSELECTION_ROWS", 200)
    summed = coselection_table(sliced())
    assert set(full["slice"].to_pylist()) == {"de", "fr"}
    assert set(summed["slice"].to_pylist()) == {ALL}
    assert pc.sum(summed["count"]) == pc.sum(full["count"])


@pytest.mark.parametrize("moe", [MoeShape(2, 4, 1), MoeShape(48, 128, 2)])
def test_coselection_table_is_empty_where_nothing_is_recorded(moe: MoeShape) -> None:
    counters = counters_of([(ALL, random_ids(6, 5, moe), 3)], moe)
    assert coselection_table(counters).num_rows == 0
    assert experts_table(counters).num_rows == 2 * moe.num_layers * moe.num_experts


# Experts and layers


def test_experts_table_adds_up_to_the_rows_and_its_shares_to_one() -> None:
    counters = sliced()
    table = experts_table(counters)
    assert pc.sum(table["selections"]).as_py() == (40 + 25 + 9) * 4 * 2
    sums = table.group_by(["slice", "phase", "layer"]).aggregate([("share", "sum")]).to_pylist()
    assert len(sums) == 2 * 2 * 4
    assert all(row["share_sum"] == pytest.approx(1) for row in sums)
    expected = sum(int((ids[:n, 3] == 6).sum()) for ids, n in ((random_ids(1, 40), 30), (random_ids(3, 9), 9)))
    assert pick(table, slice="de", phase="prompt", layer=3, expert=6)[0]["selections"] == expected


def test_layers_table_has_every_slice_phase_and_layer_and_their_totals() -> None:
    table = layers_table(sliced())
    assert table.num_rows == 3 * 3 * 4
    assert {row["tokens"] for row in pick(table, slice="(all)", phase="all")} == {74}
    assert {row["tokens"] for row in pick(table, slice="de", phase="completion")} == {10}


def test_layers_table_of_an_unsliced_run_tells_it_once() -> None:
    table = layers_table(counters_of([(ALL, random_ids(7, 20), 10)]))
    assert table.num_rows == 3 * 4
    assert set(table["slice"].to_pylist()) == {ALL}


def test_layers_repetition_is_the_share_of_pairs_by_the_phase_of_the_second_token() -> None:
    ids = random_ids(8, 30)
    table = layers_table(counters_of([(ALL, ids, 12)]))
    spans = {"prompt": range(1, 12), "completion": range(12, 30), "all": range(1, 30)}
    for row in table.to_pylist():
        layer, span = row["layer"], spans[row["phase"]]
        first = sum(ids[t, layer, 0] == ids[t - 1, layer, 0] for t in span) / len(span)
        shared = sum(bool(set(ids[t, layer]) & set(ids[t - 1, layer])) for t in span) / len(span)
        assert (row["repeat_first"], row["repeat_any"]) == pytest.approx((first, shared))
        assert (row["repeat_first_random"], row["repeat_any_random"]) == pytest.approx((1 / 8, 13 / 28))


def test_dead_experts_are_those_that_no_token_chose() -> None:
    ids = np.zeros((20, 4, 2), dtype=np.uint8)
    ids[..., 1] = 1
    ids[3, 2] = (5, 6)
    dead = {row["layer"]: row["dead_experts"] for row in pick(layers_table(counters_of([(ALL, ids, 20)])), phase="all")}
    assert dead == {0: 6, 1: 6, 2: 4, 3: 6}


def test_a_phase_without_tokens_has_nulls_and_not_zeros() -> None:
    counters = counters_of([(ALL, random_ids(9, 1), 1)])
    row = pick(layers_table(counters), phase="completion", layer=0)[0]
    assert row["tokens"] == 0
    names = ("entropy", "max_over_mean", "jain", "dead_experts", "repeat_first", "repeat_any")
    assert [row[name] for name in names] == [None] * 6
    assert pick(experts_table(counters), phase="completion", layer=0, expert=0)[0]["share"] is None


def test_a_run_without_routing_gives_empty_tables_of_the_same_schema() -> None:
    for make in (experts_table, layers_table, coselection_table):
        empty, full = make(RunCounters()), make(sliced())
        assert empty.num_rows == 0
        assert empty.schema == full.schema


# Drift


@settings(max_examples=100, deadline=None)
@given(LOADS, LOADS, LOADS)
def test_distance_is_a_metric_between_0_and_1(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    p, q, r = (shares_of(load)[None] for load in (a, b, c))
    assert jensen_shannon_distance(p, p)[0] == 0
    assert jensen_shannon_distance(p, q)[0] == jensen_shannon_distance(q, p)[0]
    assert 0 <= jensen_shannon_distance(p, q)[0] <= 1
    around = jensen_shannon_distance(p, r)[0] + jensen_shannon_distance(r, q)[0]
    assert jensen_shannon_distance(p, q)[0] <= around + 1e-7


def test_distance_equals_its_formula_in_plain_python_and_is_1_for_disjoint_experts() -> None:
    p, q = [0.5, 0.25, 0.25, 0.0], [0.1, 0.2, 0.3, 0.4]
    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    divergence = sum(sum(x * math.log2(x / m) for x, m in zip(side, middle, strict=True) if x) / 2 for side in (p, q))
    assert jensen_shannon_distance(np.array([p]), np.array([q]))[0] == pytest.approx(math.sqrt(divergence))
    assert jensen_shannon_distance(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]))[0] == 1


def test_drift_of_a_run_to_itself_is_zero_and_to_another_is_symmetric() -> None:
    a, b = experts_table(sliced()), experts_table(counters_of([("x", random_ids(10, 50), 20)]))
    assert drift(a, a)["distance"].to_pylist() == [0.0] * 4
    assert drift(a, b)["distance"].to_pylist() == drift(b, a)["distance"].to_pylist()
    assert all(distance > 0 for distance in drift(a, b)["distance"].to_pylist())


def test_drift_shows_the_layer_that_changed_and_chance_explains_the_others() -> None:
    ids, changed = random_ids(11, 2_000), random_ids(12, 2_000)
    changed[:, 2] = (1, 6)
    table = drift(experts_table(counters_of([(ALL, ids, 5)])), experts_table(counters_of([(ALL, changed, 5)])))
    for row in table.to_pylist():
        assert (row["distance"] > 3 * row["expected_by_chance"]) == (row["layer"] == 2)


def test_expected_distance_by_chance_is_what_sampling_gives() -> None:
    rng = np.random.default_rng(13)
    shares = np.array([0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05])
    a, b = rng.multinomial(2_000, shares, 4_000), rng.multinomial(5_000, shares, 4_000)
    measured = math.sqrt(np.square(jensen_shannon_distance(shares_of(a), shares_of(b))).mean())
    assert chance_distance(a[:1], b[:1])[0] == pytest.approx(measured, rel=0.03)


def test_drift_without_selections_is_null() -> None:
    table = experts_table(counters_of([(ALL, random_ids(14, 1), 1)]))
    completion = table.filter(pc.equal(table["phase"], "completion"))
    assert drift(completion, table)["distance"].null_count == 4
    assert drift(completion, table)["expected_by_chance"].null_count == 4


def test_drift_between_different_models_names_both_shapes() -> None:
    other = MoeShape(2, 16, 2)
    a, b = experts_table(sliced()), experts_table(counters_of([(ALL, random_ids(15, 5, other), 3)], other))
    with pytest.raises(SpecError, match="4 layers x 8 experts and the other 2 layers x 16 experts"):
        drift(a, b)
