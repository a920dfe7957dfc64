"""Calibration on made-up labellers whose confidence is wrong by a known temperature."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.calibrate import calibration_lines
from jobs.calibration import (
    accuracy,
    choice_figures,
    expected_calibration_error,
    fit_temperature,
    reliability,
    tempered,
)

CHOICES = ["billing", "bug", "praise"]


def overconfident(rows: int, temperature: float, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """What a labeller says whose logs are `temperature` times too large, and what is true."""
    rng = np.random.default_rng(seed)
    honest = rng.dirichlet(np.full(len(CHOICES), 0.6), size=rows)
    gold = np.array([rng.choice(len(CHOICES), p=row) for row in honest])
    return tempered(honest, 1 / temperature), gold


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7, 4.0])
def test_the_temperature_by_which_confidence_is_wrong_is_found(temperature: float) -> None:
    said, gold = overconfident(2000, temperature)
    fitted = fit_temperature(said, gold)
    assert fitted == pytest.approx(temperature, rel=0.08)
    after = expected_calibration_error(reliability(tempered(said, fitted), gold))
    assert after < 0.03
    if temperature != 1.0:
        assert after < expected_calibration_error(reliability(said, gold))


def test_the_fitted_temperature_is_the_best_of_all() -> None:
    said, gold = overconfident(500, 2.5)
    best = fit_temperature(said, gold)

    def loss(temperature: float) -> float:
        return float(-np.log(tempered(said, temperature)[np.arange(len(gold)), gold]).mean())

    assert all(loss(best) <= loss(other) + 1e-9 for other in np.geomspace(0.05, 40, 200))


def test_tempering_never_changes_the_most_probable_choice() -> None:
    said, gold = overconfident(300, 3.0)
    for temperature in (0.1, 0.7, 5.0, 40.0):
        assert (tempered(said, temperature).argmax(axis=1) == said.argmax(axis=1)).all()
    assert accuracy(tempered(said, 4.0), gold) == accuracy(said, gold)
    assert np.allclose(tempered(said, 1.0), said)


def test_reliability_and_its_error_by_hand() -> None:
    said = np.array([[0.95, 0.05, 0.0], [0.95, 0.05, 0.0], [0.35, 0.6, 0.05], [0.2, 0.2, 0.6]])
    gold = np.array([0, 1, 1, 2])
    bins = reliability(said, gold, num_bins=10)
    assert [(each.count, each.confidence, each.accuracy) for each in bins if each.count] == [
        (2, pytest.approx(0.6), 1.0),
        (2, pytest.approx(0.95), 0.5),
    ]
    assert expected_calibration_error(bins) == pytest.approx((2 * 0.4 + 2 * 0.45) / 4)
    assert expected_calibration_error([]) == 0.0
    assert reliability(np.array([[1.0, 0.0]]), np.array([0]))[-1].count == 1, "a confidence of 1 is in the last bin"


def test_precision_and_recall_by_hand() -> None:
    said = np.eye(3)[[0, 0, 0, 1]]
    billing, bug, praise = choice_figures(said, np.array([0, 0, 1, 1]), CHOICES)
    assert (billing.gold, billing.predicted, billing.precision, billing.recall) == (2, 3, pytest.approx(2 / 3), 1.0)
    assert (bug.precision, bug.recall) == (1.0, 0.5)
    assert (praise.gold, praise.predicted, praise.precision, praise.recall) == (0, 0, None, None)


def test_a_probability_of_nothing_for_what_is_true_is_survived_and_no_rows_are_refused() -> None:
    assert 1 < fit_temperature(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0, 1])) <= 50
    with pytest.raises(ValueError, match="no rows"):
        fit_temperature(np.zeros((0, 3)), np.zeros(0, dtype=np.int64))


@pytest.mark.parametrize(("temperature", "said"), [(1.7, False), (49.998, True), (0.02, True)])
def test_a_fit_at_the_end_of_its_range_is_called_none(temperature: float, said: bool) -> None:
    report = {
        "output": "out",
        "gold": "truth",
        "rows": 30,
        "rows_with_another_gold_label": 0,
        "accuracy": 0.5,
        "temperature": temperature,
        "expected_calibration_error": {"before": 0.5, "after": 0.1},
        "choices": [{"choice": "bug", "gold": 15, "predicted": 30, "precision": 0.5, "recall": None}],
        "reliability": {"before": [], "after": []},
    }
    assert any(line.startswith("no temperature fits") for line in calibration_lines(report)) is said
