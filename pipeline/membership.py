"""What dispatch needs to know of a fleet: who is alive, and whom to tell when somebody is not.

The fleet itself lives in `cluster`; this is the interface that it implements as a Ray actor, and all that `pipeline`
knows of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.engine import EngineInfo
from pipeline.errors import AttemptError, NodeLost, ReplicaDied, ReplicaUnreachable

RETIRED = "retired"
"""Why a replica is gone that was taken away on purpose."""


def read_death(error: BaseException) -> AttemptError:
    """Read a failed call to a replica as what happened to it."""
    import ray

    cause = getattr(error, "cause", None) or error  # Ray wraps what the actor raised
    if isinstance(cause, AttemptError):
        return cause
    if getattr(error, "preempted", False) or "node has died" in str(error):  # Ray 2.60 says it only in words
        return NodeLost("its node is gone")
    lines = str(error).strip().splitlines()
    message = f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        return ReplicaUnreachable(message)
    return ReplicaDied(message)


@dataclass(frozen=True, slots=True)
class Member:
    """A live replica."""

    replica: str
    """Name, unique over the fleet's whole life."""
    handle: Any
    """Ray actor handle of a `pipeline.replica.Replica`."""
    info: EngineInfo
    draining: bool = False
    """Finishes what its engine has begun, returns the rest, and takes nothing more."""


@dataclass(frozen=True, slots=True)
class Departure:
    """Why a replica is gone."""

    kind: str
    """An error kind, or `RETIRED`."""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Membership:
    """Everyone alive at one moment.

    The fleet's actor offers `watch(version, wait_s) -> Membership`, which answers at once when the version differs and
    otherwise waits for a change, and `report(replica, kind, message) -> Departure`, by which dispatch tells of a death
    or a hang; the fleet then kills what is left of the replica, starts another, and says why it is gone. A run may tell
    how much it has left to do with `want(consumer, rows_left)`; a fleet that scales follows it.
    """

    version: int
    members: dict[str, Member] = field(default_factory=dict)
    departed: dict[str, Departure] = field(default_factory=dict)
    """The latest replicas to have gone, by name."""
    verdict: str | None = None
    """Why there will be no more replicas; None while there is hope."""
