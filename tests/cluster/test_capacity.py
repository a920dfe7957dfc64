"""Whether a cluster can hold a fleet, and what the refusal says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.capacity import (
    beside_the_stages,
    check_capacity,
    describe_nodes,
    full_nodes,
    most_replicas,
    num_placeable,
)
from cluster.nodes import Node
from cluster.pools import GPU_TYPE_LABEL, UNBOUNDED, PoolPlan, SlotShape
from cluster.spread import num_spread
from pipeline.errors import SpecError
from tests.scripted_engine import ScriptedConfig


def node(name: str, gpus: int, label: str | None = None, *, cpus: int = 16, free: int | None = None) -> Node:
    total = {"CPU": float(cpus), "GPU": float(gpus)} if gpus else {"CPU": float(cpus)}
    left = total if free is None else {**total, "GPU": float(free)}
    return Node(name, f"10.0.0.{name}", labels={GPU_TYPE_LABEL: label} if label else {}, total=total, free=left)


def pool(gpu: str, gpus: int, replicas: int = 1, *, most: int | None = None, bundles: int = 1) -> PoolPlan:
    labels = ("H100-80G", "H100") if gpu == "H100-80G" else (gpu,)
    shape = SlotShape(num_gpus=gpus, num_bundles=bundles, gpu_type=gpu, gpu_labels=labels)
    return PoolPlan(gpu, replicas, ScriptedConfig(), shape=shape, max_replicas=most)


def cpu_pool(cpus: int) -> PoolPlan:
    return PoolPlan("cpu", 1, ScriptedConfig(), shape=SlotShape(num_cpus=cpus))


H100 = [node("1", 8, "H100"), node("2", 8, "H100")]


@pytest.mark.parametrize(
    ("pools", "nodes"),
    [
        ([pool("H100-80G", 2, 8)], H100),
        ([pool("H100-80G", 8, 2)], H100),
        ([pool("H100-80G", 6, 2), pool("H100-80G", 2, 2)], H100),
        ([pool("H100-80G", 8, 1, bundles=2)], H100),
        ([pool("H100-80G", 4, 2, bundles=2)], H100),
        ([pool("L4", 1, 2, bundles=2)], [node("1", 1, "L4"), node("2", 1, "L4"), node("3", 2, "L4")]),
        ([pool("H100-80G", 4, 2), pool("H100-80G", 4, 1, bundles=2)], H100),  # the largest is placed first
        ([pool("L4", 1, 0, most=8), pool("H100-80G", 8, 1)], H100),  # nothing is asked of the first
        ([pool("A100-80G", 2, 1)], [node("1", 2, "A100-80G")]),
        ([cpu_pool(8), pool("L4", 4)], [node("1", 4, "L4", cpus=8), node("2", 0, cpus=16)]),  # each where it must go
    ],
)
def test_what_fits_is_let_through(pools: list[PoolPlan], nodes: list[Node]) -> None:
    check_capacity(pools, nodes)


@pytest.mark.parametrize(
    ("pools", "nodes", "words"),
    [
        ([pool("H100-80G", 2, 9)], H100, r"needs 9 replicas with 2 GPUs of H100-80G on one node.*8 of 9 fit"),
        ([pool("H100-80G", 2, 9)], H100, r"It has 2 nodes with 8 GPUs .H100.. Lower replicas to 8, or add nodes"),
        ([pool("H100-80G", 16)], H100, r"16 GPUs of H100-80G on one node.*Lower tensor_parallel, or use larger nodes"),
        ([pool("L4", 1)], H100, r"Name a GPU type that is there, or add nodes labelled ray.io/accelerator-type=L4"),
        (
            [pool("A100-80G", 2)],
            [node("1", 8, "A100")],
            r"every A100 is the same: start nodes that have A100-80G with --labels ray.io/accelerator-type=A100-80G",
        ),
        ([pool("H100-80G", 6, 2), pool("H100-80G", 4, 1)], H100, "H100-80G needs 4 GPUs"),
        ([pool("H100-80G", 8, 1, bundles=3)], H100, "on each of 3 nodes"),
        (
            [pool("H100-80G", 3, 1, bundles=2)],
            [node("1", 4, "H100"), node("2", 2, "H100"), node("3", 8, "L4")],
            r"needs 3 GPUs of H100-80G on each of 2 nodes.*equally many .* or have 2 nodes with 3 GPUs of H100-80G",
        ),
        ([pool("H100-80G", 4, 3, bundles=2)], [*H100, node("3", 4, "H100")], "2 of 3 fit.*Lower replicas to 2"),
        ([pool("L4", 1, 0, most=8)], H100, "1 GPU of L4"),  # nothing that may be there ever could
        ([pool("H100-80G", 1, 1)], [node("1", 8, "H100", cpus=0)], "can never hold"),
        ([pool("H100-80G", 1)], [node("1", 0, cpus=8)], "Set gpu: cpu or fleet: auto, or name a Ray cluster"),
    ],
)
def test_what_can_never_fit_is_refused_with_what_is_there_and_the_cure(
    pools: list[PoolPlan], nodes: list[Node], words: str
) -> None:
    with pytest.raises(SpecError, match=words) as refused:
        check_capacity(pools, nodes)
    assert refused.value.exit_code == 2


def test_replicas_leave_a_cpu_of_the_drivers_node_to_the_stages() -> None:
    nodes = [node("1", 0, cpus=4), node("2", 0, cpus=4)]
    check_capacity([cpu_pool(4)], nodes)
    check_capacity([cpu_pool(4)], beside_the_stages(nodes, "1"))  # the other node has room
    with pytest.raises(SpecError, match="can never hold"):
        check_capacity([cpu_pool(4)], beside_the_stages(nodes[:1], "1"))


def test_a_drivers_node_is_full_when_one_more_replica_would_take_its_last_cpu() -> None:
    nodes = beside_the_stages([node("1", 0, cpus=8), node("2", 0, cpus=8)], "1", "2")
    assert num_placeable(SlotShape(num_cpus=4), nodes) == 2
    assert full_nodes(nodes, {"1": 4.0, "2": 3.0}, SlotShape(num_cpus=4)) == ["1"]
    assert full_nodes(nodes, {"1": 0.0, "gone": 0.0}, SlotShape(num_cpus=8)) == ["1"]
    bare = beside_the_stages([node("3", 4, "L4", cpus=0)], "3")
    assert num_placeable(SlotShape(num_cpus=1), bare) == 0


def test_only_free_resources_of_nodes_that_stay_count_for_another_replica() -> None:
    shape = pool("H100-80G", 2).shape
    assert num_placeable(shape, [node("1", 8, "H100"), node("2", 8, "H100", free=3)]) == 5
    leaving = Node("3", "10.0.0.3", labels={GPU_TYPE_LABEL: "H100"}, free={"CPU": 9.0, "GPU": 8.0}, leaves_at=1.0)
    assert num_placeable(shape, [leaving]) == 0
    assert num_placeable(pool("H100-80G", 8, bundles=2).shape, [*H100, node("3", 8, "H100")]) == 1


def test_a_pool_without_a_limit_is_prepared_for_half_as_many_again_as_the_cluster_holds() -> None:
    assert most_replicas(pool("H100-80G", 2, 1, most=UNBOUNDED), H100) == 12
    assert most_replicas(pool("H100-80G", 2, 1, most=3), H100) == 3


def test_nodes_in_words() -> None:
    nodes = [*H100, node("3", 0, cpus=8)]
    assert describe_nodes(nodes) == "1 node with 8 CPUs and no GPU, 2 nodes with 8 GPUs (H100)"


@given(
    sizes=st.lists(st.integers(1, 8), max_size=6),
    share=st.integers(1, 8),
    bundles=st.integers(1, 3),
    replicas=st.integers(1, 30),
)
def test_equal_slots_fit_exactly_as_often_as_they_divide_into_nodes(
    sizes: list[int], share: int, bundles: int, replicas: int
) -> None:
    nodes = [node(str(i), size, "L4") for i, size in enumerate(sizes)]
    asked = [pool("L4", share, replicas, bundles=bundles)]
    if num_spread([size // share for size in sizes], bundles) >= replicas:
        check_capacity(asked, nodes)
    else:
        with pytest.raises(SpecError):
            check_capacity(asked, nodes)
