"""The Ray actor that holds an engine's GPUs on one of its further nodes.

It takes no requests: the engine's processes talk among themselves, and the replica on the first node answers for all.
Knows nothing of other nodes' fate; the fleet watches all parts and ends them together.
"""

from __future__ import annotations

import os
from typing import Any, NoReturn

from pipeline.engine_thread import EngineConfig
from pipeline.errors import ReplicaDied
from pipeline.meeting import Meeting


class Follower:
    """One node's part of an engine; made an actor by the fleet."""

    def __init__(self, config: EngineConfig, meeting: Meeting, node_rank: int) -> None:
        self._config = config
        self._meeting = meeting
        self._node_rank = node_rank

    def follow(self) -> NoReturn:
        """Load this node's part and hold it; never returns.

        Raises:
            ReplicaDied: one of its processes ended.
            Exception: whatever kept it from loading.
        """
        self._config.follow(self._meeting, self._node_rank)
        where = f"node {self._node_rank + 1} of {self._meeting.num_nodes}"
        raise ReplicaDied(f"the engine died: a process of it on {where} ended")

    def pid(self) -> int:
        """Process id, for who wants to hear that it is dead: not answered while it follows."""
        return os.getpid()


def follower_actor(*, env: dict[str, str], **options: Any) -> Any:
    """Return the Ray actor class of `Follower` with this environment and these Ray options; no restarts."""
    import ray

    runtime_env = {"env_vars": env} if env else None
    return ray.remote(Follower).options(max_restarts=0, runtime_env=runtime_env, **options)
