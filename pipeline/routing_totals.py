"""Routing counters summed over many samples: one flat vector of uint64 with named views.

A flat vector makes merging one addition and packing one call, whatever the counters are. Knows the shape of the model
and nothing of slices, statuses or parts. Invariant: totals are sums, so any order and grouping gives the same vector.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.engine import MoeShape
from pipeline.routing import RowRouting
from pipeline.routing_layout import expert_pairs, layout

Vector = NDArray[np.uint64]


class RoutingTotals:
    """Sums over samples of one model. L layers, E experts, axis "phase" = (prompt, completion).

    Guarantees:
    - adding is associative and commutative, and new totals are its identity.
    - a sum that doesn't fit 64 bits raises OverflowError instead of wrapping.
    - `pack` and `unpack` round-trip exactly, and equal totals give equal bytes.
    """

    __slots__ = ("moe", "vector")

    def __init__(self, moe: MoeShape, vector: Vector | None = None) -> None:
        self.moe = moe
        self.vector: Vector = np.zeros(layout(moe).size, dtype=np.uint64) if vector is None else vector

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RoutingTotals):
            return NotImplemented
        return self.moe == other.moe and bool(np.array_equal(self.vector, other.vector))

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"RoutingTotals({self.moe}, samples={self.num_samples}, tokens={self.num_tokens.tolist()})"

    def _view(self, name: str) -> Vector:
        at = layout(self.moe)
        return self.vector[at.spans[name]].reshape(at.shapes[name])

    @property
    def num_samples(self) -> int:
        """Samples with valid routing."""
        return int(self._view("num_samples")[0])

    @property
    def num_tokens(self) -> Vector:
        """[phase]: tokens with routing. A row's prompt counts once for each of its samples, as in the rows."""
        return self._view("num_tokens")

    @property
    def num_pairs(self) -> Vector:
        """[phase]: pairs of consecutive tokens within a sample, by the phase of the second."""
        return self._view("num_pairs")

    @property
    def selections(self) -> Vector:
        """[phase, L, E]: how often each expert was chosen."""
        return self._view("selections")

    @property
    def same_first(self) -> Vector:
        """[phase, L]: pairs of tokens that kept their first choice."""
        return self._view("same_first")

    @property
    def same_any(self) -> Vector:
        """[phase, L]: pairs of tokens that shared at least one expert."""
        return self._view("same_any")

    @property
    def coselection(self) -> Vector | None:
        """[L, E, E], symmetric, zero diagonal: tokens that chose both experts; None when not recorded."""
        folded = self._view("coselection")
        if not folded.shape[1]:
            return None
        matrix = np.zeros((self.moe.num_layers, self.moe.num_experts, self.moe.num_experts), dtype=np.uint64)
        first, second = expert_pairs(self.moe.num_experts)
        matrix[:, first, second] = folded
        matrix[:, second, first] = folded
        return matrix

    def copy(self) -> RoutingTotals:
        """Independent totals with the same values."""
        return RoutingTotals(self.moe, self.vector.copy())

    def add_row(self, row: RowRouting) -> None:
        """Add one sample, in place."""
        if self.moe != row.moe:
            raise ValueError(f"routing of {row.moe} can't be added to routing of {self.moe}; one run has one model")
        self._add(row.vector.astype(np.uint64))

    def add(self, other: RoutingTotals) -> None:
        """Add other totals, in place.

        Raises:
            ValueError: they are of another model.
        """
        if self.moe != other.moe:
            raise ValueError(f"routing of {self.moe} can't be added to routing of {other.moe}; one run has one model")
        self._add(other.vector)

    def _add(self, vector: Vector) -> None:
        if vector.shape != self.vector.shape:
            raise ValueError(f"{vector.size} routing counters don't fit {self.moe}, which has {self.vector.size}")
        result = self.vector + vector
        if (result < vector).any():
            raise OverflowError("a routing counter passed 2**64 - 1")
        self.vector = result


def pack(totals: Sequence[RoutingTotals]) -> str:
    """Text of many totals of one model: uint64 in byte planes (the high ones are zeros), zlib, base64."""
    if not totals:
        return ""
    matrix = np.stack([one.vector for one in totals]).astype("<u8")
    planes = np.ascontiguousarray(matrix.reshape(-1).view(np.uint8).reshape(-1, 8).T)
    return base64.b64encode(zlib.compress(planes.tobytes(), 6)).decode("ascii")


def unpack(text: str, count: int, moe: MoeShape) -> list[RoutingTotals]:
    """Inverse of `pack` for `count` totals.

    Never inflates more than `count` totals need, whatever the text claims to hold.

    Raises:
        ValueError: the text doesn't hold exactly `count` totals of this shape.
    """
    size = layout(moe).size
    data = _inflate(text, count * size * 8) if count else text.encode()
    if len(data) != count * size * 8:
        raise ValueError(f"packed routing doesn't hold {count} x {size} counters")
    planes = np.frombuffer(data, dtype=np.uint8).reshape(8, -1)
    matrix = np.ascontiguousarray(planes.T).view("<u8").reshape(count, size).astype(np.uint64)
    return [RoutingTotals(moe, row.copy()) for row in matrix]


def _inflate(text: str, expected: int) -> bytes:
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(base64.b64decode(text, validate=True), expected + 1)
    except (zlib.error, binascii.Error) as error:
        raise ValueError(f"packed routing is damaged: {error}") from error
    if not inflater.eof:
        raise ValueError("packed routing is cut short or holds more than it should")
    return data
