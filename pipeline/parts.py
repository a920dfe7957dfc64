"""One part: a shard's output rows as one Parquet file, its statistics in the footer, committed in one step.

Knows nothing of shards, runs or what the counters mean: they are opaque bytes that travel with the rows.
Invariant: a part that is visible under `data/` is whole, and its statistics are those of exactly its rows.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InfrastructureError
from pipeline.rows import SCHEMA_VERSION
from pipeline.storage import Store

DATA = "data"
PREFIX = "tramontane."
COUNTERS = PREFIX + "counters"
VERSION = PREFIX + "schema_version"

# One request fetches the footer of nearly every part: schema and row group of 30 columns take 6 kB, counters of a
# 32 x 8 model 10 to 40 kB.
_TAIL_BYTES = 64 * 1024
_TRAILER_BYTES = 8  # footer length, "PAR1"
_READ_ATTEMPTS = 3  # a part that is replaced between two requests is read again

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class PartFooter:
    """What a part says about itself, read without its rows."""

    part_name: str
    num_rows: int
    """Output rows, i.e. samples and failed rows."""
    schema_version: int
    counters: bytes
    """As given to `encode_part`."""
    extra: dict[str, str]
    """As given to `encode_part`."""


def part_path(part_name: str) -> str:
    """Name of the part's object within the output."""
    return f"{DATA}/{part_name}"


def encode_part(table: pa.Table, counters_bytes: bytes, extra: Mapping[str, str]) -> bytes:
    """Return the Parquet file of `table` with counters and `extra` in its footer.

    Equal arguments give equal bytes. `counters_bytes` must be ASCII: Parquet's footer values are text, and strict
    readers (Rust's, DuckDB's) reject a file with others.

    Raises:
        ValueError: the counters aren't ASCII, or `extra` uses a key of ours.
    """
    taken = {key for key in extra if PREFIX + key in (COUNTERS, VERSION)}
    if taken or not counters_bytes.isascii():
        raise ValueError(f"footer keys {sorted(taken)} are reserved" if taken else "counters must be ASCII bytes")
    footer = {COUNTERS: counters_bytes, VERSION: str(SCHEMA_VERSION)} | {
        PREFIX + key: text for key, text in extra.items()
    }
    sink = pa.BufferOutputStream()
    # Page checksums: a flipped bit in an object store or on a disk is an error here, not a strange completion.
    with pq.ParquetWriter(sink, table.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(footer)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def commit_part(store: Store, part_name: str, data: bytes) -> None:
    """Make the part visible and durable; a part of that name is replaced.

    Raises:
        InfrastructureError: the storage refused; the part is as it was before, or already whole.
    """
    try:
        store.put(part_path(part_name), data)
    except OSError as error:
        raise InfrastructureError(
            f"part {part_name} ({len(data):,} bytes) could not be written to {store.root}: {error}. "
            "Committed parts are safe: check space and permissions, then rerun the same command"
        ) from error


def part_sizes(store: Store) -> dict[str, int]:
    """Return {part name: size in bytes} of what is committed; hidden and underscore names aren't parts."""
    return {name: size for name, size in store.list(DATA).items() if not name.startswith((".", "_"))}


def committed_parts(store: Store) -> set[str]:
    """Names of the committed parts: what `data/` holds, since nothing else marks a shard as done."""
    return set(part_sizes(store))


def read_footer(store: Store, part_name: str, *, size: int | None = None) -> PartFooter:
    """Read what the part says about itself: one request of 64 KiB, two if the footer is longer.

    `size`, as from `part_sizes`, saves a request; it may be out of date.

    Raises:
        FileNotFoundError: no such part.
        InfrastructureError: it isn't a part of ours, or it is damaged.
    """
    return _retried(store, part_name, size, lambda size: _footer(store, _Ranges(store, part_name, size)))


def read_part(store: Store, part_name: str) -> pa.Table:
    """Return the part's rows, in order, checksums verified.

    Raises:
        FileNotFoundError: no such part.
        InfrastructureError: it is damaged.
    """
    with _transport(store, part_name):
        data = store.read(part_path(part_name))
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise _damaged(store, part_name, str(error)) from error
    kept = {key: text for key, text in (table.schema.metadata or {}).items() if not key.startswith(PREFIX.encode())}
    return table.replace_schema_metadata(kept or None)


def open_part(store: Store, part_name: str, *, size: int | None = None) -> OpenPart:
    """Read a part's footer, to read some of its columns next: one request, two if the footer is longer than 64 KiB.

    `size`, as from `part_sizes`, saves a request; it may be out of date.

    Raises:
        FileNotFoundError: no such part.
        InfrastructureError: it isn't a part of ours, or it is damaged.
    """
    return _retried(store, part_name, size, lambda size: OpenPart(store, _Ranges(store, part_name, size)))


class OpenPart:
    """Some columns of a part, checksums verified; `error.kind` names one field of a struct, which comes without others.

    Fetches the columns' own bytes, neighbours in one request; nothing more of a part below 64 KiB.
    """

    def __init__(self, store: Store, ranges: _Ranges) -> None:
        self._store = store
        self._part_name = ranges.part_name
        self._file = pq.ParquetFile(ranges, page_checksum_verification=True)
        self._paths = {self._file.schema.column(index).path for index in range(len(self._file.schema))}
        self.footer = _parse_footer(store, ranges.part_name, self._file.metadata)
        self.names = frozenset(path.partition(".")[0] for path in self._paths)
        """Columns that the part has."""

    def read(self, columns: Sequence[str]) -> pa.Table:
        """All rows, in order.

        Raises:
            InfrastructureError: the part lacks a column, or is damaged.
        """
        with self._decoding(columns):
            # Callers look at several parts at a time: no threads of Arrow's own on top of those.
            return self._file.read(list(columns), use_threads=False).replace_schema_metadata(None)

    def batches(self, columns: Sequence[str], *, num_rows: int) -> Iterator[pa.RecordBatch]:
        """The same, at most `num_rows` at a time, in the memory that those take."""
        with self._decoding(columns):
            yield from self._file.iter_batches(batch_size=num_rows, columns=list(columns), use_threads=False)

    @contextlib.contextmanager
    def _decoding(self, columns: Sequence[str]) -> Iterator[None]:
        for name in columns:
            if not any(path == name or path.startswith(f"{name}.") for path in self._paths):
                raise _damaged(self._store, self._part_name, f"it has no column {name}")
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise _damaged(self._store, self._part_name, str(error)) from error


class _Ranges(io.RawIOBase):
    """A part as pyarrow wants a file: a read is one request, but the end, footer and all, is fetched only once."""

    def __init__(self, store: Store, part_name: str, size: int | None) -> None:
        super().__init__()
        self._store = store
        self.part_name = part_name
        with _transport(store, part_name):
            self._size = store.size(part_path(part_name)) if size is None else size
            self.tail = _read_tail(store, part_path(part_name), self._size)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        start, end = self._at, self._size if size < 0 else min(self._at + size, self._size)
        self._at = end
        tail_start = self._size - len(self.tail)
        if start >= tail_start:
            return self.tail[start - tail_start : end - tail_start]
        with _transport(self._store, self.part_name):
            return self._store.read_range(part_path(self.part_name), start=start, end=end)


def _footer(store: Store, ranges: _Ranges) -> PartFooter:
    return _parse_footer(store, ranges.part_name, pq.read_metadata(pa.BufferReader(ranges.tail)))


def _parse_footer(store: Store, part_name: str, metadata: pq.FileMetaData) -> PartFooter:
    found = {key.decode(): value for key, value in (metadata.metadata or {}).items()}
    if COUNTERS not in found or VERSION not in found:
        raise _damaged(store, part_name, "it carries no statistics of ours")
    ours = {key.removeprefix(PREFIX): value.decode() for key, value in found.items() if key.startswith(PREFIX)}
    version = int(ours.pop("schema_version"))
    counters = ours.pop("counters").encode()
    return PartFooter(part_name, metadata.num_rows, version, counters, ours)


def _retried(store: Store, part_name: str, size: int | None, read: Callable[[int | None], _T]) -> _T:
    """`read(size)`; again, whatever the part's size is by then, when it was replaced since the size was known."""
    reason = ""
    for _ in range(_READ_ATTEMPTS):
        try:
            return read(size)
        except InfrastructureError:
            if size is None:
                raise
            size = None  # a range beyond the end (S3: 416) is what a part that has shrunk since looks like
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            reason, size = str(error), None
    raise _damaged(store, part_name, reason)


def _read_tail(store: Store, name: str, size: int) -> bytes:
    """Return the end of the object, from before its footer on: all that is needed to parse the footer."""
    start = max(0, size - _TAIL_BYTES)
    tail = store.read_range(name, start=start, end=size)
    footer_bytes = int.from_bytes(tail[-_TRAILER_BYTES:-4], "little") + _TRAILER_BYTES
    if len(tail) < footer_bytes <= size:
        start = max(0, size - footer_bytes - 4)
        tail = store.read_range(name, start=start, end=start + footer_bytes + 4 - len(tail)) + tail
    return tail


@contextlib.contextmanager
def _transport(store: Store, part_name: str) -> Iterator[None]:
    """Turn what the storage raises into one error; that a part is missing stays FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        message = f"part {part_name} could not be fetched from {store.root}: {error}. Rerun the same command"
        raise InfrastructureError(message) from error


def _damaged(store: Store, part_name: str, reason: str) -> InfrastructureError:
    return InfrastructureError(
        f"part {part_name} in {store.root}/{DATA} can't be read: {reason}. "
        "If this run wrote it, delete that one file and rerun the same command: its shard is done again"
    )
