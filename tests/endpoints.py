"""Endpoints for tests: a warm fleet of scripted engines with a server in front of it, on this session's Ray."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import ray

from cluster.batch_records import BATCHES
from cluster.pools import PoolPlan
from cluster.serve_app import end_endpoint, start_endpoint
from cluster.serve_settings import ServeSettings
from cluster.warm import WarmFleet, raise_fleet, take_down
from jobs.batch_runner import ProcessRunner
from pipeline.model import fetch_model
from pipeline.settings import ModelSettings
from tests.driver_processes import wait_until

MODEL = ModelSettings(source="tiny", dtype="float32", max_model_len=512)
HOSTILE = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[" * 60_000,
    b'{"a":' * 10_000,
    b'{"model":"mixtral","messages":[{"role":"user","content":"\\ud800"}]}',
    b'{"model":"mixtral","messages":[{"role":"user","content":"x"}],"temperature":NaN}',
    b'{"model":"mixtral","messages":[{"role":"user","content":"x"}],"seed":' + b"9" * 5000 + b"}",
    b'{"model":"mixtral","messages":[{"role":"user","content":"x"}],"max_tokens":1e400}',
    b'{"model":"mixtral","prompt":[-1]}',
    b'{"model":"mixtral","prompt":[[99999999999999999999]]}',
    b'{"model":"mixtral","prompt":[[],[]]}',
    b'{"model":"mixtral","prompt":"' + b"a" * 60_000 + b'"}',
    b'{"model":"' + b"m" * 60_000 + b'"}',
]
"""Bodies that no honest client sends."""


@dataclass(frozen=True)
class Served:
    """A running endpoint."""

    url: str
    fleet: Any
    keys: Path | None
    started_s: float
    """From the warm fleet to the endpoint's being up."""
    name: str
    settings: ServeSettings

    @property
    def batches(self) -> Path:
        """Folder of its batches' owners."""
        return Path(str(self.settings.batches)) / BATCHES

    def restart(self) -> None:
        """End it in peace, and start it again at the same place."""
        end_endpoint()
        start_endpoint(self.name, self.settings, ProcessRunner())

    def members(self) -> dict[str, Any]:
        """The fleet's replicas."""
        return dict(ray.get(self.fleet.watch.remote(-1, 0.0)).members)

    def loads(self) -> dict[str, Any]:
        """What each replica has."""
        return {name: ray.get(member.handle.num_unfinished.remote()) for name, member in self.members().items()}

    def num_unfinished(self) -> int:
        """Requests that replicas still have."""
        return sum(ray.get([member.handle.num_unfinished.remote() for member in self.members().values()]))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def served(
    name: str, config: Any, *, moe: Any, replicas: int = 1, model: ModelSettings = MODEL, **settings: Any
) -> Iterator[Served]:
    """Raise a fleet, put an endpoint before it, and end both."""
    env = config.environment() if hasattr(config, "environment") else {}
    pool = PoolPlan("pool", replicas, config, max_num_seqs=config.max_num_seqs, env=env)
    fleet = raise_fleet(
        WarmFleet(name, model, fetch_model(model).digest, moe, (pool,), time.time()), start_timeout_s=120
    )
    try:
        wait_until(lambda: ray.get(fleet.status.remote())["replicas_up"] == replicas, "replicas")
        said = ServeSettings(port=free_port(), **settings)
        began = time.monotonic()
        start_endpoint(name, said, ProcessRunner())
        try:
            url = f"http://127.0.0.1:{said.port}"
            keys = Path(said.keys) if said.keys else None
            yield Served(url, fleet, keys, time.monotonic() - began, name, said)
        finally:
            end_endpoint()
    finally:
        take_down(name)


def get(url: str, **options: Any) -> httpx.Response:
    return httpx.get(url, timeout=30, verify=False, **options)  # no TLS here, and certificates take 30 ms to load
