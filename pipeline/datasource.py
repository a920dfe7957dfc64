"""Ray Data reads a plan: one read task per shard, one block per read task.

The only module here that imports Ray. Knows nothing of file formats. Invariant: a block is a shard. That needs
`DataContext.target_max_block_size = None` (Ray then yields one block per task output) and as many blocks as tasks
(otherwise Ray splits blocks to reach its own idea of parallelism); `read_plan` sees to both.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import DataContext, Dataset
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipeline.inputs import InputFile
from pipeline.read import read_shard
from pipeline.shards import Plan, Shard

MAX_TASK_RETRIES = 3
"""Of a task whose process died. Ray Data's default is no limit: one that the kernel kills for its memory never ends."""


class ShardSource(Datasource):  # type: ignore[misc]  # Ray is untyped for mypy
    """The shards of a plan that are still to do.

    Guarantees:
    - each listed shard is one read task, whatever parallelism Ray asks for.
    - a task carries its own shard alone: its size doesn't depend on the plan's.
    """

    def __init__(
        self,
        plan: Plan,
        schema: pa.Schema,
        *,
        shards: Sequence[int],
        rows: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        """Describe what to read.

        Args:
            plan: all shards of the run.
            schema: the user's columns to read, in the run's types.
            shards: indices of the shards to do, in the order to start them.
            rows: for a retry, shard index -> the rows to keep, as row numbers within the file; a shard that it doesn't
                name is read whole.
        """
        super().__init__()
        self._plan = plan
        self._schema = schema
        self._shards = shards
        self._rows = rows or {}

    def get_name(self) -> str:
        """Name of the operator in Ray's progress and logs."""
        return "Shards"  # Ray puts "Read" before it

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown, so that Ray doesn't resize what is a shard."""
        return None

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002  a shard is a task
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,  # noqa: ARG002
    ) -> list[ReadTask]:
        """One task per shard."""
        return [self._task(index, per_task_row_limit) for index in self._shards]

    def _task(self, index: int, row_limit: int | None) -> ReadTask:
        shard = self._plan.shard(index)
        file = self._plan.files[shard.file_index]
        keep = _pack(shard, self._rows[index]) if index in self._rows else None
        num_rows = shard.num_rows if keep is None else len(self._rows[index])
        size = file.decoded_bytes * num_rows // max(1, file.num_rows)
        metadata = BlockMetadata(num_rows=num_rows, size_bytes=size, input_files=[shard.file], exec_stats=None)
        read = functools.partial(_read_block, file.slim(shard.start, shard.stop), shard, self._schema, keep)
        functools.update_wrapper(read, _read_block)  # Ray shows the function's name
        return ReadTask(read, metadata, per_task_row_limit=row_limit)


def read_plan(
    plan: Plan,
    schema: pa.Schema,
    *,
    shards: Sequence[int],
    rows: Mapping[int, Sequence[int]] | None = None,
    task_options: Mapping[str, Any] | None = None,
    num_readers: int | None = None,
) -> Dataset:
    """Return a dataset with one block per shard; sets the current DataContext so that blocks stay whole.

    `task_options` are Ray's, for the tasks that read, of which `num_readers` run at once; None for as many as fit.
    """
    DataContext.get_current().target_max_block_size = None
    source = ShardSource(plan, schema, shards=shards, rows=rows)
    return ray.data.read_datasource(
        source,
        override_num_blocks=max(1, len(shards)),
        concurrency=num_readers,
        ray_remote_args={"max_retries": MAX_TASK_RETRIES, **(task_options or {})},
    )


def _pack(shard: Shard, rows: Sequence[int]) -> bytes:
    """One bit per row of the shard: 512 bytes at most, where a list of numbers would take 20 kB."""
    span = shard.stop - shard.start
    wanted = np.zeros(span, np.bool_)
    positions = np.asarray(rows, np.int64) - shard.start
    if positions.size and not (positions.min() >= 0 and positions.max() < span):
        raise ValueError(
            f"rows to retry lie outside shard {shard.index}, which is rows {shard.start} to {shard.stop - 1}"
        )
    wanted[positions] = True
    return np.packbits(wanted).tobytes()


def _read_block(file: InputFile, shard: Shard, schema: pa.Schema, keep: bytes | None) -> Iterable[pa.Table]:
    rows: list[int] | None = None
    if keep is not None:
        wanted = np.unpackbits(np.frombuffer(keep, np.uint8), count=shard.stop - shard.start)
        rows = (np.flatnonzero(wanted) + shard.start).tolist()
    return [read_shard(file, shard, schema, keep=rows)]
