"""The run's mailbox: dispatch and writer post figures, dispatch takes orders; the driver reads and gives them.

A Ray actor, so that neither side waits for the other. Keeps sums and shard numbers only, never rows.
"""

from __future__ import annotations

import time
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
    copied_rows: int = 0
    """Of `rows_done`, those that took over the outcome of a row with the same request."""
    copied_input_tokens: int = 0
    """Tokens of theirs, which no engine saw and the figures above don't count."""
    copied_generated_tokens: int = 0
    shards_open: int = 0
    """Being generated now."""
    shards_done: int = 0
    """Generated, and given to the writer."""
    rows_handed_on: int = 0
    """Input rows of these."""
    shards_committed: int = 0
    draining: bool = False
    """Dispatch has heard the order, so no shard is begun any more."""
    silent_s: float = 0.0
    """Seconds since dispatch was last heard of, while it has shards open; it speaks twice a second."""
    dispatch_died: bool = False
    """Its process was killed and has begun a second life, which it refuses."""

    @property
    def drained(self) -> bool:
        """Whether all that was begun is committed, and nothing will be."""
        return self.draining and self.shards_open == 0 and self.shards_committed >= self.shards_done


_STATES = frozenset(
    {"rows_in_flight", "replicas_up", "shards_open", "shards_committed", "draining", "silent_s", "dispatch_died"}
)
_SUMS = [field.name for field in fields(Figures) if field.name not in _STATES]


class RunMonitor:
    """Figures in, orders out; made an actor by `start_monitor`.

    Guarantees:
    - figures only grow, though a run may consist of several flows that count from zero each.
    """

    def __init__(self) -> None:
        self._figures: dict[str, Figures] = {}
        self._committed: dict[int, int] = {}
        """Input rows by shard."""
        self._order: Order = "run"
        self._heard_at = time.monotonic()
        self._dispatch_died = False

    def post(self, flow: str, figures: Figures) -> tuple[Order, int]:
        """Replace the figures of one flow; returns the order in force, and how many of its rows are committed."""
        self._figures[flow] = figures
        self._heard_at = time.monotonic()
        by_others = sum(other.rows_handed_on for name, other in self._figures.items() if name != flow)
        return self._order, max(0, sum(self._committed.values()) - by_others)  # flows follow one another

    def note_dispatch_death(self) -> None:
        """Take note that the dispatch process was killed: with no shard open, Ray Data 2.60 would wait for ever."""
        self._dispatch_died = True

    def note_commit(self, shard: int, num_rows: int) -> None:
        """Take note of a committed shard and its input rows; twice, if it was committed twice, is once."""
        self._committed[shard] = num_rows

    def read(self) -> Figures:
        """The newest figures, over all flows; what is true of a moment is of the latest one."""
        latest = next(reversed(self._figures.values()), Figures())
        sums = {name: sum(getattr(figures, name) for figures in self._figures.values()) for name in _SUMS}
        silent_s = time.monotonic() - self._heard_at if latest.shards_open else 0.0
        return replace(
            latest,
            shards_committed=len(self._committed),
            silent_s=silent_s,
            dispatch_died=self._dispatch_died,
            **sums,
        )

    def give_order(self, order: Order) -> None:
        """Replace the order; dispatch sees it within a second."""
        self._order = order


def start_monitor() -> Any:
    """Return the handle of a monitor actor, owned by the calling driver and on its node."""
    import ray

    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return ray.remote(RunMonitor).options(num_cpus=0, max_restarts=0, label_selector=here).remote()
