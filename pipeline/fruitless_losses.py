"""Whether replicas die of the work itself: so many in a row that restarting them leads nowhere. Pure."""

from __future__ import annotations

import math

DOUBT_AFTER = 5
"""Such losses in a row after which it has to be found out whether it is the rows or the engine."""
MAX_FRUITLESS_LOSSES = 10
"""Replicas lost in a row without a single row finished in between: then it isn't the rows, and restarts would go on for
as many rows as there are."""
MAX_WITHOUT_A_ROW = 50
"""The same, where an engine still does a row again that was done before: so many killers may lie together."""
SAME_MOMENT_S = 0.5
"""Losses within it are one event, such as a lost node."""


class FruitlessLosses:
    """Losses since a row last finished."""

    def __init__(self) -> None:
        self._count = 0
        """Since a row was finished, or done again to see that engines can."""
        self._without_a_row = 0
        self._last_at = -math.inf

    def row_finished(self) -> None:
        """Something gets done: begin again."""
        self._count = self._without_a_row = 0

    def proven(self) -> None:
        """An engine has done again what was done before: those before it died of their rows."""
        self._count = 0

    def add(self, now: float) -> None:
        """Count a loss that looks like the work's doing."""
        if now - self._last_at > SAME_MOMENT_S:
            self._count += 1
            self._without_a_row += 1
            self._last_at = now

    @property
    def in_doubt(self) -> bool:
        """Whether a row that was done before should be done again, before more rows are held to be killers.

        A dozen killers that lie together die one by one, and nothing else is done meanwhile.
        """
        return self._count >= DOUBT_AFTER

    def verdict(self, last_message: str) -> str | None:
        """Why to end the run; None while there is hope."""
        if self._count < MAX_FRUITLESS_LOSSES and self._without_a_row < MAX_WITHOUT_A_ROW:
            return None
        return f"{self._without_a_row} replicas in a row died without finishing a row; last: {last_message}"
