"""Whether a run may start, continue or must be refused, given what its output already holds. Pure: no I/O at all.

Knows fingerprints and part names, not where they are kept. Invariant: rows made under one fingerprint never come to lie
beside rows made under another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from pipeline.errors import SpecError

Resume = Literal["if_possible", "always", "never"]

_MAX_VALUE_CHARS = 120
_MAX_NAMES = 5
_INPUT_FILES = "input_files."


class Decision(Enum):
    """What to do with an output."""

    FRESH = "fresh"
    RESUME = "resume"
    REPLACE = "replace"
    """A different job began there, but committed nothing: forget it, then start."""


@dataclass(frozen=True, slots=True)
class Found:
    """What an output holds."""

    fingerprint: Mapping[str, str] | None
    """Fields of the run that began there; None if none did."""
    part_names: Collection[str]


@dataclass(frozen=True, slots=True)
class Change:
    """One field of a fingerprint that differs; `None` for a field that one side lacks."""

    field: str
    old: str | None
    new: str | None

    def __str__(self) -> str:
        return f"{self.field}: {_short(self.old)} -> {_short(self.new)}"


def changed_fields(old: Mapping[str, str], new: Mapping[str, str]) -> list[Change]:
    """Fields whose values differ, in name order; empty means that the runs give the same results."""
    names = sorted(old.keys() | new.keys())
    return [Change(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def _cure(changes: Sequence[Change]) -> str:
    if all(change.field.startswith(_INPUT_FILES) for change in changes):
        return (
            "An input file isn't the one that these results are of, and rows are known by their place in it. Put the "
            "old file back to continue, or choose an empty output.path; what new files have can be a job of its own"
        )
    return "Undo the change to continue it, or choose an empty output.path"


def fingerprint_digest(fields: Mapping[str, str]) -> str:
    """Return a short name for a fingerprint, as parts carry it; equal for equal fields in any order."""
    return hashlib.sha256(json.dumps(dict(fields), sort_keys=True).encode()).hexdigest()[:16]


def decide(found: Found, fingerprint: Mapping[str, str], *, resume: Resume, output: str) -> Decision:
    """Say whether a run with this fingerprint starts afresh in the output, continues what is there, or replaces it.

    Raises:
        SpecError: `resume` forbids what is needed, the fingerprint differs, or the data isn't from a run.
    """
    if found.fingerprint is None:
        _refuse_unknown_data(found.part_names, output)
        if resume == "always":
            raise SpecError(
                f"output.resume is `always`, but {output} holds no run; use if_possible or correct the path"
            )
        return Decision.FRESH
    if resume == "never":
        raise SpecError(
            f"output.resume is `never`, but {output} holds a run with {len(found.part_names)} committed parts; "
            "use if_possible to continue it, or choose an empty output.path"
        )
    changes = changed_fields(found.fingerprint, fingerprint)
    if changes and not found.part_names and resume == "if_possible":
        return Decision.REPLACE  # a typo that only the engine found would else cost a new output.path
    if changes:
        raise SpecError(
            f"output {output} holds results of a different job; changed since then:\n"
            + "".join(f"  {change}\n" for change in changes)
            + _cure(changes)
        )
    return Decision.RESUME


def refuse_foreign_parts(part_names: Collection[str], planned: Collection[str], *, output: str) -> None:
    """Refuse files in the data folder that no shard of the plan accounts for.

    Raises:
        SpecError: there are such files.
    """
    foreign = sorted(set(part_names) - set(planned))
    if foreign:
        raise SpecError(
            f"{output}/data holds {len(foreign)} files that do not belong to this run's plan: {_some(foreign)}; "
            "readers would take them for results. Move them away, or choose an empty output.path"
        )


def _refuse_unknown_data(part_names: Collection[str], output: str) -> None:
    if part_names:
        raise SpecError(
            f"{output}/data holds {len(part_names)} files, but no run is recorded there: {_some(sorted(part_names))}; "
            "move them away, or choose an empty output.path"
        )


def _short(value: str | None) -> str:
    if value is None:
        return "(none)"
    return value if len(value) <= _MAX_VALUE_CHARS else value[:_MAX_VALUE_CHARS] + "..."


def _some(names: list[str]) -> str:
    return ", ".join(names[:_MAX_NAMES]) + (", ..." if len(names) > _MAX_NAMES else "")
