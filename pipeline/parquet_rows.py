"""Parquet: a range of a file's rows, decoded in steps whose memory is bounded by what the file could unfold to.

Knows nothing of shards. A file of 1 MB can decode to gigabytes, because a dictionary stores a value once however many
rows repeat it: the size of a step is derived from the dictionaries' declared sizes. Row groups can only be read from
their start, and one may hold a thousand shards: so a process keeps its place in the row group it read last, and the
next shard goes on from there. Invariant: what comes out doesn't depend on what was read before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.listing import open_file
from pipeline.row_batch import Rows, measured

_MAX_BATCH_ROWS = 1024
_BATCH_BYTES = 256 << 20
_USUAL_DICTIONARY_BYTES = 2 << 20
# Column chunks are streamed through buffers of this size; reading them whole would hold a row group in memory.
_BUFFER_BYTES = 4 << 20
_TEXT = ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
_PLAIN_TEXT = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())


def read_rows(path: str, version: str, start: int, stop: int, schema: pa.Schema) -> Iterator[Rows]:
    """Yield rows [start, stop) in file order, reading only the row groups and columns that are needed.

    Args:
        path: the file.
        version: what the file was when planned; a place kept in another version is not used.
        start: first row.
        stop: one past the last row.
        schema: columns wanted; those that the file lacks are left out.

    Raises:
        pa.ArrowException, OSError: the file can't be decoded.
    """
    with open_file(path, streaming=False) as handle, pq.ParquetFile(handle) as parquet:
        metadata, own = parquet.metadata, parquet.schema_arrow
    wanted = [own.field(name) for name in schema.names if name in own.names]
    first = 0
    for index in range(metadata.num_row_groups):
        last = first + metadata.row_group(index).num_rows
        if first < stop and last > start:
            span = (max(start - first, 0), min(stop, last) - first)
            if wanted:
                yield from _group_rows(path, version, metadata, index, span, wanted)
            else:
                yield Rows({}, np.zeros(span[1] - span[0], np.int64), [None] * (span[1] - span[0]))
        first = last


class _Cursor:
    """A place in a row group; moves forward only."""

    def __init__(self, path: str, metadata: pq.FileMetaData, index: int, wanted: list[pa.Field]) -> None:
        self.handle = open_file(path, streaming=False)
        self.names = [field.name for field in wanted]
        dictionaries, rows = _reading_plan(self.handle, metadata.row_group(index), wanted)
        parquet = pq.ParquetFile(
            self.handle, metadata=metadata, read_dictionary=dictionaries, buffer_size=_BUFFER_BYTES, pre_buffer=False
        )
        # Batches lie on a grid that doesn't depend on where reading began.
        self._batches = parquet.iter_batches(rows, row_groups=[index], columns=self.names, use_threads=False)
        self._batch: pa.RecordBatch | None = None
        self.position = 0
        """First row that can still be read."""

    def read(self, start: int, stop: int) -> Iterator[Rows]:
        """Yield rows [start, stop); the batch that holds `stop` stays for the next call."""
        while self.position < stop:
            if self._batch is None:
                self._batch = next(self._batches, None)
                if self._batch is None:
                    return
            end = self.position + self._batch.num_rows
            lower, upper = max(start, self.position), min(stop, end)
            if lower < upper:
                yield measured(self._batch.slice(lower - self.position, upper - lower), self.names)
            if end > stop:
                return
            self.position, self._batch = end, None


_parked: dict[tuple[object, ...], _Cursor] = {}


def _group_rows(
    path: str, version: str, metadata: pq.FileMetaData, index: int, span: tuple[int, int], wanted: list[pa.Field]
) -> Iterator[Rows]:
    start, stop = span
    # The process id: after a fork parent and child share the file's offset. pop: nobody else can use it meanwhile.
    key = (os.getpid(), path, version, index, tuple(field.name for field in wanted))
    cursor = _parked.pop(key, None)
    if cursor is None or cursor.position > start:
        cursor = _Cursor(path, metadata, index, wanted)
    yield from cursor.read(start, stop)
    _parked.clear()
    _parked[key] = cursor


def _reading_plan(handle: IO[bytes], group: pq.RowGroupMetaData, wanted: list[pa.Field]) -> tuple[list[str], int]:
    """Return which columns to read as dictionaries, and how many rows to decode at once.

    A value is taken to be as large as the whole dictionary, which is 1 MiB with common writers: that makes steps small,
    never wrong. Text with a larger dictionary stays a dictionary until its decoded size is known. Not always:
    text that doesn't repeat takes 70 times as long that way.
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
            continue
        largest = _largest_value(handle, column)
        if largest > _USUAL_DICTIONARY_BYTES and column.has_dictionary_page and column.path_in_schema in plain_text:
            dictionaries.append(column.path_in_schema)
        else:
            row_bytes += values_per_row * largest
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
