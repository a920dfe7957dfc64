"""Slots: one placement group per replica, on nodes of the right GPU type.

Guarantees:
- a slot holds all that its replica takes or nothing; the GPUs of one bundle are on one node, bundles on different ones.
- a released slot's resources are free again; one whose fleet or driver died is released by Ray.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.pools import GPU_TYPE_LABEL, SlotShape

NODE_ID_LABEL = "ray.io/node-id"
"""Node label that Ray sets on every node."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A placement group, requested or placed."""

    group: Any
    shape: SlotShape

    def placed_on(self) -> list[str] | None:
        """Ids of the nodes that hold the bundles, in bundle order; None while it waits for room."""
        from ray.util import placement_group_table

        table = placement_group_table(self.group)
        if table.get("state") != "CREATED":
            return None
        nodes = table["bundles_to_node_id"]
        return [nodes[index] for index in sorted(nodes)]

    def strategy(self, bundle: int = 0) -> Any:
        """Ray's scheduling strategy for an actor in one of the bundles."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle)

    def release(self) -> None:
        """Give everything back, killing what still runs in it; harmless when it is gone already."""
        import ray
        from ray.util import remove_placement_group

        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            remove_placement_group(self.group)


def request_slot(shape: SlotShape, *, name: str, not_on: Sequence[str] = ()) -> Slot:
    """Ask Ray for a slot; returns at once, `Slot.placed_on` says when it is there.

    The group belongs to the calling process and goes with it. No bundle is placed on the nodes with the ids `not_on`.
    """
    from ray.util import placement_group

    strategy = "STRICT_PACK" if shape.num_bundles == 1 else "STRICT_SPREAD"
    selector = {}
    if shape.gpu_labels:
        selector[GPU_TYPE_LABEL] = f"in({','.join(shape.gpu_labels)})"
    if not_on:
        selector[NODE_ID_LABEL] = f"!in({','.join(not_on)})"
    group = placement_group(
        [shape.bundle] * shape.num_bundles,
        strategy=strategy,
        name=name,
        bundle_label_selector=[selector] * shape.num_bundles if selector else None,
    )
    return Slot(group, shape)
