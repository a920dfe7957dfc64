"""Days in paths: `date=2026-11-20` as Hive, Spark and DuckDB write it, and which of them are over. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import date
from typing import Protocol, TypeVar

from pipeline.errors import SpecError

_SHOWN = 5


class HasPath(Protocol):
    """What is needed of a file."""

    @property
    def path(self) -> str:
        """Absolute path or full URL."""
        ...


FileT = TypeVar("FileT", bound=HasPath)


def by_day(files: Iterable[FileT], key: str) -> dict[date, list[FileT]]:
    """Files by the day in their paths, in the order given.

    Raises:
        SpecError: a path has no such key, or no day there; some of them are named.
    """
    days: dict[date, list[FileT]] = {}
    wrong: list[str] = []
    for file in files:
        day = _day(file.path, key)
        if day is None:
            wrong.append(file.path)
        else:
            days.setdefault(day, []).append(file)
    if wrong:
        more = f" and {len(wrong) - _SHOWN:,} more" if len(wrong) > _SHOWN else ""
        raise SpecError(
            f"input.partition is {key!r}, but no folder is {key}=YYYY-MM-DD in {', '.join(wrong[:_SHOWN])}{more}; "
            "correct input.partition, or have input.path name the partitions only"
        )
    return days


def _day(path: str, key: str) -> date | None:
    found = re.search(rf"/{re.escape(key)}=([^/]+)/", path)
    if found is None:
        return None
    try:
        return date.fromisoformat(found[1])
    except ValueError:
        return None
