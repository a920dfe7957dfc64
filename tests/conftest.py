"""Fixtures that several test folders share: a real S3 HTTP server with fresh buckets, and a local Ray.

Knows nothing of the pipeline. Invariants: no test ever reaches a real object store, because the endpoint and the
credentials in the environment are those of the server started here; none joins or stops a Ray that it did not start.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator

import pytest


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
    import ray

    # A short path of our own: Ray's sockets must stay under 108 bytes, and other Rays' files are none of our business.
    folder = tempfile.mkdtemp(prefix="tm-ray-", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=256 << 20,
        _temp_dir=folder,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def local_ray(_ray_session: None) -> None:
    """A Ray of this test session's own, started by the first test that asks."""
