"""Reading input files as a run does: listed, planned, shard by shard."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from pipeline.inputs import list_inputs
from pipeline.read import read_shard
from pipeline.rows import READ_ERROR
from pipeline.shards import Plan
from pipeline.user_schema import user_schema


def plan_of(path: str | Path, rows_per_shard: int = 1000, limit: int | None = None) -> tuple[Plan, pa.Schema]:
    """The plan of the files there, and the schema of their rows."""
    plan = Plan(tuple(list_inputs(str(path))), rows_per_shard, limit)
    return plan, user_schema(plan.files, required=[])


def read_all(path: str | Path, rows_per_shard: int = 1000, schema: pa.Schema | None = None) -> pa.Table:
    """All rows of all shards, in order."""
    plan, found = plan_of(path, rows_per_shard)
    schema = schema or found
    tables = [read_shard(plan.files[shard.file_index].slim(shard.start), shard, schema) for shard in plan]
    return pa.concat_tables(tables)


def read_errors(table: pa.Table) -> list[str | None]:
    """Why each row could not be read; None for those that could."""
    errors: list[str | None] = table[READ_ERROR].to_pylist()
    return errors
