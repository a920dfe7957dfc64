"""Inside a CronJob's pod: makes the tick's RayJob, waits for its end, tries again where that helps, and ends alike.

    python -m cluster.scheduled_rayjob RAYJOB.yaml

The pod has to live as long as the RayJob: `concurrencyPolicy: Forbid` looks at nothing else.
Guarantees:
- one RayJob at a time per tick: its name is that of the tick's Job, so a pod that starts again finds the first one's.
- the RayJob belongs to the tick's Job, and goes with it.
- the exit code is the run's; 3 where it isn't known, or Kubernetes could not be asked.
- another RayJob is made only after an end that says that it is safe and may help: 3, or a driver that was interrupted.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

TICK = "{tick}"
"""Stands in the entrypoint for the tick's time."""
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_CREATED, _EXISTS = 201, 409
_MAX_FAILURES = 20
_ENDS = ("Complete", "Failed")
_NUM_ATTEMPTS = 3
_EXIT_CODE = re.compile(r"exit code (\d+)")
"""In what Ray says of a job whose entrypoint failed, and KubeRay passes on."""


@dataclass(frozen=True, slots=True)
class Api:
    """The Kubernetes API, as this pod may use it."""

    url: str
    account: Path = _ACCOUNT
    poll_s: float = 20.0

    def call(self, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """GET, or POST of `body`; status and answer.

        Raises:
            OSError: no answer.
        """
        data = json.dumps(body).encode() if body is not None else None
        token = (self.account / "token").read_text()  # read each time: Kubernetes replaces it every hour
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", data, headers)  # noqa: S310
        certificate = self.account / "ca.crt"
        context = ssl.create_default_context(cafile=str(certificate)) if certificate.exists() else None
        try:
            with urllib.request.urlopen(request, timeout=30, context=context) as answer:  # noqa: S310
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, {"message": error.read().decode(errors="replace")}


def tick_of(job_name: str) -> str:
    """When the tick was due, UTC: a CronJob's Jobs end in it, as minutes since 1970. Any other name is its own tick."""
    found = re.fullmatch(r".*-(\d{8,9})", job_name)
    if found is None:
        return job_name
    return datetime.fromtimestamp(int(found[1]) * 60, UTC).strftime("%Y-%m-%dT%H%MZ")


def rayjob_of_tick(template: Mapping[str, Any], *, job_name: str, job_uid: str) -> dict[str, Any]:
    """The RayJob to make: the template under the Job's name, owned by it, with the tick filled in."""
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job_name, "uid": job_uid}
    entrypoint = template["spec"]["entrypoint"].replace(TICK, tick_of(job_name))
    return {
        **template,
        "metadata": {**template["metadata"], "name": job_name, "ownerReferences": [owner]},
        "spec": {**template["spec"], "entrypoint": entrypoint},
    }


@dataclass(frozen=True, slots=True)
class End:
    """How a RayJob ended."""

    exit_code: int
    is_worth_another: bool = False
    """Whether the same again may end otherwise."""


def run_tick(api: Api, rayjob: Mapping[str, Any]) -> int:
    """Make the RayJob unless it exists, and wait for its end; another one where that may help. The exit code."""
    name = rayjob["metadata"]["name"]
    for attempt in range(1, _NUM_ATTEMPTS + 1):
        own_name = name if attempt == 1 else f"{name}-{attempt}"
        end = _run_rayjob(api, {**rayjob, "metadata": {**rayjob["metadata"], "name": own_name}})
        if not end.is_worth_another:
            break
    return end.exit_code


def _run_rayjob(api: Api, rayjob: Mapping[str, Any]) -> End:
    name, namespace = rayjob["metadata"]["name"], rayjob["metadata"]["namespace"]
    path = f"/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
    is_made, failures = False, 0
    while True:
        try:
            status, answer = api.call(f"{path}/{name}") if is_made else api.call(path, rayjob)
        except OSError as error:
            status, answer = 0, {"message": str(error)}
        if not is_made and status in (_CREATED, _EXISTS):
            is_made, failures = True, 0
            _say(f"RayJob {name} {'made' if status == _CREATED else 'was there already'}; waiting for its end")
            continue
        if is_made and status == 200:
            failures = 0
            if (end := _end_of(answer)) is not None:
                return end
        else:
            failures += 1
            _say(f"Kubernetes answered {status}: {answer.get('message', '')[:300]}")
            if failures > _MAX_FAILURES or (not is_made and 400 <= status < 500):
                return End(3)
        time.sleep(api.poll_s)


def _end_of(rayjob: Mapping[str, Any]) -> End | None:
    status = rayjob.get("status") or {}
    if status.get("jobDeploymentStatus") not in _ENDS:
        return None
    state, message = status.get("jobStatus"), status.get("message", "")
    _say(f"RayJob ended: {state or status['jobDeploymentStatus']} {message[:2000]}".rstrip())
    if state == "SUCCEEDED":
        return End(0)
    if state == "STOPPED":
        return End(130)
    found = _EXIT_CODE.search(message)
    code = int(found[1]) if found else 3
    return End(code) if code in (1, 2) else End(130 if code == 130 else 3, is_worth_another=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def main() -> int:
    """Read the template and this pod's fields from the environment; run the tick."""
    template = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    host = f"[{host}]" if ":" in host else host
    rayjob = rayjob_of_tick(template, job_name=os.environ["JOB_NAME"], job_uid=os.environ["JOB_UID"])
    return run_tick(Api(f"https://{host}:{port}"), rayjob)


if __name__ == "__main__":
    sys.exit(main())
