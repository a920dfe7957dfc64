"""What became of a replica whose connection broke: Ray learns of a node's death seconds later than its neighbours."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from cluster.fleet_replica import FleetReplica
from cluster.nodes import Node
from pipeline.errors import AttemptError, NodeLost, ReplicaDied, ReplicaUnreachable
from pipeline.membership import read_death

UNREACHABLE_S = 15.0
"""How long to wait for word of a replica that can't be reached. Meanwhile its rows wait too."""
ASK_AGAIN_S = 0.5
CONNECT_TIMEOUT_S = 3.0


async def cause_of_death(
    replica: FleetReplica, death: AttemptError, *, live_nodes: Callable[[], Sequence[Node]]
) -> AttemptError:
    """What is behind a death: a broken connection is looked into, and an engine over nodes dies when it loses one."""
    if isinstance(death, ReplicaUnreachable):
        return await why_unreachable(replica, death.message, live_nodes=live_nodes)
    if death.kind == ReplicaDied.kind and len(replica.node_ids) > 1:
        homes = [node for node in live_nodes() if node.node_id in replica.node_ids]
        if len(homes) < len(replica.node_ids) or not all(await asyncio.gather(*map(_answers, homes))):
            return NodeLost("one of its nodes is gone")
    return death


async def why_unreachable(
    replica: FleetReplica, message: str, *, live_nodes: Callable[[], Sequence[Node]]
) -> AttemptError:
    """Find out, within `UNREACHABLE_S`; ReplicaUnreachable(message) where it remains unknown."""
    homes = [node for node in live_nodes() if node.node_id in replica.node_ids]
    deadline = time.monotonic() + UNREACHABLE_S
    while time.monotonic() < deadline:
        alive = {node.node_id for node in live_nodes()}
        if not alive.issuperset(replica.node_ids) or not all([await _answers(node) for node in homes]):
            return NodeLost("its node is gone")
        try:
            await asyncio.wait_for(replica.answer(), 1.0)
        except TimeoutError:
            continue
        except Exception as error:  # noqa: BLE001  however it died
            death = read_death(error)
            if not isinstance(death, ReplicaUnreachable):
                return death
        await asyncio.sleep(ASK_AGAIN_S)
    return ReplicaUnreachable(message)


async def _answers(node: Node) -> bool:
    """Whether the node's raylet takes connections; Ray itself waits 15 s for a silent one before it says so."""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(node.address, node.port), CONNECT_TIMEOUT_S)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
