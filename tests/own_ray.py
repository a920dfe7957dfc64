"""A Ray that tests start for themselves: in a folder of its own, and gone with it; none is ever joined or stopped."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator

from jobs.lean_ray import without_data_actors, without_idle_daemons

NUM_CPUS = 8  # logical: replicas take one each, four real ones at most; the rest is for reading, templating, writing


@contextlib.contextmanager
def own_ray() -> Iterator[None]:
    """Ray in this process for the duration of the block."""
    import ray

    # A short path of our own: Ray's sockets must stay under 108 bytes, and other Rays' files are none of our business.
    folder = tempfile.mkdtemp(prefix="tm-ray-", dir="/tmp")
    with without_idle_daemons():
        ray.init(
            address="local",
            num_cpus=NUM_CPUS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=256 << 20,
            _temp_dir=folder,
        )
    with without_data_actors():
        try:
            yield
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
