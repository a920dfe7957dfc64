"""Whole-object storage under one root: local directories and object stores behind the same few verbs.

Owns atomicity (an object is either whole or absent) and the allow-list of URL schemes. Knows nothing of parts or runs.
Invariant: a name holds either nothing or all the bytes of one `put` or `create`, at every moment, for every reader.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import IO, TYPE_CHECKING, Any

from pipeline import local_objects
from pipeline.client_errors import speaking_python
from pipeline.errors import InfrastructureError, SpecError

if TYPE_CHECKING:
    import fsspec

# Anything else that fsspec knows (http, ssh, github, `simplecache::...`: 55 protocols) would let a path in a data file
# or a typo reach hosts and folders that nobody meant.
REMOTE_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "az")

# S3 answers 409 ConditionalRequestConflict when two conditional writes meet, and asks to try again.
_CREATE_ATTEMPTS = 8
_CONFLICT_CODES = frozenset({"ConditionalRequestConflict", "409"})
# s3fs makes a FileExistsError of a 412 only if the reply says which condition failed; AWS does, some others don't.
_TAKEN_CODES = frozenset({"PreconditionFailed", "412"})


def split_url(url: str) -> tuple[str, str]:
    """Return (scheme, path without scheme); the scheme of a plain path is `file`.

    Raises:
        SpecError: the scheme is not on the allow-list, or the URL chains protocols.
    """
    if "\0" in url:
        raise SpecError(f"path {url!r} contains a NUL byte")
    if "::" in url:
        raise SpecError(f"path {url!r} chains protocols with `::`, which is not allowed; give the plain URL")
    scheme, separator, rest = url.partition("://")
    if not separator:
        return "file", url
    if scheme == "file":
        return "file", rest
    if scheme in REMOTE_SCHEMES:
        return scheme, rest
    allowed = ", ".join(f"{name}://" for name in ("file", *REMOTE_SCHEMES))
    raise SpecError(f"path {url!r} uses {scheme}://, which is not allowed; use a local path or one of {allowed}")


def filesystem(url: str) -> fsspec.AbstractFileSystem:
    """Return the fsspec filesystem that serves `url`; endpoints and credentials come from the environment.

    Guarantees:
    - whatever a client library raises, what comes out is an OSError: PermissionError for want of credentials, and
      ConnectionError for a store that can't be reached.
    """
    scheme, _ = split_url(url)
    import fsspec  # 80 ms, which `validate` has no use for

    # skip_instance_cache: a cached listing from before a commit would hide committed parts.
    client = fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)
    return client if scheme == "file" else speaking_python(client)


@dataclass(frozen=True)
class Store:
    """Objects under one root; names are relative, with forward slashes. Safe to use from several threads.

    Guarantees:
    - after `put` returns the object is durable, and at no moment does a reader see part of it.
    - of several concurrent `create` calls for one name, with different data, exactly one succeeds.
    - a `create` whose reply was lost still succeeds: finding one's own bytes under the name counts as created.
    - `list` never leaves out an object that was there before the call and stays there, whatever happens beside it.
    """

    root: str
    """Directory or URL; `~` is the home directory, symbolic links are followed."""

    @cached_property
    def _fs(self) -> fsspec.AbstractFileSystem:
        return filesystem(self.root)

    @property
    def is_local(self) -> bool:
        """Whether objects are files of this machine."""
        return split_url(self.root)[0] == "file"

    def __getstate__(self) -> dict[str, str]:
        # The filesystem is rebuilt where it is used, and another process may stand in another folder.
        return {"root": self.path("x").removesuffix("/x") if self.is_local else self.root}

    def path(self, name: str) -> str:
        """Full path of an object, as the filesystem wants it.

        Raises:
            ValueError: the name would leave the root.
        """
        parts = name.split("/")
        if name.startswith("/") or "\0" in name or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"object name {name!r} would leave {self.root}")
        root = split_url(self.root)[1]
        if self.is_local:
            root = os.path.abspath(os.path.expanduser(root))
        return f"{root.rstrip('/')}/{name}"

    def put(self, name: str, data: bytes) -> None:
        """Make the object visible whole, replacing any before it. Doing it twice is doing it once."""
        if self.is_local:
            local_objects.replace(self.path(name), data)
        else:
            self._fs.pipe_file(self.path(name), data)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """Write an object piece by piece: visible whole when the block ends, as by `put`, and not at all if it raises.

        What goes to an object store lies in a local temporary file until then.
        """
        path = self.path(name)
        if self.is_local:
            with local_objects.writing(path) as file:
                yield file
            return
        with tempfile.NamedTemporaryFile() as file:
            yield file
            file.flush()
            self._fs.put_file(file.name, path)

    def create(self, name: str, data: bytes) -> None:
        """Make the object visible whole, only if the name is free. Put something unique in `data` to tell who won.

        Raises:
            FileExistsError: the name holds other bytes: somebody else created it first.
        """
        path = self.path(name)
        try:
            if self.is_local:
                local_objects.create(path, data)
            else:
                _create_remote(self._fs, path, data)
        except FileExistsError:
            if self._read_if_there(name) != data:
                raise

    def read(self, name: str) -> bytes:
        """Return the object's bytes.

        Raises:
            FileNotFoundError: there is no such object.
        """
        data: bytes = self._fs.cat_file(self.path(name))
        return data

    def read_range(self, name: str, *, start: int, end: int) -> bytes:
        """Return bytes [start, end) of the object in one request.

        Raises:
            FileNotFoundError: there is no such object.
        """
        data: bytes = self._fs.cat_file(self.path(name), start=start, end=end)
        return data

    def size(self, name: str) -> int:
        """Return the object's size in bytes.

        Raises:
            FileNotFoundError: there is no such object.
        """
        return int(self._fs.size(self.path(name)))

    def open(self, name: str) -> IO[bytes]:
        """Open the object for random reads."""
        handle: IO[bytes] = self._fs.open(self.path(name), "rb")
        return handle

    def list(self, folder: str) -> dict[str, int]:
        """Return {object name relative to the folder: size in bytes}, without subfolders; empty for no such folder.

        Raises:
            SpecError: the bucket itself does not exist.
        """
        path = self.path(folder)
        return local_objects.sizes(path) if self.is_local else _list_remote(self._fs, path)

    def delete(self, name: str) -> None:
        """Remove the object; it is no error when there is none."""
        with contextlib.suppress(FileNotFoundError):
            if self.is_local:
                os.unlink(self.path(name))
            else:
                self._fs.rm_file(self.path(name))

    def sweep(self, folder: str = "", *, older_than_s: float = 0.0) -> int:
        """Remove what writers that died left half-written in the folder, by default the root itself; return how many.

        Object stores have none.
        Call it when nobody else writes there: a live writer whose temporary file goes away fails, harmlessly.
        """
        path = self.path(folder) if folder else os.path.dirname(self.path("any"))
        return local_objects.sweep(path, older_than_s=older_than_s) if self.is_local else 0

    def _read_if_there(self, name: str) -> bytes | None:
        try:
            return self.read(name)
        except FileNotFoundError:
            return None


def _error_code(error: BaseException) -> str:
    """Return the code that the S3 service gave for this error, or an empty string."""
    response: dict[str, Any] = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _create_remote(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    for attempt in range(_CREATE_ATTEMPTS):
        try:
            fs.pipe_file(path, data, mode="create")
            return
        except FileExistsError:
            raise
        except OSError as error:
            code = _error_code(error)
            if code in _TAKEN_CODES:
                raise FileExistsError(path) from error
            if code not in _CONFLICT_CODES:
                raise
            time.sleep(0.05 * 2**attempt)
    raise InfrastructureError(
        f"creating {path} met another writer {_CREATE_ATTEMPTS} times in a row; rerun the same command"
    )


def _list_remote(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, int]:
    fs.invalidate_cache()
    try:
        found: list[dict[str, Any]] = fs.ls(path, detail=True)
    except FileNotFoundError as error:
        if _error_code(error) == "NoSuchBucket":
            bucket = path.partition("/")[0]
            raise SpecError(f"bucket {bucket!r} does not exist; create it, or correct the path {path}") from error
        return {}
    inside = path.rstrip("/") + "/"  # `ls` also answers for an object named like the folder
    return {
        name.removeprefix(inside): int(entry["size"] or 0)
        for entry in found
        if entry["type"] == "file" and (name := entry["name"].rstrip("/")).startswith(inside)
    }
