"""One shard's rows as one table: the user's columns in the run's types, identity, and why a row could not be read.

Runs in workers. Owns the limits that keep a hostile or odd file from taking its process down. Knows nothing of Ray or
of prompts. Invariant: a shard comes back with exactly its rows, in order, or an error names the file and the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa

from pipeline import jsonl, openai_lines, row_batch
from pipeline.earlier_run import own_name
from pipeline.errors import InfrastructureError
from pipeline.inputs import InputFile
from pipeline.listing import stat_file
from pipeline.parquet_rows import read_rows
from pipeline.rows import FILE, READ_ERROR, ROW, SHARD, read_fields
from pipeline.shards import Shard

MAX_SHARD_BYTES = 1 << 30
"""Decoded size of a shard; the plan aims at a quarter of it."""
_JSONL_BATCH_ROWS = 512


def read_shard(file: InputFile, shard: Shard, schema: pa.Schema, *, keep: Sequence[int] | None = None) -> pa.Table:
    """Return the shard's rows, of a slice with picks the picked ones: `schema`'s columns, then `rows.read_fields()`.

    A row that can't be read has a message in the READ_ERROR column and nulls in the user's: a JSONL line that is no
    object, text that is not UTF-8, a value above 64 MiB, and whatever lies beyond the first 1 GiB of a shard.

    Args:
        file: the shard's file, or its `slim` copy.
        shard: which rows.
        schema: the user's columns to read, in the run's types; a column that this file lacks comes back null.
        keep: only these rows, given as row numbers within the file; None for all.

    Raises:
        InfrastructureError: the file is gone, is not the one that was planned, or can't be decoded.
    """
    tables, used = [], 0
    for rows in read_range(file, shard.start, shard.stop, schema):
        within = used + np.cumsum(rows.num_bytes) <= MAX_SHARD_BYTES
        rows = rows.refuse(
            ~within,
            f"lies beyond the first {MAX_SHARD_BYTES >> 30} GiB of its shard; split the file's big rows, or "
            "rewrite it without dictionary encoding if it repeats a big text",
        )
        used += int(rows.num_bytes.sum())
        tables.append(rows.to_table(schema))
    table = pa.concat_tables(tables) if tables else row_batch.Rows.empty().to_table(schema)
    if table.num_rows != shard.stop - shard.start:
        expected = shard.stop - shard.start
        raise InfrastructureError(f"{_range(file, shard)} gave {table.num_rows} rows instead of {expected}")
    table = _with_identity(table, shard)
    for wanted in (shard.picked_rows, keep):
        if wanted is not None:
            table = table.filter(pa.array(np.isin(table[ROW].to_numpy(), np.asarray(wanted, np.int64))))
    return table.combine_chunks()


def read_range(file: InputFile, start: int, stop: int, schema: pa.Schema) -> Iterator[row_batch.Rows]:
    """Yield rows [start, stop) of a file in batches, each with its decoded size.

    Raises:
        InfrastructureError: as `read_shard`.
    """
    where = f"{file.path}, rows {start} to {stop - 1}"
    with _decoding(where):
        _check_version(file)
        if start >= stop:
            return
        names = {own_name(name, file.prefix) if file.prefix else name: name for name in schema.names}
        own = pa.schema([field.with_name(name) for field, name in zip(schema, names, strict=True)])
        if file.format != "parquet":
            batches = _jsonl_rows(file, start, stop, own)
        else:
            batches = read_rows(file.path, file.version, start, stop, own)
        yield from (rows.renamed(names) for rows in batches) if file.prefix else batches


@contextmanager
def _decoding(where: str) -> Iterator[None]:
    try:
        yield
    except InfrastructureError:
        raise
    except Exception as error:
        raise InfrastructureError(
            f"{where}: could not be read ({type(error).__name__}: {error}); if rerunning doesn't help, replace the file"
        ) from error


def _range(file: InputFile, shard: Shard) -> str:
    return f"{file.path}, rows {shard.start} to {shard.stop - 1}"


def _check_version(file: InputFile) -> None:
    now = stat_file(file.path)
    if (now.size, now.version) != (file.size, file.version):
        raise InfrastructureError(
            f"{file.path} changed since the run was planned: it had {file.size} bytes ({file.version}) and has "
            f"{now.size} ({now.version}); put the old file back, or start a new output directory"
        )


def _jsonl_rows(file: InputFile, start: int, stop: int, schema: pa.Schema) -> Iterator[row_batch.Rows]:
    batch: list[jsonl.Line] = []
    num_bytes = 0
    repeated = frozenset(file.repeated)
    for line in jsonl.read_lines(file.path, file.marks, start, stop):
        batch.append(openai_lines.as_row(line, repeated) if file.format == "openai_batch" else line)
        num_bytes += line.num_bytes
        if len(batch) == _JSONL_BATCH_ROWS or num_bytes > row_batch.MAX_CELL_BYTES:
            yield _from_lines(batch, schema)
            batch, num_bytes = [], 0
    if batch:
        yield _from_lines(batch, schema)


def _from_lines(lines: list[jsonl.Line], schema: pa.Schema) -> row_batch.Rows:
    columns = {
        field.name: pa.array(
            [jsonl.cell((line.record or {}).get(field.name), field.type) for line in lines], field.type
        )
        for field in schema
    }
    sizes = np.array([line.num_bytes for line in lines], np.int64)
    return row_batch.Rows(columns, sizes, [line.error for line in lines])


def _with_identity(table: pa.Table, shard: Shard) -> pa.Table:
    values = {
        SHARD: pa.array(np.full(table.num_rows, shard.index, np.int32)),
        FILE: pa.array([shard.file] * table.num_rows, pa.string()),
        ROW: pa.array(np.arange(shard.start, shard.stop, dtype=np.int64)),
        READ_ERROR: table[READ_ERROR],
    }
    table = table.drop_columns([READ_ERROR])
    for field in read_fields():
        table = table.append_column(field, values[field.name])
    return table
