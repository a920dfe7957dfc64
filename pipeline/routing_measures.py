"""The formulas of routing statistics, on plain arrays: balance, repetition, co-selection, distance.

Knows nothing of counters, slices or tables. Every formula names its source. Invariant: a measure without data is NaN,
never 0, and never a warning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.engine import MoeShape

Floats = NDArray[np.float64]


def shares_of(load: NDArray[Any]) -> Floats:
    """[..., E] -> [..., E], adding up to 1; NaN without selections."""
    return ratio(load, load.sum(axis=-1, keepdims=True))


def ratio(part: NDArray[Any], whole: NDArray[Any]) -> Floats:
    """Elementwise quotient with broadcasting; NaN where `whole` is 0."""
    part, whole = np.broadcast_arrays(part.astype(np.float64), whole.astype(np.float64))
    return np.asarray(np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0))


@dataclass(frozen=True, slots=True)
class RandomRepetition:
    """Repetition expected when every token draws its experts uniformly and independently of the token before."""

    first: float
    """1 / E; 12.5% for 8 experts."""
    any: float
    """1 - C(E - K, K) / C(E, K); 46.4% for 2 of 8 (arXiv:2401.04088, section 5, gives "approximately 46%")."""


def random_repetition(moe: MoeShape) -> RandomRepetition:
    """What to hold `repeat_first` and `repeat_any` against."""
    experts, chosen = moe.num_experts, moe.top_k
    return RandomRepetition(1 / experts, 1 - comb(experts - chosen, chosen) / comb(experts, chosen))


def normalised_entropy(load: NDArray[Any]) -> Floats:
    """[..., E] selections -> [...]: Shannon entropy of the shares over ln E; 1 is perfect balance.

    A token's experts differ, so no expert's share can pass 1/K and the least possible is ln K / ln E (1/3 for 2 of 8),
    not 0. A single expert is in balance by definition. NaN without selections. (Shannon 1948.)
    """
    shares = shares_of(load)
    if load.shape[-1] == 1:
        return np.asarray(shares[..., 0])
    terms = shares * np.log(np.where(shares > 0, shares, 1.0))
    # abs: no term is positive, and -0.0 would be printed as such. Rounding can pass 1 by 1e-16.
    return np.asarray(np.minimum(np.abs(terms.sum(axis=-1)) / math.log(load.shape[-1]), 1.0))


def max_over_mean(load: NDArray[Any]) -> Floats:
    """[..., E] -> [...]: load of the busiest expert over the mean load, in 1..E; NaN without selections."""
    return np.asarray(shares_of(load).max(axis=-1) * load.shape[-1])


def jain_index(load: NDArray[Any]) -> Floats:
    """[..., E] -> [...]: (sum x)^2 / (E sum x^2), in 1/E..1; NaN without selections.

    Jain, Chiu and Hawe, "A Quantitative Measure of Fairness", DEC-TR-301 (1984).
    """
    return np.asarray(1.0 / (load.shape[-1] * np.square(shares_of(load)).sum(axis=-1)))


def coselection_lift(matrix: NDArray[Any]) -> Floats:
    """[L, E, E] symmetric counts -> [L, E, E]: observed over expected; NaN on the diagonal and for unused experts.

    Expected counts are those of symmetric quasi-independence (Goodman 1968): m_ab = x_a x_b for a != b, with x such
    that every expert's total is as observed. The plain product of shares won't do: since a token's experts differ, it
    would put uniform random pairs of 8 at a lift of 0.57. Here they are at 1, and for top-2 so is any pair drawn with
    probability proportional to weight_a x weight_b.
    """
    counts = np.asarray(matrix, dtype=np.float64)
    weights = _quasi_independent_weights(counts.sum(axis=-1))
    expected = weights[:, :, None] * weights[:, None, :]
    known = (expected > 0) & ~np.eye(counts.shape[-1], dtype=np.bool_)
    return np.divide(counts, expected, out=np.full_like(counts, np.nan), where=known)


def _quasi_independent_weights(margins: Floats) -> Floats:
    """Solve x_a (S - x_a) = margin_a with S = sum(x), per layer; [L, E] -> [L, E].

    Given S each x_a is the smaller root of its quadratic, except that one expert may hold more than half of S: then it
    takes the larger root. So bisection on S alone is exact, where fixed-point iteration is still 90% off after 500
    rounds once an expert is in nearly every pair. An expert in every pair has its solution at S = infinity; 1e8 times
    the least possible S stands for it.
    """
    low = 2 * np.sqrt(margins.max(axis=-1, keepdims=True))
    dominated = _smaller_roots(margins, low).sum(axis=-1, keepdims=True) < low
    high = np.where(dominated, low * 1e8, np.sqrt(2 * margins.sum(axis=-1, keepdims=True)))
    for _ in range(64):
        middle = np.sqrt(low * high)
        roots = _smaller_roots(margins, middle)
        total, largest = roots.sum(axis=-1, keepdims=True), roots.max(axis=-1, keepdims=True)
        too_low = np.where(dominated, total < 2 * largest, total > middle)
        low, high = np.where(too_low, middle, low), np.where(too_low, high, middle)
    roots = _smaller_roots(margins, high)
    takes_larger = dominated & (margins == margins.max(axis=-1, keepdims=True))
    return np.where(takes_larger, high - roots, roots)


def _smaller_roots(margins: Floats, total: Floats) -> Floats:
    """Smaller root of x (total - x) = margin, in the form that doesn't cancel; 0 for margin 0."""
    doubled = total + np.sqrt(np.maximum(np.square(total) - 4 * margins, 0.0))
    return np.asarray(np.divide(2 * margins, doubled, out=np.zeros_like(margins), where=doubled > 0))


def jensen_shannon_distance(p: Floats, q: Floats) -> Floats:
    """[L, E] shares -> [L]: square root of the base-2 Jensen-Shannon divergence; 0 is equal, 1 is disjoint.

    Lin, "Divergence Measures Based on the Shannon Entropy" (1991); a metric: Endres and Schindelin (2003).
    """
    middle = (p + q) / 2
    divergence = (_kullback_leibler(p, middle) + _kullback_leibler(q, middle)) / 2
    return np.sqrt(np.clip(divergence, 0.0, 1.0))  # rounding may leave -1e-17


def _kullback_leibler(p: Floats, q: Floats) -> Floats:
    ratio = np.divide(p, q, out=np.ones_like(p), where=(p > 0) | np.isnan(p))
    return np.asarray((p * np.log2(ratio)).sum(axis=-1))


def chance_distance(load_a: NDArray[np.uint64], load_b: NDArray[np.uint64]) -> Floats:
    """[L, E] selections -> [L]: root mean square distance of two independent samples of one distribution.

    From E[JSD] = (E - 1) (1/n_a + 1/n_b) / (8 ln 2), the second-order expansion around equal distributions.
    """
    with np.errstate(divide="ignore"):
        inverse = 1.0 / load_a.sum(axis=-1) + 1.0 / load_b.sum(axis=-1)
    distance = np.sqrt((load_a.shape[-1] - 1) * inverse / (8 * math.log(2)))
    return np.where(np.isinf(inverse), np.nan, distance)
