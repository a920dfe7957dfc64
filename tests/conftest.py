"""Fixtures that several test folders share: a real S3 HTTP server with fresh buckets, a local Ray, quick processes.

Knows nothing of the pipeline. Invariants: no test ever reaches a real object store, because the endpoint and the
credentials in the environment are those of the server started here; none joins or stops a Ray that it did not start.
"""

from __future__ import annotations

import logging
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.driver_processes import DriverLauncher
from tests.faults.forkserver import forkserver
from tests.own_ray import own_ray

settings.register_profile("tests", deadline=None)  # 200 ms by default, which a busy machine takes for nothing
settings.load_profile("tests")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # What a shell starts in the background ignores Ctrl-C, and so would all that is started and interrupted here.
    signal.signal(signal.SIGINT, signal.default_int_handler)


ON_THE_SESSIONS_VLLM = ("real_vllm", "json_on_vllm", "serve_on_vllm", "tensor_parallel", "vllm_over_nodes")
"""Files of tests/end_to_end that share an engine, see its conftest.py; each process that runs one of them starts it."""


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Test files stay whole, and those on the session's vLLM stay together: its start takes 30 s of a busy core."""
    from xdist.scheduler.loadfile import LoadFileScheduling

    together = {f"tests/end_to_end/test_{name}.py" for name in ON_THE_SESSIONS_VLLM}

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return "vllm" if file in together else file

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Start an S3 server for the session, point AWS_* of this process (and its children) at it; yield its URL."""
    from moto.server import ThreadedMotoServer  # 1 s of imports that most tests do without

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line per request drowns a failed test's report
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    environment = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    yield url
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    server.stop()


@pytest.fixture
def s3_bucket(s3_server: str) -> str:
    """Create an empty bucket for one test and return its name."""
    import fsspec

    name = f"tm-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
    return name


@pytest.fixture(scope="session")
def _ray_session() -> Iterator[None]:
    with own_ray():
        yield


@pytest.fixture
def local_ray(_ray_session: None) -> None:
    """A Ray of this test session's own, started by the first test that asks."""


@pytest.fixture
def new_launcher(tmp_path: Path) -> Iterator[Callable[..., DriverLauncher]]:
    """Makes launchers of drivers whose scripted engines have these settings; their drivers end with the test."""
    launchers: list[DriverLauncher] = []

    def make(**engines: Any) -> DriverLauncher:
        folder = tmp_path / f"drivers-{len(launchers)}"
        folder.mkdir()
        launchers.append(DriverLauncher(folder, engines))
        return launchers[-1]

    yield make
    for launcher in launchers:
        launcher.close()


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Starts child processes in some 20 ms."""
    return forkserver()
