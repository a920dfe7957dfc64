"""The plan of a run: which rows form which shard. Pure arithmetic over the input listing.

Knows nothing of Ray, and of files only their row counts. Invariant: the shards of a plan are contiguous, stay within
one file, and cover the planned rows exactly once. Each is computed when asked for: a plan is as small as its file list,
and one bit per row of files of which only some rows are done.
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

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import row_picks
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
    """Rows to do."""
    span: int | None = None
    """Rows of the slice when only some of them are to be done; None when all are."""
    picks: bytes | None = None
    """Which of them, one bit each; None for all."""

    @property
    def stop(self) -> int:
        """One past the last row of the slice."""
        return self.start + (self.num_rows if self.span is None else self.span)

    @property
    def picked_rows(self) -> NDArray[np.int64] | None:
        """Numbers within the file of the rows to do; None for the whole slice."""
        return None if self.picks is None else row_picks.unpack(self.picks) + self.start

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
    files: Sequence[InputFile],
    *,
    replicas: int,
    limit: int | None = None,
    samples: int = 1,
    result_bytes: int = 0,
    picks: Sequence[bytes | None] = (),
) -> Plan:
    """Cut the files into shards sized for so many replicas.

    Args:
        files: from `list_inputs`.
        replicas: engines that will share the shards.
        limit: only so many rows, in file order.
        samples: output rows per input row; each repeats the user's columns.
        result_bytes: most that one output row adds to those.
        picks: of each file the rows to do as `row_picks` has them, None for all; empty for all rows of all files.
    """
    available = sum(file.num_rows for file in files)
    num_rows = available if limit is None else min(limit, available)
    # The file with the biggest rows decides: one size for all keeps a part's name a pure function of its shard.
    row_bytes = max((file.decoded_bytes // file.num_rows for file in files if file.num_rows), default=0)
    row_bytes = samples * (row_bytes + result_bytes)
    size = rows_per_shard(num_rows, replicas, row_bytes)
    if picks:
        size = -(-size // row_picks.BITS_PER_BYTE) * row_picks.BITS_PER_BYTE
    return Plan(tuple(files), size, limit, tuple(picks))


@dataclass(frozen=True)
class Plan:
    """Files and how they are cut. Written once per run; resuming reuses it, whatever the replicas are by then.

    Guarantees:
    - every row below `min(limit, rows)`, counted in file order, is in exactly one shard; of files with picks every
      picked row is, and no other.
    - a shard never crosses a file.
    - `from_json(to_json())` is the same plan.
    """

    files: tuple[InputFile, ...]
    rows_per_shard: int
    limit: int | None = None
    picks: tuple[bytes | None, ...] = ()
    """Of each file the rows to do, None for all; empty when that holds for every file."""

    def __post_init__(self) -> None:
        if self.rows_per_shard < 1:
            raise ValueError(f"rows_per_shard is {self.rows_per_shard}, but must be at least 1")
        if not self.picks:
            return
        if len(self.picks) != len(self.files) or self.limit is not None:
            raise ValueError("picked rows are given for every file or none, and never together with a limit")
        if self.rows_per_shard % row_picks.BITS_PER_BYTE:
            raise ValueError(f"rows_per_shard is {self.rows_per_shard}, but must be a multiple of 8 with picked rows")

    @cached_property
    def _cells(self) -> list[row_picks.Cells | None]:
        picks = self.picks or (None,) * len(self.files)
        return [None if bits is None else row_picks.cells_of(bits, self.rows_per_shard) for bits in picks]

    @cached_property
    def rows_of_file(self) -> list[int]:
        """Rows to do of each file."""
        if self.picks:
            counted = zip(self.files, self._cells, strict=True)
            return [file.num_rows if cells is None else int(cells.counts.sum()) for file, cells in counted]
        left = sum(file.num_rows for file in self.files) if self.limit is None else self.limit
        rows = []
        for file in self.files:
            taken = min(left, file.num_rows)
            rows.append(taken)
            left -= taken
        return rows

    @cached_property
    def _shards_before_file(self) -> list[int]:
        counts = (
            -(-rows // self.rows_per_shard) if cells is None else len(cells.positions)
            for rows, cells in zip(self.rows_of_file, self._cells, strict=True)
        )
        return list(itertools.accumulate(counts, initial=0))

    @cached_property
    def _rows_before_file(self) -> list[int]:
        return list(itertools.accumulate(self.rows_of_file[:-1], initial=0))

    @property
    def num_rows(self) -> int:
        """Rows of the run."""
        return sum(self.rows_of_file)

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
        file, number = self.files[file_index], index - self._shards_before_file[file_index]
        cells = self._cells[file_index]
        if cells is None:
            start = number * self.rows_per_shard
            rows = min(self.rows_per_shard, self.rows_of_file[file_index] - start)
            return Shard(index, file_index, file.path, start, rows)
        start = int(cells.positions[number]) * self.rows_per_shard
        span = min(self.rows_per_shard, file.num_rows - start)
        picks = row_picks.bits_between(self.picks[file_index] or b"", start, start + span)
        return Shard(index, file_index, file.path, start, int(cells.counts[number]), span, picks)

    def find(self, number: int) -> tuple[Shard, int]:
        """Return the shard and the row number within its file of the plan's row `number`, counted in file order."""
        file_index = bisect.bisect_right(self._rows_before_file, number) - 1
        row = number - self._rows_before_file[file_index]
        cells, bits = self._cells[file_index], self.picks[file_index] if self.picks else None
        position = row // self.rows_per_shard
        if cells is not None and bits is not None:
            row = int(row_picks.unpack(bits)[row])
            position = int(np.searchsorted(cells.positions, row // self.rows_per_shard))
        return self.shard(self._shards_before_file[file_index] + position), row

    def __iter__(self) -> Iterator[Shard]:
        """Yield the shards in order."""
        return (self.shard(index) for index in range(self.num_shards))

    def to_json(self) -> str:
        """Return the plan as JSON; files with equal schemas share one copy."""
        schemas: dict[str, int] = {}
        files = [_file_to_json(file, schemas) for file in self.files]
        plan: dict[str, Any] = {"version": _VERSION, "rows_per_shard": self.rows_per_shard, "limit": self.limit}
        if self.picks:
            plan["picks"] = [None if bits is None else row_picks.to_text(bits) for bits in self.picks]
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
        picks = tuple(None if text is None else row_picks.from_text(text) for text in data.get("picks", ()))
        return cls(files, data["rows_per_shard"], data["limit"], picks)


_PLAIN = [field.name for field in dataclasses.fields(InputFile) if field.name not in ("schema", "marks", "repeated")]


def _file_to_json(file: InputFile, schemas: dict[str, int]) -> dict[str, Any]:
    schema = base64.b64encode(file.schema.serialize().to_pybytes()).decode()
    entry: dict[str, Any] = {name: getattr(file, name) for name in _PLAIN}
    entry["schema"] = schemas.setdefault(schema, len(schemas))
    if file.marks.values:
        entry["marks"] = {"stride": file.marks.stride, "values": file.marks.to_text()}
    if file.repeated:
        entry["repeated"] = list(file.repeated)
    return entry


def _file_from_json(entry: dict[str, Any], schemas: list[pa.Schema]) -> InputFile:
    stored = entry.get("marks")
    marks = Marks.from_text(stored["values"], stored["stride"]) if stored else Marks()
    plain, repeated = {name: entry[name] for name in _PLAIN if name in entry}, tuple(entry.get("repeated", ()))
    return InputFile(**plain, schema=schemas[entry["schema"]], marks=marks, repeated=repeated)
