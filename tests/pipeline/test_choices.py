"""Whole-choice probabilities against brute force over a random model of next tokens."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.choices import ChoiceTree, Ids, distribution

VOCABULARY = 6
END = 0

choice_sets = st.sets(
    st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=4).map(lambda ids: (*ids, END)),
    min_size=1,
    max_size=12,
).map(lambda choices: tuple(sorted(choices)))


def next_logs(after: Ids) -> list[float]:
    """Log-probabilities of a made-up model's next token, any function of the tokens before."""
    rng = random.Random(hash(after))
    weights = [rng.random() ** 3 for _ in range(VOCABULARY)]
    return [math.log(weight / sum(weights)) for weight in weights]


@given(choice_sets)
def test_probabilities_are_products_over_tokens_normalised_over_the_choices(choices: tuple[Ids, ...]) -> None:
    tree = ChoiceTree(choices)
    answers = {
        question.after: {token: next_logs(question.after)[token] for token in question.tokens}
        for question in tree.questions
    }
    truth = [math.prod(math.exp(next_logs(ids[:end])[token]) for end, token in enumerate(ids)) for ids in choices]
    assert np.allclose(np.exp(tree.log_probabilities(answers)), truth)
    assert np.allclose(distribution(tree.log_probabilities(answers)), np.array(truth) / sum(truth))


@given(choice_sets)
def test_every_token_is_asked_about_once_and_parents_come_first(choices: tuple[Ids, ...]) -> None:
    questions = ChoiceTree(choices).questions
    asked = [(question.after, token) for question in questions for token in question.tokens]
    assert len(asked) == len(set(asked))
    assert set(asked) == {(ids[:end], token) for ids in choices for end, token in enumerate(ids)}
    seen: set[Ids] = set()
    for question in questions:
        assert not question.after or question.after[:-1] in seen
        seen.add(question.after)


@given(choice_sets, st.randoms(use_true_random=False))
def test_what_is_taken_as_said_is_not_asked_about_and_has_no_say(choices: tuple[Ids, ...], rng: random.Random) -> None:
    said = tuple(rng.randrange(len(ids)) for ids in choices)
    tree = ChoiceTree(choices, said)
    answers = {one.after: {token: next_logs(one.after)[token] for token in one.tokens} for one in tree.questions}
    asked = {(one.after, token) for one in tree.questions for token in one.tokens}
    left = {(ids[:end], ids[end]) for ids, first in zip(choices, said, strict=True) for end in range(first, len(ids))}
    assert asked == left
    truth = [
        sum(next_logs(ids[:end])[ids[end]] for end in range(first, len(ids)))
        for ids, first in zip(choices, said, strict=True)
    ]
    assert np.allclose(tree.log_probabilities(answers), truth)


def test_all_of_a_choice_can_not_be_taken_as_said() -> None:
    with pytest.raises(ValueError, match="must be left to ask about"):
        ChoiceTree(((1, 0), (2, 0)), (2, 0))


def test_all_answers_up_to_a_length_have_the_probability_one() -> None:
    """Ended by the end token, the choices are disjoint events."""
    bodies = itertools.chain.from_iterable(itertools.product(range(1, VOCABULARY), repeat=n) for n in range(4))
    choices = tuple((*body, END) for body in bodies)
    tree = ChoiceTree(choices)
    answers = {question.after: dict(enumerate(next_logs(question.after))) for question in tree.questions}
    longer = 1 - sum(np.exp(tree.log_probabilities(answers)))
    unfinished = 0.0
    for body in itertools.product(range(1, VOCABULARY), repeat=4):
        unfinished += math.exp(sum(next_logs(body[:end])[token] for end, token in enumerate(body)))
    assert longer == pytest.approx(unfinished)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ((), "must be choices"),
        (((),), "must have a token"),
        (((1, 0), (1, 0)), "same tokens"),
        (((1,), (1, 2)), "beginning"),
    ],
)
def test_choices_without_a_probability_of_their_own_are_refused(choices: tuple[Ids, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChoiceTree(choices)


@given(st.lists(st.floats(-80, 0), min_size=1, max_size=9), st.floats(0.1, 10))
def test_a_distribution_sums_to_one_and_keeps_the_order(logs: list[float], temperature: float) -> None:
    probabilities = distribution(logs, temperature)
    assert probabilities.sum() == pytest.approx(1)
    assert all(
        probabilities[i] >= probabilities[j]
        for i, j in itertools.permutations(range(len(logs)), 2)
        if logs[i] > logs[j]
    )


def test_choices_that_are_impossible_get_nothing_and_all_impossible_ones_are_equal() -> None:
    assert distribution([-math.inf, -1.0]).tolist() == [0.0, 1.0]
    assert distribution([-math.inf, -math.inf]).tolist() == [0.5, 0.5]
