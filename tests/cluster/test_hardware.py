"""Nodes to GPU types: labels of Ray, of operators and of users' own types; assumptions from the command line."""

from __future__ import annotations

import pytest

from cluster.gpus import GpuType
from cluster.hardware import Hardware, NodeKind, assumed_hardware, parse_assumption, seen_hardware
from cluster.nodes import Node
from cluster.pools import GPU_TYPE_LABEL
from pipeline.errors import SpecError

MINE = GpuType(name="H20", memory_gib=94.8, memory_gb_per_s=4000, tflops=148, ray_labels=["NVIDIA-H20"])


def node(name: str, gpus: float, label: str | None, *, leaves_at: float | None = None) -> Node:
    labels = {GPU_TYPE_LABEL: label} if label else {}
    return Node(name, "10.0.0.1", labels=labels, total={"CPU": 8, "GPU": gpus}, leaves_at=leaves_at)


def test_an_assumption_is_read() -> None:
    assert parse_assumption("H100-80G:8x4") == NodeKind("H100-80G", gpus_per_node=8, num_nodes=4)
    assert parse_assumption(" L4:1X12 ") == NodeKind("L4", 1, 12)
    assert parse_assumption("H20:8x1", [MINE]) == NodeKind("H20", 8, 1)


@pytest.mark.parametrize(
    "text", ["", "H100-80G", "H100-80G:8", "H100-80G:0x4", "H100-80G:8x0", "8x4", "H100-80G:8x4x2"]
)
def test_a_malformed_assumption_is_answered_with_an_example(text: str) -> None:
    with pytest.raises(SpecError, match=r"is not TYPE:GPUSxNODES; write e.g. --assume H100-80G:8x4"):
        parse_assumption(text)


def test_an_assumption_of_an_unknown_type_or_of_cpus_is_answered_with_the_cure() -> None:
    with pytest.raises(SpecError, match=r"gpu 'H20' is no GPU type known here.*fleet.gpu_types"):
        parse_assumption("H20:8x1")
    with pytest.raises(SpecError, match="measure one with `tramontane preview SPEC -n 20`"):
        parse_assumption("cpu:8x1")


def test_assumptions_of_one_kind_add_up() -> None:
    hardware = assumed_hardware(["L4:8x1", "H200:8x2", "L4:8x2", "L4:4x1"])
    assert hardware.kinds == (NodeKind("L4", 8, 3), NodeKind("H200", 8, 2), NodeKind("L4", 4, 1))
    assert hardware.gpu_types == ["L4", "H200"]
    assert hardware.largest_node("L4") == 8
    assert hardware.num_replicas("L4", 8) == 3
    assert hardware.num_replicas("L4", 3) == 2 * 3 + 1
    assert (hardware.nodes_of_replica("L4", 16), hardware.num_replicas("L4", 16)) == (2, 1)  # eight of each of two
    assert (hardware.nodes_of_replica("L4", 12), hardware.num_replicas("L4", 12)) == (
        2,
        1,
    )  # six, so not on that of four
    assert (hardware.nodes_of_replica("T4", 16), hardware.num_replicas("T4", 16)) == (2, 0)
    assert (hardware.num_replicas("T4", 1), hardware.largest_node("T4", otherwise=8)) == (0, 8)


def test_nodes_are_counted_by_what_their_labels_mean() -> None:
    nodes = [
        node("head", 0, None),
        node("a", 8, "H100"),  # Ray's own label
        node("b", 8, "H100-80G"),  # an operator's
        node("c", 4, "NVIDIA-H20"),
        node("d", 4, "H20"),
        node("leaving", 8, "H100", leaves_at=1.0),
    ]
    assert seen_hardware(nodes, [MINE]) == Hardware((NodeKind("H100-80G", 8, 2), NodeKind("H20", 4, 2)))


def test_a_users_type_takes_over_a_known_types_label() -> None:
    mine = MINE.model_copy(update={"ray_labels": ["H100"]})
    assert seen_hardware([node("a", 8, "H100"), node("b", 8, "H100-80G")], [mine]).gpu_types == ["H20", "H100-80G"]


def test_gpus_that_no_pool_can_name_are_told_with_the_cure() -> None:
    hardware = seen_hardware([node("a", 8, "A100"), node("b", 1, None), node("c", 2, "V100"), node("d", 2, "V100")])
    assert hardware.kinds == ()
    assert [text.partition(":")[0] for text in hardware.unknown] == [
        "8 GPUs labelled A100",
        "1 GPU without the node label ray.io/accelerator-type",
        "4 GPUs labelled V100",
    ]
    a100, unlabelled, other = hardware.unknown
    assert "--labels ray.io/accelerator-type=A100-40G or A100-80G" in a100
    assert "--labels ray.io/accelerator-type=TYPE" in unlabelled
    assert "describe the type in fleet.gpu_types, with ray_labels: [V100]" in other
