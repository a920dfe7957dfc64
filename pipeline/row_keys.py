"""Which row is which, across files and runs: keys of rows, and the search for those that are known already.

Runs on the driver. Knows nothing of runs or where their keys are kept. Invariant: a row's key depends on its id or
content alone, so that the same row has the same key in another file, at another place, in another run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.inputs import InputFile
from pipeline.read import read_range
from pipeline.rows import READ_ERROR

_KEY_BYTES = 16
"""Two of a billion rows share a 16-byte hash with a probability of 1e-21; of 8 bytes it would be 3%."""
_CONTENT_BYTES = 8
_JSON = json.JSONEncoder(default=str, separators=(",", ":"))  # `json.dumps` with a default makes one for each row
SCHEMA = pa.schema(
    [
        ("file_index", pa.int32()),
        ("row", pa.int64()),
        ("key_high", pa.uint64()),
        ("key_low", pa.uint64()),
        ("content", pa.uint64()),
    ]
)


@dataclass(frozen=True, slots=True)
class Keys:
    """Rows by what they are known by, as arrays of equal length: 36 bytes a row."""

    file_index: NDArray[np.int32]
    row: NDArray[np.int64]
    """Number within its file."""
    high: NDArray[np.uint64]
    low: NDArray[np.uint64]
    content: NDArray[np.uint64]
    """Hash of the columns that a change is seen by."""

    def __len__(self) -> int:
        return len(self.row)

    def take(self, positions: NDArray[np.int64] | NDArray[np.bool_]) -> Keys:
        """Some of them."""
        columns = (self.file_index, self.row, self.high, self.low, self.content)
        return Keys(*(column[positions] for column in columns))  # type: ignore[arg-type]  # each of its own type

    def to_table(self) -> pa.Table:
        """As `SCHEMA` has them."""
        return pa.table([self.file_index, self.row, self.high, self.low, self.content], schema=SCHEMA)

    @staticmethod
    def from_table(table: pa.Table) -> Keys:
        """Inverse of `to_table`."""
        return Keys(*(table[name].to_numpy() for name in SCHEMA.names))


def read_keys(files: Sequence[InputFile], *, id_column: str | None, columns: Sequence[str] | None) -> Keys:
    """Keys of all rows of the files, in order: of the id where there is a column for it, else of the content.

    A row without an id is known by its content, one that can't be read by its place.

    Args:
        files: from `inputs.look_into`.
        id_column: what rows are known by; None for their content.
        columns: what the content is, nulls left out, so that a column that comes later changes no earlier row; None for
            all that a file has.

    Raises:
        InfrastructureError: a file changed or can't be decoded.
    """
    keys, contents, counts = bytearray(), bytearray(), []
    for file in files:
        before = len(contents)
        for key, content in _file_keys(file, id_column, columns):
            keys += key
            contents += content
        counts.append((len(contents) - before) // _CONTENT_BYTES)
    halves = np.frombuffer(bytes(keys), np.uint64).reshape(-1, 2)
    file_index = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    row = np.concatenate([np.arange(count, dtype=np.int64) for count in counts] or [np.zeros(0, np.int64)])
    return Keys(file_index, row, halves[:, 0].copy(), halves[:, 1].copy(), np.frombuffer(bytes(contents), np.uint64))


def _file_keys(file: InputFile, id_column: str | None, columns: Sequence[str] | None) -> Iterator[tuple[bytes, bytes]]:
    columns = sorted(file.schema.names if columns is None else columns)
    names = sorted({*columns, *([id_column] if id_column else [])})
    schema = pa.schema([(name, _type(file, name)) for name in names])
    number = 0
    for rows in read_range(file, 0, file.num_rows, schema):
        table = rows.to_table(schema)
        for row in table.to_pylist():
            if row[READ_ERROR] is not None:
                key = _hash(b"place", f"{file.path}\0{number}")
                yield key, key[:_CONTENT_BYTES]
            else:
                content = _hash(b"content", _JSON.encode([(n, row[n]) for n in columns if row[n] is not None]))
                identity = None if id_column is None else row[id_column]
                yield content if identity is None else _hash(b"id", str(identity)), content[:_CONTENT_BYTES]
            number += 1


def _type(file: InputFile, column: str) -> pa.DataType:
    return file.schema.field(column).type if column in file.schema.names else pa.null()


def _hash(kind: bytes, text: str) -> bytes:
    """A cryptographic hash: a row made to collide with another would never be done."""
    return hashlib.blake2b(text.encode(), digest_size=_KEY_BYTES, person=kind).digest()


def same_rows(keys: Keys) -> NDArray[np.int64]:
    """Of each row the number of its key; numbers go from 0 without a gap."""
    order = np.lexsort((keys.low, keys.high))
    high, low = keys.high[order], keys.low[order]
    numbers = np.zeros(len(keys), np.int64)
    numbers[order[1:]] = np.cumsum((high[1:] != high[:-1]) | (low[1:] != low[:-1]))
    return numbers


def one_of_each(numbers: NDArray[np.int64], eligible: NDArray[np.bool_], *, last: bool) -> NDArray[np.int64]:
    """Positions, ascending, of the first or the last eligible row of each number."""
    positions = np.flatnonzero(eligible)
    if last:
        positions = positions[::-1]
    _, picked = np.unique(numbers[positions], return_index=True)
    return np.sort(positions[picked])


class Search:
    """Finds rows of different keys among many others that come by in any number of batches.

    Guarantees:
    - a row is found exactly if a batch had its key.
    - its content is then that of the last such batch.
    """

    def __init__(self, wanted: Keys) -> None:
        """Prepare to find these, each key once."""
        self._order = np.lexsort((wanted.low, wanted.high))
        self._high, self._low = wanted.high[self._order], wanted.low[self._order]
        self._known = np.zeros(len(wanted), np.bool_)
        self._content = np.zeros(len(wanted), np.uint64)

    def see(self, seen: Keys) -> None:
        """Look at rows that are known."""
        order = np.argsort(seen.high)  # sorted needles: 10 times quicker, by the processor's cache
        high, low, content = seen.high[order], seen.low[order], seen.content[order]
        place = np.searchsorted(self._high, high)
        end = np.searchsorted(self._high, high, side="right")
        while (open_ := place < end).any():  # once, unless two keys share their first half
            place, end, low, content = place[open_], end[open_], low[open_], content[open_]
            hit = self._low[place] == low
            self._known[place[hit]] = True
            self._content[place[hit]] = content[hit]
            place = place + 1

    @property
    def known(self) -> NDArray[np.bool_]:
        """Of each wanted row, in the order given, whether it was seen."""
        return self._in_order(self._known)

    @property
    def content(self) -> NDArray[np.uint64]:
        """Of each wanted row that was seen, its content then."""
        return self._in_order(self._content)

    def _in_order(self, values: NDArray[Any]) -> NDArray[Any]:
        placed = np.empty_like(values)
        placed[self._order] = values
        return placed
