"""Row routing against a reference in plain Python, and the guard against ids that no router can have chosen."""

from __future__ import annotations

import pickle
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine import MoeShape
from pipeline.errors import RoutingInvalid
from pipeline.routing import summarize_row
from pipeline.routing_layout import MAX_COSELECTION_CELLS, expert_pairs, num_expert_pairs

MIXTRAL = MoeShape(num_layers=32, num_experts=8, top_k=2)


def random_ids(rng: np.random.Generator, num_tokens: int, moe: MoeShape) -> np.ndarray:
    scores = rng.random((num_tokens, moe.num_layers, moe.num_experts))
    return np.argsort(scores, axis=-1)[..., : moe.top_k].astype(np.uint8)


def reference(ids: np.ndarray, num_prompt: int, moe: MoeShape) -> dict[str, object]:
    """Everything that summarize_row computes, one token at a time."""
    tokens = ids.tolist()
    counts = [[0] * (moe.num_layers * moe.num_experts) for _ in range(2)]
    first = [[0] * moe.num_layers for _ in range(2)]
    shared = [[0] * moe.num_layers for _ in range(2)]
    pairs = [0, 0]
    chosen_together = [[[0] * moe.num_experts for _ in range(moe.num_experts)] for _ in range(moe.num_layers)]
    for t, token in enumerate(tokens):
        phase = 0 if t < num_prompt else 1
        pairs[phase] += t > 0
        for layer, experts in enumerate(token):
            for expert in experts:
                counts[phase][layer * moe.num_experts + expert] += 1
            for a, b in combinations(sorted(experts), 2):
                chosen_together[layer][a][b] += 1
            if t > 0:
                before = tokens[t - 1][layer]
                first[phase][layer] += experts[0] == before[0]
                shared[phase][layer] += bool(set(experts) & set(before))
    return {"counts": counts, "first": first, "any": shared, "pairs": pairs, "together": chosen_together}


SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 4)).filter(lambda s: s[2] <= s[1])


@settings(max_examples=150, deadline=None)
@given(shape=SHAPES, prompt=st.integers(1, 9), generated=st.integers(0, 9), seed=st.integers(0, 2**32 - 1))
def test_every_statistic_equals_a_token_by_token_reference(shape, prompt, generated, seed) -> None:
    moe = MoeShape(*shape)
    ids = random_ids(np.random.default_rng(seed), prompt + generated - 1, moe)
    row = summarize_row(ids, prompt, generated, moe)
    expected = reference(ids, prompt, moe)
    assert [row.prompt_counts.tolist(), row.completion_counts.tolist()] == expected["counts"]
    assert row.same_first.tolist() == expected["first"]
    assert row.same_any.tolist() == expected["any"]
    assert list(row.num_pairs) == expected["pairs"]
    assert sum(row.num_tokens) == len(ids)
    first, second = expert_pairs(moe.num_experts)
    if num_expert_pairs(moe):
        assert row.coselection.tolist() == np.array(expected["together"])[:, first, second].tolist()
    num_pairs = sum(expected["pairs"])
    if num_pairs == 0:
        assert row.repeat_first is None
        assert row.repeat_any is None
    else:
        assert row.repeat_first == pytest.approx(np.mean(np.sum(expected["first"], axis=0) / num_pairs), abs=1e-12)
        assert row.repeat_any == pytest.approx(np.mean(np.sum(expected["any"], axis=0) / num_pairs), abs=1e-12)


@pytest.mark.parametrize(("prompt", "generated"), [(1, 1), (1, 2), (200, 1), (3, 90), (70, 31)])
def test_counts_of_both_phases_add_up_to_tokens_times_layers_times_top_k(prompt: int, generated: int) -> None:
    ids = random_ids(np.random.default_rng(1), prompt + generated - 1, MIXTRAL)
    row = summarize_row(ids, prompt, generated, MIXTRAL)
    assert int(row.prompt_counts.sum()) == prompt * 32 * 2
    assert int(row.prompt_counts.sum() + row.completion_counts.sum()) == (prompt + generated - 1) * 32 * 2
    assert row.prompt_counts.dtype == row.completion_counts.dtype == np.uint32


def test_one_token_has_no_repetition_rather_than_zero() -> None:
    row = summarize_row(random_ids(np.random.default_rng(2), 1, MIXTRAL), 1, 1, MIXTRAL)
    assert row.repeat_first is None
    assert row.repeat_any is None


def test_uniform_random_routing_repeats_12_5_and_46_4_percent_within_sampling_error() -> None:
    num_tokens = 2_000
    row = summarize_row(random_ids(np.random.default_rng(3), num_tokens, MIXTRAL), 1_500, 501, MIXTRAL)
    trials = (num_tokens - 1) * MIXTRAL.num_layers
    for measured, expected in ((row.repeat_first, 1 / 8), (row.repeat_any, 13 / 28)):
        # 5 standard errors; neighbouring pairs share a token but are uncorrelated under uniform routing.
        assert abs(measured - expected) < 5 * (expected * (1 - expected) / trials) ** 0.5


def test_first_choice_is_the_first_of_the_ids_and_order_does_not_matter_for_sharing() -> None:
    moe = MoeShape(1, 8, 2)
    swapped = np.array([[[1, 2]], [[2, 1]], [[2, 5]]], dtype=np.uint8)
    row = summarize_row(swapped, 3, 1, moe)
    assert row.repeat_first == 0.5
    assert row.repeat_any == 1.0


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64])
def test_any_integer_type_and_memory_order_gives_the_same_result(dtype: type) -> None:
    ids = random_ids(np.random.default_rng(4), 20, MIXTRAL)
    expected = summarize_row(ids, 15, 6, MIXTRAL)
    row = summarize_row(np.asfortranarray(ids.astype(dtype)), 15, 6, MIXTRAL)
    assert np.array_equal(row.prompt_counts, expected.prompt_counts)
    assert np.array_equal(row.coselection, expected.coselection)
    assert row.repeat_any == expected.repeat_any


def test_256_experts_do_not_overflow_their_ids() -> None:
    moe = MoeShape(2, 256, 8)
    ids = random_ids(np.random.default_rng(5), 30, moe)
    row = summarize_row(ids, 20, 11, moe)
    expected = reference(ids, 20, moe)
    assert [row.prompt_counts.tolist(), row.completion_counts.tolist()] == expected["counts"]
    assert row.same_any.tolist() == expected["any"]


def test_coselection_of_too_many_pairs_is_left_out_and_the_rest_stays() -> None:
    moe = MoeShape(48, 128, 8)
    assert moe.num_layers * 128 * 127 // 2 > MAX_COSELECTION_CELLS
    row = summarize_row(random_ids(np.random.default_rng(6), 10, moe), 5, 6, moe)
    assert row.coselection.shape == (48, 0)
    assert int(row.prompt_counts.sum()) == 5 * 48 * 8


def corrupted(change) -> np.ndarray:
    ids = random_ids(np.random.default_rng(7), 10, MIXTRAL).astype(np.int16)
    return change(ids)


def set_id(token: int, layer: int, choice: int, value: int):
    def change(ids: np.ndarray) -> np.ndarray:
        ids[token, layer, choice] = value
        return ids

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (np.zeros_like, "token 0 chose expert 0 twice in layer 0; 320 of 320"),
        (lambda ids: np.concatenate([ids[:9], np.zeros_like(ids[:1])]), "token 9 chose expert 0 twice in layer 0"),
        (set_id(4, 31, 1, 8), "expert id 8 is out of range: the model has experts 0..7"),
        (set_id(4, 31, 1, -1), "expert id -1 is out of range"),
        (lambda ids: ids[:-1], r"int16 \[9, 32, 2\], but 6 prompt and 5 generated tokens need integers \[10, 32, 2\]"),
        (lambda ids: ids[:, :, :1], "need integers"),
        (lambda ids: ids[:, :31], "need integers"),
        (lambda ids: ids.reshape(10, 64), "need integers"),
        (lambda ids: ids.astype(np.float32), "float32"),
    ],
)
def test_impossible_ids_are_refused_with_what_is_wrong(change, said: str) -> None:
    with pytest.raises(RoutingInvalid, match=said):
        summarize_row(corrupted(change), 6, 5, MIXTRAL)


def test_silent_zeros_of_one_layer_of_one_token_are_caught() -> None:
    ids = random_ids(np.random.default_rng(8), 50, MIXTRAL)
    ids[37, 11] = 0
    with pytest.raises(RoutingInvalid, match="token 37 chose expert 0 twice in layer 11; 1 of 1600"):
        summarize_row(ids, 50, 1, MIXTRAL)


def test_unsigned_wraparound_of_minus_one_is_out_of_range() -> None:
    ids = random_ids(np.random.default_rng(9), 3, MIXTRAL)
    ids[0, 0, 0] = 255
    with pytest.raises(RoutingInvalid, match="expert id 255"):
        summarize_row(ids, 3, 1, MIXTRAL)


def test_refusal_survives_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(RoutingInvalid("why")))
    assert (type(error), error.message, str(error)) == (RoutingInvalid, "why", "why")


def test_result_survives_a_process_boundary() -> None:
    row = summarize_row(random_ids(np.random.default_rng(10), 12, MIXTRAL), 6, 7, MIXTRAL)
    again = pickle.loads(pickle.dumps(row))
    assert np.array_equal(again.coselection, row.coselection)
    assert again.repeat_first == row.repeat_first
