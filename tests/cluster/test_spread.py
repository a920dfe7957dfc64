"""Replicas larger than a node: over how many nodes they go, evenly, and how many there is room for."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.spread import nodes_of_replica, num_spread


@pytest.mark.parametrize(
    ("num_gpus", "nodes", "expected"),
    [
        (8, [8, 4, 4], 1),  # a node holds it
        (8, [4, 4], 2),
        (16, [8, 8], 2),
        (16, [8, 8, 8, 8], 2),  # no more nodes than it must
        (6, [4, 4], 2),  # 3 and 3, never 4 and 2
        (8, [6, 6], 2),
        (8, [3, 3, 3, 3], 4),  # three nodes have GPUs enough, but not equally many
        (8, [4, 2, 2, 2], 4),  # only one has four
        (8, [4, 2, 2], 2),  # has room for none: two nodes of four are what is missing
        (9, [4, 4, 4], 3),
        (7, [4, 4], 7),  # a prime goes one by one, or not at all
        (16, [], 16),
    ],
)
def test_a_replica_takes_the_fewest_nodes_over_which_it_goes_evenly(
    num_gpus: int, nodes: list[int], expected: int
) -> None:
    assert nodes_of_replica(num_gpus, nodes) == expected


@given(num_gpus=st.integers(1, 64), nodes=st.lists(st.integers(1, 16), min_size=1, max_size=8))
def test_shares_are_equal_and_fit_the_largest_node(num_gpus: int, nodes: list[int]) -> None:
    count = nodes_of_replica(num_gpus, nodes)
    assert num_gpus % count == 0
    assert num_gpus // count <= max(nodes)
    if num_gpus <= max(nodes):
        assert count == 1


def packed(room: list[int], num_nodes: int) -> int:
    """By trying everything."""
    return max(
        (
            1 + packed([bundles - (i in chosen) for i, bundles in enumerate(room)], num_nodes)
            for chosen in combinations([i for i, bundles in enumerate(room) if bundles], num_nodes)
        ),
        default=0,
    )


@given(room=st.lists(st.integers(0, 2), max_size=5), num_nodes=st.integers(1, 3))
def test_as_many_fit_as_can_be_packed(room: list[int], num_nodes: int) -> None:
    assert num_spread(room, num_nodes) == packed(room, num_nodes)


def test_ten_thousand_nodes_are_counted_at_once() -> None:
    assert num_spread([8] * 10_000, 2) == 40_000
