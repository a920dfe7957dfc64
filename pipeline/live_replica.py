"""One replica as a dispatcher knows it: what it has of ours, what it was last seen with, how fast it is."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from pipeline.balance import Load, PaceMeter, Place, SpeedMeter
from pipeline.membership import Member
from pipeline.replica_answers import RowResult

RECALL_PATIENCE_S = 2.0
"""How long to wait for what was called back before calling again: an engine step may take a second."""


@dataclass(slots=True)
class LiveReplica:
    """One replica that takes work."""

    member: Member
    sent: set[str] = field(default_factory=set)
    """Ids of requests that it hasn't answered."""
    speed: SpeedMeter = field(default_factory=SpeedMeter)
    pace: PaceMeter = field(default_factory=PaceMeter)
    met_at: float = field(default_factory=time.monotonic)
    """When its speed was last looked at."""
    recalled_at: float = -math.inf
    knows_us: bool = False
    """Whether it has answered a poll of ours."""
    in_company: bool = False
    """Whether it was last seen with requests of other runs."""
    num_running: int = 0
    num_waiting: int = 0
    """What it was last seen with, everybody's."""
    num_of_others: int = 0
    """Of these, what wasn't ours."""

    def load(self, now: float) -> Load:
        """What may be called back from here, or begin here, so soon after the last recall."""
        info = self.member.info
        # Of requests for several samples an engine begins fewer; then what it said last tells how many still wait.
        spare = max(0, len(self.sent) - info.max_num_seqs - info.lookahead, min(len(self.sent), self.num_waiting))
        patient = now - self.recalled_at < RECALL_PATIENCE_S
        return Load(len(self.sent), info.max_num_seqs, 0 if patient else spare, self.speed.rate)

    def note_pace(self, result: RowResult) -> None:
        """Take in how long its engine took for a row; several samples at once tell nothing of one."""
        if len(result.samples) == 1:
            self.pace.add(result.samples[0].num_generated_tokens, result.timing.total_s - result.timing.queue_s)

    def note_load(self, num_running: int, num_waiting: int) -> None:
        """Take in what it was seen with, once our answers are taken off."""
        self.num_running, self.num_waiting = num_running, num_waiting
        self.num_of_others = max(0, num_running + num_waiting - len(self.sent))

    @property
    def place(self) -> Place:
        """What rows of others may begin here once more."""
        return Place(self.member.info.max_num_seqs - len(self.sent) - self.num_of_others, self.pace.pace)
