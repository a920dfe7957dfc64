"""The pod of a tick against a real HTTP server that plays Kubernetes: one RayJob per tick, waited for to its end."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.scheduled_rayjob import Api, rayjob_of_tick, run_tick, tick_of

TEMPLATE = {
    "metadata": {"name": "nightly", "namespace": "ns"},
    "spec": {"entrypoint": "tramontane run job.yaml --set output.path='s3://b/{tick}'"},
}


@dataclass
class Kubernetes:
    """Keeps RayJobs; each GET takes the next status, the last one for ever. A number is answered as an HTTP error."""

    statuses: list[Any]
    jobs: dict[str, Any] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def kubernetes() -> Iterator[Kubernetes]:
    state = Kubernetes([])

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *words: Any) -> None:
            pass

        def answer(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self) -> None:
            state.requests.append(("POST", self.path, self.headers["Authorization"]))
            job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = job["metadata"]["name"]
            self.answer(409 if name in state.jobs else 201, job)
            state.jobs.setdefault(name, job)

        def do_GET(self) -> None:
            state.requests.append(("GET", self.path, self.headers["Authorization"]))
            status = state.statuses.pop(0) if len(state.statuses) > 1 else state.statuses[0]
            self.answer(status, {}) if isinstance(status, int) else self.answer(200, {"status": status})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def api(kubernetes: Kubernetes, tmp_path: Path) -> Api:
    (tmp_path / "token").write_text("pod-token")
    return Api(kubernetes.url, account=tmp_path, poll_s=0.01)


RAYJOB = rayjob_of_tick(TEMPLATE, job_name="nightly-29400000", job_uid="u-1")
DONE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
NO_NODES = {"jobDeploymentStatus": "Failed", "message": "no nodes"}


def failed(code: int) -> dict[str, str]:
    """As Ray says it, with the end of the log, which may name other codes."""
    message = (
        f"Job entrypoint command failed with exit code {code}, last available logs:\n the other one had exit code 7"
    )
    return {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": message}


def test_rayjob_has_the_name_the_owner_and_the_time_of_its_tick() -> None:
    assert RAYJOB["metadata"]["name"] == "nightly-29400000"
    assert RAYJOB["metadata"]["ownerReferences"][0]["uid"] == "u-1"
    assert RAYJOB["spec"]["entrypoint"].endswith("output.path='s3://b/2025-11-24T1600Z'")
    assert TEMPLATE["metadata"]["name"] == "nightly"


def test_tick_of_a_job_made_by_hand_is_its_name() -> None:
    assert tick_of("nightly-now") == "nightly-now"


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (DONE, 0),
        (failed(1), 1),
        (failed(2), 2),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, 130),
    ],
)
def test_pod_waits_for_the_end_and_ends_alike(kubernetes: Kubernetes, api: Api, end: Any, code: int) -> None:
    kubernetes.statuses = [{}, {"jobDeploymentStatus": "Initializing"}, {"jobDeploymentStatus": "Running"}, end]
    assert run_tick(api, RAYJOB) == code
    assert [method for method, _, _ in kubernetes.requests] == ["POST", "GET", "GET", "GET", "GET"]
    assert {token for _, _, token in kubernetes.requests} == {"Bearer pod-token"}
    assert kubernetes.requests[-1][1] == "/apis/ray.io/v1/namespaces/ns/rayjobs/nightly-29400000"


def test_pod_started_again_waits_for_the_same_rayjob(kubernetes: Kubernetes, api: Api) -> None:
    kubernetes.statuses = [DONE]
    assert run_tick(api, RAYJOB) == 0
    assert run_tick(api, RAYJOB) == 0
    assert list(kubernetes.jobs) == ["nightly-29400000"]


@pytest.mark.parametrize(
    ("ends", "code", "rayjobs"),
    [
        ([failed(3), DONE], 0, 2),
        ([failed(130), failed(3), DONE], 0, 3),
        ([NO_NODES, failed(2)], 2, 2),
        ([failed(139), NO_NODES, failed(3), DONE], 3, 3),
    ],
)
def test_exit_codes_decide_whether_another_rayjob_is_made(
    kubernetes: Kubernetes, api: Api, ends: list[Any], code: int, rayjobs: int
) -> None:
    kubernetes.statuses = [*ends]
    assert run_tick(api, RAYJOB) == code
    names = ["nightly-29400000", "nightly-29400000-2", "nightly-29400000-3"]
    assert list(kubernetes.jobs) == names[:rayjobs]
    assert {job["metadata"]["ownerReferences"][0]["uid"] for job in kubernetes.jobs.values()} == {"u-1"}


def test_pod_started_again_goes_on_with_the_last_attempt(kubernetes: Kubernetes, api: Api) -> None:
    kubernetes.statuses = [failed(3), {"jobDeploymentStatus": "Running"}, failed(1)]
    assert run_tick(api, RAYJOB) == 1
    kubernetes.statuses = [failed(3), failed(1)]
    assert run_tick(api, RAYJOB) == 1
    assert list(kubernetes.jobs) == ["nightly-29400000", "nightly-29400000-2"]


def test_kubernetes_may_be_away_for_a_while(kubernetes: Kubernetes, api: Api) -> None:
    kubernetes.statuses = [500, 503, 500, DONE]
    assert run_tick(api, RAYJOB) == 0


def test_pod_gives_up_when_its_rayjob_is_gone(kubernetes: Kubernetes, api: Api) -> None:
    kubernetes.statuses = [404]
    assert run_tick(api, RAYJOB) == 3


def test_pod_gives_up_when_nobody_answers(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("t")
    assert run_tick(Api("http://127.0.0.1:9", account=tmp_path, poll_s=0.001), RAYJOB) == 3
