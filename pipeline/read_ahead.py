"""Reading a model's weights into the page cache before the engine asks for them, once for all replicas of a node.

vLLM maps safetensors files, so replicas of one node share what the kernel has read of them; but it faults pages in one
by one as it copies them, and imports for seconds before. Asked at once, the kernel reads meanwhile, in order.
"""

from __future__ import annotations

import os
from pathlib import Path

MEMORY_SHARE = 0.5
"""Of the memory that is available: weights that fill more of it would push themselves out again."""


def read_ahead(folder: str) -> int:
    """Have the kernel read the weights, without waiting; returns the bytes asked for, 0 where they wouldn't stay."""
    files = [path for path in Path(folder).glob("*.safetensors") if path.is_file()]
    num_bytes = sum(path.stat().st_size for path in files)
    if num_bytes > MEMORY_SHARE * _available_bytes():
        return 0
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
    return num_bytes


def _available_bytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:"))
