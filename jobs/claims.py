"""What one run of an incremental job claimed, and what it gave back: plain data, as it lies in the job's `_chain/`.

Knows JSON, and nothing of where it is kept. Invariant: a claim says everything that finishing its run needs.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

VERSION = 1


@dataclass(frozen=True, slots=True)
class ClaimedFile:
    """An input file as a claim saw it."""

    path: str
    size: int
    version: str
    """Etag, generation or modification time."""
    rows: int
    """Claimed of it; 0 when all of its rows were known."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """Something that a claim needs and that is too large to be in it."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Claim:
    """What one run has to do, decided before it began."""

    run: int
    """1, 2, 3, ..."""
    folder: str
    """Of the run, below the job's output."""
    claimed_at: str
    """UTC."""
    previous: str | None
    """SHA-256 of the claim before; None for the first."""
    settings: dict[str, str]
    """What results depend on besides rows, see `jobs.fingerprint`."""
    known_by: dict[str, Any]
    """What tells rows apart; the same in all claims of a chain."""
    files: tuple[ClaimedFile, ...]
    """First those of the plan, in its order; then those without a new row."""
    rows: int
    changed_rows: int
    """Of these, rows that an earlier run has in another state."""
    plan: StoredObject
    keys: StoredObject | None
    """Keys of the claimed rows; None where whole files are claimed."""
    accepted_changes: tuple[str, ...] = ()
    """How `settings` differ from those of the run before, on purpose."""
    version: int = VERSION

    def to_bytes(self) -> bytes:
        """JSON, as stored."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Claim:
        """Inverse of `to_bytes`."""
        fields = json.loads(data)
        if fields["version"] != VERSION:
            raise ValueError(f"claim has version {fields['version']!r}, but this program writes version {VERSION}")
        keys = fields["keys"]
        return Claim(
            **{
                **fields,
                "files": tuple(ClaimedFile(**file) for file in fields["files"]),
                "plan": StoredObject(**fields["plan"]),
                "keys": None if keys is None else StoredObject(**keys),
                "accepted_changes": tuple(fields["accepted_changes"]),
            }
        )


@dataclass(frozen=True, slots=True)
class Release:
    """What a run leaves to later ones: everything that it had not committed."""

    run: int
    reason: str
    released_at: str
    kept_rows: int
    kept_parts: tuple[str, ...]
    whole_files: tuple[int, ...]
    """Of the claim's files those that are done to the last row, by their positions."""

    def to_bytes(self) -> bytes:
        """JSON, as stored."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Release:
        """Inverse of `to_bytes`."""
        fields = json.loads(data)
        lists = {name: tuple(fields[name]) for name in ("kept_parts", "whole_files")}
        return Release(**{**fields, **lists})
