"""How many cores there are to share out."""

from __future__ import annotations

import os


def num_cores() -> int:
    """Cores that this process may run on (taskset, cpusets), of a machine that may have more.

    A quota of processor time, as `docker --cpus` sets it, is not seen.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
