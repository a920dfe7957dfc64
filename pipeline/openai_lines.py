"""OpenAI batch files as input: which columns a line becomes, and which lines repeat a `custom_id`.

Knows JSONL lines, and nothing of what a request means: see `openai_requests`. Invariant: every line that isn't blank is
a row, with its line number; of lines with one `custom_id`, in all files of a run together, the first alone is sound.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import jsonl
from pipeline.errors import SpecError
from pipeline.openai_requests import COLUMNS, LINE

SCHEMA = pa.schema([*((name, pa.string()) for name in COLUMNS), (LINE, pa.int64())])
"""Of every batch file, whatever its lines hold."""

# To find repeated ids takes 24 bytes a request on the driver, some 100 more a request for the moment of sorting.
MAX_REQUESTS = 4_000_000
# They travel with the plan. A file with more is no batch with a slip in it.
MAX_REPEATED = 100_000


@dataclass(slots=True)
class CustomIds:
    """The ids of one file: 128-bit hashes, of which two of 4 million differing ids are equal once in 10^25 files."""

    path: str
    num_rows: int = 0
    rows: array[int] = field(default_factory=lambda: array("q"))
    """Those with an id."""
    hashes: bytearray = field(default_factory=bytearray)

    def add(self, record: dict[str, Any] | None) -> None:
        """Take the next row's record, None for a line that can't be read.

        Raises:
            SpecError: there are more requests than a run takes.
        """
        value = _text((record or {}).get("custom_id"))
        if value:
            self.rows.append(self.num_rows)
            self.hashes += hashlib.blake2b(value.encode(), digest_size=16).digest()
        self.num_rows += 1
        if self.num_rows > MAX_REQUESTS:
            raise _too_many(self.path)


def scan_requests(path: str) -> tuple[jsonl.Scan, CustomIds]:
    """Read a file once; see `jsonl.scan`."""
    ids = CustomIds(path)
    scan = jsonl.scan(path, visit=ids.add)
    return dataclasses.replace(scan, schema=SCHEMA), ids


def repeated_rows(files: Sequence[CustomIds]) -> list[tuple[int, ...]]:
    """Of each file the rows whose `custom_id` an earlier row has, files in their order.

    Raises:
        SpecError: there are more than 100,000 of them, or more than 4 million requests.
    """
    if sum(file.num_rows for file in files) > MAX_REQUESTS:
        raise _too_many(files[0].path)
    rows = np.concatenate([np.frombuffer(file.rows, np.int64) for file in files] or [np.zeros(0, np.int64)])
    owners = np.repeat(np.arange(len(files)), [len(file.rows) for file in files])
    halves = np.frombuffer(b"".join(file.hashes for file in files), np.uint64).reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: among equals the first comes first
    ordered = halves[order]
    repeats = np.sort(order[1:][(ordered[1:] == ordered[:-1]).all(axis=1)])
    if len(repeats) > MAX_REPEATED:
        first = int(repeats[0])
        raise SpecError(
            f"{len(repeats):,} requests have a `custom_id` that an earlier one has, such as row {rows[first]:,} of "
            f"{files[owners[first]].path}; give every request an id of its own"
        )
    return [tuple(rows[repeats[owners[repeats] == number]].tolist()) for number in range(len(files))]


def as_row(line: jsonl.Line, repeated: Collection[int]) -> jsonl.Line:
    """The line with its record as `SCHEMA` has it: null for what is missing or of the wrong type.

    A line that can be read and has an error all the same is one whose `custom_id` is taken.
    """
    record, error = line.record or {}, line.error
    columns = {name: _text(record.get(name)) for name in COLUMNS[:-1]}
    try:
        columns["body"] = (
            json.dumps(record["body"], ensure_ascii=False) if isinstance(record.get("body"), dict) else None
        )
    except RecursionError:  # reading it took a level less than writing it here does
        columns, error = {}, f"line {line.number} is nested too deeply"
    if error is None and line.row in repeated:
        error = f"line {line.number} has the custom_id {columns['custom_id']!r:.80} of an earlier line; make it unique"
    return dataclasses.replace(line, record={**columns, LINE: line.number}, error=error)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _too_many(path: str) -> SpecError:
    return SpecError(
        f"{path} and what comes with it are more than {MAX_REQUESTS:,} requests; split them over several runs"
    )
