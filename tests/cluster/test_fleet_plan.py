"""What `auto` becomes on given nodes, what engines on GPUs are told, and what is refused before weights are loaded.

Figures are for Mixtral 8x7B in bf16 with `max_model_len` 2048, so sequences of 1,024 tokens; by hand, from
tests/cluster/test_topology.py: H100-80G at 2 has 26.37 GiB x 2^30 / (131,072 / 2) = 432,000 KV tokens, 421 sequences,
416 in eights; H200 at 1 has 37.99 GiB x 2^30 / 131,072 = 311,000, 303, 296.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cluster.capacity import check_capacity
from cluster.fleet_plan import FleetDemand, decide_fleet, refuse_impossible
from cluster.gpus import GpuType
from cluster.hardware import Hardware, NodeKind
from cluster.nodes import Node
from cluster.pools import GPU_TYPE_LABEL, UNBOUNDED, pool_plans
from cluster.settings import FleetSettings, PoolSettings
from pipeline.errors import SpecError
from pipeline.settings import ModelSettings
from pipeline.vllm_engine import VllmEngineConfig
from tests.cluster.real_configs import MIXTRAL_8X7B

MODEL = ModelSettings(source="mistralai/Mixtral-8x7B-Instruct-v0.1")
MINE = {"name": "H20", "memory_gib": 94.8, "memory_gb_per_s": 4000, "tflops": 148, "ray_labels": ["NVIDIA-H20"]}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("mixtral")
    (folder / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    return str(folder)


def fleet(*pools: dict[str, Any], **fields: Any) -> FleetSettings:
    return FleetSettings.model_validate({"pools": list(pools), **fields})


def node(name: str, gpus: int, label: str) -> Node:
    return Node(name, "10.0.0.1", labels={GPU_TYPE_LABEL: label}, total={"CPU": 16, "GPU": gpus})


HEAD = Node("head", "10.0.0.1", total={"CPU": 8})
AUTO = FleetSettings.model_validate("auto")


def demand(settings: FleetSettings, path: str, model: ModelSettings = MODEL) -> FleetDemand:
    return FleetDemand(settings, model, path, None)


def engine_args(pool: PoolSettings) -> tuple[Any, Any]:
    return pool.engine_args.get("max_num_seqs"), pool.engine_args.get("max_num_batched_tokens")


def test_auto_becomes_one_pool_per_type_that_is_there(mixtral: str) -> None:
    nodes = [HEAD, node("a", 8, "H100"), node("b", 8, "H100"), node("c", 8, "H200"), node("d", 4, "T4")]
    plans, notes = demand(AUTO, mixtral).plans(nodes, grows=False)
    found = [(plan.shape.gpu_type, plan.shape.num_gpus, plan.num_replicas, plan.max_replicas) for plan in plans]
    assert found == [("H100-80G", 2, 1, UNBOUNDED), ("H200", 1, 1, UNBOUNDED)]
    assert [plan.max_num_seqs for plan in plans] == [416, 296]
    assert [plan.shape.gpu_labels for plan in plans] == [("H100-80G", "H100"), ("H200",)]
    [note] = notes
    assert note.startswith("not used: T4 can't compute in bfloat16")


def test_auto_is_one_cpu_engine_where_there_is_no_gpu(mixtral: str) -> None:
    [plan], notes = demand(AUTO, mixtral).plans([HEAD], grows=False)
    assert (plan.shape.num_gpus, plan.shape.num_cpus, plan.num_replicas, plan.max_replicas) == (0, 1, 1, 1)
    assert isinstance(plan.engine, VllmEngineConfig)
    assert (plan.engine.on_cpu, plan.engine.engine_args) == (True, {})
    assert notes == ()


def test_auto_without_gpus_is_refused_where_they_may_still_come(mixtral: str) -> None:
    with pytest.raises(SpecError, match=r"fleet.pools\[0\] \(auto\): .*none until it grows; name the types"):
        demand(AUTO, mixtral).plans([HEAD], grows=True)


def test_auto_on_gpus_that_can_not_be_used_says_why(mixtral: str) -> None:
    with pytest.raises(SpecError, match=r"no GPU of this cluster can be used: .*labelled A100.*T4 can't compute in bf"):
        demand(AUTO, mixtral).plans([node("a", 8, "A100"), node("b", 4, "T4")], grows=False)


def test_the_largest_node_decides_which_sizes_there_are(mixtral: str) -> None:
    pool = {"gpu": "L4", "tensor_parallel": "auto"}
    [plan], _ = demand(fleet(pool), mixtral).plans([node("a", 4, "L4"), node("b", 8, "L4")], grows=False)
    assert plan.shape.num_gpus == 8
    with pytest.raises(SpecError, match=r"fleet.pools\[0\] \(L4\): nothing fits on a node of 4"):
        demand(fleet(pool), mixtral).plans([node("a", 4, "L4")], grows=False)


def test_a_replica_larger_than_a_node_goes_evenly_over_several_of_its_type(mixtral: str) -> None:
    pools = fleet({"gpu": "H100-80G", "tensor_parallel": 8, "replicas": "max"}, {"gpu": "H200", "tensor_parallel": 8})
    nodes = [HEAD, *(node(name, 4, "H100") for name in "abc"), node("d", 8, "H200")]
    [spread, whole], _ = demand(pools, mixtral).plans(nodes, grows=False)
    assert (spread.shape.num_gpus, spread.shape.num_bundles, spread.shape.gpu_labels) == (4, 2, ("H100-80G", "H100"))
    assert spread.shape.describe() == "4 GPUs of H100-80G on each of 2 nodes"
    assert isinstance(spread.engine, VllmEngineConfig)
    assert (spread.engine.tensor_parallel, spread.engine.num_nodes) == (8, 2)
    assert (whole.shape.num_gpus, whole.shape.num_bundles) == (8, 1)
    check_capacity([spread, whole], nodes)


def test_what_can_not_be_spread_evenly_is_refused_with_what_is_there_and_the_cure(mixtral: str) -> None:
    pools = fleet({"gpu": "H100-80G", "tensor_parallel": 8})
    nodes = [HEAD, node("a", 4, "H100"), node("b", 2, "H100"), node("c", 2, "H100"), node("d", 8, "L4")]
    plans, _ = demand(pools, mixtral).plans(nodes, grows=False)  # eight GPUs in all, but 4 + 2 + 2
    with pytest.raises(
        SpecError, match=r"needs 4 GPUs of H100-80G on each of 2 nodes.*equally many.*lower tensor_par"
    ) as e:
        check_capacity(plans, nodes)
    assert e.value.exit_code == 2
    automatic = fleet({"gpu": "auto", "tensor_parallel": 8})
    with pytest.raises(
        SpecError, match="H100-80G: no node has 8 of them, as tensor_parallel asks for, and no nodes ha"
    ):
        demand(automatic, mixtral).plans(nodes[:-1], grows=False)


def test_batch_sizes_are_the_planners_where_the_user_gave_none(mixtral: str) -> None:
    hardware = Hardware((NodeKind("H100-80G", 8, 1),))
    pool = {"gpu": "H100-80G", "tensor_parallel": 2}
    for extra, expected in [
        ({}, (416, 8192)),
        ({"max_num_seqs": 64}, (64, 8192)),
        ({"max_num_batched_tokens": 16384}, (400, 16384)),
        ({"max_num_seqs": 9000}, (9000, 9000)),
    ]:
        decided, _ = decide_fleet(fleet({**pool, "engine_args": extra}), MODEL, mixtral, hardware, grows=False)
        assert engine_args(decided.pools[0]) == expected, extra
    given = MODEL.model_copy(update={"engine_args": {"max_num_seqs": 64}})
    decided, _ = decide_fleet(fleet(pool), given, mixtral, hardware, grows=False)
    assert engine_args(decided.pools[0]) == (None, 8192), "what is set for the model is laid under the pool's"


def test_cpu_pools_are_never_measured_by_gpu_memory(mixtral: str) -> None:
    pools = fleet({"gpu": "cpu", "tensor_parallel": 3, "replicas": 2})
    decided, _ = decide_fleet(pools, MODEL, mixtral, Hardware(()), grows=False)
    assert decided == pools
    automatic = fleet({"gpu": "cpu", "tensor_parallel": "auto"})
    decided, _ = decide_fleet(automatic, MODEL, mixtral, Hardware(()), grows=False)
    assert decided.pools[0].tensor_parallel == 1


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ({"gpu": "H100-80G"}, r"\(H100-80G\): tensor_parallel=1 puts 87.0 GiB .*; use tensor_parallel=2"),
        ({"gpu": "H100-80G", "tensor_parallel": 3}, "doesn't divide the model's 32 attention heads; use tensor_paral"),
        ({"gpu": "T4", "tensor_parallel": 8}, "T4 can't compute in bfloat16.*set model.dtype: float16, or use another"),
        ({"gpu": "T4", "tensor_parallel": "auto"}, "T4 can't compute in bfloat16"),
        ({"gpu": "H20"}, "gpu 'H20' is no GPU type known here"),
        (
            {"gpu": "L4", "tensor_parallel": "auto", "engine_args": {"quantization": "odd"}},
            "give tensor_parallel yours",
        ),
        ({"gpu": "L4", "tensor_parallel": "auto", "engine_args": {"cpu_offload_gb": 8}}, "cpu_offload_gb changes what"),
    ],
)
def test_what_can_not_work_is_refused_without_any_node(mixtral: str, pool: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        refuse_impossible(fleet(pool), MODEL, mixtral)
    assert caught.value.exit_code == 2


def test_a_size_that_the_planner_can_not_judge_is_the_users_word(mixtral: str, tmp_path: Path) -> None:
    pool = {"gpu": "H100-80G", "engine_args": {"cpu_offload_gb": 60}}
    decided, _ = decide_fleet(fleet(pool), MODEL, mixtral, Hardware(()), grows=False)
    assert decided.pools[0].engine_args == {"cpu_offload_gb": 60}
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    refuse_impossible(fleet({"gpu": "H100-80G"}), MODEL, str(tmp_path))
    with pytest.raises(SpecError, match="T4 can't compute in bfloat16"):
        refuse_impossible(fleet({"gpu": "T4"}), MODEL, str(tmp_path))


def test_a_config_without_its_sizes_is_answered_with_the_cure(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(SpecError, match=r"config.json has no 'hidden_size'.*give tensor_parallel"):
        refuse_impossible(fleet({"gpu": "H200", "tensor_parallel": "auto"}), MODEL, str(tmp_path))


def test_a_users_own_type_goes_all_the_way_to_the_slot(mixtral: str) -> None:
    """0.92 x 94.8 = 87.22 GiB; 87.22 - 86.99 / 2 - 2.91 = 40.81 GiB at 2, 668,700 KV tokens, 653 sequences."""
    settings = fleet({"gpu": "H20", "tensor_parallel": "auto", "replicas": "max"}, gpu_types=[MINE])
    assert isinstance(settings.gpu_types[0], GpuType)
    [plan], _ = demand(settings, mixtral).plans([node("a", 8, "NVIDIA-H20")], grows=False)
    assert (plan.shape.num_gpus, plan.shape.gpu_labels) == (2, ("H20", "NVIDIA-H20"))
    assert plan.max_num_seqs == 648
    [plan], _ = demand(fleet({"gpu": "auto"}, gpu_types=[MINE]), mixtral).plans([HEAD], grows=False)
    assert plan.shape.gpu_type is None
    automatic = AUTO.model_copy(update={"gpu_types": settings.gpu_types})
    [plan], _ = demand(automatic, mixtral).plans([node("a", 8, "NVIDIA-H20")], grows=False)
    assert plan.shape.gpu_type == "H20"


def test_cpus_of_the_fewest_replicas_are_known_before_any_node(mixtral: str) -> None:
    pools = fleet(
        {"gpu": "cpu", "replicas": 2, "tensor_parallel": 3},
        {"gpu": "H200", "replicas": {"min": 4, "max": 9}, "tensor_parallel": 2},
    )
    assert demand(pools, mixtral).replica_cpus == 2 * 3 + 4
    assert demand(AUTO, mixtral).replica_cpus == 1


def threads(settings: FleetSettings, path: str) -> list[str]:
    plans = pool_plans(settings, MODEL, model_path=path, moe=None)
    return [plan.env["OMP_NUM_THREADS"] for plan in plans]


def test_cpu_engines_share_out_the_cores_of_this_process_unless_told_their_threads(
    mixtral: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(3 + pid)) | {7, 11, 13}, raising=False)
    assert threads(fleet({"gpu": "cpu"}), mixtral) == ["6"]
    assert threads(fleet({"gpu": "cpu", "replicas": 2}), mixtral) == ["3"]
    assert threads(fleet({"gpu": "cpu", "replicas": 9}), mixtral) == ["1"]
    assert threads(fleet({"gpu": "cpu", "cpu_threads": 2}), mixtral) == ["2"]
    assert fleet({"gpu": "cpu", "cpu_threads": 2, "tensor_parallel": "auto"}).pools[0].cpu_threads == 2


@pytest.mark.parametrize("pool", [{"gpu": "H200"}, {"gpu": "auto"}, {"gpu": "cpu", "tensor_parallel": 2}])
def test_threads_are_for_single_cpu_engines(pool: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cpu_threads is for a pool of gpu: cpu with tensor_parallel: 1"):
        fleet({**pool, "cpu_threads": 1})
