"""Whole objects as files of this machine: written beside their final place, synced, then shown in one step.

Knows full paths only, neither stores nor URLs. Invariant: under a final name there is never part of an object, and what
is there has reached the disk, its folder included, before the call returns.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
import uuid
from collections.abc import Iterator
from typing import IO

from pipeline.errors import SpecError

# Exactly what `_write_temporary` makes: an output may lie in a folder that holds other people's hidden files.
_TEMPORARY = re.compile(r"^\..+\.[0-9a-f]{32}\.tmp$")
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


def _is_temporary(name: str) -> bool:
    return _TEMPORARY.match(name) is not None


def sizes(folder: str) -> dict[str, int]:
    """Return {file name: size in bytes} of the folder, without temporary files; empty for no such folder."""
    found = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                # A temporary file may vanish between listing and stat; fsspec's `ls` then reports the folder missing.
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    if stat.S_ISREG(status.st_mode) and not _is_temporary(entry.name):
                        found[entry.name] = status.st_size
    except FileNotFoundError:
        return {}
    return found


def sweep(folder: str, *, older_than_s: float) -> int:
    """Remove the temporary files of writers that died; return how many."""
    removed = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if _is_temporary(entry.name) and time.time() - entry.stat().st_mtime >= older_than_s:
                    os.unlink(entry.path)
                    removed += 1
    return removed


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(folder: str) -> None:
    """Make the folder and its parents, each durable before anything is put inside."""
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    _make_folder(parent)
    try:
        os.mkdir(folder)
    except FileExistsError:
        if not os.path.isdir(folder):  # not FileExistsError: to callers of `create` that means a lost race
            raise NotADirectoryError(f"{folder} is not a directory; give a path that is one, or a new one") from None
    _sync_folder(parent)


def _write_temporary(path: str, data: bytes) -> str:
    with _temporary(path) as file:
        file.write(data)
    return file.name


@contextlib.contextmanager
def _temporary(path: str) -> Iterator[IO[bytes]]:
    """A file beside `path`; on the disk when the block ends, and gone if it raises."""
    folder, name = os.path.split(path)
    _make_folder(folder)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        _forget(temporary)
        raise


def _forget(temporary: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)


def replace(path: str, data: bytes) -> None:
    """Show `data` under `path` in one step, replacing what was there."""
    with writing(path) as file:
        file.write(data)


@contextlib.contextmanager
def writing(path: str) -> Iterator[IO[bytes]]:
    """Show under `path`, in one step when the block ends, what was written in it; if it raises, nothing changes."""
    with _temporary(path) as file:
        yield file
    try:
        os.replace(file.name, path)
    except BaseException:
        _forget(file.name)
        raise
    _sync_folder(os.path.dirname(path))


def create(path: str, data: bytes) -> None:
    """Show `data` under `path` in one step, only if the name is free.

    Raises:
        FileExistsError: the name is taken.
        SpecError: the file system has no hard links, the only way to do both at once.
    """
    temporary = _write_temporary(path, data)
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno in _NO_HARD_LINKS:
            raise SpecError(f"{path}: this file system has no hard links; choose another place to write to") from error
        raise
    finally:
        _forget(temporary)
    _sync_folder(os.path.dirname(path))
