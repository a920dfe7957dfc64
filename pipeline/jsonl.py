r"""JSONL: one JSON object per line; scanning a file in bounded memory, and reading a range of its rows.

Owns what a line may be and how JSON values become columns. Knows nothing of shards. Invariant: scanning and reading
agree on which lines are rows, so row numbers mean the same on the driver and in every worker.

- Rows are the lines that aren't blank, numbered from 0. Lines end with `\n` or `\r\n`. A BOM at the start of the
  file is skipped, anywhere else it spoils its line.
- A line is a bad row, never an error, when it is not UTF-8, not JSON, not an object, longer than 8 MiB, holds NaN,
  Infinity, a number beyond double range, or a lone surrogate (`"\ud800"`, which no UTF-8 output can hold). A
  `"\u0000"` is legal.
- Of duplicate keys the last wins, as in every common JSON reader.
- Columns: string, int64, double, bool by what the lines hold; int and float widen to double; everything else (lists,
  objects, mixtures, integers beyond int64) becomes a string column: strings in it stay as they are, so that one odd row
  doesn't change its neighbours' text, and other values are JSON text.
"""

from __future__ import annotations

import base64
import bisect
import io
import json
import math
import re
import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, NoReturn

import pyarrow as pa

from pipeline.errors import SpecError
from pipeline.listing import open_file
from pipeline.user_schema import WIDE_INTEGERS, merge_guesses

MAX_LINE_BYTES = 8 << 20
MAX_COLUMNS = 1000
_BOM = b"\xef\xbb\xbf"
_LONE_SURROGATE_HINT = re.compile(r"\\u[dD][89a-fA-F]")
_INT64 = range(-(2**63), 2**63)
_EXACT_IN_DOUBLE = 2**53


@dataclass(frozen=True, slots=True)
class Line:
    """One row: its 0-based row number, its 1-based line number in the file, and its object or what is wrong."""

    row: int
    number: int
    num_bytes: int
    record: dict[str, Any] | None
    error: str | None


@dataclass(slots=True)
class Marks:
    """Where to start reading: (row, byte offset, line number) of every so many rows, at most `_CAPACITY` of them.

    When full, every second mark goes and the stride doubles: at 24 bytes a mark no file has more than 384 KiB of them.
    """

    _CAPACITY = 16384
    values: array[int] = field(default_factory=lambda: array("q"))
    stride: int = 64

    def offer(self, row: int, offset: int, number: int) -> None:
        """Keep the position of a row if it is due."""
        if row % self.stride:
            return
        self.values.extend((row, offset, number))
        if len(self.values) >= 3 * self._CAPACITY:
            kept = [self.values[i : i + 3] for i in range(0, len(self.values), 6)]
            self.values = array("q", (value for triple in kept for value in triple))
            self.stride *= 2

    def before(self, row: int) -> tuple[int, int, int]:
        """Return the last marked (row, offset, line number) at or before `row`; the start of the file when none is."""
        index = bisect.bisect_right(self.values[0::3], row) - 1
        if index < 0:
            return 0, 0, 1
        found_row, offset, number = self.values[3 * index : 3 * index + 3]
        return found_row, offset, number

    def only(self, row: int) -> Marks:
        """Return just the mark that reading from `row` needs."""
        return Marks(array("q", self.before(row)), self.stride)

    def to_text(self) -> str:
        """Base64 of little-endian int64 values."""
        return base64.b64encode(_little_endian(self.values).tobytes()).decode()

    @classmethod
    def from_text(cls, text: str, stride: int) -> Marks:
        """Inverse of `to_text`."""
        return cls(_little_endian(array("q", base64.b64decode(text))), stride)


def _little_endian(values: array[int]) -> array[int]:
    if sys.byteorder == "big":
        values = array("q", values)
        values.byteswap()
    return values


@dataclass(frozen=True, slots=True)
class Scan:
    """What one pass over a file found."""

    num_rows: int
    schema: pa.Schema
    marks: Marks


def scan(path: str, *, visit: Callable[[dict[str, Any] | None], None] | None = None) -> Scan:
    """Read a file once, front to back, holding one line at a time.

    `visit` is given each row's object, None for a bad row.

    Raises:
        SpecError: the lines have more than 1000 different keys.
    """
    types: dict[str, pa.DataType] = {}
    wide: set[str] = set()
    marks = Marks()
    num_rows = 0
    with open_file(path, streaming=True) as file:
        for offset, number, raw in _raw_lines(file, 0, 1):
            marks.offer(num_rows, offset, number)
            num_rows += 1
            record, _ = _parse(raw)
            if visit is not None:
                visit(record)
            for name, value in (record or {}).items():
                types[name] = merge_guesses(types.get(name, pa.null()), _json_type(value))
                if isinstance(value, int) and abs(value) > _EXACT_IN_DOUBLE:
                    wide.add(name)
            if len(types) > MAX_COLUMNS:
                raise SpecError(
                    f"{path} has more than {MAX_COLUMNS} different keys up to line {number}; a key is a column: "
                    "put values, not names, into the keys' place"
                )
    fields = [pa.field(name, kind, metadata=WIDE_INTEGERS if name in wide else None) for name, kind in types.items()]
    return Scan(num_rows, pa.schema(fields), marks)


def read_lines(path: str, marks: Marks, start: int, stop: int) -> Iterator[Line]:
    """Yield rows [start, stop) of a file, seeking to the nearest mark before them."""
    row, offset, first = marks.before(start)
    with open_file(path, streaming=True) as file:
        file.seek(offset)
        for _, number, raw in _raw_lines(file, offset, first):
            if row >= stop:
                return
            if row >= start:
                record, problem = _parse(raw)
                yield Line(row, number, len(raw), record, problem and f"line {number} {problem}")
            row += 1


def cell(value: Any, kind: pa.DataType) -> Any:
    """Turn a JSON value into what pyarrow takes for a column of this type."""
    if value is None or isinstance(value, str):
        return value
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return json.dumps(value, ensure_ascii=False)
    if pa.types.is_floating(kind):
        return float(value)
    return value


def _raw_lines(file: IO[bytes], offset: int, number: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield (byte offset, line number, bytes) of the lines that aren't blank; a too long line comes cut."""
    reader = file if isinstance(file, io.BufferedReader) else io.BufferedReader(file, 1 << 20)  # type: ignore[type-var]
    while raw := reader.readline(MAX_LINE_BYTES + 2):
        size, last = len(raw), raw
        while not last.endswith(b"\n") and (last := reader.readline(1 << 20)):
            size += len(last)
        if offset == 0:
            raw = raw.removeprefix(_BOM)
        if raw.strip():
            yield offset, number, raw.rstrip(b"\r\n") if size <= MAX_LINE_BYTES + 2 else raw
        offset += size
        number += 1


def _parse(raw: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """Return (object, None), or (None, what is wrong)."""
    if len(raw) > MAX_LINE_BYTES:
        return None, f"is longer than {MAX_LINE_BYTES >> 20} MiB; split it or leave out what the prompt doesn't need"
    try:
        text = raw.decode("utf-8")
        value = _DECODER.decode(text)
        if _LONE_SURROGATE_HINT.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        return None, f"is not UTF-8 (byte {error.start})"
    except UnicodeEncodeError:
        return None, "holds a lone surrogate, which is not a character"
    except RecursionError:
        return None, "is nested too deeply"
    except ValueError as error:
        return None, f"is not JSON: {error}"
    if not isinstance(value, dict):
        return None, f"is a JSON {_name(value)}, not an object"
    return value, None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond double range")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)


def _json_type(value: Any) -> pa.DataType:
    if value is None:
        return pa.null()
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int):
        return pa.int64() if value in _INT64 else pa.string()
    return pa.float64() if isinstance(value, float) else pa.string()


def _name(value: Any) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), "value")
