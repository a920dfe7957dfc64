"""API keys: made here, kept as hashes in a file, checked in constant time, and read again when the file changes.

Keys are 256 random bits, so a plain SHA-256 can't be guessed back. Invariant: a key itself is nowhere but with whoever
was given it.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
from pathlib import Path

from pipeline.errors import SpecError

logger = logging.getLogger(__name__)

PREFIX = "tm-"
_LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64}) sha256:(?P<hash>[0-9a-f]{64})")
MAX_KEY_CHARS = 512


def hash_key(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def add_key(path: Path, name: str) -> str:
    """Make a key, add its hash to the file under the name, and return the key: it can't be had again.

    Raises:
        SpecError: the name is bad or taken, or the file can't be read or written.
    """
    line = f"{name} sha256:"
    key = PREFIX + secrets.token_urlsafe(32)
    line += hash_key(key)
    if _LINE.fullmatch(line) is None:
        raise SpecError(f"{name!r} can't name a key; use up to 64 letters, digits, dots, dashes and underscores")
    try:
        known = read_keys(path) if path.exists() else {}
        if name in known.values():
            raise SpecError(f"{path} has a key named {name!r}; remove its line to take it back, or choose another name")
        # A hand may have left the last line without its end: this one, written after it, would make both unreadable.
        before = "\n" if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n") else ""
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8") as file:
            file.write(f"{before}{line}\n")
    except OSError as error:
        raise SpecError(f"{path} can't be used: {error.strerror}; choose a file in a folder that exists") from None
    return key


def read_keys(path: Path) -> dict[str, str]:
    """Names by hash.

    Raises:
        SpecError: a line is no key's.
        OSError: the file can't be read.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise SpecError(f"{path}, line {number} is not `NAME sha256:HASH`; add keys with `tramontane key`")
        found[match["hash"]] = match["name"]
    return found


class KeyFile:
    """The keys of a file.

    Guarantees:
    - a change of the file holds from the next request on.
    - a file that can't be read, or has a broken line, lets nobody in.
    - how long a check takes depends on how many keys there are, not on which one is like the one given.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._names: dict[str, str] = {}

    def name_of(self, key: str) -> str | None:
        """Whose key it is; None for nobody's."""
        self._read_if_changed()
        given = hash_key(key[:MAX_KEY_CHARS])
        found = None
        for known, name in self._names.items():
            if hmac.compare_digest(known, given):
                found = name
        return found

    def _read_if_changed(self) -> None:
        try:
            at = self._path.stat()
            seen = (at.st_mtime_ns, at.st_size, at.st_ino)
            if seen != self._seen:
                self._names, self._seen = read_keys(self._path), seen
        except (OSError, SpecError) as error:
            if self._names or self._seen is None:
                logger.warning("nobody is let in: %s", error)
            self._names, self._seen = {}, (0, 0, 0)
