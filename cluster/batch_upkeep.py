"""What the directory of files and batches takes of the disk, and what goes from it by itself.

Knows names, sizes and ages; nothing of processes. Invariant: nothing goes that somebody could still ask for by its id,
but the oldest batches of a key that has had very many.
"""

from __future__ import annotations

import collections
import contextlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from cluster.batch_files import FILE_ID, FILES, owner_folder
from cluster.batch_records import BATCH_ID, BATCHES, RECORD, BatchFolder
from pipeline import local_objects

MAX_OVER = 1000
"""Batches of one key that are over; of more the oldest go. Their files stay."""
STALE_S = 600.0
"""Who is still writing something touches it more often than that."""
_BLOCK = 4096


def num_bytes(root: Path, owner: str) -> int:
    """What the owner's files and batches take, in whole blocks; what a batch shares with a file counts once."""
    found: dict[tuple[int, int], int] = {}
    for name in (FILES, BATCHES):
        for folder, _, names in os.walk(root / name / owner_folder(owner)):
            for each in names:
                with contextlib.suppress(FileNotFoundError):
                    status = os.lstat(os.path.join(folder, each))
                    found[status.st_dev, status.st_ino] = -(-status.st_size // _BLOCK) * _BLOCK
    return sum(found.values())


def sweep(root: Path, *, older_than_s: float = STALE_S) -> None:
    """Remove what writers that died have left: temporary files, and files and batches without a record."""
    for owner in _subfolders(root / FILES):
        local_objects.sweep(str(owner), older_than_s=older_than_s)
        names = set(os.listdir(owner))
        for name in names:
            path = owner / name
            is_nobodys = path.suffix == ".jsonl" and f"{path.stem}.json" not in names
            if is_nobodys and FILE_ID.fullmatch(path.stem) and _is_older(path, older_than_s):
                path.unlink(missing_ok=True)
    for owner in _subfolders(root / BATCHES):
        for path in _subfolders(owner):
            local_objects.sweep(str(path), older_than_s=older_than_s)
            if BATCH_ID.fullmatch(path.name) and not (path / RECORD).exists() and _is_older(path, older_than_s):
                shutil.rmtree(path, ignore_errors=True)


def drop_oldest(over: Iterable[BatchFolder]) -> None:
    """Remove batches that are over, given oldest first, so that no key has more than `MAX_OVER` of them."""
    of_owners = collections.defaultdict(list)
    for folder in over:
        of_owners[folder.owner].append(folder)
    for owned in of_owners.values():
        for folder in owned[: max(0, len(owned) - MAX_OVER)]:
            folder.drop()


def _subfolders(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (path for path in folder.iterdir() if path.is_dir())


def _is_older(path: Path, seconds: float) -> bool:
    try:
        return time.time() - path.stat().st_mtime >= seconds
    except FileNotFoundError:
        return False
