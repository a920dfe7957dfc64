"""The Ray that a run works in: one of its own on this machine, gone when the run ends, or a cluster that is named.

Never a cluster that just happens to be there: a bare `ray.init()` joins any Ray on the machine.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import math
import os
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jobs.lean_ray import without_data_actors, without_idle_daemons
from pipeline.cores import num_cores
from pipeline.errors import InfrastructureError, SpecError

LOGICAL_CPUS = 4
"""At least so many beside the replicas': reading, templating and writing overlap, and with fewer a stage may wait for a
slot for ever."""
OBJECT_STORE_BYTES = 1 << 30
STARTUP_TIMED_OUT = "timed out during startup"
"""What Ray 2.60 says, as a bare Exception."""

USUAL_THRESHOLDS = (700, 10, 10)
"""CPython's, of its garbage collector."""

# Before Ray is imported. A flow that was given up, and still runs when Ray is shut down, would start another one.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")


@contextmanager
def ray_session(address: str | None = None, *, replica_cpus: float = 0.0) -> Iterator[None]:
    """Be connected to Ray for the duration of the block. A caller that is connected already stays so.

    Args:
        address: a cluster's, or `auto` for the one that this machine belongs to; None or `local`: start one.
        replica_cpus: logical CPUs that replicas take, of a Ray that is started here.

    Raises:
        SpecError: there is no cluster at that address, or its version or token differs.
        InfrastructureError: a Ray of its own doesn't come up.
    """
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    # Ray's C++ layer prints an error for every actor pool of Ray Data (ray#53727), straight to standard error.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    is_own = address in (None, "local")
    with _without_log_banner(), _daemons_in_their_own_group():
        try:
            if is_own:
                _start(replica_cpus)
            else:
                _join(str(address))
        except Exception as error:
            if STARTUP_TIMED_OUT not in str(error):
                raise
            message = (
                "Ray didn't start on this machine in time, which is too busy or short of memory; rerun when it isn't"
            )
            raise InfrastructureError(message) from error
        except SystemExit:  # what the SIGTERM handler that Ray puts in place makes of an interrupt
            raise KeyboardInterrupt from None
    _keep_token_private()
    # A flow's error is raised to the run, which says it in a line; Ray Data would say it first, at length.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    with without_data_actors() if is_own else contextlib.nullcontext():
        gc.set_threshold(*USUAL_THRESHOLDS)  # `jobs.main` has raised them for the imports, which are done
        try:
            yield
        finally:
            ray.shutdown()


QUIET = {"RAY_task_events_report_interval_ms": "0", "RAY_enable_metrics_collection": "0"}
"""Leaves out what Ray's processes tell each other for a dashboard that isn't there: a run's processes but the engine's
then take 0.12 of a core for 0.13, of two that the engine wants both of."""


def _start(replica_cpus: float) -> None:
    import ray

    with without_idle_daemons(), _inherited(QUIET):
        ray.init(
            address="local",
            num_cpus=max(LOGICAL_CPUS, num_cores()) + math.ceil(replica_cpus),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=OBJECT_STORE_BYTES,
        )


@contextmanager
def _inherited(variables: Mapping[str, str]) -> Iterator[None]:
    """Have processes that are started in the block find these, unless they are set; afterwards all is as it was."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _join(address: str) -> None:
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise SpecError(
            f"no Ray cluster at {address!r}: {lines[0][:300] if lines else type(error).__name__}; check the address, "
            "and that this machine has the cluster's Ray version and token (RAY_AUTH_MODE, RAY_AUTH_TOKEN)"
        ) from error


def _keep_token_private() -> None:
    """Take the token file that Ray makes (2.60: readable for everybody) from all but its owner."""
    token = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):
        if stat.S_IMODE(token.stat().st_mode) & 0o077:
            token.chmod(0o600)


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
