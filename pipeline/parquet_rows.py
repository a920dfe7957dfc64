"""Parquet: a range of a file's rows, decoded in steps whose memory is bounded by what the file could unfold to.

Knows nothing of shards. A file of 1 MB can decode to gigabytes, because a dictionary stores a value once however many
rows repeat it. So columns of text come as dictionaries, their decoded size is computed before they are decoded, and the
size of a step is derived from the dictionaries' declared sizes. Invariant: no value above `MAX_CELL_BYTES` gets out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.listing import open_file
from pipeline.rows import READ_ERROR

MAX_CELL_BYTES = 64 << 20
_MAX_BATCH_ROWS = 1024
_BATCH_BYTES = 128 << 20
_TEXT = ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
_PLAIN_TEXT = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())


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
                bad = np.array([not _is_valid(_compact(column.slice(i, 1))) for i in range(len(column))])
                rows = rows.refuse(bad, f"column {name!r} holds text that is not UTF-8")
                rows = rows.compacted(name)
        return rows

    def compacted(self, name: str) -> Rows:
        """Drop dictionary values of a column that no row uses any more."""
        return Rows({**self.columns, name: _compact(self.columns[name])}, self.num_bytes, self.errors)


def read_rows(path: str, start: int, stop: int, schema: pa.Schema) -> Iterator[Rows]:
    """Yield rows [start, stop) in file order, reading only the row groups and columns that are needed.

    Raises:
        pa.ArrowException, OSError: the file can't be decoded.
    """
    with open_file(path, streaming=False) as handle:
        with pq.ParquetFile(handle) as parquet:
            metadata, first = parquet.metadata, 0
            own = parquet.schema_arrow
            wanted = [own.field(name) for name in schema.names if name in own.names]
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            last = first + group.num_rows
            if first < stop and last > start:
                span = (max(start - first, 0), min(stop, last) - first)
                yield from _group_rows(handle, metadata, index, span, wanted)
            first = last


def _group_rows(
    handle: IO[bytes], metadata: pq.FileMetaData, index: int, span: tuple[int, int], wanted: list[pa.Field]
) -> Iterator[Rows]:
    start, stop = span
    if not wanted:
        yield Rows({}, np.zeros(stop - start, np.int64), [None] * (stop - start))
        return
    names = [field.name for field in wanted]
    group = metadata.row_group(index)
    dictionaries, batch_rows = _reading_plan(handle, group, wanted)
    parquet = pq.ParquetFile(handle, metadata=metadata, read_dictionary=dictionaries, pre_buffer=True)
    position = 0
    for batch in parquet.iter_batches(batch_rows, row_groups=[index], columns=names, use_threads=False):
        lower, upper = max(start - position, 0), min(stop - position, batch.num_rows)
        position += batch.num_rows
        if lower < upper:
            yield _measured(batch.slice(lower, upper - lower), names)
        if position >= stop:
            return


def _reading_plan(handle: IO[bytes], group: pq.RowGroupMetaData, wanted: list[pa.Field]) -> tuple[list[str], int]:
    """Return which columns to read as dictionaries, and how many rows to decode at once.

    Text at the top level can stay a dictionary. Text inside lists and structs can't, so there each value is taken to be
    as large as the whole dictionary (1 MiB with common writers), which makes steps smaller, never wrong.
    """
    names = {field.name for field in wanted}
    plain_text = {field.name for field in wanted if field.type in _PLAIN_TEXT}
    dictionaries, row_bytes = [], 1
    for position in range(group.num_columns):
        column = group.column(position)
        top = column.path_in_schema.split(".")[0]
        if top not in names and column.path_in_schema not in names:
            continue
        values_per_row = -(-column.num_values // max(1, group.num_rows))
        repeats = column.physical_type in _TEXT and (
            column.has_dictionary_page or "DELTA_BYTE_ARRAY" in column.encodings
        )
        if not repeats:
            row_bytes += column.total_uncompressed_size // max(1, group.num_rows)
        elif column.has_dictionary_page and column.path_in_schema in plain_text:
            dictionaries.append(column.path_in_schema)
        else:
            row_bytes += values_per_row * _largest_value(handle, column)
    return dictionaries, min(max(_BATCH_BYTES // row_bytes, 1), _MAX_BATCH_ROWS)


def _largest_value(handle: IO[bytes], column: pq.ColumnChunkMetaData) -> int:
    """Bound the size of one value of a column chunk: it is stored in its dictionary page, or at least in the chunk."""
    whole: int = column.total_uncompressed_size
    if not column.has_dictionary_page or set(column.encodings) & {"DELTA_BYTE_ARRAY"}:
        return whole
    handle.seek(column.dictionary_page_offset)
    header = handle.read(16)
    # Thrift compact: field 1 (page type) and field 2 (uncompressed size), each a byte 0x15 and a zigzag varint.
    if len(header) < 8 or header[0] != 0x15 or header[2] != 0x15:
        return whole
    value = shift = 0
    for byte in header[3:8]:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return min(whole, value >> 1)


def _measured(batch: pa.RecordBatch, wanted: list[str]) -> Rows:
    columns = {name: batch.column(batch.schema.get_field_index(name)) for name in wanted}
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
