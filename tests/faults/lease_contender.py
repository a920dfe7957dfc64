"""What child processes do in the lease tests: race for an output, or hold one until told."""

from __future__ import annotations

import os
from typing import Any

from pipeline.errors import InfrastructureError, SpecError
from pipeline.lease import acquire_lease
from pipeline.storage import Store


def race(environment: dict[str, str], root: str, number: int, start: Any, finish: Any, results: Any) -> None:
    """Put (number, epoch or the refusal) and keep what was won until all have tried."""
    os.environ.update(environment)
    store = Store(root)
    store.list("_run")  # connect before the start
    start.wait()
    try:
        lease = acquire_lease(store, run_id=f"run-{number}", ttl_s=6)
        results.put((number, lease.epoch))
    except SpecError as error:
        results.put((number, str(error)))
    finish.wait()


def hold(environment: dict[str, str], root: str, ttl_s: float, pipe: Any) -> None:
    """Own the output; answer each message with what `check` says."""
    os.environ.update(environment)
    lease = acquire_lease(Store(root), run_id="holder", ttl_s=ttl_s)
    pipe.send("owner")
    while pipe.recv() == "check":
        try:
            lease.check()
            pipe.send("owner")
        except InfrastructureError as error:
            pipe.send(str(error))
