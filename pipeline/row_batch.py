"""Some rows on their way from a file to a shard: columns, how large each row is, and what is wrong with it.

Owns how a bad row is emptied, so that its neighbours go on. Knows nothing of file formats. Invariant: no value above
`MAX_CELL_BYTES` and no text that is not UTF-8 gets into a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.rows import READ_ERROR

MAX_CELL_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Rows:
    """Some consecutive rows: columns, decoded size of each row, and what is wrong with it."""

    columns: dict[str, pa.Array]
    num_bytes: npt.NDArray[np.int64]
    errors: list[str | None]

    @classmethod
    def empty(cls) -> Rows:
        """No rows."""
        return cls({}, np.zeros(0, np.int64), [])

    def refuse(self, bad: npt.NDArray[np.bool_], reason: str) -> Rows:
        """Empty these rows and give them this reason, unless they have one."""
        if not bad.any():
            return self
        errors = [error or (reason if wrong else None) for error, wrong in zip(self.errors, bad, strict=True)]
        # Taking by index keeps dictionaries as they are: nothing is decoded in order to be thrown away.
        indices = pa.array(np.arange(len(bad)), mask=bad)
        columns = {name: column.take(indices) for name, column in self.columns.items()}
        return Rows(columns, self.num_bytes * ~bad, errors)

    def renamed(self, names: Mapping[str, str]) -> Rows:
        """Give columns other names."""
        return Rows({names[name]: column for name, column in self.columns.items()}, self.num_bytes, self.errors)

    def to_table(self, schema: pa.Schema) -> pa.Table:
        """Cast to the run's types, with null columns for what the file lacks, and add the READ_ERROR column."""
        rows = self._without_invalid_text()
        arrays = [
            rows.columns[field.name].cast(field.type)
            if field.name in rows.columns
            else pa.nulls(len(rows.errors), field.type)
            for field in schema
        ]
        out = schema.append(pa.field(READ_ERROR, pa.string()))
        return pa.Table.from_arrays([*arrays, pa.array(rows.errors, pa.string())], schema=out)

    def _without_invalid_text(self) -> Rows:
        """Arrow doesn't look whether text from Parquet is UTF-8; the first stage that touched it would die of it."""
        rows = self
        for name, column in self.columns.items():
            if not _is_valid(column):
                # take, not slice: validation looks at all of a slice's children
                bad = np.array([not _is_valid(_compact(column.take([i]))) for i in range(len(column))])
                rows = rows.refuse(bad, f"column {name!r} holds text that is not UTF-8")
                rows = rows.compacted(name)
        return rows

    def compacted(self, name: str) -> Rows:
        """Drop dictionary values of a column that no row uses any more."""
        return Rows({**self.columns, name: _compact(self.columns[name])}, self.num_bytes, self.errors)


def measured(batch: pa.RecordBatch, names: Sequence[str]) -> Rows:
    """Compute the decoded size of each row, and refuse rows with a value above 64 MiB."""
    columns = {name: batch.column(batch.schema.get_field_index(name)) for name in names}
    sizes = {name: _cell_bytes(column) for name, column in columns.items()}
    total: npt.NDArray[np.int64] = np.asarray(sum(sizes.values()), np.int64)
    rows = Rows(columns, total, [None] * batch.num_rows)
    for name, size in sizes.items():
        rows = rows.refuse(size > MAX_CELL_BYTES, f"column {name!r} holds a value above {MAX_CELL_BYTES >> 20} MiB")
    return rows


def _cell_bytes(column: pa.Array) -> npt.NDArray[np.int64]:
    """Return the decoded size of each value; an equal share of the total where no single one can be above the limit."""
    if pa.types.is_dictionary(column.type):
        values = column.dictionary
        if not (pa.types.is_string(values.type) or pa.types.is_binary(values.type)):
            return np.full(len(column), 8, np.int64)
        lengths = pc.binary_length(values).cast(pa.int64()).take(column.indices)
        return np.asarray(pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False), np.int64)
    if column.nbytes <= MAX_CELL_BYTES:
        return np.full(len(column), -(-column.nbytes // max(1, len(column))), np.int64)
    return np.array([column.slice(i, 1).nbytes for i in range(len(column))], np.int64)


def _is_valid(column: pa.Array) -> bool:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _compact(column: Any) -> Any:
    """Return a column whose dictionary holds only the values in use."""
    if not pa.types.is_dictionary(column.type):
        return column
    used = pc.drop_null(pc.unique(column.indices))
    positions = pc.index_in(column.indices, used)
    return pa.DictionaryArray.from_arrays(positions.cast(column.type.index_type), column.dictionary.take(used))
