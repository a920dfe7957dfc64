"""A Ray of the run's own on this machine, quiet, and gone when the run ends."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

LOGICAL_CPUS = 4
"""At least so many: reading, templating and writing overlap, and with fewer a stage may wait for a slot for ever."""
OBJECT_STORE_BYTES = 1 << 30


@contextmanager
def local_ray() -> Iterator[None]:
    """Start Ray for the duration of the block.

    Always `address="local"`: a bare `ray.init()` joins any Ray that happens to run on the machine.
    """
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    ray.init(
        address="local",
        num_cpus=max(LOGICAL_CPUS, os.cpu_count() or 1),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=OBJECT_STORE_BYTES,
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
