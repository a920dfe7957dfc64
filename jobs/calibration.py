"""How far a labeller's confidence can be trusted, and the temperature that mends it. Pure: arrays in, figures out.

Probabilities are float arrays [rows, choices] whose rows sum to 1; gold labels are the indices of the true choices.
Calibration divides log-probabilities by one temperature for all rows (Guo et al. 2017, "On Calibration of Modern Neural
Networks", section 4.2), which changes confidence but never which choice is the most probable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

NUM_BINS = 15
"""Of the reliability diagram, as in Guo et al."""
LOWEST, HIGHEST = 0.02, 50.0
"""Temperatures looked at. Beyond them all confidence is 1, or all choices are equal."""
_LEAST = 1e-12
"""Stands for a probability of 0, which no finite temperature could mend."""


@dataclass(frozen=True, slots=True)
class Bin:
    """Rows whose confidence lies in one interval of the reliability diagram."""

    low: float
    high: float
    count: int
    confidence: float
    """Mean over its rows; 0 when there are none."""
    accuracy: float
    """Share of its rows whose most probable choice is the true one; 0 when there are none."""


@dataclass(frozen=True, slots=True)
class ChoiceFigures:
    """One choice against all others."""

    choice: str
    gold: int
    """Rows that truly are of this choice."""
    predicted: int
    precision: float | None
    """None when nothing was predicted to be of it."""
    recall: float | None
    """None when no row is of it."""


def tempered(probabilities: Floats, temperature: float) -> Floats:
    """The same distributions with their logs divided by `temperature`."""
    logs = np.log(np.maximum(probabilities, _LEAST)) / temperature
    weights = np.exp(logs - logs.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)  # type: ignore[no-any-return]


def fit_temperature(probabilities: Floats, gold: Indices) -> float:
    """The temperature under which the true choices are the most likely, to within 0.1%.

    The mean negative log-likelihood is convex in 1 / temperature, so golden-section search over its log finds the one
    minimum. If every row is right (or wrong) it lies at the end of the range.

    Raises:
        ValueError: there are no rows.
    """
    if not len(gold):
        raise ValueError("no rows to fit a temperature to")
    low, high, ratio = np.log(LOWEST), np.log(HIGHEST), (5**0.5 - 1) / 2
    while high - low > 1e-4:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if _loss(probabilities, gold, np.exp(left)) < _loss(probabilities, gold, np.exp(right)):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2))


def _loss(probabilities: Floats, gold: Indices, temperature: float) -> float:
    logs = np.log(np.maximum(probabilities, _LEAST)) / temperature
    best = logs.max(axis=1)
    normalisers = best + np.log(np.exp(logs - best[:, None]).sum(axis=1))
    return float(np.mean(normalisers - logs[np.arange(len(gold)), gold]))


def reliability(probabilities: Floats, gold: Indices, num_bins: int = NUM_BINS) -> list[Bin]:
    """Rows by confidence, the probability of their most probable choice, in bins of equal width, the lowest first."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == gold
    places = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    bins = []
    for place in range(num_bins):
        chosen = places == place
        count = int(chosen.sum())
        means = (float(confidence[chosen].mean()), float(right[chosen].mean())) if count else (0.0, 0.0)
        bins.append(Bin(place / num_bins, (place + 1) / num_bins, count, *means))
    return bins


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Mean distance of confidence and accuracy over the rows, bin by bin; 0 when there are no rows."""
    total = sum(each.count for each in bins)
    return sum(each.count * abs(each.confidence - each.accuracy) for each in bins) / total if total else 0.0


def accuracy(probabilities: Floats, gold: Indices) -> float:
    """Share of rows whose most probable choice is the true one."""
    return float((probabilities.argmax(axis=1) == gold).mean())


def choice_figures(probabilities: Floats, gold: Indices, choices: Sequence[str]) -> list[ChoiceFigures]:
    """Precision and recall of every choice."""
    predicted = probabilities.argmax(axis=1)
    figures = []
    for index, choice in enumerate(choices):
        is_gold, is_predicted = gold == index, predicted == index
        both, num_gold, num_predicted = int((is_gold & is_predicted).sum()), int(is_gold.sum()), int(is_predicted.sum())
        precision = both / num_predicted if num_predicted else None
        recall = both / num_gold if num_gold else None
        figures.append(ChoiceFigures(choice, num_gold, num_predicted, precision, recall))
    return figures
