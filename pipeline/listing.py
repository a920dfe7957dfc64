"""Path patterns to files: a file, directory, glob or a list of them, local or on an object store.

Owns which files a pattern means, their order, and what tells one version of a file from the next. Knows nothing of
what is inside a file. Invariant: the same patterns over the same files give the same list, each file once.
"""

from __future__ import annotations

import difflib
import functools
import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import IO, Any

import fsspec

from pipeline.errors import InfrastructureError, RunError, SpecError
from pipeline.storage import filesystem, split_url

# Object stores answer a readahead of 50 MB by default; 4 MiB keeps memory flat and costs one request per 4 MiB.
_REMOTE_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class FoundFile:
    """One file that a pattern matched."""

    path: str
    """Absolute path or full URL: the identity of the file."""
    size: int
    """Bytes."""
    version: str
    """Etag, generation or modification time: changes when the content does."""


def find_files(paths: str | Sequence[str]) -> list[FoundFile]:
    """Return the files that the patterns match, in the patterns' order, sorted by path within a pattern.

    Directories are taken with everything below them, links to directories followed, each directory once. Names that
    start with `.` or `_` are skipped, unless given explicitly: they are markers, checksums and temporary files
    (`_SUCCESS`, `.part.crc`, `_run/`).

    Guarantees:
    - a file that several patterns match is listed once, where it came first.

    Raises:
        SpecError: a pattern matches nothing or must not be read; all such patterns are named at once.
        InfrastructureError: an object store could not be reached.
    """
    patterns = [paths] if isinstance(paths, str) else list(paths)
    if not patterns:
        raise SpecError("input.path is an empty list; give at least one file, directory or glob")
    found: dict[str, FoundFile] = {}
    problems: list[str] = []
    for pattern in patterns:
        try:
            for file in _match(pattern):
                found.setdefault(file.path, file)
        except SpecError as error:
            problems.append(error.message)
    if problems:
        raise SpecError("\n".join(problems))
    return list(found.values())


def stat_file(path: str) -> FoundFile:
    """Return size and version of one file as they are now.

    Raises:
        FileNotFoundError: it is gone.
    """
    scheme, location = split_url(path)
    if scheme == "file":
        status = os.stat(location)
        return FoundFile(path, status.st_size, f"mtime_ns:{status.st_mtime_ns}")
    return _from_listing(scheme, _filesystem(scheme).info(location))


def open_file(path: str, *, streaming: bool) -> IO[bytes]:
    """Open a file for reading: front to back when `streaming`, else for the few large ranges that Parquet asks for."""
    scheme, location = split_url(path)
    if scheme == "file":
        return open(location, "rb")  # the caller closes it
    if streaming:
        handle = _filesystem(scheme).open(location, "rb", block_size=_REMOTE_BLOCK_BYTES, cache_type="readahead")
    else:
        handle = _filesystem(scheme).open(location, "rb", cache_type="none")
    opened: IO[bytes] = handle
    return opened


def _filesystem(scheme: str) -> fsspec.AbstractFileSystem:
    return _filesystem_of_process(scheme, os.getpid())


@functools.lru_cache(maxsize=8)
def _filesystem_of_process(scheme: str, _pid: int) -> fsspec.AbstractFileSystem:
    """One client per process: making one costs about 50 ms, and an asynchronous client doesn't survive a fork."""
    return filesystem(f"{scheme}://")


def _match(pattern: str) -> list[FoundFile]:
    scheme, location = split_url(pattern)
    if not location:
        raise SpecError(f"input path {pattern!r} is empty; give a file, directory or glob")
    try:
        found = _match_local(location) if scheme == "file" else _match_remote(scheme, location)
    except RunError:
        raise
    except FileNotFoundError:
        found = []  # no such bucket
    except PermissionError as error:
        raise SpecError(
            f"input path {pattern!r} may not be read ({error}); check credentials and permissions"
        ) from error
    except Exception as error:  # every client library has exceptions of its own
        raise InfrastructureError(f"input path {pattern!r} could not be listed: {error!r}") from error
    if not found:
        cure = _alike(location) if scheme == "file" else None
        cure = cure or "check the spelling (names starting with . or _ are skipped)"
        raise SpecError(f"input path {pattern!r} matches no file; {cure}")
    return sorted(found, key=lambda file: file.path)


def _alike(location: str) -> str | None:
    """A name beside the one that isn't there which may have been meant."""
    folder, name = os.path.split(os.path.abspath(os.path.expanduser(location)))
    if glob.has_magic(location) or not os.path.isdir(folder):
        return None
    close = difflib.get_close_matches(name, os.listdir(folder), n=1)
    return f"did you mean {close[0]!r}, which is there?" if close else None


def _match_local(location: str) -> list[FoundFile]:
    absolute = os.path.abspath(os.path.expanduser(location))
    roots = [absolute]
    if not os.path.exists(absolute):  # a name that exists is meant literally, whatever brackets it holds
        hits = glob.glob(absolute, recursive=True)
        roots = [hit for hit in hits if not _is_hidden_below(absolute, hit)]
    seen: set[str] = set()
    return [_stat_listed(path) for root in sorted(roots, key=_links_last) for path in _walk_local(root, seen)]


def _stat_listed(path: str) -> FoundFile:
    """`stat_file` of a file that a listing has named."""
    try:
        return stat_file(path)
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise SpecError(
                f"input file {path!r} is a link to {os.readlink(path)!r}, which doesn't exist; remove the link, or "
                "restore what it stands for"
            ) from error
        raise InfrastructureError(
            f"input file {path!r} vanished while it was listed; rerun the same command"
        ) from error


def _links_last(path: str) -> tuple[bool, str]:
    """By name, links after what they may stand for: a folder is known by its own name wherever that is met."""
    return os.path.islink(path), path


def _walk_local(root: str, seen: set[str]) -> Iterable[str]:
    """Files below the root, or the root; `seen` has the directories that were walked before, and is added to."""
    if not os.path.isdir(root):
        if not os.path.isfile(root):
            raise SpecError(f"input path {root!r} is not a regular file; write the rows to a file first")
        return [root]
    files = []
    if os.path.realpath(root) in seen:
        return []
    seen.add(os.path.realpath(root))
    for folder, subfolders, names in os.walk(root, onerror=_raise, followlinks=True):
        visible = [os.path.join(folder, name) for name in subfolders if not _is_hidden(name)]
        subfolders[:] = [os.path.basename(path) for path in sorted(visible, key=_links_last)]
        for name in tuple(subfolders):  # a link to a folder above would be walked for ever, one beside it twice
            real = os.path.realpath(os.path.join(folder, name))
            if real in seen:
                subfolders.remove(name)
            seen.add(real)
        files += [os.path.join(folder, name) for name in names if not _is_hidden(name)]
    return files


def _raise(error: OSError) -> None:
    raise error


def _match_remote(scheme: str, location: str) -> list[FoundFile]:
    client = _filesystem(scheme)
    location = location.rstrip("/")
    if not any(character in location for character in "*?["):
        return _remote_tree(client, scheme, location)
    found: list[FoundFile] = []
    for name, entry in client.glob(location, detail=True).items():
        if _is_hidden_below(location, name):
            continue
        is_file = entry["type"] == "file"
        found += [_from_listing(scheme, entry)] if is_file else _remote_tree(client, scheme, name)
    return found


def _remote_tree(client: fsspec.AbstractFileSystem, scheme: str, root: str) -> list[FoundFile]:
    """Return the object itself, or every object below it. One listing answers both."""
    listing: dict[str, dict[str, Any]] = client.find(root, detail=True)
    entries = [entry for entry in listing.values() if entry["type"] == "file" and not entry["name"].endswith("/")]
    return [_from_listing(scheme, entry) for entry in entries if not _is_hidden_below(root, entry["name"])]


def _from_listing(scheme: str, entry: dict[str, Any]) -> FoundFile:
    for key in ("ETag", "etag", "generation", "LastModified", "last_modified", "mtime"):
        if entry.get(key):
            value = str(entry[key]).strip('"')
            return FoundFile(f"{scheme}://{entry['name']}", int(entry["size"]), f"{key.lower()}:{value}")
    raise InfrastructureError(
        f"{scheme}://{entry['name']} has neither etag nor modification time: changes can't be seen"
    )


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _is_hidden_below(pattern: str, path: str) -> bool:
    """Return whether a part of `path` is hidden that the pattern did not spell out.

    Parts are compared from the front; from the first `**` on their positions differ, so all the rest are tested.
    """
    spelled = pattern.split("/")
    for position, part in enumerate(path.split("/")):
        known = position < len(spelled) and "**" not in spelled[: position + 1]
        explicit = known and _is_hidden(spelled[position])
        if _is_hidden(part) and not explicit:
            return True
    return False
