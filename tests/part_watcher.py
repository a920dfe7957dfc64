"""Somebody else who looks at `data/` all the while, by pyarrow and boto3 alone: what is seen must be whole, and stay.

Knows the output's path or s3:// URL only, nothing of runs nor of how they write. Reads each version of a part once, as
soon as it is seen.
"""

from __future__ import annotations

import functools
import io
import os
import threading
from collections.abc import Collection, Hashable
from pathlib import Path
from typing import Any, Self

import pyarrow.parquet as pq


def part_versions(output: str | Path) -> dict[str, Hashable]:
    """What a user's glob `data/*` finds: name -> what differs between two versions of the same name."""
    if _is_s3(output):
        return {name: (entry["ETag"], entry["LastModified"]) for name, entry in _listed(str(output)).items()}
    try:
        entries = [entry for entry in os.scandir(Path(output) / "data") if not entry.name.startswith(".")]
    except FileNotFoundError:
        return {}
    stats = {entry.name: entry.stat() for entry in entries}
    return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


def part_names(output: str | Path) -> list[str]:
    """The names of what `part_versions` finds, in order."""
    return sorted(part_versions(output))


def read_part_file(output: str | Path, name: str) -> bytes:
    """All bytes of one part."""
    if not _is_s3(output):
        return (Path(output) / "data" / name).read_bytes()
    bucket, prefix = _bucket_and_prefix(str(output))
    content: bytes = _client().get_object(Bucket=bucket, Key=prefix + name)["Body"].read()
    return content


class PartWatcher:
    """Polls `data/` on a thread from start to end of the block."""

    def __init__(
        self, output: str | Path, *, part_rows: Collection[int] | None = None, interval_s: float = 0.02
    ) -> None:
        """`part_rows`: how many rows a part may have; None for any number."""
        self.num_reads = 0
        self.problems: list[str] = []
        self._output = output
        self._part_rows = part_rows
        self._interval_s = interval_s
        self._seen: dict[str, Hashable] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                self._look()
            except Exception as error:  # any at all: also a part that was listed and then is not there
                self.problems.append(repr(error))

    def _look(self) -> None:
        versions = part_versions(self._output)
        self.problems += [f"{name} has vanished" for name in self._seen.keys() - versions.keys()]
        for name, version in versions.items():
            if self._seen.get(name) != version:
                num_rows = pq.read_table(io.BytesIO(read_part_file(self._output, name))).num_rows
                self.num_reads += 1
                if self._part_rows is not None and num_rows not in self._part_rows:
                    self.problems.append(f"{name} has {num_rows} rows")
                self._seen[name] = version


def _is_s3(output: str | Path) -> bool:
    return str(output).startswith("s3://")


def _listed(output: str) -> dict[str, dict[str, Any]]:
    """Not by s3fs, whose `find` on a still empty folder may return the folder itself as if it were a file."""
    bucket, prefix = _bucket_and_prefix(output)
    entries = _client().list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
    names = {entry["Key"].removeprefix(prefix): entry for entry in entries}
    return {name: entry for name, entry in names.items() if not name.startswith(".")}


def _bucket_and_prefix(output: str) -> tuple[str, str]:
    bucket, _, path = output.removeprefix("s3://").partition("/")
    return bucket, f"{path}/data/"


@functools.cache
def _client() -> Any:
    import boto3

    return boto3.client("s3")
