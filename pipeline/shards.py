"""The plan of a run: which rows form which shard. Pure arithmetic over the input listing.

Knows nothing of Ray, and of files only their row counts. Invariant: the shards of a plan are contiguous, stay within
one file, and cover the planned rows exactly once. Each is computed when asked for: a plan is as small as its file list.
"""

from __future__ import annotations

import base64
import bisect
import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from pipeline.inputs import InputFile
from pipeline.jsonl import Marks

MIN_ROWS = 64
MAX_ROWS = 4096
# Shards that are open when a driver dies are redone; at 256 shards a run, the few open ones are about 1% of it.
MIN_SHARDS = 256
SHARDS_PER_REPLICA = 16
# A shard is one block in memory. Rows of more than 64 KiB get shards of fewer rows, down to one.
SHARD_BYTES = 256 << 20
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Shard:
    """A contiguous slice of one file's rows: the unit of commit and of resume."""

    index: int
    """Position in the plan."""
    file_index: int
    """Position of the file in the plan."""
    file: str
    """Path or URL of the file."""
    start: int
    """First row, counted from 0 within the file."""
    num_rows: int

    @property
    def stop(self) -> int:
        """One past the last row."""
        return self.start + self.num_rows

    @property
    def part_name(self) -> str:
        """Name of the part that holds this shard's results: a pure function of the shard."""
        return f"part-{self.file_index:05d}-{self.start:012d}.parquet"


def rows_per_shard(num_rows: int, replicas: int, row_bytes: int = 0) -> int:
    """Return how many rows a shard should hold: enough shards for resume and balance, but none needlessly small.

    Args:
        num_rows: rows of the run.
        replicas: engines that will share them.
        row_bytes: mean decoded size of a row, 0 when unknown.
    """
    wanted = num_rows // max(MIN_SHARDS, replicas * SHARDS_PER_REPLICA)
    rows = min(max(wanted, MIN_ROWS), MAX_ROWS)
    return max(1, min(rows, SHARD_BYTES // max(1, row_bytes)))


def make_plan(
    files: Sequence[InputFile], *, replicas: int, limit: int | None = None, samples: int = 1, result_bytes: int = 0
) -> Plan:
    """Cut the files into shards sized for so many replicas.

    Args:
        files: from `list_inputs`.
        replicas: engines that will share the shards.
        limit: only so many rows, in file order.
        samples: output rows per input row; each repeats the user's columns.
        result_bytes: most that one output row adds to those.
    """
    available = sum(file.num_rows for file in files)
    num_rows = available if limit is None else min(limit, available)
    # The file with the biggest rows decides: one size for all keeps a part's name a pure function of its shard.
    row_bytes = max((file.decoded_bytes // file.num_rows for file in files if file.num_rows), default=0)
    row_bytes = samples * (row_bytes + result_bytes)
    return Plan(tuple(files), rows_per_shard(num_rows, replicas, row_bytes), limit)


@dataclass(frozen=True)
class Plan:
    """Files and how they are cut. Written once per run; resuming reuses it, whatever the replicas are by then.

    Guarantees:
    - every row below `min(limit, rows)`, counted in file order, is in exactly one shard.
    - a shard never crosses a file.
    - `from_json(to_json())` is the same plan.
    """

    files: tuple[InputFile, ...]
    rows_per_shard: int
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.rows_per_shard < 1:
            raise ValueError(f"rows_per_shard is {self.rows_per_shard}, but must be at least 1")

    @cached_property
    def _rows_of_file(self) -> list[int]:
        left = sum(file.num_rows for file in self.files) if self.limit is None else self.limit
        rows = []
        for file in self.files:
            taken = min(left, file.num_rows)
            rows.append(taken)
            left -= taken
        return rows

    @cached_property
    def _shards_before_file(self) -> list[int]:
        counts = (-(-rows // self.rows_per_shard) for rows in self._rows_of_file)
        return list(itertools.accumulate(counts, initial=0))

    @cached_property
    def _rows_before_file(self) -> list[int]:
        return list(itertools.accumulate(self._rows_of_file[:-1], initial=0))

    @property
    def num_rows(self) -> int:
        """Rows of the run."""
        return sum(self._rows_of_file)

    @property
    def num_shards(self) -> int:
        """Shards of the run."""
        return self._shards_before_file[-1]

    def shard(self, index: int) -> Shard:
        """Return one shard.

        Raises:
            IndexError: the plan has no such shard.
        """
        if not 0 <= index < self.num_shards:
            raise IndexError(f"shard {index} of a plan with {self.num_shards} shards")
        file_index = bisect.bisect_right(self._shards_before_file, index) - 1
        start = (index - self._shards_before_file[file_index]) * self.rows_per_shard
        rows = min(self.rows_per_shard, self._rows_of_file[file_index] - start)
        return Shard(index, file_index, self.files[file_index].path, start, rows)

    def find(self, number: int) -> tuple[Shard, int]:
        """Return the shard and the row number within its file of the plan's row `number`, counted in file order."""
        file_index = bisect.bisect_right(self._rows_before_file, number) - 1
        row = number - self._rows_before_file[file_index]
        return self.shard(self._shards_before_file[file_index] + row // self.rows_per_shard), row

    def __iter__(self) -> Iterator[Shard]:
        """Yield the shards in order."""
        return (self.shard(index) for index in range(self.num_shards))

    def to_json(self) -> str:
        """Return the plan as JSON; files with equal schemas share one copy."""
        schemas: dict[str, int] = {}
        files = [_file_to_json(file, schemas) for file in self.files]
        plan = {"version": _VERSION, "rows_per_shard": self.rows_per_shard, "limit": self.limit}
        return json.dumps({**plan, "num_rows": self.num_rows, "schemas": list(schemas), "files": files})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Inverse of `to_json`.

        Raises:
            ValueError: the text is not a plan of this version.
        """
        data = json.loads(text)
        if data.get("version") != _VERSION:
            raise ValueError(f"plan has version {data.get('version')!r}, but this program writes version {_VERSION}")
        schemas = [pa.ipc.read_schema(pa.py_buffer(base64.b64decode(schema))) for schema in data["schemas"]]
        files = tuple(_file_from_json(entry, schemas) for entry in data["files"])
        return cls(files, data["rows_per_shard"], data["limit"])


_PLAIN = [field.name for field in dataclasses.fields(InputFile) if field.name not in ("schema", "marks")]


def _file_to_json(file: InputFile, schemas: dict[str, int]) -> dict[str, Any]:
    schema = base64.b64encode(file.schema.serialize().to_pybytes()).decode()
    entry: dict[str, Any] = {name: getattr(file, name) for name in _PLAIN}
    entry["schema"] = schemas.setdefault(schema, len(schemas))
    if file.marks.values:
        entry["marks"] = {"stride": file.marks.stride, "values": file.marks.to_text()}
    return entry


def _file_from_json(entry: dict[str, Any], schemas: list[pa.Schema]) -> InputFile:
    stored = entry.get("marks")
    marks = Marks.from_text(stored["values"], stored["stride"]) if stored else Marks()
    return InputFile(**{name: entry[name] for name in _PLAIN}, schema=schemas[entry["schema"]], marks=marks)
