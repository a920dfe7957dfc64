"""Rows that are begun at a second replica while a slow one still works on them: which, where, and whose answer counts.

Invariant: there is a backup only while its row is in flight where it was begun first. However that ends, the backup
ends; if the backup is answered first, that ends the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.outcomes import Key


@dataclass(frozen=True, slots=True)
class Backup:
    """One row at its second replica."""

    key: Key
    original_id: str
    """As what it is with the replica that began it first."""
    giver: str
    """That replica."""
    request_id: str
    """As what it is with the second one."""
    receiver: str


class Backups:
    """All of them; a request in flight has one at most, ever."""

    def __init__(self) -> None:
        self._by_id: dict[str, Backup] = {}
        self._by_original: dict[str, Backup] = {}
        self._tried: set[str] = set()
        """Original ids in flight whose backup failed, which may be the row's doing."""

    def may_have(self, original_id: str) -> bool:
        """Whether this request in flight has had no backup yet."""
        return original_id not in self._by_original and original_id not in self._tried

    def add(self, backup: Backup) -> None:
        """It has been sent."""
        self._by_id[backup.request_id] = self._by_original[backup.original_id] = backup

    def ended(self, request_id: str, *, again: bool) -> Backup | None:
        """Its replica has answered this request, or is gone; returns the backup that it was, if it was one.

        `again` says that the row may have another one: nothing has been tried.
        """
        backup = self._by_id.pop(request_id, None)
        if backup is not None:
            del self._by_original[backup.original_id]
            if not again:
                self._tried.add(backup.original_id)
        return backup

    def original_ended(self, original_id: str) -> Backup | None:
        """The row is no longer where it was begun first; returns the backup that nobody waits for now."""
        self._tried.discard(original_id)
        backup = self._by_original.pop(original_id, None)
        if backup is not None:
            del self._by_id[backup.request_id]
        return backup

    def originals(self) -> tuple[str, ...]:
        """Of all backups."""
        return tuple(self._by_original)

    def clear(self) -> None:
        """Nobody waits for anything."""
        self._by_id.clear()
        self._by_original.clear()
        self._tried.clear()
