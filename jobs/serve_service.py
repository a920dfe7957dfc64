"""What Serve imports and builds where a RayService says so: the warm fleet of a fleet file, and an endpoint on it."""

from __future__ import annotations

import json
import logging
from typing import Any

from cluster.fleet_file import FleetFile
from cluster.serve_app import application, check_reach
from cluster.warm import warm_fleets
from jobs.batch_runner import ProcessRunner
from jobs.fleets import start_fleet_of

logger = logging.getLogger(__name__)


def application_of(args: dict[str, Any]) -> Any:
    """The Serve application for `fleet_file`, whose fleet is started, and waited for, unless it is up.

    Raises:
        SpecError: the file is wrong, the cluster can't hold the fleet, or anybody could reach the endpoint.
        InfrastructureError: no replica came up.
    """
    file = FleetFile.model_validate_json(json.dumps(args["fleet_file"]), strict=True)
    check_reach(file.serve)
    if file.name not in warm_fleets():
        start_fleet_of(file, say=logger.info)
    return application(file.name, file.serve, ProcessRunner())
