"""Replicas larger than a node: over how many nodes they go, and how many of them there is room for. Pure.

vLLM wants equally many workers on every node of an engine, so a replica is spread evenly or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence


def nodes_of_replica(num_gpus: int, node_gpus: Sequence[int]) -> int:
    """Nodes that a replica of `num_gpus` takes where there are nodes with `node_gpus` GPUs each: one if any holds it.

    Else the smallest number by which it divides evenly and of which there are enough. Where there never are enough,
    the smallest by which a share fits the largest node, so that a refusal can say what is missing.
    """
    largest = max(node_gpus, default=1)
    shares = [share for share in range(min(num_gpus, largest), 0, -1) if num_gpus % share == 0]
    for share in shares:
        if sum(gpus >= share for gpus in node_gpus) >= num_gpus // share:
            return num_gpus // share
    return num_gpus // shares[0]


def num_spread(room: Sequence[int], num_nodes: int) -> int:
    """Replicas that fit, each with one bundle on `num_nodes` different nodes, where nodes have room for `room` bundles.

    So many replicas use a node at most once each: n fit exactly when the sum of min(room, n) is n x `num_nodes` or
    more, and if n fit, so do fewer.
    """
    low, high = 0, sum(room) // num_nodes
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(bundles, middle) for bundles in room) >= middle * num_nodes:
            low = middle
        else:
            high = middle - 1
    return low
