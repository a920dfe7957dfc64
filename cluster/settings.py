"""What a fleet can be told: pools, GPU types of one's own, prices; the text under a field is its documentation.

Light, as `pipeline.settings`: the command line validates a spec without importing Ray or an ML library.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from cluster.gpus import CPU, GpuType
from pipeline.settings import Settings, contradiction

AUTO: Literal["auto"] = "auto"
"""To be decided once the nodes are known."""


class ReplicaRange(Settings):
    """How few and how many engines a pool may have; in between, as many as the work left is worth."""

    min: Annotated[int, Field(ge=0)] = 0
    """Kept even when idle, and required of the cluster."""
    max: Annotated[int, Field(ge=1)]
    """Never more."""

    @model_validator(mode="after")
    def _min_within_max(self) -> ReplicaRange:
        if self.min > self.max:
            raise contradiction(f"min {self.min} is more than max {self.max}; lower it", at="min")
        return self


class PoolSettings(Settings):
    """Replicas of one kind."""

    gpu: str = CPU
    """GPU type, `cpu`, or `auto` for each type that the cluster has (one CPU engine where it has none)."""
    replicas: Annotated[int, Field(ge=1)] | Literal["max"] | ReplicaRange = 1
    """Engines to start: a number, `{min: 0, max: 8}` to follow the work, or `max` for as many as the cluster holds."""
    tensor_parallel: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    """GPUs (or CPU workers) per engine; `auto` for the fewest of one node on which the model and a batch that pays have
    room. More GPUs than a node has are taken from several nodes, equally many of each."""
    engine_args: dict[str, Any] = Field(default={})
    """Laid over `model.engine_args` for this pool."""
    cpu_threads: Annotated[int, Field(ge=1)] | None = None
    """Threads of each CPU engine's forward pass; null for all cores that the driver may use, shared out among the
    engines."""
    usd_per_gpu_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """What a GPU of this pool costs, for `tramontane plan`."""

    @model_validator(mode="after")
    def _threads_of_one_worker(self) -> PoolSettings:
        if self.cpu_threads is not None and (self.gpu.casefold() != CPU or self.tensor_parallel not in (1, AUTO)):
            raise contradiction(
                "cpu_threads is for a pool of gpu: cpu with tensor_parallel: 1 (each of several CPU workers has a core "
                "of its own); leave it out",
                at="cpu_threads",
            )
        return self

    @property
    def is_decided(self) -> bool:
        """Whether GPU type and tensor-parallel size are known before any node is."""
        return AUTO not in (self.gpu, self.tensor_parallel)

    @property
    def num_workers(self) -> int:
        """GPUs (or CPU workers) per engine, of a pool where that is decided."""
        if self.tensor_parallel == AUTO:
            raise ValueError(f"tensor_parallel of pool {self.gpu} is still to be decided")
        return self.tensor_parallel

    @property
    def least(self) -> int:
        """Engines that there must be room for."""
        if isinstance(self.replicas, ReplicaRange):
            return self.replicas.min
        return 1 if self.replicas == "max" else self.replicas

    @property
    def most(self) -> int | None:
        """Engines that there may be; None for as many as fit."""
        if isinstance(self.replicas, ReplicaRange):
            return self.replicas.max
        return None if self.replicas == "max" else self.replicas


def _seconds(value: Any) -> Any:
    """Read `90s`, `30m`, `2h`; numbers are seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", value.strip()) if isinstance(value, str) else None
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]] if match else value


Duration = Annotated[float, BeforeValidator(_seconds)]


class FleetSettings(Settings):
    """What runs the model; `fleet: auto` for whatever the cluster has."""

    pools: list[PoolSettings] = Field(default=[PoolSettings()], min_length=1)
    """One entry per GPU type, in order of preference."""
    gpu_types: list[GpuType] = Field(default=[])
    """GPU types of your own, for pools to name; one with the name of a known type replaces it."""
    start_timeout: Annotated[Duration, Field(gt=0)] = 1800.0
    """How long a run may be without a single replica, e.g. `30m`: waiting for nodes, loading the model."""
    attach: str | None = None
    """Name of a warm fleet (`tramontane up`) to use instead of pools of one's own."""
    priority: Literal["high", "normal", "low"] = "normal"
    """Whose rows go first on a warm fleet that several runs share."""

    @model_validator(mode="before")
    @classmethod
    def _all_there_is(cls, value: Any) -> Any:
        if value != AUTO:
            return value
        return {"pools": [{"gpu": AUTO, "replicas": "max", "tensor_parallel": AUTO}]}

    @model_validator(mode="after")
    def _types_are_told_apart(self) -> FleetSettings:
        names = [gpu.name for gpu in self.gpu_types]
        for name in names:
            if name.casefold() in (CPU, AUTO):
                raise contradiction(f"a GPU type can't be called {name}; choose another name", at="gpu_types")
            if names.count(name) > 1:
                raise contradiction(f"{name} is there twice; leave one out", at="gpu_types")
        return self

    @model_validator(mode="after")
    def _one_fleet(self) -> FleetSettings:
        if self.attach is not None and "pools" in self.model_fields_set:
            raise contradiction("attach uses the pools of a warm fleet; leave out either attach or pools", at="attach")
        return self
