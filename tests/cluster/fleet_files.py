"""Fleet files for tests, made of pools and groups of nodes."""

from __future__ import annotations

from typing import Any

from cluster.fleet_file import FleetFile


def fleet(pools: list[dict[str, Any]], groups: list[dict[str, Any]], **cluster: Any) -> FleetFile:
    return FleetFile.model_validate(
        {
            "name": "test",
            "model": {"source": "tiny"},
            "fleet": {"pools": pools},
            "cluster": {"image": "example.com/t:1", "groups": groups, **cluster},
        }
    )


H100 = {"gpu": "H100-80G", "tensor_parallel": 2, "replicas": 2}
