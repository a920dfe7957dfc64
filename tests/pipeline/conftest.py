"""Outputs to write to, on a local disk and on S3."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.storage import Store


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
    """An empty output, once on each: what the protocol promises holds on both."""
    if request.param == "local":
        return Store(str(request.getfixturevalue("tmp_path") / "out"))
    return Store(f"s3://{request.getfixturevalue('s3_bucket')}/out")


@pytest.fixture
def local(tmp_path: Path) -> Store:
    """An empty output on the local disk, for what doesn't depend on the storage."""
    return Store(str(tmp_path))


@pytest.fixture
def atomic_moto(monkeypatch: pytest.MonkeyPatch) -> None:
    """moto tests the condition of a put and stores the object in two steps; S3 does it in one."""
    from moto.s3.responses import S3Response

    original, one_at_a_time = S3Response._key_response_put, threading.Lock()

    def put(self: Any, query: Any, key_name: str) -> Any:
        with one_at_a_time:
            return original(self, query, key_name)

    monkeypatch.setattr(S3Response, "_key_response_put", put)
