"""A run beside people: its own process comes last, after the engines and the endpoint that they wait for."""

from __future__ import annotations

import os

LAST = 17
"""Ray 2.60 starts workers, engines among them, at niceness 15; a driver at 0 would come before them all, and its
imports alone take seconds of a core. Not 19: a busy machine would then keep it from renewing its lease in time."""


def stand_back() -> None:
    """Let engines have the processor first, for good: niceness can't be lowered again.

    Before threads are started: those that run keep theirs.
    """
    os.nice(max(0, LAST - os.nice(0)))
