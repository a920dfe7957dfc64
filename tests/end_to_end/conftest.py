"""One real vLLM engine for the whole session: starting one costs 8 to 30 s."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.pools import PoolPlan
from cluster.warm import WarmFleet, raise_fleet, take_down
from pipeline.model import ModelFiles, fetch_model
from pipeline.settings import ModelSettings
from pipeline.vllm_engine import VllmEngineConfig

FLEET = "vllm"
"""Name of the session's fleet."""


@pytest.fixture(scope="session")
def tiny_model() -> ModelFiles:
    return fetch_model(ModelSettings(source="random"))


@pytest.fixture(scope="session")
def vllm_fleet(_ray_session: None, tiny_model: ModelFiles) -> Iterator[Any]:
    """A warm fleet with one replica: float32, 512 tokens, routing captured with ids."""
    engine = VllmEngineConfig(
        model_path=tiny_model.path,
        dtype="float32",
        max_model_len=512,
        moe=tiny_model.moe,
        on_cpu=True,
        num_threads=1,
    )
    pool = PoolPlan("vllm", 1, engine, env=engine.environment())
    model = ModelSettings(source="random", dtype="float32", max_model_len=512)
    warm = WarmFleet(FLEET, model, tiny_model.digest, tiny_model.moe, (pool,), time.time())
    yield raise_fleet(warm, start_timeout_s=300)
    take_down(FLEET)
