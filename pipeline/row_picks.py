"""Some rows of a file, one bit each: what a plan does when not all of a file is to be done.

Pure arithmetic; knows neither files nor shards. Invariant: bits stand in row order, the first row in the highest bit of
the first byte, and bits past the last row are 0.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

BITS_PER_BYTE = 8
"""Rows of a shard of picked rows are a multiple of it, so that a shard's bits are whole bytes."""


@dataclass(frozen=True, slots=True)
class Cells:
    """A file cut into equal runs of rows, of which those without a picked row are left out."""

    positions: NDArray[np.int64]
    """Which runs are left, ascending."""
    counts: NDArray[np.int64]
    """Picked rows of each; never 0."""


@dataclass(frozen=True, slots=True)
class PickedRows(Sequence[int]):
    """Numbers of rows, ascending and each once, in one bit for every row from the first to the last of them."""

    first: int
    """The lowest; 0 when there is none."""
    bits: bytes

    @classmethod
    def of(cls, rows: ArrayLike) -> PickedRows:
        """These rows, in whatever order."""
        numbers = np.asarray(rows, np.int64)
        if not numbers.size:
            return cls(0, b"")
        first = int(numbers.min())
        return cls(first, pack(numbers - first, int(numbers.max()) - first + 1))

    def numbers(self) -> NDArray[np.int64]:
        """The same as an array."""
        return unpack(self.bits) + self.first

    def __len__(self) -> int:
        return int.from_bytes(self.bits).bit_count()

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers().tolist())

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        rows: int | list[int] = self.numbers()[index].tolist()
        return rows

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:  # noqa: FBT001  numpy's interface
        return self.numbers().astype(dtype or np.int64, copy=False)


def pack(rows: NDArray[np.int64], num_rows: int) -> bytes:
    """Bits of a file of `num_rows` rows of which `rows` are picked; 12.5 MB for 100 million rows.

    Raises:
        ValueError: a row lies outside the file.
    """
    if rows.size and not (rows.min() >= 0 and rows.max() < num_rows):
        raise ValueError(f"picked rows lie outside a file of {num_rows} rows")
    bits = np.zeros(num_rows, np.bool_)
    bits[rows] = True
    return np.packbits(bits).tobytes()


def unpack(bits: bytes) -> NDArray[np.int64]:
    """Numbers of the picked rows, ascending."""
    return np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8)))


def cells_of(bits: bytes, rows_per_cell: int) -> Cells:
    """Cut a file's bits into runs of `rows_per_cell` rows, a multiple of 8."""
    width = rows_per_cell // BITS_PER_BYTE
    padded = np.frombuffer(bits.ljust(-(-len(bits) // width) * width, b"\0"), np.uint8).reshape(-1, width)
    counts = np.bitwise_count(padded).sum(axis=1, dtype=np.int64)
    positions = np.flatnonzero(counts)
    return Cells(positions, counts[positions])


def bits_between(bits: bytes, start: int, stop: int) -> bytes:
    """The bits of rows [start, stop), where `start` is a multiple of 8."""
    return bits[start // BITS_PER_BYTE : -(-stop // BITS_PER_BYTE)]


def to_text(bits: bytes) -> str:
    """Short text for JSON: a thousand rows of a million take 2 kB."""
    return base64.b64encode(zlib.compress(bits)).decode()


def from_text(text: str) -> bytes:
    """Inverse of `to_text`."""
    return zlib.decompress(base64.b64decode(text))
