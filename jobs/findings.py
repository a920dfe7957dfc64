"""What `doctor` finds: one checked thing a finding, with its cure. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import RunError

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Guarantees:
    - a warning and a problem have a cure.
    """

    level: Level
    """`problem`: a run would fail, or strangers could take the cluster; `warning`: it would work, but badly."""
    check: str
    """What was looked at, in one word: `ray`, `versions`, `machine`, ..."""
    found: str
    cure: str | None = None
    """What to do about it; None when there is nothing to do."""

    def __post_init__(self) -> None:
        if self.level != "ok" and not self.cure:
            raise ValueError(f"a {self.level} needs a cure: {self.found}")


def fine(check: str, found: str) -> Finding:
    """A finding that needs nothing done."""
    return Finding("ok", check, found)


def refusal(check: str, error: RunError, *, level: Level = "problem") -> Finding:
    """An error as a finding: by convention the last clause of its message is the cure."""
    for separator in ("; ", ". "):
        found, _, cure = error.message.rpartition(separator)
        if found and cure:
            return Finding(level, check, found, cure)
    return Finding(level, check, error.message, "correct it and run doctor again")


def exit_code(findings: Iterable[Finding]) -> int:
    """0 when nothing would make a run fail, else 2."""
    return 2 if any(finding.level == "problem" for finding in findings) else 0


def finding_lines(findings: list[Finding]) -> list[str]:
    """The findings for people, in the order they were made, and their sum."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<8} {finding.check:<9} {finding.found}")
        if finding.cure:
            lines.append(f"{'':<18} -> {finding.cure}")
    problems, warnings = (sum(each.level == level for each in findings) for level in ("problem", "warning"))
    return [*lines, f"{_number(problems, 'problem')}, {_number(warnings, 'warning')}"]


def _number(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'s' * (count != 1)}"
