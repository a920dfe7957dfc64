"""The input of a run: which files, how many rows each, which columns, and which version of each file was seen.

Reads footers of Parquet files and scans JSONL files, on the driver, before anything starts. Knows nothing of shards or
prompts. Invariant: what an `InputFile` says was true of the file with that size and version.
"""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import jsonl, openai_lines
from pipeline.earlier_run import prefixed
from pipeline.errors import InfrastructureError, RunError, SpecError
from pipeline.listing import FoundFile, find_files, open_file
from pipeline.settings import InputFormat

Format = Literal["parquet", "jsonl", "openai_batch"]
_EXTENSIONS: dict[str, Format] = {".parquet": "parquet", ".pq": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".lz4")
# Footers are a few requests of a few kB each: waiting dominates, so many threads. 16 keep 1,000 S3 footers under 10 s.
_PROBE_THREADS = 16
_EMPTY_SCHEMA = pa.schema([])


@dataclass(frozen=True)
class InputFile:
    """One file as the driver found it."""

    path: str
    """Absolute path or full URL: the identity, as in the `input_file` column."""
    format: Format
    size: int
    """Bytes."""
    version: str
    """Etag, generation or modification time."""
    num_rows: int
    schema: pa.Schema = field(default=_EMPTY_SCHEMA)
    """The file's own columns, without metadata; what an earlier run added is under the prefix."""
    decoded_bytes: int = 0
    """Estimated size in memory."""
    marks: jsonl.Marks = field(default_factory=jsonl.Marks)
    """Of lines only: byte offsets of some rows."""
    repeated: tuple[int, ...] = ()
    """Of OpenAI batch files only: rows whose `custom_id` an earlier row of the run has."""
    prefix: str = ""
    """See `earlier_run`."""

    def slim(self, row: int, stop: int | None = None) -> InputFile:
        """Return a copy of a few hundred bytes that suffices for reading rows [row, stop), or all from `row` on."""
        first, last = bisect.bisect_left(self.repeated, row), bisect.bisect_left(self.repeated, stop or math.inf)
        repeated = self.repeated[first:last]
        return replace(self, schema=_EMPTY_SCHEMA, marks=self.marks.only(row), repeated=repeated)


def list_inputs(paths: str | Sequence[str], kind: InputFormat = "auto", *, prefix: str = "") -> list[InputFile]:
    """Find the files and look into each; see `listing.find_files` for what a path may be and how files are ordered.

    `kind` is how to read them: as their extensions say, or as OpenAI batch files. `prefix`: see `earlier_run`.

    Guarantees:
    - a file without rows, or no row at all, is legal.

    Raises:
        SpecError: a path matches nothing, a file has an unknown extension or can't be read. All problems at once.
        InfrastructureError: an object store could not be reached.
    """
    return look_into(find_files(paths), kind, prefix=prefix)


def look_into(found: Sequence[FoundFile], kind: InputFormat = "auto", *, prefix: str = "") -> list[InputFile]:
    """The second half of `list_inputs`, for some of the files that were found; raises the same."""
    wrong = [problem for file in found if (problem := _extension_problem(file.path, kind))]
    if wrong:
        raise SpecError("\n".join(wrong))
    ids: dict[str, openai_lines.CustomIds] = {}
    probe = partial(_probe_requests, ids) if kind == "openai_batch" else partial(_probe_prefixed, prefix)
    with ThreadPoolExecutor(min(_PROBE_THREADS, max(1, len(found)))) as threads:
        results = list(threads.map(partial(_probe_safely, probe), found))
    problems = [result.message for result in results if isinstance(result, SpecError)]
    for result in results:
        if isinstance(result, RunError) and not problems:
            raise result
    if problems:
        raise SpecError("\n".join(problems))
    # Ten thousand files with one schema share one object.
    seen: dict[pa.Schema, pa.Schema] = {}
    files = [result for result in results if isinstance(result, InputFile)]
    if ids:
        repeated = openai_lines.repeated_rows([ids[file.path] for file in files])
        return [replace(file, repeated=rows) for file, rows in zip(files, repeated, strict=True)]
    return [replace(file, schema=seen.setdefault(file.schema, file.schema)) for file in files]


def _extension_problem(path: str, kind: InputFormat) -> str | None:
    stem, extension = os.path.splitext(path.lower())
    if kind == "openai_batch" and _EXTENSIONS.get(extension) == "parquet":
        return f"{path} is Parquet, but OpenAI batch files are JSONL; leave input.format out to read it as it is"
    if extension in _EXTENSIONS:
        return None
    if extension in _COMPRESSED and os.path.splitext(stem)[1] in _EXTENSIONS:
        return (
            f"{path} is compressed, so its rows can't be read from the middle; decompress it or convert it to Parquet"
        )
    if extension == ".json":
        return f"{path} ends in .json; if it holds one JSON object per line, rename it to .jsonl"
    known = ", ".join(_EXTENSIONS)
    return f"{path} has unknown extension {extension!r}; inputs end in {known}; a glob such as *.parquet skips it"


def _probe_safely(probe: Callable[[FoundFile], InputFile], found: FoundFile) -> InputFile | RunError:
    try:
        return probe(found)
    except RunError as error:
        return error
    except (pa.ArrowException, ValueError, NotImplementedError, FileNotFoundError, PermissionError) as error:
        return SpecError(f"{found.path} can't be read: {error}; replace or remove the file")
    except Exception as error:  # noqa: BLE001  every client library has exceptions of its own
        return InfrastructureError(f"{found.path} could not be read: {error!r}; run the same command again")


def _probe_requests(ids: dict[str, openai_lines.CustomIds], found: FoundFile) -> InputFile:
    scan, ids[found.path] = openai_lines.scan_requests(found.path)
    return _scanned(found, "openai_batch", scan)


def _scanned(found: FoundFile, kind: Format, scan: jsonl.Scan) -> InputFile:
    # Parsed values take about twice their bytes as text.
    size = 2 * found.size
    return InputFile(found.path, kind, found.size, found.version, scan.num_rows, scan.schema, size, scan.marks)


def _probe_prefixed(prefix: str, found: FoundFile) -> InputFile:
    file = _probe(found)
    return replace(file, schema=prefixed(file.schema, prefix), prefix=prefix) if prefix else file


def _probe(found: FoundFile) -> InputFile:
    kind = _EXTENSIONS[os.path.splitext(found.path.lower())[1]]
    if kind == "jsonl":
        return _scanned(found, kind, jsonl.scan(found.path))
    with open_file(found.path, streaming=False) as handle, pq.ParquetFile(handle) as parquet:
        metadata = parquet.metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        schema = parquet.schema_arrow
    if sum(group.num_rows for group in groups) != metadata.num_rows:
        raise ValueError(f"its footer says {metadata.num_rows} rows, its row groups hold another number")
    _check_names(schema)
    size = sum(group.total_byte_size for group in groups)
    return InputFile(found.path, kind, found.size, found.version, metadata.num_rows, _bare(schema), size)


def _check_names(schema: pa.Schema) -> None:
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise ValueError(f"columns {', '.join(twice)} occur twice")


def _bare(schema: pa.Schema) -> pa.Schema:
    """Drop metadata: pandas' index notes and Parquet's field ids describe the file, not the rows."""
    return pa.schema([pa.field(field.name, field.type) for field in schema])
