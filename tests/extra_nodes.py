"""More nodes for a test's Ray: real raylets on this machine, labelled, with logical GPUs, to be lost like real ones."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import ray

from cluster.pools import GPU_TYPE_LABEL


class ExtraNodes:
    """Nodes added to the Ray that this process has started; all of them go with `close`."""

    def __init__(self) -> None:
        self._nodes: dict[str, Any] = {}

    def add(self, gpu_type: str, num_gpus: int, *, num_cpus: int | None = None) -> str:
        """Start a node, by default with a CPU per GPU and one over, wait until the cluster has it, return its id."""
        from ray._private.node import Node
        from ray._private.parameter import RayParams

        head = ray._private.worker.global_worker.node
        params = RayParams(
            gcs_address=ray.get_runtime_context().gcs_address,
            num_cpus=num_gpus + 1 if num_cpus is None else num_cpus,
            num_gpus=num_gpus,
            labels={GPU_TYPE_LABEL: gpu_type},
            object_store_memory=80 << 20,
            include_dashboard=False,
            temp_dir=head.get_temp_dir_path(),
            node_ip_address=head.node_ip_address,
            min_worker_port=0,
            max_worker_port=0,
        )
        node = Node(params, head=False, shutdown_at_exit=False, spawn_reaper=False)
        self._nodes[node.node_id] = node
        deadline = time.monotonic() + 30
        while not any(known["NodeID"] == node.node_id and known["Alive"] for known in ray.nodes()):
            assert time.monotonic() < deadline, "the node didn't join within 30 s"
            time.sleep(0.05)
        return str(node.node_id)

    def lose(self, node_id: str) -> None:
        """Kill all the processes of a node, as a power cut would."""
        self._nodes.pop(node_id).kill_all_processes(check_alive=False, allow_graceful=False)

    def close(self) -> None:
        """End what is left, in order, so that the cluster forgets it at once."""
        ended = set(self._nodes)
        for node in self._nodes.values():
            node.kill_all_processes(check_alive=False, allow_graceful=True)
        self._nodes.clear()
        deadline = time.monotonic() + 30
        while any(known["NodeID"] in ended and known["Alive"] for known in ray.nodes()):
            assert time.monotonic() < deadline, "the nodes didn't leave within 30 s"
            time.sleep(0.05)


@contextlib.contextmanager
def extra_nodes() -> Iterator[ExtraNodes]:
    """Nodes for the duration of the block."""
    nodes = ExtraNodes()
    try:
        yield nodes
    finally:
        nodes.close()
