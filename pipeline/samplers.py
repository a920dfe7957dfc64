"""Columns that each row draws for itself: values by weight, or integers of a range. Pure.

Guarantees:
- what a row draws depends on seed, the sampler's name and values, and the row's identity; not on shards or attempts.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import pyarrow as pa

from pipeline.rows import FILE, ROW


@dataclass(frozen=True, slots=True)
class Sampler:
    """One column to draw."""

    name: str
    values: tuple[str, ...] | range
    bounds: tuple[float, ...] | None = None
    """Ends of the values' shares of [0, 1); None when all are equally likely."""

    @classmethod
    def weighted(cls, name: str, weights: dict[str, float]) -> Sampler:
        """Values with weights above 0."""
        total = sum(weights.values())
        bounds = itertools.accumulate(weight / total for weight in weights.values())
        return cls(name, tuple(weights), tuple(bounds))

    @property
    def num_values(self) -> int:
        """Different values that it can draw."""
        return len(self.values) if isinstance(self.values, range) else len(set(self.values))

    @property
    def field(self) -> pa.Field:
        """Its column."""
        return pa.field(self.name, pa.int64() if isinstance(self.values, range) else pa.string())

    def draw(self, seed: int, file: str, row: int) -> str | int:
        """The value of one row."""
        digest = blake2b(f"{seed}\0{self.name}\0{row}\0{file}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        number = int.from_bytes(digest, "little")
        if self.bounds is None:
            return self.values[number * len(self.values) >> 64]
        return self.values[min(bisect.bisect_right(self.bounds, number / 2**64), len(self.values) - 1)]


@dataclass(frozen=True, slots=True)
class Samplers:
    """All of a job's."""

    samplers: tuple[Sampler, ...]
    seed: int
    input_root: str
    """Folder of all input files: draws depend on paths below it, so that moving the whole input changes nothing."""

    @property
    def fields(self) -> list[pa.Field]:
        """Their columns."""
        return [sampler.field for sampler in self.samplers]

    def add_columns(self, table: pa.Table) -> pa.Table:
        """A shard with the columns that its rows draw."""
        files, rows = table.column(FILE).to_pylist(), table.column(ROW).to_pylist()
        places = [(file.removeprefix(self.input_root), row) for file, row in zip(files, rows, strict=True)]
        for sampler in self.samplers:
            drawn: Sequence[str | int] = [sampler.draw(self.seed, file, row) for file, row in places]
            table = table.append_column(sampler.field, pa.array(drawn, sampler.field.type))
        return table
