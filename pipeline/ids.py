"""Nulls and duplicates in the user's own id column, found in bounded memory before anything starts.

Rows are identified by file and row number regardless: this is advice. Knows only ids. Invariant: at most `max_rows`
rows are looked at, 8 bytes each.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.inputs import InputFile
from pipeline.read import read_range

_MAX_ID_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class IdReport:
    """What an id column looks like."""

    nulls: int
    """Rows without an id, or with one above 64 KiB."""
    duplicates: int
    """Rows whose id an earlier row has, by 64-bit hashes: one false hit in 10 million checks of 2 million rows."""
    checked_rows: int
    """Rows looked at."""
    complete: bool
    """Whether these were all rows."""


def check_ids(files: Sequence[InputFile], column: str, *, max_rows: int = 2_000_000) -> IdReport:
    """Count nulls and duplicates of a column over the first `max_rows` rows.

    Raises:
        InfrastructureError: a file changed or can't be decoded.
    """
    hashes = array("Q")
    checked = nulls = 0
    for value in _values(files, column, max_rows):
        checked += 1
        if value is None:
            nulls += 1
        else:
            digest = hashlib.blake2b(str(value).encode(), digest_size=8).digest()
            hashes.append(int.from_bytes(digest, "little"))
    duplicates = len(hashes) - len(np.unique(np.frombuffer(hashes, np.uint64))) if hashes else 0
    return IdReport(nulls, duplicates, checked, checked == sum(file.num_rows for file in files))


def _values(files: Sequence[InputFile], column: str, max_rows: int) -> Iterator[Any]:
    left = max_rows
    for file in files:
        kind = file.schema.field(column).type if column in file.schema.names else pa.null()
        for rows in read_range(file, 0, min(left, file.num_rows), pa.schema([(column, kind)])):
            small = rows.refuse(rows.num_bytes > _MAX_ID_BYTES, "is no id")  # a repeated 64 MiB value would fill memory
            yield from small.to_table(pa.schema([(column, kind)]))[column].to_pylist()
        left -= min(left, file.num_rows)
