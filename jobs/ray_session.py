"""A Ray of the run's own on this machine, quiet, and gone when the run ends."""

from __future__ import annotations

import functools
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

LOGICAL_CPUS = 4
"""At least so many: reading, templating and writing overlap, and with fewer a stage may wait for a slot for ever."""
OBJECT_STORE_BYTES = 1 << 30

# Before Ray is imported. A flow that was given up, and still runs when Ray is shut down, would start another one.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")


@contextmanager
def local_ray() -> Iterator[None]:
    """Start Ray for the duration of the block.

    Always `address="local"`: a bare `ray.init()` joins any Ray that happens to run on the machine. A caller that has
    started Ray in this process keeps it.
    """
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    # Ray's C++ layer prints an error for every actor pool of Ray Data (ray#53727), straight to standard error.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    with _without_log_banner(), _daemons_in_their_own_group():
        try:
            ray.init(
                address="local",
                num_cpus=max(LOGICAL_CPUS, os.cpu_count() or 1),
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                object_store_memory=OBJECT_STORE_BYTES,
            )
        except SystemExit:  # what the SIGTERM handler that Ray puts in place makes of an interrupt
            raise KeyboardInterrupt from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _daemons_in_their_own_group() -> Iterator[None]:
    """Keep a SIGTERM to our whole process group, as `timeout` sends it, from Ray: a run must still finish its shards.

    Ray only keeps Ctrl-C from its daemons; and when the raylet is gone the driver exits on the spot, code 1.
    They end with us all the same (PR_SET_PDEATHSIG). Ray has no option for this.
    """
    from ray._private import services

    original = services.ConsolePopen
    services.ConsolePopen = functools.partial(original, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = original


@contextmanager
def _without_log_banner() -> Iterator[None]:
    """Hold back what Ray's C++ layer writes to standard error meanwhile; show all but its word on its own log level."""
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            held.seek(0)
            os.write(2, b"".join(line for line in held if b"Set ray log level from" not in line))
