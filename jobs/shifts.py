"""How far two samples of one quantity lie apart, and how far chance alone would put them. Pure, on numbers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.routing_measures import chance_distance, jensen_shannon_distance, shares_of

NUM_BINS = 1000
CHANCE_FACTOR = 2.0
"""A shift below twice what chance gives is none, whatever the threshold: small nights would else cry wolf."""
_MEAN_OF_KOLMOGOROV = math.sqrt(math.pi / 2) * math.log(2)


@dataclass(frozen=True, slots=True)
class Shift:
    """One difference between two runs."""

    size: float
    by_chance: float
    """What two samples of this size from one distribution are apart on average."""

    def exceeds(self, threshold: float) -> bool:
        """Whether it is above the threshold, and above what chance may do."""
        return self.size > max(threshold, CHANCE_FACTOR * self.by_chance)


@dataclass(slots=True)
class Moments:
    """Count, mean and variance of numbers, some at a time (Chan, Golub and LeVeque 1979)."""

    count: int = 0
    mean: float = 0.0
    _squares: float = 0.0

    def add(self, values: NDArray[np.float64]) -> None:
        """Take these in."""
        if not len(values):
            return
        count, mean = self.count + len(values), float(values.mean())
        step = mean - self.mean
        self._squares += float(np.square(values - mean).sum()) + step**2 * self.count * len(values) / count
        self.mean += step * len(values) / count
        self.count = count

    @property
    def variance(self) -> float:
        """Of a single number."""
        return self._squares / (self.count - 1) if self.count > 1 else 0.0


@dataclass(slots=True)
class Histogram:
    """Numbers in 0..1 by thousandths, and their moments."""

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(NUM_BINS, np.int64))
    moments: Moments = field(default_factory=Moments)

    def add(self, values: NDArray[np.float64]) -> None:
        """Take these in."""
        bins = np.clip((values * NUM_BINS).astype(np.int64), 0, NUM_BINS - 1)
        self.counts += np.bincount(bins, minlength=NUM_BINS)
        self.moments.add(values)


def share_shift(a: Mapping[str, int], b: Mapping[str, int]) -> Shift:
    """Jensen-Shannon distance between shares of names; both must count something."""
    names = sorted(a.keys() | b.keys())
    loads = [np.array([[side.get(name, 0) for name in names]], np.uint64) for side in (a, b)]
    distance = jensen_shannon_distance(shares_of(loads[0]), shares_of(loads[1]))
    return Shift(float(distance[0]), float(chance_distance(loads[0], loads[1])[0]))


def distribution_shift(a: Histogram, b: Histogram) -> Shift:
    """Kolmogorov-Smirnov distance, to a thousandth of the scale; both must hold something."""
    below = [np.cumsum(side.counts) / side.counts.sum() for side in (a, b)]
    inverse = 1 / a.moments.count + 1 / b.moments.count
    return Shift(float(np.abs(below[0] - below[1]).max()), _MEAN_OF_KOLMOGOROV * math.sqrt(inverse))


def mean_shift(a: Moments, b: Moments) -> Shift:
    """Change of the mean, relative to `a`'s; infinite if that is 0 and the other isn't. Both must hold something."""
    if a.mean == 0:
        return Shift(0.0 if b.mean == 0 else math.inf, 0.0)
    # Of a normal variable the mean absolute value is sqrt(2 / pi) standard deviations.
    noise = math.sqrt(2 / math.pi * (a.variance / a.count + b.variance / b.count))
    return Shift(abs(b.mean - a.mean) / abs(a.mean), noise / abs(a.mean))
