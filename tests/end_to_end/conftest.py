"""One real vLLM engine for the whole session: starting one costs 8 to 30 s."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cluster.fleet import PoolPlan, start_fleet, stop_fleet
from pipeline.model import ModelFiles, fetch_model
from pipeline.settings import ModelSettings
from pipeline.vllm_engine import VllmEngineConfig


@pytest.fixture(scope="session")
def tiny_model() -> ModelFiles:
    return fetch_model(ModelSettings(source="tiny"))


@pytest.fixture(scope="session")
def vllm_fleet(_ray_session: None, tiny_model: ModelFiles) -> Iterator[Any]:
    """A live fleet with one replica: float32, 512 tokens, routing captured with ids."""
    engine = VllmEngineConfig(
        model_path=tiny_model.path,
        dtype="float32",
        max_model_len=512,
        moe=tiny_model.moe,
        on_cpu=True,
        num_threads=1,
    )
    pools = [PoolPlan("vllm", 1, engine, env=engine.environment())]
    fleet = start_fleet(pools, keep_expert_ids=True, request_timeout_s=120)
    yield fleet
    stop_fleet(fleet)
