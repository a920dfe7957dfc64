"""`serve` and `key`: an endpoint on a warm fleet for as long as the command runs, and API keys for it.

The fleet is there before and stays after, unless the command started a Ray of its own for it: that one ends with it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.fleet_file import FleetFile
from cluster.fleet_plan import FleetDemand
from cluster.serve_app import check_reach, end_endpoint, endpoint_problem, start_endpoint
from cluster.serve_settings import ServeSettings
from cluster.warm import warm_fleets
from jobs.batch_runner import ProcessRunner
from jobs.fleet_file_source import load_fleet_file
from jobs.fleets import start_fleet_of
from jobs.interrupts import Interrupts
from jobs.ray_session import LOGICAL_CPUS, ray_session
from pipeline.errors import InfrastructureError, SpecError

LOOK_INTERVAL_S = 0.2
PROBLEM_INTERVAL_S = 2.0
# Before Ray Serve is imported: what it does is said here, in a line.
os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")

PATIENCE_S = 30.0
"""How long the endpoint may have a problem before the command gives up: Serve replaces an ingress meanwhile."""


@dataclass(frozen=True, slots=True)
class ServePlan:
    """What is to be served, where."""

    name: str
    """The warm fleet's."""
    file: FleetFile | None
    settings: ServeSettings
    address: str | None
    """Of the Ray cluster that has the fleet; None for a Ray of the command's own."""

    @property
    def model_name(self) -> str:
        """What requests call the model."""
        return self.settings.model_name or self.name

    @property
    def url(self) -> str:
        """Where it answers."""
        host = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
        return f"http://{host}:{self.settings.port}"

    @property
    def replica_cpus(self) -> float:
        """Logical CPUs that its replicas, and runs of batches, take of a Ray of the command's own."""
        if self.file is None or self.address is not None:
            return 0
        of_runs = LOGICAL_CPUS * self.settings.batches_at_once if self.settings.batches else 0
        return FleetDemand(self.file.fleet, self.file.model, "", None).replica_cpus + of_runs


def plan_endpoint(target: str | None, address: str | None, *, attach: str | None = None, **changes: Any) -> ServePlan:
    """Work out what `serve` is asked for.

    Args:
        target: a fleet's file, or a warm fleet's name.
        address: of the Ray cluster.
        attach: a warm fleet's name, instead of a target.
        **changes: settings from the command line, None for those not given.

    Raises:
        SpecError: the file or a setting is wrong, or anybody could reach the endpoint.
    """
    is_file = target is not None and (target.endswith((".yaml", ".yml")) or Path(target).is_file())
    file = load_fleet_file(str(target)) if is_file else None
    own = file is not None and address in (None, "local")
    if not own and address in (None, "local"):
        raise SpecError(
            f"{attach or target} is taken for a warm fleet's name, and no Ray cluster is named to find it on; "
            "add --ray ADDRESS or set RAY_ADDRESS, or give a fleet's YAML file, which can do without"
        )
    given = {name: value for name, value in changes.items() if value is not None}
    for name in ("keys", "batches"):
        if given.get(name):
            given[name] = str(Path(given[name]).absolute())
    settings = (file.serve if file is not None else ServeSettings()).model_dump() | given
    try:
        valid = ServeSettings.model_validate(settings)
    except ValidationError as error:
        detail = error.errors()[0]
        raise SpecError(f"--{str(detail['loc'][0]).replace('_', '-')} {detail['input']}: {detail['msg']}") from None
    check_reach(valid)
    name = file.name if file is not None else str(attach or target)
    return ServePlan(name, file, valid, None if own else address)


def serve(plan: ServePlan, *, say: Callable[[str], None]) -> None:
    """Serve until an interrupt, then let answers that have begun come to their end.

    Raises:
        SpecError: the fleet isn't there and there is no file to start it from, or Serve runs already.
        InfrastructureError: the endpoint doesn't start, or its fleet is lost.
    """
    interrupts = Interrupts()
    with contextlib.ExitStack() as quiet, interrupts.heard(), ray_session(plan.address, replica_cpus=plan.replica_cpus):
        interrupts.install()  # `ray.init` has put a SIGTERM handler of its own in place
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        _have_fleet(plan, say)
        began = time.monotonic()
        start_endpoint(plan.name, plan.settings, ProcessRunner())
        took_s = time.monotonic() - began
        say(f"{plan.url}/v1 answers for model {plan.model_name!r} (up in {took_s:.1f} s); Ctrl-C ends it")
        if plan.settings.batches is not None:
            say(f"files and batches are kept in {plan.settings.batches}; what isn't done goes on with the next start")
        try:
            with interrupts.watched():
                _until_interrupted(interrupts)
        finally:
            # Ray 2.60 prints each call that ends with Serve's controller, as a failure that it will repeat.
            quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
            say(f"ending; answers that have begun have {plan.settings.drain_timeout_s:g} s")
            say("ended, every answer whole" if end_endpoint() else "ended, answers cut off")


def _have_fleet(plan: ServePlan, say: Callable[[str], None]) -> None:
    if plan.file is None or plan.name in warm_fleets():
        return
    start_fleet_of(plan.file, say=say)
    if plan.address is not None:
        say(f"fleet {plan.name} stays when the endpoint ends; `tramontane down {plan.name}` ends it")


def _until_interrupted(interrupts: Interrupts) -> None:
    """Wait for an interrupt.

    Raises:
        InfrastructureError: the endpoint has been down for too long.
    """
    well_at = looked_at = time.monotonic()
    while not interrupts.count:
        time.sleep(LOOK_INTERVAL_S)
        now = time.monotonic()
        if now - looked_at < PROBLEM_INTERVAL_S:
            continue
        looked_at = now
        problem = endpoint_problem()
        if problem is None:
            well_at = now
        elif now - well_at > PATIENCE_S:
            raise InfrastructureError(f"the endpoint is down: {problem}")
