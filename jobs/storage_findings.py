"""Whether an output can be written as commits need it: read back, listed, deleted, and created only once.

Leaves an output as it found it: without the probe's object, and without folders that it had to make.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from jobs.findings import Finding, fine, refusal
from pipeline.errors import RunError
from pipeline.listing import find_files
from pipeline.storage import Store

FOLDER = "_run"


class _BrokenPromise(Exception):
    """Storage that works, but not as commits need it; the message says how."""


def input_finding(paths: str | Sequence[str]) -> Finding:
    """Whether the input's files can be listed."""
    try:
        files = find_files(paths)
    except RunError as error:
        return refusal("input", error)
    count = f"{len(files):,} file{'s' * (len(files) != 1)}"
    return fine("input", f"{count}, {sum(file.size for file in files):,} bytes")


def output_finding(path: str) -> Finding:
    """Write a probe into the output and take it away again.

    Guarantees:
    - afterwards the output holds what it held before, and no folder more.
    - an output where a second `create` of a name succeeds is a problem.
    """
    try:
        store = Store(path)
        missing = _missing_folders(store)
        try:
            _probe(store)
        finally:
            _remove_folders(missing)
    except RunError as error:
        return refusal("output", error)
    except _BrokenPromise as broken:
        cure = "use a local disk, or a store with conditional writes (S3, GCS and Azure have them; see its settings)"
        return Finding("problem", "output", f"{path}: {broken}", cure)
    except Exception as error:  # noqa: BLE001  # every client library has exceptions of its own
        cure = "correct output.path, or its permissions and credentials (AWS_*, GOOGLE_*, AZURE_* in the environment)"
        return Finding("problem", "output", f"{path} can't be used: {error or type(error).__name__}", cure)
    return fine("output", f"{path}: written, read back, created only once, listed and deleted")


def _probe(store: Store) -> None:
    name = f"doctor-{secrets.token_hex(8)}"
    probe = f"{FOLDER}/{name}"
    first, second = secrets.token_bytes(64), secrets.token_bytes(64)
    try:
        store.create(probe, first)
        _require(store.read(probe) == first, "what was written is not what is read")
        with contextlib.suppress(FileExistsError):
            store.create(probe, second)
            raise _BrokenPromise("a name could be created twice, so two runs could own this output at once")
        _require(store.read(probe) == first, "a refused write changed the object")
        store.put(probe, second)
        _require(store.read(probe) == second, "an object that was replaced is still read as before")
        _require(name in store.list(FOLDER), "an object that was written isn't listed")
    finally:
        store.delete(probe)
    _require(name not in store.list(FOLDER), "an object that was deleted is still listed")


def _require(kept: bool, broken: str) -> None:  # noqa: FBT001
    if not kept:
        raise _BrokenPromise(broken)


def _missing_folders(store: Store) -> list[Path]:
    """Folders that writing the probe will make, the innermost first; object stores have none."""
    if not store.is_local:
        return []
    folder = Path(store.path(FOLDER))
    return [each for each in (folder, *folder.parents) if not each.exists()]


def _remove_folders(folders: Sequence[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not made after all, or somebody else writes there by now
            os.rmdir(folder)
