"""A run beside people: its own process comes last, after the engines and the endpoint that they wait for."""

from __future__ import annotations

import os

LAST = 19
"""Ray 2.60 starts workers, engines among them, at niceness 15; a driver at 0 would come before them all, and its
imports alone take seconds of a core."""


def stand_back() -> None:
    """Let every other process have the processor first, for good: niceness can't be lowered again."""
    os.nice(LAST)
