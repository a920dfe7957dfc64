"""The run's mailbox: dispatch and writer post figures, dispatch takes orders; the driver reads and gives them.

A Ray actor, so that neither side waits for the other. Keeps sums and shard numbers only, never rows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

Order = Literal["run", "drain", "abandon", "stop"]
"""Go on; begin no further shard; drop what isn't finished; end the flow, in which nothing is left to do."""


@dataclass(slots=True)
class Figures:
    """What happened in this execution, since it started; committed or not."""

    rows_done: int = 0
    rows_failed: int = 0
    rows_in_flight: int = 0
    replicas_up: int = 0
    input_tokens: int = 0
    generated_tokens: int = 0
    shards_open: int = 0
    """Being generated now."""
    shards_done: int = 0
    """Generated, and given to the writer."""
    shards_committed: int = 0
    draining: bool = False
    """Dispatch has heard the order, so no shard is begun any more."""

    @property
    def drained(self) -> bool:
        """Whether all that was begun is committed, and nothing will be."""
        return self.draining and self.shards_open == 0 and self.shards_committed >= self.shards_done


_STATES = frozenset({"rows_in_flight", "replicas_up", "shards_open", "shards_committed", "draining"})
_SUMS = [field.name for field in fields(Figures) if field.name not in _STATES]


class RunMonitor:
    """Figures in, orders out; made an actor by `start_monitor`.

    Guarantees:
    - figures only grow, though a run may consist of several flows that count from zero each.
    """

    def __init__(self) -> None:
        self._figures: dict[str, Figures] = {}
        self._committed: set[int] = set()
        self._order: Order = "run"

    def post(self, flow: str, figures: Figures) -> Order:
        """Replace the figures of one flow and return the order in force."""
        self._figures[flow] = figures
        return self._order

    def note_commit(self, shard: int) -> None:
        """Take note of a committed shard; twice, if it was committed twice, is once."""
        self._committed.add(shard)

    def read(self) -> Figures:
        """The newest figures, over all flows; what is true of a moment is of the latest one."""
        latest = next(reversed(self._figures.values()), Figures())
        sums = {name: sum(getattr(figures, name) for figures in self._figures.values()) for name in _SUMS}
        return replace(latest, shards_committed=len(self._committed), **sums)

    def give_order(self, order: Order) -> None:
        """Replace the order; dispatch sees it within a second."""
        self._order = order


def start_monitor() -> Any:
    """Return the handle of a monitor actor, owned by the calling driver."""
    import ray

    return ray.remote(RunMonitor).options(num_cpus=0, max_restarts=0).remote()
