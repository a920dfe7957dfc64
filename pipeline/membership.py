"""What dispatch needs to know of a fleet: who is alive, and whom to tell when somebody is not.

The fleet itself lives in `cluster`; this is the interface that it implements as a Ray actor, and all that `pipeline`
knows of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.engine import EngineInfo


@dataclass(frozen=True, slots=True)
class Member:
    """A live replica."""

    replica: str
    """Name, unique over the fleet's whole life."""
    handle: Any
    """Ray actor handle of a `pipeline.replica.Replica`."""
    info: EngineInfo


@dataclass(frozen=True, slots=True)
class Membership:
    """Everyone alive at one moment.

    The fleet's actor offers `watch(version, wait_s) -> Membership`, which answers at once when the version differs and
    otherwise waits for a change, and `report(replica, kind, message)`, by which dispatch tells of a death or a hang;
    the fleet then kills what is left of the replica and starts another.
    """

    version: int
    members: dict[str, Member] = field(default_factory=dict)
    verdict: str | None = None
    """Why there will be no more replicas; None while there is hope."""
