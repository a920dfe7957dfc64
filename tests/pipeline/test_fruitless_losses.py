"""A run ends when replicas die one after the other and nothing gets done, and not before."""

from __future__ import annotations

from pipeline.fruitless_losses import (
    DOUBT_AFTER,
    MAX_FRUITLESS_LOSSES,
    MAX_WITHOUT_A_ROW,
    SAME_MOMENT_S,
    FruitlessLosses,
)


def test_so_many_losses_in_a_row_are_a_verdict_and_one_finished_row_is_hope() -> None:
    losses = FruitlessLosses()
    for number in range(MAX_FRUITLESS_LOSSES - 1):
        losses.add(float(number))
    assert losses.verdict("killed") is None
    losses.row_finished()
    losses.add(100.0)
    assert losses.verdict("killed") is None
    for number in range(MAX_FRUITLESS_LOSSES - 1):
        losses.add(200.0 + number)
    assert losses.verdict("killed") == "10 replicas in a row died without finishing a row; last: killed"


def test_many_losses_at_one_moment_are_one() -> None:
    losses = FruitlessLosses()
    for number in range(5 * MAX_FRUITLESS_LOSSES):
        losses.add(7.0 + SAME_MOMENT_S * number / (5 * MAX_FRUITLESS_LOSSES))
    assert losses.verdict("killed") is None


def test_an_engine_that_can_still_do_one_row_is_given_up_after_fifty_losses_without_another() -> None:
    losses = FruitlessLosses()
    for number in range(MAX_WITHOUT_A_ROW - 1):
        losses.add(float(number))
        if losses.in_doubt:
            losses.proven()
        assert not losses.in_doubt
        assert losses.verdict("killed") is None
    losses.add(1000.0)
    assert losses.verdict("killed") == "50 replicas in a row died without finishing a row; last: killed"


def test_doubt_comes_with_the_fifth_loss_and_goes_with_a_row() -> None:
    losses = FruitlessLosses()
    for number in range(DOUBT_AFTER):
        assert not losses.in_doubt
        losses.add(float(number))
    assert losses.in_doubt
    losses.row_finished()
    assert not losses.in_doubt
