"""The run's mailbox: dispatch posts its figures and takes orders, the driver reads figures and gives orders.

A Ray actor of one entry, so that neither side waits for the other. Keeps sums only, never rows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Order = Literal["run", "drain", "abandon"]
"""Go on; begin no further shard; drop what isn't finished."""


@dataclass(slots=True)
class Figures:
    """What happened in this execution, since it started; committed or not."""

    rows_done: int = 0
    rows_failed: int = 0
    rows_in_flight: int = 0
    replicas_up: int = 0
    input_tokens: int = 0
    generated_tokens: int = 0
    attempts_failed: int = 0

    def as_dict(self) -> dict[str, int]:
        """Plain data, for `progress.json`."""
        return asdict(self)


class RunMonitor:
    """Figures in, orders out; made an actor by `start_monitor`."""

    def __init__(self) -> None:
        self._figures = Figures()
        self._order: Order = "run"

    def post(self, figures: Figures) -> Order:
        """Replace the figures and return the order in force."""
        self._figures = figures
        return self._order

    def read(self) -> Figures:
        """The newest figures."""
        return self._figures

    def give_order(self, order: Order) -> None:
        """Replace the order; dispatch sees it within a second."""
        self._order = order


def start_monitor() -> Any:
    """Return the handle of a monitor actor, owned by the calling driver."""
    import ray

    return ray.remote(RunMonitor).options(num_cpus=0, max_restarts=0).remote()
